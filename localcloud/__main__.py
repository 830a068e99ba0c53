"""`python -m localcloud`: plan, bring up and destroy an environment on this machine, without an account at Azure.

    python -m localcloud preview --stack dev     what `pulumi up` would change (make preview STACK=dev CLOUD=local)
    python -m localcloud up --stack dev          bring it up: real engine, real API server, simulated Azure and kubelets
    python -m localcloud outputs --stack dev     what it tells other stacks
    python -m localcloud destroy --stack dev     remove it
    python -m localcloud serve                   keep the control plane up to look around with kubectl, until Ctrl-C

What follows `--` goes to pulumi: `python -m localcloud preview --stack dev -- --diff`. Everything lies in `--folder`.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import threading
from pathlib import Path

from common import exits
from common.processes import interrupt
from common.settings import SettingsError
from localcloud.api import ApiError
from localcloud.cli import PulumiFailed
from localcloud.cloud import LocalCloud, known_to
from localcloud.control_plane import ControlPlaneError
from localcloud.tools import ROOT

COMMANDS = {
    "preview": ("preview", "--policy-pack", "policy"),
    "up": ("up", "--yes", "--policy-pack", "policy"),
    "destroy": ("destroy", "--yes"),
    "outputs": ("stack", "output"),
}


def main(arguments: list[str]) -> int:
    ours, theirs = arguments, list[str]()
    if "--" in arguments:
        at = arguments.index("--")
        ours, theirs = arguments[:at], arguments[at + 1 :]
    parser = argparse.ArgumentParser(
        prog="python -m localcloud", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=[*COMMANDS, "serve"])
    parser.add_argument("--stack", default="dev", help="which Pulumi.STACK.yaml (default: dev)")
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "localcloud", help="default: out/localcloud")
    options = parser.parse_args(ours)
    try:
        if options.command != "serve":
            known_to(ROOT, options.stack)  # before anything is started
        with LocalCloud(options.folder) as cloud:
            if options.command == "serve":
                return _serve(cloud)
            stack = cloud.stack(options.stack)
            if stack.unlock():
                print(
                    f"an earlier run on {options.stack} was killed: its lock is taken away; if something that it was "
                    f"creating `already exists`, remove {cloud.folder} and begin anew",
                    flush=True,
                )
            return stack.show(*COMMANDS[options.command], *theirs)
    except SettingsError as error:
        print(error, file=sys.stderr)
        return exits.INPUT
    except (ControlPlaneError, PulumiFailed, ApiError, subprocess.TimeoutExpired, OSError) as error:
        print(error, file=sys.stderr)
        return exits.FAILED
    except KeyboardInterrupt as stop:
        print("interrupted: nothing is left running; what is there stays", file=sys.stderr)
        return exits.stopped(stop)


def _serve(cloud: LocalCloud) -> int:
    print(f"kubectl --kubeconfig {cloud.folder / 'kubeconfig'} get pods -A    (Ctrl-C ends it)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    return exits.OK


if __name__ == "__main__":
    interrupt()
    sys.exit(main(sys.argv[1:]))
