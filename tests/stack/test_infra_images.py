"""Build contexts and the images made of them."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pulumi
import pytest

from common.settings import SettingsError
from infra.context import base_images, context_files, context_hash, pack
from infra.images import IMAGES, Images, ImagesArgs
from infra.registry import Registry, RegistryArgs
from tests.unit.pulumi_mocks import DIGEST, deploy, place
from tests.unit.registrations import deploy_with_requests

ROOT = Path(__file__).parents[2]
BASE = "public.ecr.aws/docker/library/python:3.12@sha256:" + "b" * 64

Write = Callable[..., Path]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with rooms a, b and c; the image of a has a and c, that of b has b and c."""
    for name in (
        "a/__init__.py",
        "a/run.sh",
        "b/__init__.py",
        "c/deep/er.py",
        "c/__pycache__/x.pyc",
        "c/.hidden",
        "lock",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "a/run.sh").chmod(0o755)
    for room in "ab":
        (tmp_path / room / "Dockerfile").write_text(
            f"ARG PYTHON_IMAGE={BASE}\nFROM ${{PYTHON_IMAGE}}\n# COPY nothing\nARG LOCK=lock\n"
            f'COPY ${{LOCK}} /opt/\nCOPY --from=other /x /y\nCOPY --chown=1:1 ["{room}", "./{room}"]\nCOPY \\\n  ./c \\\n  ./c\n'
        )
    return tmp_path


def test_a_context_holds_what_is_copied_and_no_leavings(repository: Path) -> None:
    files = context_files(repository, "a/Dockerfile")
    assert list(files) == ["a/Dockerfile", "a/__init__.py", "a/run.sh", "c/deep/er.py", "lock"]
    assert all(path == repository / name for name, path in files.items())


def test_another_rooms_code_changes_no_context(repository: Path) -> None:
    def hashes() -> list[str]:
        return [context_hash(context_files(repository, f"{room}/Dockerfile")) for room in "ab"]

    before = hashes()
    (repository / "b/__init__.py").write_text("changed")
    assert [old == new for old, new in zip(before, hashes(), strict=True)] == [True, False]
    before = hashes()
    (repository / "c/deep/er.py").write_text("changed")
    assert [old == new for old, new in zip(before, hashes(), strict=True)] == [False, False]


def test_a_new_name_or_an_executable_bit_changes_the_context(repository: Path) -> None:
    seen = {context_hash(context_files(repository, "a/Dockerfile"))}
    (repository / "a/run.sh").chmod(0o644)
    seen.add(context_hash(context_files(repository, "a/Dockerfile")))
    (repository / "a/run.sh").rename(repository / "a/walk.sh")
    seen.add(context_hash(context_files(repository, "a/Dockerfile")))
    assert len(seen) == 3


def test_the_archive_is_the_same_whatever_the_machine(
    repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    files = context_files(repository, "a/Dockerfile")
    first = pack(files)
    copy = tmp_path_factory.mktemp("copy") / "repository"
    shutil.copytree(repository, copy)
    for path in copy.rglob("*"):
        os.utime(path, (0, 1))
        path.chmod(path.stat().st_mode & ~0o077)  # as under a strict umask
    again = {name: copy / name for name in reversed(list(files))}
    assert pack(again) == first and context_hash(again) == context_hash(files)
    assert first[4:8] == bytes(4)  # gzip's own time


def test_the_archive_is_the_same_under_another_locale(repository: Path) -> None:
    (repository / "a" / "grün.txt").write_text("x")
    program = (
        "import sys, pathlib, hashlib; from infra.context import *; "
        "f = context_files(pathlib.Path(sys.argv[1]), 'a/Dockerfile'); "
        "print(hashlib.sha256(pack(f)).hexdigest(), context_hash(f))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program, str(repository)],
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], "PYTHONHASHSEED": seed, **locale},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed, locale in (("1", {"LC_ALL": "C", "TZ": "UTC"}), ("2", {"LC_ALL": "C.UTF-8", "TZ": "Asia/Tokyo"}))
    }
    assert len(outputs) == 1 and len(outputs.pop().split()) == 2


def test_the_archive_has_two_modes_and_nobodys_name(repository: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(pack(context_files(repository, "a/Dockerfile")))) as archive:
        members = archive.getmembers()
        script = archive.extractfile("a/run.sh")
        assert script is not None and script.read() == b"a/run.sh"
    assert {member.name: member.mode for member in members} == {
        "a/Dockerfile": 0o644, "a/__init__.py": 0o644, "a/run.sh": 0o755, "c/deep/er.py": 0o644, "lock": 0o644,
    }  # fmt: skip
    assert {(member.uid, member.gid, member.uname, member.gname, member.mtime) for member in members} == {
        (0, 0, "", "", 0)
    }


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ("ADD a /a", "x:2: ADD: use COPY; what ADD fetches or unpacks is in no hash"),
        ("RUN --mount=type=cache,target=/x true", "x:2: RUN --mount=type=cache,target=/x: needs BuildKit"),
        ("COPY --chmod=755 a /a", "x:2: COPY --chmod=755: needs BuildKit"),
        ("COPY <<EOF /a", "x:2: COPY <<EOF /a: needs BuildKit"),
        ("COPY a/*.py /a", "x:2: COPY a/*.py: a pattern: name the file or folder"),
        ("COPY . /a", "x:2: COPY .: the whole repository: every change"),
        ("COPY ../a /a", "x:2: COPY ../a: leads out of the repository"),
        ("COPY /etc /a", "x:2: COPY /etc: leads out of the repository"),
        ("COPY gone /a", "x:2: COPY gone: no such file or folder"),
        ("COPY a", "x:2: COPY a: names no source and destination"),
        ('COPY ["a", /a]', 'x:2: COPY ["a", /a]: is not a JSON list'),
        ("ARG LOCK\nCOPY ${LOCK} /a", "x:3: COPY ${LOCK} /a: ARG LOCK has no default"),
        ("COPY linked /a", "x:2: COPY linked: linked/link is a link"),
        ("COPY empty /a", "x:2: COPY empty: holds no files"),
    ],
)
def test_what_cannot_be_built_from_a_context_is_told_by_line(repository: Path, lines: str, problem: str) -> None:
    (repository / "empty").mkdir()
    (repository / "linked").mkdir()
    (repository / "linked/link").symlink_to(repository / "lock")
    (repository / "x").write_text(f"FROM base\n{lines}\n")
    with pytest.raises(SettingsError) as caught:
        context_files(repository, "x")
    assert len(caught.value.problems) == 1 and caught.value.problems[0].startswith(problem)


def test_problems_are_told_together(repository: Path) -> None:
    (repository / "x").write_text("FROM base\nCOPY gone /\n\nADD a \\\n  /a\n")
    with pytest.raises(SettingsError) as caught:
        context_files(repository, "x")
    assert [problem.split(" ")[0] for problem in caught.value.problems] == ["x:2:", "x:4:"]


def test_a_base_image_is_an_argument_or_stays_as_written(repository: Path) -> None:
    assert base_images(repository / "a/Dockerfile") == {"PYTHON_IMAGE": BASE}
    (repository / "x").write_text("FROM python:3 AS build\nFROM scratch\n")
    assert base_images(repository / "x") == {}


def declare(root: Path = ROOT, subnet: str | None = None, device: Any = "cuda", **where: Any) -> Images:
    where_ = place(**where)
    registry = Registry("registry", RegistryArgs(where_, "kubelet"))
    return Images("images", ImagesArgs(where_, registry, root, subnet, device))


def test_without_a_gpu_the_serving_image_alone_is_another_one() -> None:
    plain = {item.name: item.inputs for item in deploy(declare).of(":ImageBuild")}
    cpu = {item.name: item.inputs for item in deploy(lambda: declare(device="cpu")).of(":ImageBuild")}
    assert {name for name in plain if plain[name]["context"] != cpu[name]["context"]} == {"images-serving"}
    assert cpu["images-serving"]["arguments"]["REQUIREMENTS"] == "requirements/serving-cpu.lock"
    files = context_files(ROOT, IMAGES["serving"], cpu["images-serving"]["arguments"])
    assert "requirements/serving-cpu.lock" in files and "requirements/serving-gpu.lock" not in files
    assert context_hash(files) == cpu["images-serving"]["context"]


def test_every_image_is_built_from_its_context_and_referred_to_by_digest() -> None:
    found: list[list[str]] = []

    def program() -> pulumi.Output[None]:
        images = declare()
        return pulumi.Output.all(images.training, images.serving, images.router, images.stress).apply(found.append)

    seen, requests = deploy_with_requests(program)
    server = f"{place().names.unique('acr', 50)}.azurecr.io"
    assert found == [[f"{server}/drydock/{name}@{DIGEST}" for name in ("training", "serving", "router", "stress")]]
    builds = {item.name.removeprefix("images-"): item.inputs for item in seen.of(":ImageBuild")}
    assert {name: build["dockerfile"] for name, build in builds.items()} == IMAGES
    for name, build in builds.items():
        base = base_images(ROOT / IMAGES[name])["PYTHON_IMAGE"]
        assert (
            build["context"] == context_hash(context_files(ROOT, IMAGES[name])) and build["image"] == f"drydock/{name}"
        )
        assert build["arguments"] == {
            "PYTHON_IMAGE": base.replace("public.ecr.aws/docker/library/python", f"{server}/cache/python")
        }
        assert "@sha256:" in build["arguments"]["PYTHON_IMAGE"] and build.get("agent_pool") is None
        assert any(":CacheRule::" in urn for urn in requests["ImageBuild", f"images-{name}"].dependencies)
    assert not seen.of(":AgentPool")


def test_a_private_registry_builds_inside_of_the_network() -> None:
    seen = deploy(lambda: declare(private=True, subnet="/subnets/builds"))
    agents = seen.one(":AgentPool").inputs
    assert agents["virtualNetworkSubnetResourceId"] == "/subnets/builds"
    assert (agents["tier"], agents["count"], agents["os"]) == ("S3", 1.0, "Linux")
    assert {item.inputs["agent_pool"] for item in seen.of(":ImageBuild")} == {"builds"}


def test_problems_of_all_images_are_told_together(tmp_path: Path) -> None:
    for dockerfile in IMAGES.values():
        (tmp_path / dockerfile).parent.mkdir(exist_ok=True)
        (tmp_path / dockerfile).write_text("FROM base\nCOPY gone /\n")
    with pytest.raises(SettingsError) as caught:
        deploy(lambda: declare(tmp_path, private=True))
    told = [problem.split(":")[0] for problem in caught.value.problems]
    assert told == [*IMAGES.values(), "images"] and "subnet" in caught.value.problems[-1]
