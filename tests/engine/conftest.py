"""The unmodified program on the real engine: each environment is brought up once, for all tests of its file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from localcloud.api import Api
from localcloud.cloud import LocalCloud, Stack
from localcloud.tools import Tools, ToolsMissing, locate
from tests.engine.plans import Plan, preview


@pytest.fixture(scope="session")
def tools() -> Tools:
    try:
        return locate()
    except ToolsMissing as missing:
        if os.environ.get("DRYDOCK_ENGINE") == "required":  # make engine, CI: a skipped test would hide a failure
            raise
        pytest.skip(f"needs the engine's tools: make tools ({missing})")


@dataclass(frozen=True)
class Up:
    """A stack that was brought up from nothing."""

    cloud: LocalCloud
    stack: Stack
    first: Plan  # of the preview before anything was there
    said: str  # all that `pulumi up` printed


@pytest.fixture(scope="module")
def cloud(
    tools: Tools, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalCloud]:
    """A subscription of the file's own. Its Jobs' pods run until a test ends them."""
    folder = tmp_path_factory.mktemp(request.module.__name__.rpartition(".")[2])
    with LocalCloud(folder, complete_jobs=False) as cloud:
        yield cloud


@pytest.fixture(scope="module")
def api(cloud: LocalCloud) -> Iterator[Api]:
    with cloud.control_plane.client() as api:
        yield api


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The subscription that all environments share, also between the workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "world"


@pytest.fixture(scope="session")
def dev(tools: Tools, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """The dev environment, up. Its Jobs' pods run until a test ends them."""
    with LocalCloud(tmp_path_factory.mktemp("dev"), complete_jobs=False, world=world) as cloud:
        stack = cloud.stack("dev")
        first = preview(stack)
        done = stack.pulumi("up", "--yes", "--skip-preview", "--policy-pack", "policy", check=False)
        said = f"{done.stdout}\n{done.stderr}"
        assert done.returncode == 0, said
        yield Up(cloud, stack, first, said)
