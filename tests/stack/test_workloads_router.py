"""What clients reach: only labelled namespaces, only read access to pods, and no request lost when a router goes."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from infra.outputs import CLIENT_LABEL
from serving.router import Pods, router_command
from tests.unit.kubernetes_schema import problems
from tests.unit.pulumi_mocks import LOAD_BALANCER, Recorder, deploy
from workloads.metrics import FRONT_PORT
from workloads.router import GRACE_SECONDS, PRE_STOP_SECONDS, REQUEST_SECONDS, Router, RouterArgs

IMAGE = "example.azurecr.io/drydock/router@sha256:" + "d" * 64
VNET = "10.64.0.0/16"


@cache
def declared(expose: str = "cluster", nodes: int = 3) -> Recorder:
    args = RouterArgs(image=IMAGE, expose=expose, vnet_ranges=(VNET,), nodes=nodes)  # type: ignore[arg-type]
    return deploy(lambda: Router("router", args) and None)


def deployment(seen: Recorder) -> dict[str, Any]:
    found: dict[str, Any] = seen.one(":Deployment").inputs["spec"]
    return found


def pod(seen: Recorder) -> dict[str, Any]:
    found: dict[str, Any] = deployment(seen)["template"]["spec"]
    return found


def containers(seen: Recorder) -> dict[str, dict[str, Any]]:
    return {item["name"]: item for item in [*pod(seen)["containers"], *pod(seen)["initContainers"]]}


@pytest.mark.parametrize("expose", ["cluster", "vnet"])
def test_every_object_keeps_the_published_schema(expose: str) -> None:
    objects = [item.inputs for item in declared(expose).resources if item.type.startswith("kubernetes:")]
    assert {item["kind"] for item in objects} == {
        "ServiceAccount", "Role", "RoleBinding", "NetworkPolicy", "PodDisruptionBudget", "Deployment", "Service",
    }  # fmt: skip
    assert [said for item in objects for said in problems(item)] == []


def test_selectors_find_the_pods_and_the_service_its_port() -> None:
    seen = declared()
    labels = deployment(seen)["template"]["metadata"]["labels"]
    service = seen.one(":Service").inputs["spec"]
    selectors = [
        service["selector"],
        deployment(seen)["selector"]["matchLabels"],
        seen.one(":PodDisruptionBudget").inputs["spec"]["selector"]["matchLabels"],
        seen.one(":NetworkPolicy").inputs["spec"]["podSelector"]["matchLabels"],
    ]
    assert all(selector.items() <= labels.items() for selector in selectors)
    assert service["ports"][0]["port"] == 80
    assert service["ports"][0]["targetPort"] == containers(seen)["front"]["ports"][0]["containerPort"] == 8080


def test_the_router_listens_to_the_front_alone_and_finds_the_engines() -> None:
    command = containers(declared())["router"]["command"]
    assert command[:3] == ["python", "-m", "serving.router"]
    given = dict(zip(command[3::2], command[4::2], strict=True))
    assert given["--host"] == "127.0.0.1" and given["--metrics-host"] == "0.0.0.0"
    assert given["--selector"] == "app=engine" and given["--namespace"] == "drydock-serving"
    assert given["--replica-port"] == "8000"
    environment = {item["name"]: item["value"] for item in containers(declared())["front"]["env"]}
    assert environment["ROUTER_PORT"] == given["--port"] != environment["FRONT_PORT"]


def test_it_may_read_pods_and_nothing_else() -> None:
    seen = declared()
    assert seen.one(":Role").inputs["rules"] == [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}
    ]
    binding = seen.one(":RoleBinding").inputs
    assert binding["roleRef"]["name"] == seen.one(":Role").inputs["metadata"]["name"]
    account = seen.one(":ServiceAccount").inputs["metadata"]["name"]
    assert binding["subjects"][0]["name"] == account == pod(seen)["serviceAccountName"]
    assert pod(seen)["automountServiceAccountToken"] is True


def test_who_gets_in() -> None:
    for expose, ranges in (("cluster", []), ("vnet", [VNET])):
        clients, scrape = declared(expose).one(":NetworkPolicy").inputs["spec"]["ingress"]
        assert [int(item["port"]) for item in clients["ports"]] == [8080]
        peers = clients["from"]
        assert [peer["ipBlock"]["cidr"] for peer in peers if "ipBlock" in peer] == ranges
        spaces = [peer["namespaceSelector"]["matchLabels"] for peer in peers if "namespaceSelector" in peer]
        assert spaces == [CLIENT_LABEL] == [{"drydock/client": "true"}]
        assert [int(item["port"]) for item in scrape["ports"]] == [29000, 8405]
        assert all(set(peer) == {"podSelector", "namespaceSelector"} for peer in scrape["from"])


def test_prometheus_finds_both_of_its_ports() -> None:
    annotations = deployment(declared())["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == "29000"
    ports = {item["name"]: item["containerPort"] for item in containers(declared())["front"]["ports"]}
    environment = {item["name"]: item["value"] for item in containers(declared())["front"]["env"]}
    assert ports[FRONT_PORT] == int(environment["FRONT_METRICS_PORT"]) == 8405


def test_what_gets_out_is_the_engines_and_the_api_server() -> None:
    engines, https = declared().one(":NetworkPolicy").inputs["spec"]["egress"]
    assert engines["to"] == [{"podSelector": {"matchLabels": {"app": "engine"}}}]
    assert [int(item["port"]) for item in engines["ports"]] == [8000]
    assert [int(item["port"]) for item in https["ports"]] == [443]


def test_inside_the_virtual_network_by_an_internal_load_balancer_that_keeps_the_clients_address() -> None:
    service = declared("vnet").one(":Service").inputs
    assert service["spec"]["type"] == "LoadBalancer"
    assert service["metadata"]["annotations"] == {"service.beta.kubernetes.io/azure-load-balancer-internal": "true"}
    assert service["spec"]["externalTrafficPolicy"] == "Local"
    inside = declared().one(":Service").inputs
    assert inside["spec"]["type"] == "ClusterIP" and "annotations" not in inside["metadata"]


@pytest.mark.parametrize(
    ("expose", "url"),
    [("cluster", "http://drydock.drydock-serving.svc.cluster.local"), ("vnet", f"http://{LOAD_BALANCER}")],
)
def test_the_url_is_that_of_the_service(expose: Any, url: str) -> None:
    urls: list[str] = []
    args = RouterArgs(image=IMAGE, expose=expose, vnet_ranges=("10.64.0.0/16",), nodes=1)
    deploy(lambda: Router("router", args).url.apply(urls.append))
    assert urls == [url]


def test_two_routers_on_two_nodes_where_there_can_be_two() -> None:
    assert deployment(declared())["replicas"] == 2
    terms = pod(declared())["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert terms[0]["topologyKey"] == "kubernetes.io/hostname"
    assert terms[0]["matchLabelKeys"] == ["pod-template-hash"]  # or a rollout would wait for a third node
    assert "affinity" not in pod(declared(nodes=1))
    assert pod(declared())["nodeSelector"] == {"drydock/pool": "apps"}
    assert declared().one(":PodDisruptionBudget").inputs["spec"]["maxUnavailable"] == 1


def test_running_requests_end_within_the_grace_period() -> None:
    command = router_command(Pods(("app=engine",), "x", 8000), ("127.0.0.1", 1), ("127.0.0.1", 2))
    assert command[command.index("--request-timeout-secs") + 1] == str(REQUEST_SECONDS)
    front = (Path(__file__).parents[2] / "serving" / "front.cfg").read_text()
    hard_stop = int(front.split("hard-stop-after ")[1].split("s")[0])
    assert hard_stop > REQUEST_SECONDS
    assert pod(declared())["terminationGracePeriodSeconds"] == GRACE_SECONDS > PRE_STOP_SECONDS + hard_stop
    stop = containers(declared())["front"]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert stop == PRE_STOP_SECONDS


def test_the_router_is_there_before_the_front_and_after_it() -> None:
    assert containers(declared())["router"]["restartPolicy"] == "Always"
    assert [item["name"] for item in pod(declared())["initContainers"]] == ["router"]
    # Without a replica the front still answers: 503, and the request counts.
    assert containers(declared())["front"]["readinessProbe"]["httpGet"] == {"path": "/liveness", "port": 8080}


def test_containers_are_closed() -> None:
    for item in containers(declared()).values():
        assert item["image"] == IMAGE
        assert item["securityContext"]["readOnlyRootFilesystem"] is True
        assert set(item["resources"]["limits"]) == {"cpu", "memory", "ephemeral-storage"}
