"""Lets a Pulumi CLI built from its Go module run Python: a language host that serves the SDK's own `LanguageServer`.

A released CLI brings a host of its own; `pulumi-language-python` cannot be had as a Go module. Pulumi finds this one by
its name on the PATH (`localcloud.cli` writes the wrapper) and starts it anew for each preview and each update.
"""

from __future__ import annotations

import os
import queue
import runpy
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from importlib.metadata import version
from typing import IO, Any

import grpc
from pulumi.automation._server import LanguageServer
from pulumi.runtime.proto import language_pb2, language_pb2_grpc, plugin_pb2

from localcloud.orphans import end_with_parent


class LanguageHost(LanguageServer):
    """Runs the program in the folder that the engine names, and policy packs; installs nothing."""

    def __init__(self, engine: str) -> None:
        super().__init__(self._program)
        self._engine = engine
        self._folder = "."

    def _program(self) -> None:
        sys.path.insert(0, self._folder)
        runpy.run_path(self._folder, run_name="__main__")

    def Handshake(self, request: Any, context: Any) -> Any:
        return language_pb2.LanguageHandshakeResponse()

    def GetPluginInfo(self, request: Any, context: Any) -> Any:
        return plugin_pb2.PluginInfo(version=version("pulumi"))

    def Run(self, request: Any, context: Any) -> Any:
        self._folder = request.info.program_directory or request.pwd
        os.chdir(request.pwd)
        request.args[:] = [self._engine]
        answer = super().Run(request, context)  # type: ignore[no-untyped-call]
        if answer.error:  # it is logged already, as a released host does: the engine would tell it a second time
            answer.error, answer.bail = "", True
        return answer

    def RunPlugin(self, request: Any, context: Any) -> Iterator[Any]:
        """Policy packs are plugins of kind `analyzer`; what they print is handed on line by line."""
        module = "pulumi.policy" if request.kind == "analyzer" else "pulumi.run.plugin"
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", module, *request.args, request.info.program_directory or request.pwd],
            cwd=request.pwd,
            env={**os.environ, **dict(pair.split("=", 1) for pair in request.env)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        context.add_callback(process.terminate)
        lines: queue.Queue[tuple[str, bytes]] = queue.Queue()  # an empty line: that stream has ended

        def pump(name: str, stream: IO[bytes]) -> None:
            for line in iter(stream.readline, b""):
                lines.put((name, line))
            lines.put((name, b""))

        assert process.stdout is not None and process.stderr is not None
        streams = {"stdout": process.stdout, "stderr": process.stderr}
        for name, stream in streams.items():
            threading.Thread(target=pump, args=(name, stream), daemon=True).start()
        while streams:
            name, line = lines.get()
            if line:
                yield language_pb2.RunPluginResponse(**{name: line})  # type: ignore[arg-type]
            else:
                streams.pop(name)
        yield language_pb2.RunPluginResponse(exitcode=process.wait())

    def GetProgramDependencies(self, request: Any, context: Any) -> Any:
        return language_pb2.GetProgramDependenciesResponse()

    def RuntimeOptionsPrompts(self, request: Any, context: Any) -> Any:
        return language_pb2.RuntimeOptionsResponse()


def main() -> None:
    """Pulumi gives the engine's address as the first argument that is no flag, and reads the port from stdout."""
    engine = next(argument for argument in sys.argv[1:] if not argument.startswith("-"))
    server = grpc.server(futures.ThreadPoolExecutor(8))
    language_pb2_grpc.add_LanguageRuntimeServicer_to_server(LanguageHost(engine), server)
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    end_with_parent()
    try:
        server.wait_for_termination()
    except KeyboardInterrupt:  # Ctrl-C reaches the whole group; the engine ends us when it is done
        server.stop(None)


if __name__ == "__main__":
    main()
