"""Images really built, pushed and mounted: buildah and docker-registry, on a base of busybox.

Needs root, buildah, docker-registry and a static busybox (Debian: busybox-static), else it is skipped.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests

from common.processes import wait_for
from common.settings import SettingsError
from infra.context import context_files, context_hash, pack
from infra.uploads import ImageBuildProvider
from localcloud import registry
from localcloud.azure import arm
from localcloud.azure.rules import SUBSCRIPTION
from localcloud.builder import Builder, BuildFailed
from localcloud.images import BuildahImages, Store, missing
from localcloud.runner.images import ImageMissing
from tests.stack.azure_engine import Engine

INDEX = "https://packages.example/simple"
BASE = "reg01.azurecr.io/cache/python@sha256:" + "0" * 64
DOCKERFILE = """\
ARG PYTHON_IMAGE=public.example/python
FROM ${PYTHON_IMAGE}
RUN mkdir -p /opt/drydock && echo drydock:x:10001:10001::/cache:/bin/sh >> /etc/passwd
ARG REQUIREMENTS=some.lock
COPY ${REQUIREMENTS} /opt/drydock/requirements.lock
RUN grep index-url /etc/pip.conf | cut -c1-5 && date +%N > /opt/drydock/installed
ENV PATH=/opt/drydock/bin:$PATH HOME=/cache
WORKDIR /app
COPY room ./room
USER 10001:10001
STOPSIGNAL SIGINT
ENTRYPOINT ["python", "-m", "room"]
"""


def why_not() -> str:
    busybox = shutil.which("busybox")
    static = busybox and b"ld-linux" not in Path(busybox).read_bytes()[:4096]  # its interpreter
    return "; ".join(
        [
            *missing(),
            *([] if shutil.which("docker-registry") else ["docker-registry: install the Debian package of that name"]),
            *([] if static else ["a static busybox is needed: install busybox-static"]),
        ]
    )


pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")


def busybox(store: Store, log: Path) -> str:
    """In place of `localcloud.base.python_image`, which takes a minute."""
    name = "localhost/base:1"
    if store.has(name):
        return name
    root = log.parent / "base"
    for folder in ("bin", "etc/ssl/certs", "mnt", "tmp"):
        (root / folder).mkdir(parents=True)
    for file in ("etc/pip.conf", "etc/ssl/certs/ca-certificates.crt", "etc/passwd", "etc/group"):
        (root / file).touch()
    shutil.copy(str(shutil.which("busybox")), root / "bin" / "busybox")
    subprocess.run(["chroot", str(root), "/bin/busybox", "--install", "-s", "/bin"], check=True)
    container = store.ask("from", "scratch")
    store.ask("copy", "--quiet", container, root, "/")
    store.ask("config", "--env", "PATH=/bin", container)
    store.ask("commit", "--quiet", "--rm", container, name)
    return name


@dataclass
class Yard:
    """A registry of the stand-in for Azure whose runs really build."""

    store: Store
    host: str
    source: Path
    logs: Path
    props: dict[str, Any] = field(default_factory=dict)

    def up(self) -> str:
        """What `pulumi up` does with the context: the digest of its image."""
        files = context_files(self.source, "Dockerfile")
        outs = ImageBuildProvider().create(self.props | {"context": context_hash(files)}).outs
        assert outs is not None
        return str(outs["digest"])

    def log(self) -> str:
        """Of the run that was last written to."""
        return max(self.logs.glob("build-*.log"), key=lambda path: path.stat().st_mtime_ns).read_text()

    def reference(self, digest: str) -> str:
        return f"reg01.azurecr.io/drydock/thing@{digest}"


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yard]:
    folder = tmp_path_factory.mktemp("yard")
    source = folder / "source"
    (source / "room").mkdir(parents=True)
    (source / "room" / "code.py").write_text("first\n")
    (source / "Dockerfile").write_text(DOCKERFILE)
    (source / "some.lock").write_text("torch\n")
    (folder / "other.lock").write_text("torch for CPUs\n")
    engine = Engine(folder / "cloud")
    engine.make("resources:ResourceGroup", {"resourceGroupName": "g", "location": "swedencentral"})
    where = {"resourceGroupName": "g", "registryName": "reg01", "location": "swedencentral"}
    engine.make("containerregistry:Registry", where | {"sku": {"name": "Standard"}})
    store = Store(folder / "images")
    props = {
        "subscription_id": SUBSCRIPTION, "resource_group": "g", "registry": "reg01", "image": "drydock/thing",
        "root": str(source), "dockerfile": "Dockerfile", "arguments": {"PYTHON_IMAGE": BASE}, "agent_pool": None,
    }  # fmt: skip
    with registry.serve(folder / "registry") as host, pytest.MonkeyPatch.context() as patch:
        replace = {"Dockerfile": {"REQUIREMENTS": folder / "other.lock"}}
        server = arm.serve(engine.folder, engine.world, builder=Builder(store, host, busybox, replace))
        patch.setenv("DRYDOCK_ARM_ENDPOINT", server.url)
        patch.setenv("PIP_INDEX_URL", INDEX)
        patch.setattr("infra.uploads.POLL_SECONDS", 0.1)
        try:
            yield Yard(store, host, source, engine.folder / "logs", props)
        finally:
            server.close()
            BuildahImages(store, host).release()
            store.close()


@pytest.fixture(scope="module")
def built(yard: Yard) -> str:
    return yard.up()


def test_a_run_builds_and_pushes(yard: Yard, built: str) -> None:
    manifest = requests.get(f"http://{yard.host}/v2/drydock/thing/manifests/{built}", timeout=5, headers={
        "Accept": "application/vnd.oci.image.manifest.v1+json"})  # fmt: skip
    assert manifest.status_code == 200 and manifest.headers["Docker-Content-Digest"] == built
    assert "STEP 1/11: FROM localhost/base:1" in yard.log() and "\nindex\n" in yard.log()


def test_a_pod_gets_its_root_and_settings(yard: Yard, built: str) -> None:
    images = BuildahImages(yard.store, yard.host)
    image = images.ensure(yard.reference(built))
    assert (image.rootfs / "app/room/code.py").read_text() == "first\n"
    assert (image.rootfs / "opt/drydock/requirements.lock").read_text() == "torch for CPUs\n"
    assert (image.id, image.user, image.working_dir) == (yard.reference(built), "10001:10001", "/app")
    assert image.entrypoint == ("python", "-m", "room") and image.stop_signal == "SIGINT" and image.cmd == ()
    assert {"PATH=/opt/drydock/bin:/bin", "HOME=/cache"} <= set(image.env)
    assert images.ensure(yard.reference(built)) == image


def test_nothing_of_this_machine_is_in_an_image(yard: Yard, built: str) -> None:
    root = BuildahImages(yard.store, yard.host).ensure(yard.reference(built)).rootfs
    assert (root / "etc/pip.conf").read_bytes() == b"" and not any((root / "mnt").iterdir())
    tag = context_hash(context_files(yard.source, "Dockerfile"))[:12]
    said = yard.store.ask("inspect", "--type", "image", f"localhost/drydock/thing:{tag}")
    assert "echo drydock:x:10001" in said and "packages.example" not in said


def test_a_change_of_code_installs_nothing_anew(yard: Yard, built: str) -> None:
    images = BuildahImages(yard.store, yard.host)
    before = images.ensure(yard.reference(built)).rootfs
    (yard.source / "room/code.py").write_text("second\n")
    digest = yard.up()
    after = images.ensure(yard.reference(digest)).rootfs
    assert digest != built and (after / "app/room/code.py").read_text() == "second\n"
    assert (after / "opt/drydock/installed").read_text() == (before / "opt/drydock/installed").read_text()
    (yard.source / "room/code.py").write_text("first\n")
    assert yard.up() == built


def test_what_a_registry_lacks_cannot_be_pulled(yard: Yard) -> None:
    images = BuildahImages(yard.store, yard.host)
    with pytest.raises(ImageMissing, match=r'"reg01.azurecr.io/drydock/thing@sha256:1+": 404 MANIFEST_UNKNOWN'):
        images.ensure(yard.reference("sha256:" + "1" * 64))
    with pytest.raises(ImageMissing, match=r"only NAME.azurecr.io is reachable"):
        images.ensure("public.example/library/python:3.12")


def test_an_image_that_the_store_lacks_is_pulled(yard: Yard, built: str, tmp_path: Path) -> None:
    elsewhere = BuildahImages(Store(tmp_path), yard.host)
    try:
        assert (elsewhere.ensure(yard.reference(built)).rootfs / "app/room/code.py").read_text() == "first\n"
    finally:
        elsewhere.release()


def test_a_store_that_was_moved_while_an_image_was_mounted_goes_on(yard: Yard, built: str, tmp_path: Path) -> None:
    """Whoever renames the clone after a kill: what is in the store holds absolute paths."""
    before, after = tmp_path / "before", tmp_path / "after"
    root = BuildahImages(Store(before), yard.host).ensure(yard.reference(built)).rootfs
    subprocess.run(["umount", root], check=True)  # as the kernel does when the namespace of the mount ends
    before.rename(after)
    images = BuildahImages(Store(after), yard.host)
    try:
        assert (images.ensure(yard.reference(built)).rootfs / "app/room/code.py").read_text() == "first\n"
    finally:
        images.release()


def test_a_step_that_fails_shows_its_words(yard: Yard) -> None:
    (yard.source / "Dockerfile").write_text(DOCKERFILE + "RUN echo no such distribution && exit 3\n")
    try:
        with pytest.raises(SettingsError) as caught:
            yard.up()
    finally:
        (yard.source / "Dockerfile").write_text(DOCKERFILE)
    assert "its build ended as Failed: failed to run step ID: build: exit status" in caught.value.problems[0]
    assert "no such distribution" in caught.value.problems


def test_closing_the_store_ends_a_build(yard: Yard, tmp_path: Path) -> None:
    BuildahImages(yard.store, yard.host).release()
    store, log = Store(yard.store.folder), tmp_path / "log"
    (tmp_path / "Dockerfile").write_text(f"FROM {busybox(store, log)}\nRUN echo here && sleep 4242\n")
    ended: list[str] = []

    def build() -> None:
        with pytest.raises(BuildFailed) as caught:
            context = pack({"Dockerfile": tmp_path / "Dockerfile"})
            Builder(store, yard.host, busybox).build(context, "Dockerfile", {}, ["a:b"], log)
        ended.append(str(caught.value))

    thread = threading.Thread(target=build)
    thread.start()
    wait_for(lambda: log.exists() and "\nhere\n" in log.read_text(), 20, "the step", lambda: None)
    store.close()
    thread.join(10)
    assert ended and "4242" not in subprocess.run(["ps", "ax", "-o", "args"], capture_output=True, text=True).stdout
    assert str(store.folder / "store" / "overlay") not in Path("/proc/self/mounts").read_text()
    Builder(Store(store.folder), yard.host, busybox)
    assert "base-working" not in Store(store.folder).ask("containers", "--all")
