"""The front: Azure's own hosts, as the pods of a local cluster meet them, over TLS."""

from localcloud.front.directory import hosts
from localcloud.front.server import Front

__all__ = ["Front", "hosts"]
