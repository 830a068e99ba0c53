"""The local cloud's programs: found, built whole or not at all from their locks, and taken from the PATH where they do."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from localcloud.tools import ROOT, ToolsMissing, locate, machine, modules
from localcloud.tools import __main__ as command
from localcloud.tools.build import LOG_TAIL, Build, BuildFailed, regrouped
from localcloud.tools.modules import CRDS, DEFINITIONS, ETCD, KUBERNETES, KUBERNETES_PROVIDER, KWOK, MODULES, PULUMI

GO = """\
#!/bin/sh
# Stands for Go: `go env` tells a version, anything else does what the test says.
if [ "$1" = env ]; then echo "${FAKE_GO:-go1.99.0}"; echo "${FAKE_TOOLCHAIN:-local}"; exit 0; fi
while [ $# -gt 1 ]; do if [ "$1" = -o ]; then out="$2"; fi; shift; done
"""


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with none of the programs: returns the one folder of its PATH, with what the scripts here call."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("mv", "seq", "sleep", "touch"):
        (programs / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("PULUMI_HOME", str(tmp_path / "pulumi"))
    return programs


def program(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script if script.startswith("#!") else f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def fill(root: Path, *left_out: modules.Module) -> Path:
    """An engine folder with everything built but `left_out`."""
    engine = root / ".engine"
    engine.mkdir(exist_ok=True)
    for module in MODULES:
        if module not in left_out:
            built = module.built(engine)
            built.mkdir()
            for name in module.binaries:
                (built / name).touch()
    return engine


def test_all_is_found_where_it_was_built(tmp_path: Path) -> None:
    engine = fill(tmp_path)
    tools = locate(tmp_path)
    assert tools.kube_proxy == KUBERNETES.built(engine) / "kube-proxy"
    assert tools.kubernetes_provider == KUBERNETES_PROVIDER.built(engine) / "pulumi-resource-kubernetes"
    assert tools.crds == CRDS.built(engine)
    assert len({path for path in vars(tools).values() if path.exists()}) == 9


def test_one_line_names_what_is_absent_and_the_remedy(tmp_path: Path, bare: Path) -> None:
    engine = fill(tmp_path, ETCD, CRDS)
    (KUBERNETES.built(engine) / "kube-proxy").unlink()
    program(bare / "go", GO)
    with pytest.raises(ToolsMissing) as error:
        locate(tmp_path)
    (line,) = error.value.problems
    assert line.startswith("not built yet: crds, etcd, kube-proxy; run `make tools` (once, about 22 min")


@pytest.mark.parametrize(
    ("version", "toolchain", "said"),
    [
        ("go1.26.5", "local", "Go 1.26.5 is too old: install Go 1.26.6 or newer"),
        ("go1.26.6", "local", None),
        ("go1.27", "local", None),
        ("go1.21.0", "auto", None),  # it fetches the newer one
        ("nothing", "local", "go does not work (nothing\nlocal)"),
    ],
)
def test_the_age_of_go_is_told(
    version: str, toolchain: str, said: str | None, bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(bare / "go", GO)
    monkeypatch.setenv("FAKE_GO", version)
    monkeypatch.setenv("FAKE_TOOLCHAIN", toolchain)
    with pytest.raises(ToolsMissing) as error:
        locate(tmp_path)
    assert (said or "run `make tools`") in str(error.value)
    assert bool(machine.go_problem()) is (said is not None)


def test_without_go_the_check_says_one_line_and_touches_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        assert command.main(["--check", "--root", str(tmp_path)]) == 2
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    (line,) = capsys.readouterr().err.splitlines()
    assert "Go is not on the PATH: install Go 1.26.6" in line
    assert f"pulumi {PULUMI.version.rpartition('.')[0]} or newer, etcd 3.6 or newer, kube-apiserver" in line
    assert not (tmp_path / ".engine").exists()


@pytest.mark.parametrize(
    ("module", "name", "said", "taken"),
    [
        (PULUMI, "pulumi", "v3.274.0", True),
        (PULUMI, "pulumi", "v3.301.2", True),
        (PULUMI, "pulumi", "v3.273.9", False),
        (PULUMI, "pulumi", "v4.300.0", False),
        (ETCD, "etcd", "etcd Version: 3.6.0\nGit SHA: 0123456", True),
        (ETCD, "etcd", "etcd Version: 3.5.24", False),
        (KUBERNETES, "kube-scheduler", "Kubernetes v1.37.0", True),
        (KUBERNETES, "kube-scheduler", "Kubernetes v1.36.9", False),
        (KUBERNETES, "kube-scheduler", "Kubernetes v1.38.0", False),
        (KWOK, "kwok", "kwok version v0.8.3 go1.25.1 (linux/amd64)", True),
        (KWOK, "kwok", "kwok version v0.7.0 go1.26.1 (linux/amd64)", False),
        (KWOK, "kwok", "no version at all", False),
    ],
)
def test_a_released_program_of_a_suitable_version_is_taken(
    module: modules.Module, name: str, said: str, taken: bool, bare: Path, tmp_path: Path
) -> None:
    argument = "version" if name == "pulumi" else "--version"
    program(bare / name, f'[ "$*" = {argument} ] && echo "{said}"')
    engine = fill(tmp_path)
    field = name.replace("-", "_")
    assert getattr(locate(tmp_path), field) == (bare / name if taken else module.built(engine) / name)


def test_a_program_that_fails_is_not_taken(bare: Path) -> None:
    program(bare / "etcd", "echo etcd Version: 3.7.3; exit 1")
    assert machine.released(ETCD, "etcd") is None


def test_an_installed_plugin_of_the_sdks_version_is_taken(tmp_path: Path) -> None:
    engine = fill(tmp_path, KUBERNETES_PROVIDER)
    plugins = tmp_path / "pulumi" / "plugins"
    program(plugins / "resource-kubernetes-v4.0.0" / "pulumi-resource-kubernetes", "")
    with pytest.raises(ToolsMissing, match="not built yet: pulumi-resource-kubernetes;"):
        locate(tmp_path)
    fits = plugins / f"resource-kubernetes-v{modules.sdk_version()}" / "pulumi-resource-kubernetes"
    program(fits, "")
    assert locate(tmp_path).kubernetes_provider == fits != KUBERNETES_PROVIDER.built(engine) / fits.name


def test_the_key_changes_with_lock_flags_and_packages_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules, "HERE", tmp_path)
    folder = tmp_path / "etcd"
    folder.mkdir()
    (folder / "go.mod").write_text("module x\n\nrequire go.etcd.io/etcd/server/v3 v3.7.3\n")
    first = ETCD.key()
    assert re.fullmatch("[0-9a-f]{12}", first)
    os.utime(folder / "go.mod", (0, 0))
    assert replace(ETCD, seconds=1).key() == first
    keys = [first, replace(ETCD, stamps=("main.version={version}",)).key(), replace(ETCD, binaries={"e": "x"}).key()]
    (folder / "go.sum").write_text("go.etcd.io/etcd/server/v3 v3.7.3 h1:x=\n")
    keys += [ETCD.key()]
    (folder / "go.sum").write_text("go.etcd.io/etcd/server/v3 v3.7.3 h1:y=\n")
    keys += [ETCD.key()]
    assert len(set(keys)) == 5


def test_the_flags_tell_the_locked_versions() -> None:
    assert f"k8s.io/component-base/version.gitVersion=v{KUBERNETES.version}" in KUBERNETES.flags()[-1]
    assert f"version.gitMinor={KUBERNETES.version.split('.')[1]}" in KUBERNETES.flags()[-1]
    assert f"main.version={modules.sdk_version()}" in KUBERNETES_PROVIDER.flags()[-1]
    assert all(module.flags()[0] == "-mod=readonly" for module in MODULES)


def test_a_module_that_is_not_required_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "go.mod").write_text("module x\n\nrequire a.example/bc v1.0.0\n")
    assert modules.required(tmp_path / "go.mod", "a.example/bc") == "v1.0.0"
    with pytest.raises(LookupError, match=r"go\.mod: no line matches .*a\\.example/b"):
        modules.required(tmp_path / "go.mod", "a.example/b")


def test_the_staging_modules_are_of_kubernetes_own_number() -> None:
    """Kubernetes 1.37.2 goes with v0.37.2 of each; one forgotten in an upgrade would be mixed in silently."""
    replaced = re.findall(r"^\t(k8s\.io/\S+) => (\S+) (\S+)$", (KUBERNETES.folder / "go.mod").read_text(), re.MULTILINE)
    assert len(replaced) == 33
    assert {version for _, _, version in replaced} == {f"v0{KUBERNETES.version.removeprefix('1')}"}
    assert all(left == right for left, right, _ in replaced)


def test_every_source_of_definitions_is_locked_by_hash() -> None:
    sums = (CRDS.folder / "go.sum").read_text()
    for name in {one.module for one in DEFINITIONS}:
        assert f"{name} {modules.required(CRDS.folder / 'go.mod', name)} h1:" in sums


def test_a_definition_moves_to_the_group_that_aks_gives_it() -> None:
    text = yaml.safe_dump(
        {
            "metadata": {"name": "podmonitors.monitoring.coreos.com", "annotations": {"a": "b"}},
            "spec": {"group": "monitoring.coreos.com", "names": {"plural": "podmonitors"}, "versions": ["v1"]},
        }
    )
    moved = next(one for one in DEFINITIONS if one.path.endswith("podmonitors.yaml"))
    assert moved.name == "azmonitoring.coreos.com_podmonitors.yaml"
    value = yaml.safe_load(regrouped(text, moved))
    assert value["metadata"] == {"name": "podmonitors.azmonitoring.coreos.com", "annotations": {"a": "b"}}
    assert value["spec"]["group"] == "azmonitoring.coreos.com" and value["spec"]["versions"] == ["v1"]
    kept = next(one for one in DEFINITIONS if not one.group)
    assert regrouped(text, kept) == text and kept.name == Path(kept.path).name


def test_a_build_appears_whole_and_what_is_outdated_goes(bare: Path, tmp_path: Path) -> None:
    engine = fill(tmp_path, ETCD, KUBERNETES)
    (engine / "etcd-0123456789ab").mkdir()
    (engine / "unfinished-left" / "out").mkdir(parents=True)
    program(
        bare / "go", GO + 'if [ -d "$out" ]; then cd "$out" && touch kube-x; else echo built > "$out"; fi; pwd >&2\n'
    )
    build = Build(engine, lambda: None)
    build.module(ETCD)
    build.module(KUBERNETES)
    build.sweep()
    assert (ETCD.built(engine) / "etcd").read_text() == "built\n"
    assert (KUBERNETES.built(engine) / "kube-x").exists()
    assert not [path for path in engine.iterdir() if "unfinished" in path.name or path.name == "etcd-0123456789ab"]
    assert PULUMI.built(engine).exists()
    log = (engine / "etcd.log").read_text()
    assert "$ go build -mod=readonly -trimpath" in log and str(ETCD.folder) not in log, "Go ran in the checkout"


def test_a_failed_build_shows_the_end_of_what_go_said_and_leaves_nothing(bare: Path, tmp_path: Path) -> None:
    engine = fill(tmp_path, ETCD)
    program(bare / "go", GO + 'echo half > "$out"; for i in $(seq 40); do echo "line $i." >&2; done; exit 3\n')
    with pytest.raises(BuildFailed) as error:
        Build(engine, lambda: None).module(ETCD)
    lines = str(error.value).splitlines()
    assert lines == [*(f"line {n}." for n in range(41 - LOG_TAIL, 41)), f"go ended with exit code 3; all that it said: {engine}/etcd.log"]  # fmt: skip
    assert not ETCD.built(engine).exists() and not list(engine.glob("unfinished*"))


def test_a_failed_download_shows_what_went_wrong(bare: Path, tmp_path: Path) -> None:
    """`go mod download -json` tells it on its standard output, as JSON."""
    engine = fill(tmp_path, CRDS)
    program(bare / "go", GO + """echo '{"Error": "checksum mismatch"}'; exit 1\n""")
    with pytest.raises(BuildFailed, match="checksum mismatch"):
        Build(engine, lambda: None).module(CRDS)
    assert not CRDS.built(engine).exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_an_interrupted_build_leaves_nothing_that_looks_complete(
    number: int, code: int, bare: Path, tmp_path: Path
) -> None:
    engine = fill(tmp_path, ETCD)
    begun = tmp_path / "begun"
    program(bare / "go", GO + f'echo half > "$out"; echo $$ > {begun}.new; mv {begun}.new {begun}; exec sleep 60\n')
    run = [sys.executable, "-m", "localcloud.tools", "--root", str(tmp_path)]
    process = subprocess.Popen(run, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 20
    try:
        while not begun.exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == code
    go = int(begun.read_text())
    while Path(f"/proc/{go}").exists() and Path(f"/proc/{go}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "Go outlived the build"
        time.sleep(0.01)
    assert not ETCD.built(engine).exists()
    assert list(engine.glob("unfinished*")) == [] or number == signal.SIGKILL

    program(bare / "go", GO + 'echo whole > "$out"\n')
    Build(engine, lambda: None).module(ETCD)
    assert (ETCD.built(engine) / "etcd").read_text() == "whole\n"
    assert not list(engine.glob("unfinished*"))


def test_what_remains_follows_the_pace_of_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 100.0
    monkeypatch.setattr("time.monotonic", lambda: clock)
    progress = command.Progress([PULUMI, KUBERNETES])
    progress.begin(PULUMI)
    assert progress.remaining(clock) == pytest.approx(PULUMI.seconds + KUBERNETES.seconds)
    assert progress.remaining(clock + PULUMI.seconds + 99) == pytest.approx(KUBERNETES.seconds)
    clock += PULUMI.seconds / 2
    progress.begin(KUBERNETES)
    assert KUBERNETES.seconds / 2 < progress.remaining(clock) < KUBERNETES.seconds * 0.65
    assert progress.remaining(clock + 10) == pytest.approx(progress.remaining(clock) - 10)
