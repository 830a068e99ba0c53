"""A way around the request layer of a running engine, so that a request through it can be held against one without."""

from __future__ import annotations

from typing import Any

from serving.middleware import App, Message, Receive, RequestLayer, Send

HEADER = "x-bench-around"
MIDDLEWARE = f"{__name__}.Around"


class Around:
    """ASGI middleware, given to vLLM after `RequestLayer` and so outside of it: whoever sends `HEADER` is let past it.

    For measurements alone: it lets anybody past every limit.
    """

    def __init__(self, app: App) -> None:
        if not isinstance(app, RequestLayer):  # else nothing would be measured
            raise TypeError(f"{MIDDLEWARE} must be the next --middleware after the request layer's, not {app!r}'s")
        self.layer = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        around = any(name == HEADER.encode() for name, _ in scope.get("headers", ()))
        app: Any = self.layer.app if around else self.layer
        await app(scope, receive, send)
