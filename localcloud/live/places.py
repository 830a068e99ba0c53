"""The addresses and files that the two halves of a running local cloud agree on."""

from __future__ import annotations

from pathlib import Path

# In the cluster's own network namespace, beside its pods (192.168.0.0/16), Services (10.0.0.0/16) and nodes
# (10.224.0.0/16).
API_ADDRESS = "10.225.0.1"
AZURE_ADDRESS = "10.225.0.2"  # where Azure's names lead
OWN = "10.225.0.3"  # the machine itself, towards Services
REGISTRY_ADDRESS = "10.225.0.4"  # where the registries' names lead: apart, so that they alone can be out of reach

TRUST = "etc/ssl/certs/drydock-local.crt"  # on each node's disk
DAEMON_FILE = "live.json"  # written when all is up; gone when nothing is


def sockets(folder: Path) -> dict[str, Path]:
    """Unix sockets: `azure` is served outside of the namespace, the others inside."""
    return {name: folder / "sockets" / name for name in ("api", "azure", "router")}
