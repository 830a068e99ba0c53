"""Azurite, Microsoft's emulator of the Blob service, on loopback."""

from __future__ import annotations

from pathlib import Path

from common.processes import Processes, free_ports, wait_for
from common.settings import SettingsError
from localcloud.tools import ROOT

AZURITE = ROOT / ".venv" / "azurite" / "node_modules" / ".bin" / "azurite-blob"
# The one account that Azurite has, with its published key.
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
START_SECONDS = 30.0


def check() -> None:
    """Raise `SettingsError` where it is not installed."""
    if not AZURITE.exists():
        raise SettingsError([f"{AZURITE.relative_to(ROOT)}: no Blob emulator: run make azurite, which needs npm"])


def start(processes: Processes, folder: Path, log: Path) -> str:
    """Start it with its data in `folder`; the endpoint of its account, as DRYDOCK_BLOB_ENDPOINT takes it.

    Raises `SettingsError` when it ends at once, TimeoutError when it does not come up.
    """
    (port,) = free_ports(1)
    log.unlink(missing_ok=True)
    process = processes.start(
        # The SDK speaks a newer API version than this Azurite knows: it answers as by its own newest.
        [str(AZURITE), "--blobPort", str(port), "--location", str(folder), "--silent", "--skipApiVersionCheck",
         "--disableTelemetry"],
        log=log,
    )  # fmt: skip

    def alive() -> None:
        if process.poll() is not None:
            raise SettingsError([f"{log}: Azurite ended with {process.returncode}: {log.read_text()[-500:]}"])

    wait_for(lambda: "successfully listens" in log.read_text(), START_SECONDS, "Azurite", alive)
    return f"http://127.0.0.1:{port}/{ACCOUNT}"
