"""What is built: one folder with a Go lock (go.mod, go.sum) for each module, its binaries, flags and key.

To upgrade one: `go get MODULE@VERSION && go mod tidy` in its folder, but see the remarks in kubernetes/go.mod and
crds/go.mod; the provider's tidy wants any schema.json and terraform-mapping.json beside its main.go.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
PROVIDER = "github.com/pulumi/pulumi-kubernetes/provider/v4"


@dataclass(frozen=True)
class Module:
    """A folder of locks beside this file. `binaries`: file name to Go package; `seconds`: cold caches, two cores.

    `version_of` is the required Go module whose version the binaries tell; in `stamps` (the linker's `-X`) `{version}`
    stands for it, `{minor}` for its second number and `{sdk}` for the version of the installed pulumi-kubernetes.
    """

    name: str
    seconds: int
    version_of: str = ""
    binaries: Mapping[str, str] = field(default_factory=dict)
    stamps: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()  # what else decides the outcome, beyond the folder's files

    @property
    def folder(self) -> Path:
        return HERE / self.name

    @property
    def version(self) -> str:
        """The locked version of `version_of`, without the `v`."""
        return required(self.folder / "go.mod", self.version_of).removeprefix("v")

    @property
    def go(self) -> str:
        """The oldest Go that its go.mod allows."""
        return _search(r"^go (\S+)$", self.folder / "go.mod")

    def flags(self) -> list[str]:
        """The flags of `go build`: the lock alone decides versions, and no path of this machine is written in."""
        linker = ["-s", "-w"]  # without symbols: a third smaller
        if self.stamps:
            named = {"version": f"v{self.version}", "minor": self.version.split(".")[1], "sdk": sdk_version()}
            linker += [part for stamp in self.stamps for part in ("-X", stamp.format(**named))]
        return ["-mod=readonly", "-trimpath", "-buildvcs=false", f"-ldflags={' '.join(linker)}"]

    def key(self) -> str:
        """Changes with the folder's files, the packages and the flags, and with nothing else."""
        digest = hashlib.sha256()
        for path in sorted(path for path in self.folder.iterdir() if path.is_file()):
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
        said = [*self.flags(), *(f"{name}={package}" for name, package in self.binaries.items()), *self.takes]
        digest.update("\0".join(said).encode())
        return digest.hexdigest()[:12]

    def built(self, engine: Path) -> Path:
        """The folder in which the outcome lies once it is complete."""
        return engine / f"{self.name}-{self.key()}"


def sdk_version() -> str:
    """The version of the installed pulumi-kubernetes: it asks the engine for the plugin of just that version."""
    return metadata.version("pulumi-kubernetes")


def required(go_mod: Path, module: str) -> str:
    """The version of `module` that `go_mod` requires. Raises `LookupError` where it requires none."""
    return _search(rf"^(?:require )?\s*{re.escape(module)} (v\S+)", go_mod)


def _search(pattern: str, path: Path) -> str:
    found = re.search(pattern, path.read_text(), re.MULTILINE)
    if not found:
        raise LookupError(f"{path}: no line matches {pattern}")
    return found[1]


@dataclass(frozen=True)
class Definition:
    """A custom resource definition: the file in its Go module, and the group that it gets instead of its own."""

    module: str
    path: str
    group: str = ""

    @property
    def name(self) -> str:
        """The file's name among the others: `GROUP_PLURAL.yaml`, as controller-gen names it."""
        plain = Path(self.path).name
        return f"{self.group}_{plain.partition('_')[2]}" if self.group else plain


# What AKS's add-ons install of which the stack makes objects: KEDA, node auto-provisioning, managed Prometheus.
# AKSNodeClass lies beside the lock, in our own words.
KEDA = "github.com/kedacore/keda/v2"
KARPENTER = "sigs.k8s.io/karpenter"
PROMETHEUS = "github.com/prometheus-operator/prometheus-operator"
# Microsoft: the same definitions, except for the group (azure-monitor/containers/prometheus-metrics-scrape-crd).
AZMONITORING = "azmonitoring.coreos.com"
DEFINITIONS = (
    Definition(KEDA, "config/crd/bases/keda.sh_scaledobjects.yaml"),
    Definition(KEDA, "config/crd/bases/keda.sh_triggerauthentications.yaml"),
    Definition(KARPENTER, "pkg/apis/crds/karpenter.sh_nodepools.yaml"),
    Definition(PROMETHEUS, "example/prometheus-operator-crd/monitoring.coreos.com_podmonitors.yaml", AZMONITORING),
    Definition(PROMETHEUS, "example/prometheus-operator-crd/monitoring.coreos.com_servicemonitors.yaml", AZMONITORING),
)

CRDS = Module("crds", 10, takes=tuple(f"{one.module}/{one.path} {one.group}" for one in DEFINITIONS))
ETCD = Module("etcd", 25, "go.etcd.io/etcd/server/v3", {"etcd": "go.etcd.io/etcd/server/v3"})
KWOK = Module("kwok", 80, "sigs.k8s.io/kwok", {"kwok": "sigs.k8s.io/kwok/cmd/kwok"})
PULUMI = Module(
    "pulumi", 260, "github.com/pulumi/pulumi/pkg/v3",
    {"pulumi": "github.com/pulumi/pulumi/pkg/v3/cmd/pulumi"},
    # Else `pulumi version` prints nothing, and the Automation API refuses it.
    ("github.com/pulumi/pulumi/sdk/v3/go/common/version.Version={version}",),
)  # fmt: skip
KUBERNETES = Module(
    "kubernetes", 425, "k8s.io/kubernetes",
    {
        name: f"k8s.io/kubernetes/cmd/{name}"
        for name in ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy")
    },
    (  # else the API server says that it is v0.0.0
        "k8s.io/component-base/version.gitVersion={version}",
        "k8s.io/component-base/version.gitMajor=1",
        "k8s.io/component-base/version.gitMinor={minor}",
    ),
)  # fmt: skip
KUBERNETES_PROVIDER = Module(
    "kubernetes-provider", 500, PROVIDER,
    {"pulumi-resource-kubernetes": "."},
    ("main.version={sdk}",),
)  # fmt: skip
MODULES = (CRDS, ETCD, KWOK, PULUMI, KUBERNETES, KUBERNETES_PROVIDER)  # the shortest first: what is wrong shows early
