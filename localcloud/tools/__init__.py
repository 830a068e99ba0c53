"""Finds the programs of a local cloud: built here from locked Go modules, or released ones of this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.settings import SettingsError
from localcloud.tools.machine import go_problem, needed_go, released, wanted
from localcloud.tools.modules import MODULES, Module

ROOT = Path(__file__).parents[2]
DISK = "15 GB of disk"  # 14 GB of Go's caches and 0.9 GB of binaries


class ToolsMissing(SettingsError):
    """Programs are absent; its one line says which, and what to run or install."""


@dataclass(frozen=True)
class Tools:
    """The programs of a local cloud, and `crds`, a folder of `*.yaml` with one custom resource definition each."""

    pulumi: Path
    kubernetes_provider: Path
    etcd: Path
    kube_apiserver: Path
    kube_controller_manager: Path
    kube_scheduler: Path
    kube_proxy: Path
    kwok: Path
    crds: Path


def locate(root: Path = ROOT) -> Tools:
    """The tools: released and suitable ones first, then what was built into `root`/.engine.

    Raises `ToolsMissing` with one line for all that is absent.
    """
    found = {name: path for _, parts in _parts(root / ".engine") for name, path in parts.items()}
    if absent := [name for name, path in found.items() if not path.exists()]:
        raise ToolsMissing([missing_line(absent)])
    return Tools(
        pulumi=found["pulumi"],
        kubernetes_provider=found["pulumi-resource-kubernetes"],
        etcd=found["etcd"],
        kube_apiserver=found["kube-apiserver"],
        kube_controller_manager=found["kube-controller-manager"],
        kube_scheduler=found["kube-scheduler"],
        kube_proxy=found["kube-proxy"],
        kwok=found["kwok"],
        crds=found["crds"],
    )


def missing(engine: Path) -> list[tuple[Module, list[str]]]:
    """The modules to build, with what is absent of each: neither in the folder `engine` nor released and here."""
    absent = [(module, [name for name, path in parts.items() if not path.exists()]) for module, parts in _parts(engine)]
    return [(module, names) for module, names in absent if names]


def _parts(engine: Path) -> list[tuple[Module, dict[str, Path]]]:
    """For each module its programs' names and where each is or will be; of the CRDs, their folder."""
    parts = []
    for module in MODULES:
        built = module.built(engine)
        paths = {}
        for name in module.binaries:
            other = released(module, name)
            paths[name] = other.path if other else built / name
        parts.append((module, paths or {module.name: built}))
    return parts


def missing_line(absent: list[str]) -> str:
    """One line: what is absent and what a person does about it."""
    line = f"not built yet: {', '.join(absent)}"
    if problem := go_problem():
        return (
            f"{line}; {problem}: install Go {needed_go()} or newer and run `make tools`; of released programs these "
            f"would do: {', '.join(wanted())}; the CRDs come through Go in any case"
        )
    minutes = sum(module.seconds for module in MODULES) / 60
    return f"{line}; run `make tools` (once, about {minutes:.0f} min on two cores with cold caches, {DISK})"
