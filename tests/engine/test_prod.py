"""The prod environment on the real engine, where things go wrong on the way: each `up` ends with its cause, the next goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from localcloud.azure.faults import Fault, inject, waiting
from localcloud.azure.world import World
from localcloud.cloud import LocalCloud, Stack
from localcloud.tools import Tools
from tests.engine.cluster import gpu_nodes, placements
from tests.engine.plans import edited, last_update, preview, state, written

pytestmark = pytest.mark.timeout(900)

SETTINGS = "Pulumi.prod.yaml"


@pytest.fixture(scope="module")
def cloud(tools: Tools, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCloud]:
    with LocalCloud(tmp_path_factory.mktemp("prod"), world=world) as cloud:
        yield cloud


@pytest.fixture(scope="module")
def prod(cloud: LocalCloud) -> Stack:
    return cloud.stack("prod")


def up(stack: Stack) -> tuple[int, str]:
    done = stack.pulumi("up", "--yes", "--skip-preview", check=False)
    return done.returncode, f"{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (Fault("conflict", "containerregistry:Registry", action="create"), ["registry-registry", "409", "Conflict"]),
        (Fault("quota", "containerservice:AgentPool", "pools-serve", action="create"), ["pools-serve", "quota"]),
    ],
    ids=["conflict", "quota"],
)
def test_an_up_that_fails_tells_the_cause_at_the_resource(
    prod: Stack, cloud: LocalCloud, fault: Fault, told: list[str]
) -> None:
    inject(cloud.folder, fault)
    code, said = up(prod)
    assert code != 0
    assert [text for text in told if text.lower() not in said.lower()] == [], said[-3000:]
    assert last_update(prod)[0] == "failed"
    assert waiting(cloud.folder) == []  # it was met, not passed by


def kill_midway(prod: Stack, cloud: LocalCloud, fault: Fault) -> dict[str, Any]:
    """SIGKILL an `up` that waits for `fault`; the operation that was under way, as the state tells it."""
    inject(cloud.folder, fault)
    command = cloud.cli.command("up", "--yes", "--skip-preview", "--stack", "prod")
    process = subprocess.Popen(
        command, cwd=prod.folder, env=dict(cloud.cli.environment), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while waiting(cloud.folder):
        assert process.poll() is None and time.monotonic() < deadline, "the fault was not met"
        time.sleep(0.1)
    time.sleep(2)
    plugins = psutil.Process(process.pid).children(recursive=True)  # in groups of their own; some outlive the engine
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    _, left = psutil.wait_procs(plugins, timeout=5)
    assert "python" not in " ".join(part for each in left for part in each.cmdline())  # those of ours end
    for each in left:
        each.kill()
    code, said = up(prod)
    assert code != 0 and "pulumi cancel" in said  # the lock of the one that was killed
    prod.pulumi("cancel", "--yes")
    exported = json.loads(prod.pulumi("stack", "export").stdout)["deployment"]
    (pending,) = [item for item in exported["pending_operations"] if item["type"] == "creating"]
    return dict(pending["resource"])


def test_killed_midway_it_goes_on_as_the_readme_says(prod: Stack, cloud: LocalCloud) -> None:
    pool = ("containerservice:AgentPool", "pools-serve")
    under_way = kill_midway(prod, cloud, Fault("slow", *pool, action="create", seconds=600))
    assert under_way["urn"].endswith("::pools-serve")
    prod.pulumi("refresh", "--yes", "--skip-preview", "--clear-pending-creates")  # Azure never heard of it

    kill_midway(prod, cloud, Fault("unanswered", *pool, action="create", seconds=600))
    prod.pulumi("refresh", "--yes", "--skip-preview", "--clear-pending-creates")  # Azure has made it meanwhile
    code, said = up(prod)
    (made,) = [item.id for item in World(cloud.world).all() if "/agentpools/serve" in item.id.lower()]
    assert code != 0 and f"cannot create already existing resource '{made}'" in said
    with World(cloud.world).hold() as resources:  # as by `az resource delete --ids`
        resources.remove(made)
    code, said = up(prod)
    assert code == 0, said[-3000:]


def test_nothing_is_orphaned(prod: Stack, cloud: LocalCloud) -> None:
    ours = {item["id"].lower() for item in state(prod) if item["type"].startswith("azure-native:")}
    group = next(item["id"].lower() for item in state(prod) if item["type"] == "azure-native:resources:ResourceGroup")
    held = {record.id.lower() for record in World(cloud.world).all()}
    assert {found for found in held if found.startswith(group)} <= ours
    assert ours <= held


def test_what_is_sent_from_inside_waits_for_the_private_endpoints(prod: Stack) -> None:
    sent = [item for item in state(prod) if item["type"].rpartition(":")[2] in ("FileUpload", "ImageBuild")]
    assert len(sent) == 6  # two datasets, four images
    for item in sent:
        assert [urn for urn in item["dependencies"] if ":PrivateDnsZoneGroup::" in urn], item["urn"]


def test_every_pod_is_on_the_pool_meant_for_it(prod: Stack, cloud: LocalCloud) -> None:
    found = placements(cloud)
    assert found["engine"] == found["compile"] == {"serve"} and found["router"] == {"apps"}
    for maker in ("nvidia-device-plugin", "dcgm-exporter"):
        assert found[maker] == {"serve", "tune"} == set(gpu_nodes(cloud).values())
    assert {pool for maker, pools in found.items() if maker.startswith("tune-") for pool in pools} == {"tune"}


def test_a_second_up_changes_nothing(prod: Stack) -> None:
    assert up(prod)[0] == 0
    assert set(last_update(prod)[1]) == {"same"}
    assert preview(prod).changes == {}


def test_more_replicas_are_one_scaled_object(prod: Stack) -> None:
    with edited(prod, SETTINGS, "min_replicas: 3", "min_replicas: 4"):
        # The alert that replicas are missing knows the number too.
        wanted = {"ScaledObject serving-scaling-scaled": {"update"}, "PrometheusRuleGroup alerts-1": {"update"}}
        assert preview(prod).changes == wanted


def replicas(cloud: LocalCloud) -> int:
    with cloud.control_plane.client() as api:
        return int(api.get("/apis/apps/v1/namespaces/drydock-serving/deployments/engine")["spec"]["replicas"])


def test_replicas_stay_on_the_way_from_kedas_number_to_a_fixed_one_and_back(prod: Stack, cloud: LocalCloud) -> None:
    assert replicas(cloud) == 3
    with cloud.control_plane.client() as api:  # as KEDA does it, by its HPA
        scale = "/apis/apps/v1/namespaces/drydock-serving/deployments/engine/scale"
        api.patch(scale, {"spec": {"replicas": 5}}, fieldManager="kube-controller-manager")
    with edited(prod, SETTINGS, "max_num_seqs: 32", "max_num_seqs: 24"):
        code, said = up(prod)
        assert code == 0 and replicas(cloud) == 5, said[-3000:]
    with edited(prod, SETTINGS, "max_replicas: 6", "max_replicas: 3"):
        code, said = up(prod)
        assert code == 0 and replicas(cloud) == 3, said[-3000:]
    code, said = up(prod)  # KEDA's again: absent from what was applied, the number would fall to one
    assert code == 0 and replicas(cloud) == 3, said[-3000:]


def test_a_build_that_fails_leaves_what_runs_and_is_made_up_for(prod: Stack, cloud: LocalCloud) -> None:
    with cloud.control_plane.client() as api:
        before = api.get("/apis/apps/v1/namespaces/drydock-serving/deployments/engine")["spec"]["template"]
    inject(cloud.folder, Fault("build_failed", name="drydock/serving", action="build"))
    with written(prod, "serving/__init__.py", "# changed\n"):
        code, said = up(prod)
        assert code != 0
        for text in ("images-serving", "its build ended as Failed", "az acr task logs"):
            assert text in said, said[-3000:]
        with cloud.control_plane.client() as api:
            after = api.get("/apis/apps/v1/namespaces/drydock-serving/deployments/engine")["spec"]["template"]
        assert after == before
        assert up(prod)[0] == 0
    with cloud.control_plane.client() as api:
        rolled = api.get("/apis/apps/v1/namespaces/drydock-serving/deployments/engine")["spec"]["template"]
    assert rolled != before


def test_what_is_protected_refuses_before_anything_is_gone(prod: Stack) -> None:
    before = [item["urn"] for item in state(prod)]
    done = prod.pulumi("destroy", "--yes", check=False)
    assert done.returncode != 0
    assert "protect" in done.stdout + done.stderr
    assert [item["urn"] for item in state(prod)] == before


def test_destroy_ends_though_the_cluster_is_out_of_reach(prod: Stack, cloud: LocalCloud) -> None:
    with edited(prod, SETTINGS, "drydock:owner:", "drydock:protect: false\n  drydock:owner:"):
        code, said = up(prod)
        assert code == 0, said[-3000:]
        cloud.control_plane.stop()
        done = prod.pulumi("destroy", "--yes", check=False)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert [item["type"] for item in state(prod) if item["type"].startswith("azure-native:")] == []
