"""The mirror Job: what it runs, that its token stays secret, and what makes it run again."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from pulumi.runtime import rpc
from pydantic import SecretStr

from infra.catalog import MODELS
from infra.pools import APPS, POOL_LABEL
from infra.settings import Base
from tests.unit.kubernetes_schema import problems
from tests.unit.pulumi_mocks import DIGEST, Recorder, deploy
from tests.unit.registrations import deploy_with_requests
from workloads.jobs import digest_of, inputs_hash
from workloads.mirror import LARGEST_FILE_GIB, Mirror, MirrorArgs, disk_gib, job_name

IMAGE = f"reg.azurecr.io/drydock/training@{DIGEST}"
REVISION = "a" * 40
MODEL = "meta-llama/Llama-3.1-8B-Instruct"
TOKEN = "hf_very-secret-token"
BASE = Base(model=MODEL, revision=REVISION)
addresses: list[str] = []


def program_of(token: str | None = None, base: Base = BASE) -> Callable[[], None]:
    def program() -> None:
        args = MirrorArgs(
            base=base,
            image=IMAGE,
            account="drydockst",
            namespace="drydock-tuning",
            service_account="mirror",
            token=SecretStr(token) if token else None,
        )
        Mirror("mirror", args).address.apply(addresses.append)

    return program


def mirrored(token: str | None = None, base: Base = BASE) -> Recorder:
    return deploy(program_of(token, base))


def test_a_job_that_is_replaced_is_deleted_first() -> None:
    """The new one has its name: made first, it conflicts, or is what is deleted then (both seen on the real engine)."""
    _, requests = deploy_with_requests(program_of())
    (job,) = (request for (kind, _), request in requests.items() if kind == "Job")
    assert job.deleteBeforeReplaceDefined and job.deleteBeforeReplace
    assert list(job.replaceOnChanges) == ["spec.podFailurePolicy"]


def job(seen: Recorder) -> dict[str, Any]:
    return seen.one(":Job").inputs


@pytest.mark.parametrize("token", [None, TOKEN])
def test_every_object_keeps_the_published_schema(token: str | None):
    seen = mirrored(token)
    objects = [item for item in seen.resources if item.custom]
    assert [kind.rpartition(":")[2] for kind in sorted(item.type for item in objects)] == (
        ["Job", "Secret", "NetworkPolicy"] if token else ["Job", "NetworkPolicy"]
    )
    for item in objects:
        # The Secret's content comes wrapped, see below.
        wrapped = {"stringData": {"token": "x"}} if item.type.endswith(":Secret") else {}
        assert problems(item.inputs | wrapped) == [], item.name


def test_it_copies_this_revision_to_the_address_that_others_read():
    spec = job(mirrored())["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    address = f"az://drydockst/models/{MODEL}/{REVISION}"
    assert container["image"] == IMAGE
    assert container["command"] == [
        *("python", "-m", "blobs", "mirror", MODEL, "--revision", REVISION, address, "--wait-seconds", "900"),
    ]
    assert addresses[-1] == address
    assert spec["nodeSelector"] == {POOL_LABEL: APPS}
    assert spec["serviceAccountName"] == "mirror"
    assert not spec.get("tolerations")


def test_what_it_writes_to_is_a_volume_with_room_for_a_file():
    spec = job(mirrored())["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    environment = {item["name"]: item.get("value") for item in container["env"]}
    hub = {"HF_ENDPOINT": "https://huggingface.co"}
    assert environment == {"HOME": "/work", "TMPDIR": "/work", "HF_HOME": "/work/hf"} | hub
    assert container["volumeMounts"] == [{"name": "work", "mountPath": "/work"}]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["resources"]["requests"]["ephemeral-storage"] == "17Gi"  # 8.03e9 parameters of two bytes, and 2
    assert container["resources"]["limits"]["ephemeral-storage"] == "17Gi"


def test_disk_is_bounded_by_the_largest_file_of_a_large_model():
    large = next(name for name, figures in MODELS.items() if figures.parameters > 60e9)
    assert disk_gib(Base(model=large, revision=REVISION)) == LARGEST_FILE_GIB + 2


def test_the_token_comes_from_a_secret_and_is_nowhere_in_plain_text():
    seen = mirrored(TOKEN)
    assert seen.one(":Secret").inputs["stringData"] == {
        rpc._special_sig_key: rpc._special_secret_sig,
        "value": {"token": TOKEN},
    }
    env = job(seen)["spec"]["template"]["spec"]["containers"][0]["env"]
    assert {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "huggingface", "key": "token"}}} in env
    assert TOKEN not in json.dumps(job(seen))


def test_a_new_revision_token_or_image_is_a_new_job_and_nothing_else_is():
    name = job_name(BASE, IMAGE, None)
    assert name == job(mirrored())["metadata"]["name"]
    assert name.startswith("mirror-") and len(name) == len("mirror-") + 8
    others = {
        job_name(Base(model=MODEL, revision="b" * 40), IMAGE, None),
        job_name(BASE, IMAGE.replace("d" * 64, "e" * 64), None),
        job_name(BASE, IMAGE, SecretStr("one")),
        job_name(BASE, IMAGE, SecretStr("two")),
    }
    assert len(others | {name}) == 5
    assert job_name(BASE, IMAGE.replace("reg", "other"), None) == name


def test_it_is_not_awaited_and_leaves_no_name_behind():
    made = job(mirrored())
    assert made["metadata"]["annotations"] == {
        "pulumi.com/skipAwait": "true",
        "pulumi.com/deletionPropagationPolicy": "background",
    }
    assert int(made["spec"]["activeDeadlineSeconds"]) == 4 * 3600
    assert "ttlSecondsAfterFinished" not in made["spec"]


def test_only_https_goes_out():
    spec = mirrored().one(":NetworkPolicy").inputs["spec"]
    labels = job(mirrored())["spec"]["template"]["metadata"]["labels"]
    assert spec["podSelector"]["matchLabels"].items() <= labels.items()
    assert spec["ingress"] == []
    assert [int(port["port"]) for rule in spec["egress"] for port in rule["ports"]] == [443]


@pytest.mark.parametrize(
    ("hub", "ports"),
    [
        ("https://hub.example", [443]),
        ("https://hub.example:443/hf", [443]),
        ("https://hub.example:8443", [443, 8443]),
        ("http://10.64.3.1", [443, 80]),
    ],
)
def test_a_mirror_of_the_hub_is_asked_and_reached(hub: str, ports: list[int]):
    base = BASE.model_copy(update={"hub": hub})
    seen = mirrored(base=base)
    (container,) = job(seen)["spec"]["template"]["spec"]["containers"]
    assert {"name": "HF_ENDPOINT", "value": hub} in container["env"]
    spec = seen.one(":NetworkPolicy").inputs["spec"]
    assert [int(port["port"]) for rule in spec["egress"] for port in rule["ports"]] == ports
    assert job_name(base, IMAGE, None) != job_name(BASE, IMAGE, None)


@pytest.mark.parametrize(
    "hub", ["hub.example", "ftp://hub.example", "https://hub.example/", "https://me:pw@hub.example"]
)
def test_what_is_no_address_of_a_hub_is_refused(hub: str):
    with pytest.raises(ValueError, match="hub"):
        Base(model=MODEL, revision=REVISION, hub=hub)


def test_hashes_tell_inputs_apart_and_images_are_named_by_digest():
    assert inputs_hash("ab", "c", length=12) != inputs_hash("a", "bc", length=12)
    assert len(inputs_hash("a", length=7)) == 7
    with pytest.raises(ValueError, match="by its digest"):
        digest_of("reg.azurecr.io/drydock/training:latest")
