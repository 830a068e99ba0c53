"""Command line of the blobs room: fetch from Blob Storage, push to it, mirror a base model into it."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from blobs import BlobError
from blobs.store import MARKER, Address, BlobFolder, wait_for
from common import cli, exits
from common.settings import SettingsError

EPILOG = f"""
addresses       az://ACCOUNT/CONTAINER/PATH, by Entra identity: a pod's workload identity, elsewhere az login and
                the rest of DefaultAzureCredential. DRYDOCK_BLOB_ENDPOINT names another endpoint than
                https://ACCOUNT.blob.core.windows.net; for an emulator on loopback, AZURE_STORAGE_KEY its key.

examples        python -m blobs mirror meta-llama/Llama-3.1-8B-Instruct \\
                    --revision 0e9e39f249a16976918f6564b8830bc894c89659 az://mystore/models/llama-3.1-8b
                python -m blobs fetch az://mystore/models/llama-3.1-8b /models/base --wait-seconds 3600
                python -m blobs fetch az://mystore/datasets/1a2b...jsonl /data/rows.jsonl --sha256 1a2b...

exit codes      {exits.OK} done, or nothing to do    {exits.INPUT} address, digest, role or model to mend    \
{exits.FAILED} a trouble that may pass: run again
"""


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand and return its exit code."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m blobs", description=__doc__, epilog=EPILOG, formatter_class=shape)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    fetch = commands.add_parser("fetch", help="a complete folder, or a single blob; what is there and whole is kept")
    fetch.add_argument("source", metavar="SRC", help="az://ACCOUNT/CONTAINER/PATH")
    fetch.add_argument("target", metavar="DST", type=Path, help="folder to fill, or file to write")
    fetch.add_argument("--sha256", metavar="HEX", help="SRC is a single blob, and this is its SHA-256")

    push = commands.add_parser("push", help="a folder with its marker, or a single file; what is there is kept")
    push.add_argument("source", metavar="SRC", type=Path, help="folder or file")
    push.add_argument("target", metavar="DST", help="az://ACCOUNT/CONTAINER/PATH of that folder or file")

    mirror = commands.add_parser("mirror", help="a base model from the Hugging Face hub, at one commit")
    mirror.add_argument("model", metavar="MODEL", help="ORGANISATION/NAME; HF_TOKEN opens a gated or private one")
    mirror.add_argument("--revision", required=True, metavar="SHA", help="full commit, 40 hex digits")
    mirror.add_argument("target", metavar="DST", help="az://ACCOUNT/CONTAINER/PATH of the folder")

    for command in (fetch, push, mirror):
        command.add_argument(
            "--wait-seconds",
            type=float,
            default=0.0,
            metavar="N",
            help="wait so long for what is not there yet, and for a role just granted to count [0]",
        )

    arguments = parser.parse_args(argv)
    run = {"fetch": _fetch, "push": _push, "mirror": _mirror}[arguments.command]
    return cli.run(run, arguments, failures=(BlobError, OSError))


def _fetch(arguments: argparse.Namespace) -> int:
    address = Address.parse(arguments.source)
    place, name = address.split()
    parent = BlobFolder(place)
    if arguments.sha256:
        sha256 = arguments.sha256.removeprefix("sha256:").lower()
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise SettingsError([f"--sha256 {arguments.sha256}: expected 64 hex digits"])
        parent.fetch_file(name, arguments.target, sha256=sha256, wait_seconds=arguments.wait_seconds)
        return exits.OK

    def kind() -> str | None:
        """Which of the two SRC is, once one of them is there."""
        return "folder" if (parent / name).marker() else "blob" if parent.entry(name) else None

    if wait_for(kind, arguments.wait_seconds, f"{address / MARKER} (the mirror Job writes it)") == "blob":
        parent.fetch_file(name, arguments.target)
    else:
        (parent / name).fetch(arguments.target)
    return exits.OK


def _push(arguments: argparse.Namespace) -> int:
    address = Address.parse(arguments.target)
    source: Path = arguments.source
    if not source.exists():
        raise SettingsError([f"{source}: no such file or folder"])
    if source.is_dir():
        folder = BlobFolder(address)
        wait_for(lambda: (folder.marker(),), arguments.wait_seconds, str(address))
        made = folder.push(source)
    else:
        place, name = address.split()
        folder = BlobFolder(place)
        wait_for(lambda: (folder.entry(name),), arguments.wait_seconds, str(address))
        made = folder.push_file(source, name)
    print(f"{address}: {'pushed' if made else 'already there'}")
    return exits.OK


def _mirror(arguments: argparse.Namespace) -> int:
    from blobs.mirror import mirror  # the hub's client is in the image that mirrors, not in every one

    target = Address.parse(arguments.target)
    made = mirror(arguments.model, arguments.revision, target, wait_seconds=arguments.wait_seconds)
    print(f"{target}: {arguments.model}@{arguments.revision} {'is complete' if made else 'was complete already'}")
    return exits.OK


if __name__ == "__main__":
    sys.exit(main())
