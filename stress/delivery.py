"""The report of a run, written and put into Blob Storage: what outlives the pod that measured it."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

from blobs import BlobError
from blobs.store import Address, BlobFolder, wait_for
from common import exits
from common.settings import SettingsError
from stress import report

ROLE_SECONDS = 60  # the role counted before the load; this much for a bad minute of the account


def opened(text: str, wait_seconds: float) -> BlobFolder:
    """The folder `az://ACCOUNT/CONTAINER/PATH`, once this process may read it: nobody loads a server for nothing.

    Raises `SettingsError` for an address or a role to mend, also when the role does not count within `wait_seconds`.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("blobs").setLevel(logging.INFO)  # says what is waited for
    folder = BlobFolder(Address.parse(text))
    try:
        wait_for(lambda: (folder.marker(),), wait_seconds, text)
    except BlobError as error:
        raise SettingsError([f"push: {error}"]) from None
    return folder


def deliver(out: Path, folder: BlobFolder) -> int:
    """Write the report of `out` and put everything there into `folder`; the exit code. SIGTERM ends it at once."""
    # The marker comes last: nothing to tidy up. Not gevent's handler: the drills do not run its loop.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(exits.TERMINATED))
    report.main([str(out)])
    try:
        wait_for(lambda: (folder.push(out, quiet=True),), ROLE_SECONDS, str(folder.address))
    except (SettingsError, BlobError, OSError) as error:
        print(f"stress: the report is not in {folder.address}: {error}", file=sys.stderr)
        return exits.INPUT if isinstance(error, SettingsError) else exits.FAILED
    print(f"report: {folder.address / 'report.html'}", flush=True)
    return exits.OK
