"""The stand-in for Azure has state: what it makes is there, what is gone is gone, and names meet; no engine is needed."""

from __future__ import annotations

import base64
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pulumi.runtime.proto import provider_pb2, status_pb2

import localcloud.nodes
from localcloud.azure.faults import Fault, inject, waiting
from localcloud.azure.rules import RULES, parent_of, type_of
from localcloud.azure.values import UNKNOWN
from localcloud.azure.world import Record, World
from tests.stack.azure_engine import GROUP, Engine, Refused

LOCATION = "swedencentral"
IN_GROUP = {"resourceGroupName": "g", "location": LOCATION}
ACCOUNT = IN_GROUP | {"accountName": "data0001", "kind": "StorageV2", "sku": {"name": "Standard_LRS"}}
NETWORK = IN_GROUP | {"virtualNetworkName": "vnet", "subnets": [{"name": "nodes", "addressPrefix": "10.64.0.0/21"}]}
SUBNET = f"{GROUP}/providers/Microsoft.Network/virtualNetworks/vnet/subnets/nodes"
SYSTEM = {"name": "system", "mode": "System", "count": 2, "vmSize": "Standard_D4s_v5", "vnetSubnetID": SUBNET}
CLUSTER = IN_GROUP | {
    "resourceName": "aks", "dnsPrefix": "drydock", "kubernetesVersion": "1.35", "agentPoolProfiles": [SYSTEM],
    "oidcIssuerProfile": {"enabled": True},
}  # fmt: skip
POOL = {
    "resourceGroupName": "g", "resourceName": "aks", "agentPoolName": "a100", "vmSize": "Standard_NC24ads_A100_v4",
    "enableAutoScaling": True, "minCount": 0, "maxCount": 2, "osDiskSizeGB": 256, "orchestratorVersion": "1.35",
}  # fmt: skip
IDENTITY = IN_GROUP | {"resourceName": "kubelet"}
ROLE = "/subscriptions/s/providers/Microsoft.Authorization/roleDefinitions/r"


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    engine = Engine(tmp_path)
    engine.make("resources:ResourceGroup", {"resourceGroupName": "g", "location": LOCATION})
    return engine


@pytest.fixture
def cluster(engine: Engine) -> Engine:
    engine.make("network:VirtualNetwork", NETWORK)
    engine.make("containerservice:ManagedCluster", CLUSTER)
    return engine


def kinds(answer: Any) -> dict[str, str]:
    names = provider_pb2.PropertyDiff.Kind
    return {path: names.Name(each.kind) for path, each in answer.detailedDiff.items()}


def refusal(call: Any, *arguments: Any) -> str:
    with pytest.raises(Refused) as caught:
        call(*arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("token", "old", "new", "expected"),
    [
        ("containerservice:AgentPool", POOL, {"maxCount": 3}, {"maxCount": "UPDATE"}),
        ("containerservice:AgentPool", POOL, {"vmSize": "other"}, {"vmSize": "UPDATE_REPLACE"}),
        ("containerservice:AgentPool", POOL, {"agentPoolName": "b"}, {"agentPoolName": "UPDATE_REPLACE"}),
        ("containerservice:AgentPool", POOL, {"agentPoolName": UNKNOWN}, {"agentPoolName": "UPDATE_REPLACE"}),
        ("containerservice:AgentPool", POOL, {"osDiskSizeGB": 64}, {"osDiskSizeGB": "UPDATE"}),  # Azure refuses it
        ("containerservice:AgentPool", POOL, {"nodeLabels": {"a": "b"}}, {"nodeLabels": "ADD"}),
        ("containerservice:AgentPool", POOL | {"tags": {"a": "1", "b": "1"}}, {"tags": {"b": "2"}},
         {"tags.a": "DELETE", "tags.b": "UPDATE"}),
        ("containerservice:ManagedCluster", CLUSTER, {"dnsPrefix": "x"}, {"dnsPrefix": "UPDATE_REPLACE"}),
        ("containerservice:ManagedCluster", CLUSTER, {"location": "Sweden Central"}, {}),
        ("containerservice:ManagedCluster", CLUSTER, {"location": "westeurope"}, {"location": "UPDATE_REPLACE"}),
        ("containerservice:ManagedCluster", CLUSTER | {"networkProfile": {"podCidr": "a", "loadBalancerSku": "x"}},
         {"networkProfile": {"podCidr": "b", "loadBalancerSku": "y"}},
         {"networkProfile.podCidr": "UPDATE_REPLACE", "networkProfile.loadBalancerSku": "UPDATE"}),
        ("containerservice:ManagedCluster", CLUSTER, {"agentPoolProfiles": [SYSTEM | {"count": 3}, {"name": "more"}]},
         {"agentPoolProfiles[0].count": "UPDATE", "agentPoolProfiles[1]": "ADD"}),
        ("network:PublicIPAddress", {"sku": {"name": "Basic"}}, {"sku": {"name": "Standard"}},
         {"sku.name": "UPDATE_REPLACE"}),
        ("storage:StorageAccount", ACCOUNT, {"isHnsEnabled": True}, {"isHnsEnabled": "ADD_REPLACE"}),
        ("authorization:RoleAssignment", {"principalId": "a", "scope": "b"}, {"principalId": "c", "scope": "d"},
         {"principalId": "UPDATE_REPLACE", "scope": "UPDATE_REPLACE"}),
    ],
)  # fmt: skip
def test_a_change_is_an_update_or_a_replacement_as_the_real_provider_says(
    engine: Engine, token: str, old: dict[str, Any], new: dict[str, Any], expected: dict[str, str]
) -> None:
    answer = engine.diff(token, old, old | new)
    replaced = [path for path, kind in expected.items() if kind.endswith("REPLACE")]
    assert kinds(answer) == expected and sorted(answer.replaces) == sorted(replaced)
    assert answer.changes == (provider_pb2.DiffResponse.DIFF_SOME if expected else provider_pb2.DiffResponse.DIFF_NONE)
    assert answer.deleteBeforeReplace is bool(replaced)  # an explicit name stands in the way of the new one
    assert all(each.inputDiff for each in answer.detailedDiff.values())


def test_a_name_of_the_providers_own_lets_the_new_one_be_made_first(engine: Engine) -> None:
    old = POOL | {"__createBeforeDelete": True}
    assert engine.diff("containerservice:AgentPool", old, old | {"vmSize": "x"}).deleteBeforeReplace is False


def test_a_preview_knows_the_inputs_and_nothing_else(engine: Engine) -> None:
    given = CLUSTER | {"identity": {"type": "UserAssigned", "userAssignedIdentities": ["/id"]}}
    seen = engine.preview("containerservice:ManagedCluster", given)
    assert seen["dnsPrefix"] == "drydock" and seen["oidcIssuerProfile"] == {"enabled": True, "issuerURL": UNKNOWN}
    assert seen["name"] == seen["fqdn"] == UNKNOWN and "resourceGroupName" not in seen
    # A list on its way in and a map on its way out.
    assert seen["identity"]["type"] == "UserAssigned" and seen["identity"]["userAssignedIdentities"] == UNKNOWN
    assert [record.token for record in World(engine.world).all()] == ["azure-native:resources:ResourceGroup"]


def test_a_preview_of_an_update_keeps_name_and_location(cluster: Engine) -> None:
    id_ = f"{GROUP}/providers/Microsoft.ContainerService/managedClusters/aks"
    seen = cluster.update("containerservice:ManagedCluster", id_, CLUSTER | {"tags": {"a": "b"}}, preview=True)
    assert (seen["name"], seen["location"], seen["fqdn"]) == ("aks", LOCATION, UNKNOWN)
    assert "tags" not in cluster.read("containerservice:ManagedCluster", id_)[1]


def test_what_is_made_is_there_for_another_process_and_gone_when_deleted(engine: Engine, tmp_path: Path) -> None:
    id_, made = engine.make("managedidentity:UserAssignedIdentity", IDENTITY)
    assert id_ == f"{GROUP}/providers/Microsoft.ManagedIdentity/userAssignedIdentities/kubelet"
    other = Engine(tmp_path)
    assert other.read("managedidentity:UserAssignedIdentity", id_.upper()) == (id_, made, IDENTITY)
    assert made["principalId"] != made["clientId"] and made["name"] == "kubelet"
    assert made["type"] == "Microsoft.ManagedIdentity/userAssignedIdentities"
    other.delete("managedidentity:UserAssignedIdentity", id_)
    other.delete("managedidentity:UserAssignedIdentity", id_)
    assert engine.read("managedidentity:UserAssignedIdentity", id_) == ("", {}, {})


def test_what_is_there_is_not_made_again_and_what_is_gone_is(engine: Engine) -> None:
    id_, first = engine.make("managedidentity:UserAssignedIdentity", IDENTITY)
    told = refusal(engine.make, "managedidentity:UserAssignedIdentity", IDENTITY)
    assert told == f"cannot create already existing resource '{id_}'"
    engine.delete("managedidentity:UserAssignedIdentity", id_)
    assert engine.update("managedidentity:UserAssignedIdentity", id_, IDENTITY) == first  # an update is a PUT


def test_a_singleton_is_always_there(engine: Engine) -> None:
    engine.make("storage:StorageAccount", ACCOUNT)
    service = {"resourceGroupName": "g", "accountName": "data0001", "blobServicesName": "default"}
    engine.make("storage:BlobServiceProperties", service)
    assert engine.make("storage:BlobServiceProperties", service)[0].endswith("/blobServices/default")


def test_parents_and_references_must_be_there(engine: Engine) -> None:
    assert 'Status=404 Code="ParentResourceNotFound"' in refusal(engine.make, "containerservice:AgentPool", POOL)
    elsewhere = ACCOUNT | {"resourceGroupName": "other"}
    told = refusal(engine.make, "storage:StorageAccount", elsewhere)
    assert told == 'Status=404 Code="ResourceGroupNotFound" Message="Resource group \'other\' could not be found."'
    assert f"{SUBNET.lower()} referenced by" in refusal(engine.make, "containerservice:ManagedCluster", CLUSTER)
    engine.make("network:VirtualNetwork", NETWORK)
    engine.make("containerservice:ManagedCluster", CLUSTER)
    assignment = {"roleAssignmentName": "n", "principalId": "p", "roleDefinitionId": ROLE, "scope": f"{SUBNET}x"}
    assert "was not found" in refusal(engine.make, "authorization:RoleAssignment", assignment)
    engine.make("authorization:RoleAssignment", assignment | {"scope": SUBNET})


@pytest.mark.parametrize("outer", ["group", "cluster"])
def test_children_go_with_what_they_belong_to(cluster: Engine, outer: str) -> None:
    pool, _ = cluster.make("containerservice:AgentPool", POOL)
    id_ = GROUP if outer == "group" else f"{GROUP}/providers/Microsoft.ContainerService/managedClusters/aks"
    cluster.delete("resources:ResourceGroup" if outer == "group" else "containerservice:ManagedCluster", id_)
    assert cluster.read("containerservice:AgentPool", pool)[0] == ""
    assert (
        cluster.read(
            "containerservice:ManagedCluster", f"{GROUP}/providers/Microsoft.ContainerService/managedClusters/aks"
        )[0]
        == ""
    )
    assert cluster.read("network:VirtualNetwork", SUBNET.rpartition("/subnets/")[0])[0] == (
        "" if outer == "group" else SUBNET.rpartition("/subnets/")[0]
    )


@pytest.mark.parametrize(
    ("token", "inputs", "said"),
    [
        ("storage:StorageAccount", ACCOUNT, 'Status=409 Code="StorageAccountAlreadyTaken" Message="The storage account named data0001 is already taken."'),
        ("containerregistry:Registry", IN_GROUP | {"registryName": "reg01", "sku": {"name": "Standard"}}, "The registry DNS name reg01.azurecr.io is already in use"),
        ("dashboard:Grafana", IN_GROUP | {"workspaceName": "board1"}, "The workspace name board1 is not available"),
    ],
)  # fmt: skip
def test_names_of_the_whole_world_meet_between_stacks(
    engine: Engine, tmp_path: Path, token: str, inputs: dict[str, Any], said: str
) -> None:
    engine.make(token, inputs)
    other = Engine(tmp_path)
    other.make("resources:ResourceGroup", {"resourceGroupName": "other", "location": LOCATION})
    assert said in refusal(other.make, token, inputs | {"resourceGroupName": "other"})


def test_a_role_is_given_once_and_its_guid_is_one_in_the_tenant(engine: Engine) -> None:
    given = {"roleAssignmentName": "n1", "principalId": "p", "roleDefinitionId": ROLE, "scope": GROUP}
    engine.make("authorization:RoleAssignment", given)
    told = refusal(engine.make, "authorization:RoleAssignment", given | {"roleAssignmentName": "n2"})
    assert 'Code="RoleAssignmentExists"' in told
    other, _ = engine.make("managedidentity:UserAssignedIdentity", IDENTITY)
    told = refusal(engine.make, "authorization:RoleAssignment", given | {"scope": other, "principalId": "q"})
    assert 'Code="RoleAssignmentUpdateNotPermitted"' in told


def test_what_is_in_use_is_not_deleted(cluster: Engine) -> None:
    network = SUBNET.rpartition("/subnets/")[0]
    assert 'Code="InUseSubnetCannotBeDeleted"' in refusal(cluster.delete, "network:VirtualNetwork", network)
    without = NETWORK | {"subnets": [{"name": "others", "addressPrefix": "10.64.8.0/24"}]}
    assert "Subnet nodes is in use by" in refusal(cluster.update, "network:VirtualNetwork", network, without)
    cluster.delete(
        "containerservice:ManagedCluster", f"{GROUP}/providers/Microsoft.ContainerService/managedClusters/aks"
    )
    cluster.update("network:VirtualNetwork", network, without)
    cluster.delete("network:VirtualNetwork", network)


def test_what_azure_never_changes_is_refused_by_name(cluster: Engine) -> None:
    id_, _ = cluster.make("containerservice:AgentPool", POOL)
    told = refusal(cluster.update, "containerservice:AgentPool", id_, POOL | {"osDiskSizeGB": 64})
    assert 'Code="PropertyChangeNotAllowed"' in told and "properties.osDiskSizeGB" in told
    assert cluster.update("containerservice:AgentPool", id_, POOL | {"maxCount": 4})["maxCount"] == 4
    aks = f"{GROUP}/providers/Microsoft.ContainerService/managedClusters/aks"
    bigger = CLUSTER | {"agentPoolProfiles": [SYSTEM | {"vmSize": "Standard_D8s_v5"}]}
    assert "PropertyChangeNotAllowed" in refusal(cluster.update, "containerservice:ManagedCluster", aks, bigger)
    more = CLUSTER | {"agentPoolProfiles": [SYSTEM | {"name": "another", "vmSize": "Standard_D8s_v5"}, SYSTEM]}
    cluster.update("containerservice:ManagedCluster", aks, more)


def test_nodes_are_not_newer_than_their_control_plane(cluster: Engine) -> None:
    told = refusal(cluster.make, "containerservice:AgentPool", POOL | {"orchestratorVersion": "1.36.1"})
    assert 'Code="NodePoolMcVersionIncompatible"' in told
    cluster.make("containerservice:AgentPool", POOL | {"orchestratorVersion": "1.34"})


def test_outputs_follow_from_the_id_and_name_the_identities(engine: Engine, tmp_path: Path) -> None:
    identity, known = engine.make("managedidentity:UserAssignedIdentity", IDENTITY)
    engine.make("network:VirtualNetwork", NETWORK)
    given = CLUSTER | {"identity": {"type": "UserAssigned", "userAssignedIdentities": [identity]}}
    id_, made = engine.make("containerservice:ManagedCluster", given)
    assert made["identity"]["userAssignedIdentities"] == {
        identity: {"principalId": known["principalId"], "clientId": known["clientId"]}
    }
    assert made["oidcIssuerProfile"]["issuerURL"].startswith(f"https://{LOCATION}.oic.prod-aks.azure.com/")
    assert made["fqdn"].endswith(f".hcp.{LOCATION}.azmk8s.io") and "privateFQDN" not in made
    private = {"enablePrivateCluster": True, "enablePrivateClusterPublicFQDN": False}
    hidden = engine.update("containerservice:ManagedCluster", id_, given | {"apiServerAccessProfile": private})
    assert "fqdn" not in hidden and ".privatelink." in hidden["privateFQDN"]
    again = Engine(tmp_path / "again")
    again.make("resources:ResourceGroup", {"resourceGroupName": "g", "location": LOCATION})
    assert again.make("managedidentity:UserAssignedIdentity", IDENTITY)[1] == known


def test_who_is_asking_and_the_kubeconfig(cluster: Engine, tmp_path: Path) -> None:
    me = cluster.invoke("authorization:getClientConfig", {})
    assert set(me) == {"clientId", "objectId", "subscriptionId", "tenantId"} and me["subscriptionId"] in GROUP
    ask = {"resourceGroupName": "g", "resourceName": "aks", "format": "exec"}
    what = "containerservice:listManagedClusterUserCredentials"
    assert "no control plane" in refusal(cluster.invoke, what, ask)
    (tmp_path / "cluster.json").write_text(json.dumps({"kubeconfig": "kind: Config\n"}))
    (found,) = cluster.invoke(what, ask)["kubeconfigs"]
    assert base64.b64decode(found["value"]) == b"kind: Config\n"
    assert 'Status=404 Code="ResourceNotFound"' in refusal(cluster.invoke, what, ask | {"resourceName": "none"})
    assert "storage:listStorageAccountKeys" in refusal(cluster.invoke, "storage:listStorageAccountKeys", {})


def test_a_pool_is_nodes_of_the_control_plane(cluster: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []
    monkeypatch.setattr(
        localcloud.nodes, "sync", lambda api, pool, nodes: seen.append((pool.rpartition("/")[2], len(nodes)))
    )
    access = {"server": "https://127.0.0.1:1", "token": "t", "ca_file": str(tmp_path / "ca"), "kubeconfig": ""}
    (tmp_path / "cluster.json").write_text(json.dumps(access))
    aks = f"{GROUP}/providers/Microsoft.ContainerService/managedClusters/aks"
    cluster.update("containerservice:ManagedCluster", aks, CLUSTER)
    id_, _ = cluster.make("containerservice:AgentPool", POOL)
    cluster.update("containerservice:AgentPool", id_, POOL | {"maxCount": 3})
    cluster.delete("containerservice:AgentPool", id_)
    cluster.make("containerservice:AgentPool", POOL)
    cluster.delete("resources:ResourceGroup", GROUP)
    assert seen == [("system", 2), ("a100", 2), ("a100", 3), ("a100", 0), ("a100", 2), ("system", 0), ("a100", 0)]


def test_what_programs_put_into_a_cluster_goes_with_it(
    cluster: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def item(name: str, manager: str, namespace: str | None = None) -> dict[str, Any]:
        found = {"name": name, "managedFields": [{"manager": manager}]}
        return {"metadata": found | ({"namespace": namespace} if namespace else {})}

    class Api:
        objects: ClassVar = {
            "/api/v1/namespaces": [item("kube-system", "kube-apiserver"), item("models", "pulumi-kubernetes-1")],
            "/api/v1/configmaps": [item("a", "pulumi-kubernetes-2", "models"), item("b", "pulumi-kubernetes-3", "kube-system"),
                                   item("c", "drydock-localcloud", "kube-system")],
            "/api/v1/nodes": [],
            "/apis/scheduling.k8s.io/v1/priorityclasses": [item("high", "pulumi-kubernetes-4"), item("top", "kube-apiserver")],
        }  # fmt: skip
        deleted: ClassVar[list[str]] = []

        def __init__(self, *_: object) -> None: ...

        def __enter__(self) -> Api:
            return self

        def __exit__(self, *_: object) -> None: ...

        def get(self, path: str) -> dict[str, Any]:
            if path == "/apis":
                return {"groups": [{"preferredVersion": {"groupVersion": "scheduling.k8s.io/v1"}}]}
            kinds = [key.rpartition("/")[2] for key in self.objects if key.rpartition("/")[0] == path]
            reviews = {"name": "tokenreviews", "verbs": ["create"]}
            return {"resources": [reviews, *({"name": name, "verbs": ["list", "delete"]} for name in kinds)]}

        def list(self, path: str, **_: str) -> Any:
            return self.objects[path]

        def delete(self, path: str, **_: str) -> None:
            self.deleted.append(path)
            self.objects[path.rpartition("/")[0]] = []

    monkeypatch.setattr("localcloud.api.Api", Api)
    (tmp_path / "cluster.json").write_text(json.dumps({"server": "", "token": "", "ca_file": "", "kubeconfig": ""}))
    cluster.delete("resources:ResourceGroup", GROUP)
    assert Api.deleted == [
        "/api/v1/namespaces/models",
        "/api/v1/namespaces/kube-system/configmaps/b",
        "/apis/scheduling.k8s.io/v1/priorityclasses/high",
    ]


def test_a_size_that_nobody_knows_is_refused(cluster: Engine) -> None:
    told = refusal(cluster.make, "containerservice:AgentPool", POOL | {"vmSize": "Standard_None"})
    assert "InvalidParameter" in told and "Standard_None" in told
    assert not cluster.context.metadata and "/agentpools/" not in str(World(cluster.world).all()).lower()


def test_a_cluster_that_does_not_answer_keeps_nothing_from_being_deleted(cluster: Engine, tmp_path: Path) -> None:
    (tmp_path / "ca").write_text("")
    access = {"server": "http://127.0.0.1:1", "token": "t", "ca_file": str(tmp_path / "ca"), "kubeconfig": ""}
    (tmp_path / "cluster.json").write_text(json.dumps(access))
    assert "the control plane does not take it" in refusal(cluster.make, "containerservice:AgentPool", POOL)
    ((key, _),) = cluster.context.metadata
    assert key == "grpc-status-details-bin"  # it is there, and stays in the state
    cluster.delete("resources:ResourceGroup", GROUP)
    assert World(cluster.world).all() == []


def test_containers_are_made_in_the_emulator_too(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Client:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> Client:
            return self

        def __exit__(self, *_: object) -> None: ...

        def create_container(self) -> None:
            seen.append(f"+{self.name}")

        def delete_container(self) -> None:
            seen.append(f"-{self.name}")

    monkeypatch.setattr("localcloud.azure.hands._container_client", Client)
    for account in ("data0001", "data0002"):
        engine.make("storage:StorageAccount", ACCOUNT | {"accountName": account})
        engine.make(
            "storage:BlobContainer", {"resourceGroupName": "g", "accountName": account, "containerName": "models"}
        )
    accounts = f"{GROUP}/providers/Microsoft.Storage/storageAccounts"
    engine.delete("storage:StorageAccount", f"{accounts}/data0001")
    assert seen == ["+models", "+models"]  # the other account has it still
    engine.delete("storage:StorageAccount", f"{accounts}/data0002")
    assert seen[2:] == ["-models"]


def test_faults_are_met_once_by_whom_they_are_meant_for(cluster: Engine) -> None:
    inject(cluster.folder, Fault("conflict", "AgentPool", "a100"), Fault("quota", "containerservice:AgentPool"))
    cluster.make("managedidentity:UserAssignedIdentity", IDENTITY)
    pool = f"{GROUP}/providers/Microsoft.ContainerService/managedClusters/aks/agentPools/a100"
    cluster.read("containerservice:AgentPool", pool)  # looking neither conflicts nor takes quota
    assert 'Status=409 Code="Conflict"' in refusal(cluster.make, "containerservice:AgentPool", POOL)
    told = refusal(cluster.make, "containerservice:AgentPool", POOL)
    assert 'Code="ErrCode_InsufficientVCPUQuota"' in told
    assert "quota requested 24, remaining 0 for family StandardNCADSA100v4Family" in told
    cluster.make("containerservice:AgentPool", POOL)
    assert waiting(cluster.folder) == []


def test_a_throttle_is_waited_out_up_to_the_providers_patience(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localcloud.azure.provider.THROTTLE_SECONDS", 0.0)
    inject(engine.folder, Fault("throttled", times=3))
    id_, _ = engine.make("managedidentity:UserAssignedIdentity", IDENTITY)
    inject(engine.folder, Fault("throttled", "UserAssignedIdentity", action="delete", times=4))
    assert 'Status=429 Code="TooManyRequests"' in refusal(engine.delete, "managedidentity:UserAssignedIdentity", id_)
    engine.delete("managedidentity:UserAssignedIdentity", id_)


def test_what_vanished_is_gone_and_what_is_slow_comes(cluster: Engine) -> None:
    id_, _ = cluster.make("containerservice:AgentPool", POOL)
    inject(cluster.folder, Fault("vanished", "AgentPool", action="read"), Fault("slow", seconds=0.05, action="update"))
    assert cluster.read("containerservice:AgentPool", id_)[0] == ""
    started = time.monotonic()
    cluster.update("containerservice:AgentPool", id_, POOL)
    assert time.monotonic() - started >= 0.05


def test_what_is_half_made_stays_with_its_reason(cluster: Engine) -> None:
    inject(cluster.folder, Fault("half_made", "AgentPool"))
    assert 'Code="Conflict"' in refusal(cluster.make, "containerservice:AgentPool", POOL)
    ((key, data),) = cluster.context.metadata
    assert key == "grpc-status-details-bin"
    detail = provider_pb2.ErrorResourceInitFailed()
    assert status_pb2.Status.FromString(data).details[0].Unpack(detail)
    assert detail.id.endswith("/agentPools/a100") and "Conflict" in detail.reasons[0]
    assert cluster.read("containerservice:AgentPool", detail.id)[0] == detail.id


def test_a_fault_that_does_not_exist_is_told() -> None:
    with pytest.raises(ValueError, match="kind 'explode' is not one of conflict"):
        Fault("explode")
    with pytest.raises(ValueError, match="action 'make' is not one of create"):
        Fault("conflict", action="make")


def _add(folder: Path, start: int) -> None:
    for number in range(start, start + 20):
        with World(folder).hold() as resources:
            resources.put(Record(f"/subscriptions/s/resourceGroups/{number}", "t", {}, {}))


def test_two_processes_lose_nothing_of_each_other(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=_add, args=(tmp_path, start)) for start in (0, 100)]
    for each in both:
        each.start()
    for each in both:
        each.join(20)
    assert len(World(tmp_path).all()) == 40


def test_ids_tell_types_and_parents() -> None:
    account = f"{GROUP}/providers/Microsoft.Storage/storageAccounts/a"
    assert parent_of(f"{account}/blobServices/default/containers/c") == account
    assert parent_of(f"{account}/providers/Microsoft.Authorization/roleAssignments/r") == account
    assert parent_of(account) == GROUP and parent_of(GROUP) == ""
    assert type_of(f"{GROUP}/providers/Microsoft.ContainerService/managedClusters/a/agentPools/b") == (
        "Microsoft.ContainerService/managedClusters/agentPools"
    )
    assert RULES["resources:ResourceGroup"].arm_type == "Microsoft.Resources/resourceGroups"
