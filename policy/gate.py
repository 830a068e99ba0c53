"""Fails when a preview would replace or delete what holds data: `pulumi preview --json | python policy/gate.py`.

Pulumi refuses to delete a protected resource only when it gets there, halfway through an update, and not at all when
the same change also removes the protection. Reviewers should see it first. Exit code 3: something would go.
"""

from __future__ import annotations

import json
import sys
from typing import Any

LOSSES = ("delete", "replace", "delete-replaced", "create-replacement", "discard", "discard-replaced")


def losses(preview: dict[str, Any]) -> list[str]:
    """One line for each protected resource that the preview's steps replace or delete."""
    found = {}
    for step in preview.get("steps") or []:
        before = step.get("oldState") or {}
        if step["op"] in LOSSES and before.get("protect"):
            kind, name = step["urn"].split("::")[-2:]
            why = f" because of {', '.join(step['replaceReasons'])}" if step.get("replaceReasons") else ""
            verb = "deleted" if step["op"] in ("delete", "discard") else "replaced"
            found[step["urn"]] = f"{kind.rpartition('$')[2]} {name} would be {verb}{why}"
    return list(found.values())


def main() -> int:
    """Read the preview from standard input; tell what would be lost."""
    text = sys.stdin.read()
    try:
        preview = json.loads(text)
    except ValueError:
        print(f"not a preview: expected the output of pulumi preview --json, found {text[:80]!r}", file=sys.stderr)
        return 2
    failed = [item["message"].strip() for item in preview.get("diagnostics") or [] if item.get("severity") == "error"]
    if "steps" not in preview or failed:
        print("\n".join(["the preview itself failed:", *failed]), file=sys.stderr)
        return 1
    found = losses(preview)
    for line in found:
        print(f"protected: {line}", file=sys.stderr)
    if found:
        print("if that is meant: drydock:protect: false in an update of its own, reviewed by itself", file=sys.stderr)
    return 3 if found else 0


if __name__ == "__main__":
    sys.exit(main())
