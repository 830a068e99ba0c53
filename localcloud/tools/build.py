"""Builds one module into a folder of its own, which appears under its name only when it is complete."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import psutil
import yaml

from common.processes import die_with_parent
from localcloud.tools.modules import (
    CRDS,
    DEFINITIONS,
    KUBERNETES_PROVIDER,
    MODULES,
    PROVIDER,
    Definition,
    Module,
    sdk_version,
)

GIB = 1024**3
UNFINISHED = "unfinished-"
LOG_TAIL = 20  # lines shown of what Go said


class BuildFailed(RuntimeError):
    """Go ended with an error; the message has the end of its output and the log's name."""


class Build:
    """Builds modules into the folder `engine`; `tick` is called about once a second while Go runs.

    Only one at a time may use `engine` (its caller holds a lock): what an interrupted one left is removed first.
    """

    def __init__(self, engine: Path, tick: Callable[[], None]) -> None:
        self._engine = engine
        self._tick = tick
        self._work = Path()

    def module(self, module: Module) -> None:
        """Build `module`. Raises `BuildFailed`."""
        for left in self._engine.glob(f"{UNFINISHED}*"):
            shutil.rmtree(left, ignore_errors=True)
        # A name of its own: a compiler that outlived its killed parent may still write to the last one.
        self._work = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=self._engine))
        target, out = module.built(self._engine), self._work / "out"
        try:
            out.mkdir()
            (self._work / "tmp").mkdir()
            shutil.copytree(module.folder, self._work / "module")  # what is derived is never written to the checkout
            with (self._engine / f"{module.name}.log").open("w", encoding="utf-8") as log:
                if module is CRDS:
                    self._definitions(out, log)
                else:
                    self._binaries(module, out, log)
            shutil.rmtree(target, ignore_errors=True)  # incomplete, or it would not be built
            out.rename(target)
        finally:
            shutil.rmtree(self._work, ignore_errors=True)

    def sweep(self) -> None:
        """Remove the folders of earlier locks and flags."""
        current = {module.built(self._engine) for module in MODULES}
        for folder in self._engine.iterdir():
            if re.search(r"-[0-9a-f]{12}$", folder.name) and folder not in current:
                shutil.rmtree(folder)

    def _binaries(self, module: Module, out: Path, log: TextIO) -> None:
        if module is KUBERNETES_PROVIDER:
            self._provider_schema(log)
        # Several packages go into a folder, each under the last part of its name; a single one is given its name.
        to = out if len(module.binaries) > 1 else out / next(iter(module.binaries))
        self._go(["build", *module.flags(), "-p", str(parallel()), "-o", str(to), *module.binaries.values()], log)

    def _provider_schema(self, log: TextIO) -> None:
        """The two files that the provider embeds: from its module, and with the version that the SDK asks for."""
        source = self._download([PROVIDER], log)[PROVIDER] / "cmd" / "pulumi-resource-kubernetes"
        for name, said in (("schema.json", {"version": sdk_version()}), ("terraform-mapping.json", {})):
            value = json.loads((source / name).read_text(encoding="utf-8")) | said
            (self._work / "module" / name).write_text(json.dumps(value), encoding="utf-8")  # without its white space

    def _definitions(self, out: Path, log: TextIO) -> None:
        folders = self._download(sorted({one.module for one in DEFINITIONS}), log)
        for one in DEFINITIONS:
            text = (folders[one.module] / one.path).read_text(encoding="utf-8")
            (out / one.name).write_text(regrouped(text, one), encoding="utf-8")
        for path in CRDS.folder.glob("*.yaml"):
            shutil.copyfile(path, out / path.name)

    def _download(self, modules: list[str], log: TextIO) -> dict[str, Path]:
        """The folders of the locked versions of `modules`; Go compares each with the hash in go.sum."""
        listed = self._work / "listed"
        self._go(["mod", "download", "-json", *modules], log, listed)
        decoder, text, folders = json.JSONDecoder(), listed.read_text(encoding="utf-8").strip(), {}
        while text:
            one, end = decoder.raw_decode(text)
            folders[one["Path"]] = Path(one["Dir"])
            text = text[end:].strip()
        return folders

    def _go(self, arguments: list[str], log: TextIO, stdout: Path | None = None) -> None:
        """Run `go` in the copy of the module; proxies and caches are those of the environment."""
        print(f"$ go {' '.join(arguments)}", file=log, flush=True)
        environment = os.environ | {"GOWORK": "off", "GO111MODULE": "on", "GOTMPDIR": str(self._work / "tmp")}
        with stdout.open("w") if stdout else contextlib.nullcontext(log) as output:
            process = subprocess.Popen(
                ["go", *arguments],
                cwd=self._work / "module", env=environment, stdin=subprocess.DEVNULL,
                stdout=output, stderr=log,
                start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip
        try:
            while True:
                try:
                    code = process.wait(1)
                    break
                except subprocess.TimeoutExpired:
                    self._tick()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # the compilers too; what they left lies in our own folder
                process.wait()
        if code:
            if stdout:
                log.write(stdout.read_text(encoding="utf-8"))  # with -json, what went wrong is told there
                log.flush()
            said = Path(log.name).read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL:]
            raise BuildFailed("\n".join([*said, f"go ended with exit code {code}; all that it said: {log.name}"]))


def regrouped(text: str, definition: Definition) -> str:
    """The definition's YAML as it is, or in another group where `definition` names one."""
    if not definition.group:
        return text
    value: dict[str, Any] = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    value["metadata"]["name"] = f"{value['spec']['names']['plural']}.{definition.group}"
    value["spec"]["group"] = definition.group
    return yaml.safe_dump(value, sort_keys=False)


def parallel() -> int:
    """How many packages Go may work on at once: one a core, and 3 GiB of free memory each.

    Measured: linking the API server takes 2.8 GiB. The provider's linker takes 4.6 GiB, but runs alone.
    """
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores, psutil.virtual_memory().available // (3 * GIB)))
