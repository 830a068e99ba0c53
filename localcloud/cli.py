"""The Pulumi CLI set up so that a program meets this machine: its own home, state, plugins, and nobody's account."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common.processes import die_with_parent
from localcloud.tools import ROOT, Tools

PASSPHRASE = "drydock-local"  # of a state that holds secrets of this machine alone
# What would lead a provider, or our own code, to a real account.
FOREIGN = ("ARM_", "AZURE_", "PULUMI_", "DRYDOCK_", "KUBE")
HANDED_ON = (signal.SIGTERM, signal.SIGHUP)
# Where we are killed outright, so is the engine: its cluster is gone, and the next run takes its lock away.
_at_our_death = partial(die_with_parent, signal.SIGKILL)


class PulumiFailed(Exception):
    """`pulumi` ended with another exit code than 0; the message is everything it said."""


@dataclass(frozen=True)
class Cli:
    """`pulumi` with plugins for `kubernetes` (the real one) and `azure-native` (`localcloud.azure`) below `folder`."""

    folder: Path
    tools: Tools
    environment: Mapping[str, str]

    def run(
        self, *arguments: str, cwd: Path, check: bool = True, timeout: float = 600
    ) -> subprocess.CompletedProcess[str]:
        """Run `pulumi ARGUMENTS` in `cwd`; stdout and stderr are kept apart.

        Interrupted, it ends what it has begun and writes its state before the interruption goes on.
        """
        with subprocess.Popen(
            self.command(*arguments), cwd=cwd, env=dict(self.environment), text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, preexec_fn=_at_our_death,
        ) as process:  # fmt: skip
            try:
                out, err = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
            except KeyboardInterrupt:
                process.send_signal(signal.SIGINT)
                process.communicate()
                raise
        done = subprocess.CompletedProcess(process.args, process.returncode, out, err)
        if check and done.returncode:
            raise PulumiFailed(
                f"pulumi {' '.join(arguments)}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
            )
        return done

    def show(self, *arguments: str, cwd: Path) -> int:
        """Run `pulumi ARGUMENTS` before a person's eyes, for as long as it takes, and return its exit code.

        Ctrl-C reaches `pulumi` too, which ends what it has begun and writes its state: we wait for it, and raise
        KeyboardInterrupt then. SIGTERM and SIGHUP, which reach us alone, are handed on as the same.
        """
        process: subprocess.Popen[bytes] | None = None
        stopped = owed = False

        def interrupted(number: int, frame: object) -> None:
            nonlocal stopped, owed
            stopped = True
            if number == signal.SIGINT:
                return
            if process is None:
                owed = True  # it runs already, perhaps, but is not known here yet
            else:
                process.send_signal(signal.SIGINT)

        before = {number: signal.signal(number, interrupted) for number in (signal.SIGINT, *HANDED_ON)}
        try:
            process = subprocess.Popen(
                self.command(*arguments), cwd=cwd, env=dict(self.environment), preexec_fn=_at_our_death
            )
            if owed:
                process.send_signal(signal.SIGINT)
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if stopped:
            raise KeyboardInterrupt
        return code

    def command(self, *arguments: str) -> list[str]:
        return [str(self.folder / "bin" / "pulumi"), *arguments]

    def json(self, *arguments: str, cwd: Path) -> Any:
        """What `pulumi ARGUMENTS --json` prints."""
        return json.loads(self.run(*arguments, "--json", cwd=cwd).stdout)


def prepare(folder: Path, tools: Tools, more: Mapping[str, str]) -> Cli:
    """Write home, plugins and wrappers below `folder` and return the CLI that uses them.

    `more`: further variables of its environment.
    """
    home, state, wrappers = folder / "home", folder / "state", folder / "bin"
    for each in (home, state, wrappers):
        each.mkdir(parents=True, exist_ok=True)
    _same_file(tools.pulumi, wrappers / "pulumi")  # beside its language host, as released: else it warns on every run
    _wrapper(wrappers / "pulumi-language-python", "localcloud.language_host")
    _wrapper(wrappers / "pulumi-resource-pulumi-python", "localcloud.orphans pulumi.dynamic")
    plugins = home / "plugins"
    _wrapper(_plugin(plugins, "azure-native", version("pulumi-azure-native")), "localcloud.azure")
    kubernetes = _plugin(plugins, "kubernetes", version("pulumi-kubernetes"))
    kubernetes.unlink(missing_ok=True)
    kubernetes.symlink_to(tools.kubernetes_provider)
    environment = {
        **{key: value for key, value in os.environ.items() if not _foreign(key)},
        "PATH": os.pathsep.join([str(wrappers), os.environ["PATH"]]),
        "PULUMI_HOME": str(home),
        "PULUMI_BACKEND_URL": f"file://{state}",
        "PULUMI_CONFIG_PASSPHRASE": PASSPHRASE,
        "PULUMI_SKIP_UPDATE_CHECK": "true",
        "PULUMI_DISABLE_AUTOMATIC_PLUGIN_ACQUISITION": "true",  # nothing is fetched: what lacks is an error
        "PYTHONDONTWRITEBYTECODE": "1",
        **more,
    }
    return Cli(folder, tools, environment)


def _foreign(variable: str) -> bool:
    """Proxies too: all servers are on loopback, and gRPC would ask a proxy for them."""
    return variable.startswith(FOREIGN) or variable.lower().endswith("_proxy")


def _same_file(source: Path, target: Path) -> None:
    """`target` is `source` under another name; not a symbolic link, which Pulumi would follow."""
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:  # another file system
        shutil.copy2(source, target)


def _plugin(plugins: Path, name: str, release: str) -> Path:
    folder = plugins / f"resource-{name}-v{release}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"pulumi-resource-{name}"


def _wrapper(path: Path, module: str) -> None:
    # Only `localcloud` comes from ROOT: a program's modules come from its own folder, which stands before it.
    path.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m {module} "$@"\n')
    path.chmod(0o755)
