"""Adapters in a real OCI registry (Debian's docker-registry) and in a folder: both behave the same."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import localcloud.registry
from artifacts.__main__ import main
from artifacts.adapter import AdapterCard, fetch_adapter, promote, promoted_digest, publish_adapter, version
from artifacts.store import CorruptBlob, NotFound, StoreError, open_store
from common import exits

BINARY = shutil.which("docker-registry")
SKOPEO = shutil.which("skopeo")
needs_registry = pytest.mark.skipif(
    BINARY is None, reason="no docker-registry on PATH: install the Debian package docker-registry"
)
needs_skopeo = pytest.mark.skipif(SKOPEO is None, reason="no skopeo on PATH: install the Debian package skopeo")
# htpasswd -nbB -C 5 somebody dry-run
HTPASSWD = "somebody:$2b$05$yjT8AtDj/hQeqEzKDSkkAeP5BwwozH29T1yw7rDCnNOvLkjaMdua."


@dataclass
class Place:
    """A store of one kind: its address, and where it keeps its bytes."""

    url: str
    data: Path


@contextmanager
def _registry(folder: Path, password_file: Path | None = None) -> Iterator[Place]:
    """A registry of its own on a free loopback port, with its data below `folder`."""
    with localcloud.registry.serve(folder, password_file=password_file) as host:
        yield Place(f"oci://{host}/team/drydock", folder / "data")


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    if BINARY is None:
        pytest.skip("no docker-registry on PATH: install the Debian package docker-registry")
    with _registry(tmp_path_factory.mktemp("registry")) as place:
        yield place


@pytest.fixture(params=["folder", "registry"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "folder":
        return Place(str(tmp_path / "store"), tmp_path / "store")
    found: Place = request.getfixturevalue("registry")
    # Each test has a prefix of its own, so that tests do not see each other's adapters.
    name = "".join(letter for letter in request.node.name.lower() if letter.isalnum())
    return Place(f"{found.url}/{name}", found.data)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "canaries.json").write_text("[]")
    prefix, random = "base_model.model.model.layers.0.self_attn.q_proj", np.random.default_rng(7)
    tensors = {
        f"{prefix}.lora_A.weight": random.standard_normal((16, 40_000), dtype=np.float32),
        f"{prefix}.lora_B.weight": random.standard_normal((40_000, 16), dtype=np.float32),
    }  # 5 MB: more than one piece of every copy loop
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def _card(dataset: str = "sha256:d", passed: bool = True) -> AdapterCard:
    return AdapterCard(
        name="kubectl",
        base_model="tiny",
        base_revision="sha256:b",
        dataset_digest=dataset,
        evaluation={"metric": "exact_match", "base": 0.2, "adapter": 0.8, "gain": 0.6, "passed": passed},
    )


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_adapter_lives_in_both_kinds(place: Place, adapter: Path, tmp_path: Path) -> None:
    store = open_store(place.url)
    with pytest.raises(NotFound, match="no tag in this repository"):
        store.resolve("adapters/kubectl", "promoted")
    assert store.tags("adapters/kubectl") == {}

    old = publish_adapter(store, "kubectl", adapter, _card())
    assert publish_adapter(store, "kubectl", adapter, _card()) == old
    new = publish_adapter(store, "kubectl", adapter, _card("sha256:e"))
    promote(store, "kubectl", version(old))
    assert promoted_digest(store, "kubectl") == old
    promote(store, "kubectl", new)
    assert promoted_digest(store, "kubectl") == new
    promote(store, "kubectl", old)  # the rollback
    assert store.tags("adapters/kubectl") == {version(old): old, version(new): new, "promoted": old}
    assert store.repositories() == ["adapters/kubectl"]

    for number, reference in enumerate(("promoted", version(old), old)):
        fetched = fetch_adapter(store, "kubectl", reference, tmp_path / f"out{number}")
        assert (fetched.digest, fetched.card.dataset_digest) == (old, "sha256:d")
        assert _contents(fetched.folder) == _contents(adapter)

    with pytest.raises(NotFound) as caught:
        store.resolve("adapters/kubectl", "0" * 8)
    assert all(part in str(caught.value) for part in (place.url, "adapters/kubectl", "00000000", version(new)))
    with pytest.raises(NotFound):
        store.tag("adapters/kubectl", "sha256:" + "0" * 64, "promoted")
    layer = store.inspect("adapters/kubectl", old).manifest["layers"][0]["digest"]
    with pytest.raises(StoreError):  # a blob is no artifact; docker-registry 2.8 answers 500 to the question
        store.tag("adapters/kubectl", layer, "promoted")
    assert promoted_digest(store, "kubectl") == old


@needs_registry
def test_a_stand_in_on_loopback_is_asked_in_place_of_the_registry_that_is_named(
    registry: Place, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, _, prefix = registry.url.removeprefix("oci://").partition("/")
    monkeypatch.setenv("DRYDOCK_REGISTRY_ENDPOINT", f"http://{host}")
    named = open_store(f"oci://drydock.azurecr.io/{prefix}/standin")
    digest = publish_adapter(named, "kubectl", adapter, _card())
    assert named.url == f"oci://drydock.azurecr.io/{prefix}/standin"
    monkeypatch.delenv("DRYDOCK_REGISTRY_ENDPOINT")
    assert open_store(f"{registry.url}/standin").resolve("adapters/kubectl", digest) == digest
    monkeypatch.setenv("DRYDOCK_REGISTRY_ENDPOINT", "https://elsewhere.example")
    with pytest.raises(ValueError, match=r"expected http:.*PORT"):
        open_store("oci://drydock.azurecr.io/adapters")


def test_both_kinds_agree_to_the_byte(registry: Place, adapter: Path, tmp_path: Path) -> None:
    stores = [open_store(registry.url + "/same"), open_store(tmp_path / "store")]
    first, second = (publish_adapter(store, "kubectl", adapter, _card()) for store in stores)
    assert first == second
    one, two = (store.inspect("adapters/kubectl", first) for store in stores)
    assert one == two


@pytest.mark.parametrize("damage", ["altered", "truncated"])
def test_damage_on_the_store_s_own_disk(place: Place, adapter: Path, tmp_path: Path, damage: str) -> None:
    store = open_store(place.url)
    weights = adapter / "adapter_model.safetensors"
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": ["q_proj"], "damage": damage}
    (adapter / "adapter_config.json").write_text(json.dumps(config))  # a blob that no other test shares
    digest = publish_adapter(store, "kubectl", adapter, _card())
    layers = {layer["size"]: layer["digest"] for layer in store.inspect("adapters/kubectl", digest).manifest["layers"]}
    wanted = layers[(adapter / "adapter_config.json").stat().st_size]
    (found,) = [
        path
        for path in place.data.rglob(f"*{wanted.removeprefix('sha256:')}*")
        if "blobs" in path.parts and "_layers" not in path.parts
    ]
    blob = found / "data" if found.is_dir() else found
    data = blob.read_bytes()
    blob.write_bytes(data[:-1] if damage == "truncated" else data[:-1] + b"#")
    with pytest.raises(CorruptBlob, match=f"expected {wanted} of {len(data)} bytes, found sha256:"):
        fetch_adapter(store, "kubectl", digest, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert weights.exists()


def test_the_command_line_on_both_kinds(place: Place, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = open_store(place.url)
    good = publish_adapter(store, "kubectl", adapter, _card())
    bad = publish_adapter(store, "kubectl", adapter, _card(passed=False))
    assert main(["promote", place.url, "kubectl", version(good)]) == exits.OK
    assert main(["promote", place.url, "kubectl", version(bad)]) == exits.GATE
    assert main(["list", place.url]) == exits.OK
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in listed[-2:]] == [version(good), version(bad)]
    assert "promoted" in listed[-2]
    # What others keep there, a signature say, hides nothing of ours.
    (adapter / "signature").write_text("cosign")
    store.push("adapters/kubectl", {"signature": adapter / "signature"}, b"{}", "application/vnd.x", tag="sha256-1.sig")
    store.push("adapters/team/kubectl", {"signature": adapter / "signature"}, b"{}", "application/vnd.x", tag="one")
    assert main(["list", place.url]) == exits.OK
    said = capsys.readouterr()
    assert said.out.splitlines() == listed[-len(said.out.splitlines()) :] and version(good) in said.out
    assert "expected an adapter" in said.err


@needs_registry
def test_a_registry_with_passwords(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docker = tmp_path / "docker"
    docker.mkdir()
    monkeypatch.setenv("DOCKER_CONFIG", str(docker))
    (tmp_path / "htpasswd").write_text(HTPASSWD + "\n")
    (tmp_path / "guarded").mkdir()
    with _registry(tmp_path / "guarded", tmp_path / "htpasswd") as place:
        with pytest.raises(StoreError, match="run docker login"):
            publish_adapter(open_store(place.url), "kubectl", adapter, _card())
        host = place.url.removeprefix("oci://").partition("/")[0]
        for password, works in (("wrong", False), ("dry-run", True)):
            secret = base64.b64encode(f"somebody:{password}".encode()).decode()
            (docker / "config.json").write_text(json.dumps({"auths": {host: {"auth": secret}}}))
            store = open_store(place.url)
            if not works:
                with pytest.raises(StoreError, match="401"):
                    publish_adapter(store, "kubectl", adapter, _card())
                continue
            digest = publish_adapter(store, "kubectl", adapter, _card())
            assert _contents(fetch_adapter(store, "kubectl", digest, tmp_path / "out").folder) == _contents(adapter)


@needs_skopeo
def test_skopeo_reads_our_layout(adapter: Path, tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    digest = publish_adapter(store, "kubectl", adapter, _card())
    promote(store, "kubectl", digest)
    address = f"oci:{tmp_path / 'store' / 'adapters' / 'kubectl'}:promoted"
    raw = _skopeo("inspect", "--raw", address)
    assert json.loads(raw) == store.inspect("adapters/kubectl", digest).manifest
    # Copying reads and verifies every blob.
    _skopeo("--insecure-policy", "copy", address, f"dir:{tmp_path / 'copy'}")
    weights = adapter / "adapter_model.safetensors"
    assert any(path.read_bytes() == weights.read_bytes() for path in (tmp_path / "copy").iterdir())


@needs_skopeo
@needs_registry
def test_skopeo_carries_a_layout_into_a_registry(registry: Place, adapter: Path, tmp_path: Path) -> None:
    digest = publish_adapter(open_store(tmp_path / "store"), "kubectl", adapter, _card())
    source = f"oci:{tmp_path / 'store' / 'adapters' / 'kubectl'}:{version(digest)}"
    target = registry.url.replace("oci://", "docker://") + f"/carried/adapters/kubectl:{version(digest)}"
    _skopeo("--insecure-policy", "copy", "--dest-tls-verify=false", source, target)
    store = open_store(registry.url + "/carried")
    fetched = fetch_adapter(store, "kubectl", version(digest), tmp_path / "out")
    assert fetched.digest == digest
    assert _contents(fetched.folder) == _contents(adapter)


def _skopeo(*arguments: str) -> bytes:
    assert SKOPEO is not None
    done = subprocess.run([SKOPEO, *arguments], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout
