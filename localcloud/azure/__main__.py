"""The plugin `pulumi-resource-azure-native`: prints the port that it serves on, and ends with the engine."""

from __future__ import annotations

import os
import signal
import sys
from concurrent import futures
from pathlib import Path

import grpc
from pulumi.runtime.proto import provider_pb2_grpc

from localcloud.azure.provider import Provider
from localcloud.orphans import end_with_parent

MESSAGE_BYTES = 400 * 1024 * 1024  # the engine's own limit


def main() -> int:
    folder = os.environ.get("DRYDOCK_LOCALCLOUD")
    if not folder:
        print("DRYDOCK_LOCALCLOUD: set it to the folder of a local cloud", file=sys.stderr)
        return 2
    world = os.environ.get("DRYDOCK_LOCALCLOUD_WORLD") or str(Path(folder) / "azure")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the engine ends us when it is done
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    server = grpc.server(
        futures.ThreadPoolExecutor(32),
        options=[("grpc.max_receive_message_length", MESSAGE_BYTES), ("grpc.max_send_message_length", MESSAGE_BYTES)],
    )
    provider_pb2_grpc.add_ResourceProviderServicer_to_server(Provider(Path(folder), Path(world)), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(port, flush=True)
    end_with_parent()
    server.wait_for_termination()
    return 0


if __name__ == "__main__":
    sys.exit(main())
