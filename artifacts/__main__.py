"""Look into an adapter store, promote, roll back, give to KAITO: `python -m artifacts list|show|promote|image`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from artifacts import adapter, image
from artifacts.adapter import PROMOTED, AdapterError, NotProven, read_card, repository, version
from artifacts.store import CorruptBlob, NotFound, Store, StoreError, Unusable, open_store
from common import exits

_ABOUT = """\
Look into an adapter store, promote or roll back an adapter, or make KAITO's image of it.

STORE is a registry, oci://HOST[:PORT]/PREFIX, or a folder such as out/registry.
NAME is an adapter such as kubectl. A version is the first eight hex digits of its
digest; every version that was ever published stays in the store under that tag.
The tag `promoted` says which version replicas serve."""

_EXAMPLES = """\
examples:
  python -m artifacts list out/registry                     all adapters, all versions
  python -m artifacts show out/registry kubectl             the promoted version's card and files
  python -m artifacts show out/registry kubectl:1a2b3c4d    another version's
  python -m artifacts promote out/registry kubectl 1a2b3c4d promote, or go back to, that version
  python -m artifacts image oci://HOST/adapters kubectl --to oci://HOST/kaito/kubectl
                                                            the promoted version as an image for KAITO

Replicas follow the tag by themselves: nothing is restarted or deployed. Each one goes on
serving the version it has until the new one is loaded and proven there.

exit codes: 0 done, 1 the store failed, 2 no such adapter or version, 3 the version has
not passed its evaluation and stays a candidate (nothing overrides that: tune a better one)."""

_IMAGE = """\
Push a version as a container image with PEFT's two files in /data, the form that KAITO
serves (docs/kaito.md). Docker is not needed. The same version gives the same digest.

Standard output is HOST/REPOSITORY@sha256:..., for serving.kaito.adapter_images. The image
has the version for its tag, and for annotations the digests of adapter, base and dataset
and the figures of its evaluation: skopeo inspect --raw docker://HOST/REPOSITORY:VERSION

Signed in to as the store is: docker login's password, or your Entra identity on an ACR."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the result is the process's exit code."""
    options = _parser().parse_args(arguments)
    try:
        store = open_store(options.store)
        if options.command == "list":
            _list(store)
        elif options.command == "show":
            _show(store, options.adapter)
        elif options.command == "promote":
            _promote(store, options.name, options.version)
        else:
            _image(store, options.name, options.version, options.to, options.candidate)
    except NotProven as error:
        return _fail(error, exits.GATE)
    except (NotFound, AdapterError, ValueError) as error:
        return _fail(error, exits.INPUT)
    except (StoreError, OSError) as error:
        return _fail(error, exits.FAILED)
    return exits.OK


def _parser() -> argparse.ArgumentParser:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m artifacts", description=_ABOUT, epilog=_EXAMPLES, formatter_class=shape
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="list|show|promote|image")
    text = "one line a version: its score against its base, and which one is promoted"
    listing = commands.add_parser("list", help=text, description=text)
    text = "the card and the files of one version, as JSON"
    showing = commands.add_parser("show", help=text, description=text)
    text = "move the tag `promoted` to a version that passed its evaluation; an earlier version: a rollback"
    promoting = commands.add_parser("promote", help=text, description=text)
    text = "push a version as the container image that KAITO serves"
    imaging = commands.add_parser("image", help=text, description=_IMAGE, formatter_class=shape)
    for command in (listing, showing, promoting, imaging):
        command.add_argument("store", metavar="STORE", help="oci://HOST[:PORT]/PREFIX, or a folder")
    showing.add_argument(
        "adapter",
        metavar="NAME[:REF]",
        help="REF is a version or tag (default: promoted), or NAME@sha256:...",
    )
    promoting.add_argument("name", metavar="NAME", help="the adapter")
    promoting.add_argument(
        "version", metavar="VERSION", help="eight hex digits as `list` shows them, or a whole sha256: digest"
    )
    imaging.add_argument("name", metavar="NAME", help="the adapter")
    imaging.add_argument("version", metavar="VERSION", nargs="?", default=PROMOTED, help="default: the promoted one")
    imaging.add_argument("--to", metavar="oci://HOST/REPOSITORY", required=True, help="where KAITO will pull it from")
    imaging.add_argument(
        "--candidate", action="store_true", help="also a version that has not passed its evaluation: to try it"
    )
    return parser


def _list(store: Store) -> None:
    rows = [("ADAPTER", "VERSION", "", "METRIC", "BASE", "ADAPTER", "GAIN", "EVALUATION", "RANK", "BASE MODEL")]
    for name in adapter.adapter_names(store):
        tags = store.tags(repository(name))
        for digest in sorted(set(tags.values()), key=lambda digest: (digest != tags.get(PROMOTED), digest)):
            try:
                card = read_card(store, name, digest)[1]
            except (AdapterError, Unusable, CorruptBlob) as error:
                print(error, file=sys.stderr)  # a signature, say: the others are shown all the same
                continue
            seen = card.evaluation
            verdict = "passed" if card.passed else "failed" if seen else "none"
            state = PROMOTED if digest == tags.get(PROMOTED) else ""
            figures = (_figure(seen.get(key)) for key in ("base", "adapter", "gain"))
            metric, rank = str(seen.get("metric", "-")), str(card.lora_rank or "-")
            rows.append((name, version(digest), state, metric, *figures, verdict, rank, card.base_model))  # type: ignore[arg-type]
    if len(rows) == 1:
        print(f"{store.url}: no adapter was published here yet")
        return
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _show(store: Store, text: str) -> None:
    name, at, digest = text.partition("@")
    name, _, tag = (name, "", digest) if at else name.partition(":")
    digest, card = read_card(store, name, tag or PROMOTED)
    layers = store.inspect(repository(name), digest).manifest["layers"]
    tags = sorted(tag for tag, other in store.tags(repository(name)).items() if other == digest)
    files = {layer["annotations"]["org.opencontainers.image.title"]: layer["size"] for layer in layers}
    shown = {
        "version": version(digest),
        "digest": digest,
        "tags": tags,
        "files_bytes": files,
        "card": card.model_dump(mode="json"),
    }
    print(json.dumps(shown, indent=2, ensure_ascii=False))


def _promote(store: Store, name: str, reference: str) -> None:
    before = adapter.promoted_digest(store, name)
    digest = adapter.promote(store, name, reference)
    if before == digest:
        print(f"{name}: {version(digest)} was promoted already")
        return
    print(f"{name}: promoted {version(digest)}" + (f" in place of {version(before)}" if before else ", its first"))
    if before:
        print(f"to go back: python -m artifacts promote {store.url} {name} {version(before)}")


def _image(store: Store, name: str, reference: str, target: str, candidate: bool) -> None:
    pushed = image.push(store, name, reference, target, candidate=candidate)
    state = "was there already" if pushed.there_before else "is pushed"
    print(f"{name} {pushed.version} {state}; name it in serving.kaito.adapter_images.{name}:", file=sys.stderr)
    print(pushed.reference)


def _figure(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else "-"


def _fail(error: Exception, code: int) -> int:
    print(error, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
