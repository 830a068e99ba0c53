"""Options of registered resources (protect, ignoreChanges, parent, dependencies): mocks do not show them, the monitor does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pulumi.runtime import mocks
from pulumi.runtime.proto import resource_pb2

from tests.unit.pulumi_mocks import Recorder, deploy

Request = resource_pb2.RegisterResourceRequest


@contextmanager
def registered() -> Iterator[list[Request]]:
    """The requests of all resources that are registered inside the block."""
    requests: list[Request] = []
    inner = mocks.MockMonitor.RegisterResource

    def register(monitor: mocks.MockMonitor, request: Request) -> Any:
        requests.append(request)
        return inner(monitor, request)  # type: ignore[no-untyped-call]

    mocks.MockMonitor.RegisterResource = register  # type: ignore[method-assign]
    try:
        yield requests
    finally:
        mocks.MockMonitor.RegisterResource = inner  # type: ignore[method-assign]


def deploy_with_requests(program: Callable[[], Any], **options: Any) -> tuple[Recorder, dict[tuple[str, str], Request]]:
    """`deploy`, and the requests by the last part of the type and the name: `("AgentPool", "pools-apps")`."""
    with registered() as requests:
        seen = deploy(program, **options)
    return seen, {(request.type.rpartition(":")[2], request.name): request for request in requests}


def orphans(requests: dict[tuple[str, str], Request], component: str) -> list[str]:
    """Resources that are neither the component itself nor below it."""
    return [
        f"{kind} {name}"
        for (kind, name), request in requests.items()
        if kind not in (component, "Stack") and f":{component}" not in request.parent
    ]
