"""The cluster as Azure gets it: who may reach it, who may use it, what it is made of."""

from __future__ import annotations

import asyncio
from functools import cache
from typing import Any

import pulumi
import pytest

from infra.cluster import Cluster, ClusterArgs
from infra.kubeconfig import for_kubelogin
from infra.network import Network, NetworkArgs
from infra.place import Place
from infra.roles import CLUSTER_ADMIN, MANAGED_IDENTITY_OPERATOR, NETWORK_CONTRIBUTOR
from infra.settings import Cluster as ClusterSettings
from infra.settings import Network as NetworkSettings
from tests.unit.pulumi_mocks import ADMIN, KUBECONFIG, TENANT, Recorder, place
from tests.unit.registrations import Request, deploy_with_requests, orphans

RANGES = ("203.0.113.7/32", "198.51.100.0/24")
LOGS = "/subscriptions/0/logs"


def cluster(where: Place, network: dict[str, Any], **settings: Any) -> Cluster:
    wanted = NetworkSettings(**network)
    args = ClusterArgs(
        where,
        ClusterSettings(**settings),
        wanted,
        Network("network", NetworkArgs(where, wanted)),
        LOGS,
    )
    return Cluster("cluster", args)


def made(
    network: dict[str, Any], *, protect: bool = True, **settings: Any
) -> tuple[Recorder, dict[tuple[str, str], Request]]:
    where = place(private=network.get("private", False), protect=protect)
    return deploy_with_requests(lambda: cluster(where, network, **settings))


@cache
def public(**settings: Any) -> dict[str, Any]:
    found: dict[str, Any] = made({"authorized_ip_ranges": RANGES}, **settings)[0].one(":ManagedCluster").inputs
    return found


def test_a_public_api_server_answers_the_named_ranges_alone() -> None:
    sent = public()
    access = sent["apiServerAccessProfile"]
    assert access["authorizedIPRanges"] == list(RANGES)
    assert access["enablePrivateCluster"] is False
    assert access["disableRunCommand"] is True
    assert sent["publicNetworkAccess"] == "Enabled"


def test_a_private_cluster_has_nothing_public() -> None:
    sent = made({"private": True})[0].one(":ManagedCluster").inputs
    access = sent["apiServerAccessProfile"]
    assert sent["publicNetworkAccess"] == "Disabled"
    assert access["enablePrivateCluster"] is True
    assert access["enablePrivateClusterPublicFQDN"] is False
    assert access["privateDNSZone"] == "system"
    assert access["disableRunCommand"] is True
    assert "authorizedIPRanges" not in access


@pytest.mark.parametrize("network", [{"private": True}, {"authorized_ip_ranges": RANGES}])
def test_nodes_reach_the_api_server_inside_the_network(network: dict[str, Any]) -> None:
    access = made(network)[0].one(":ManagedCluster").inputs["apiServerAccessProfile"]
    assert access["enableVnetIntegration"] is True
    assert access["subnetId"].endswith("/subnets/api-server")


def test_people_and_pods_sign_in_with_entra_alone() -> None:
    sent = public()
    assert sent["disableLocalAccounts"] is True
    assert sent["enableRBAC"] is True
    assert sent["aadProfile"] == {"managed": True, "enableAzureRBAC": True, "tenantID": TENANT}
    assert sent["oidcIssuerProfile"] == {"enabled": True}
    assert sent["securityProfile"]["workloadIdentity"] == {"enabled": True}
    assert sent["securityProfile"]["imageCleaner"] == {"enabled": True, "intervalHours": 168}
    assert sent["nodeResourceGroupProfile"] == {"restrictionLevel": "ReadOnly"}


def test_system_pool_is_the_only_inline_one_and_is_tainted() -> None:
    (pool,) = public(zones=("1", "2", "3"), system_nodes=3, kubernetes_version="1.36")["agentPoolProfiles"]
    assert (pool["name"], pool["mode"], pool["count"]) == ("system", "System", 3)
    assert pool["nodeTaints"] == ["CriticalAddonsOnly=true:NoSchedule"]
    assert pool["availabilityZones"] == ["1", "2", "3"]
    assert pool["orchestratorVersion"] == "1.36"
    assert pool["vnetSubnetID"].endswith("/subnets/nodes")
    assert pool["upgradeSettings"] == {"maxSurge": "33%"}  # AKS allows no maxUnavailable on a system pool
    assert pool["securityProfile"] == {"enableVTPM": True, "enableSecureBoot": True}


@pytest.mark.parametrize(
    ("outbound", "expected"), [("load_balancer", "loadBalancer"), ("nat_gateway", "userAssignedNATGateway")]
)
def test_network_profile(outbound: str, expected: str) -> None:
    seen, _ = made({"authorized_ip_ranges": RANGES, "outbound": outbound})
    assert seen.one(":ManagedCluster").inputs["networkProfile"] == {
        "networkPlugin": "azure",
        "networkPluginMode": "overlay",
        "networkDataplane": "cilium",
        "networkPolicy": "cilium",
        "podCidr": "192.168.0.0/16",
        "serviceCidr": "10.0.0.0/16",
        "dnsServiceIP": "10.0.0.10",
        "loadBalancerSku": "standard",
        "outboundType": expected,
    }


def test_add_ons_and_upgrades() -> None:
    sent = public()
    assert sent["workloadAutoScalerProfile"] == {"keda": {"enabled": True}}
    assert sent["azureMonitorProfile"] == {"metrics": {"enabled": True}}
    assert sent["addonProfiles"] == {
        "omsagent": {"enabled": True, "config": {"logAnalyticsWorkspaceResourceID": LOGS, "useAADAuth": "true"}}
    }
    assert sent["autoUpgradeProfile"] == {"upgradeChannel": "patch", "nodeOSUpgradeChannel": "NodeImage"}
    assert not [name for name, item in sent["storageProfile"].items() if item["enabled"]]
    assert set(sent["storageProfile"]) == {"blobCSIDriver", "diskCSIDriver", "fileCSIDriver", "snapshotController"}
    assert sent["autoScalerProfile"] == {
        "maxNodeProvisionTime": "20m",
        "skipNodesWithLocalStorage": "false",
        "skipNodesWithSystemPods": "false",
    }


def test_the_free_tier_gets_nothing_that_wants_a_paid_one() -> None:
    free, standard, premium = public(tier="Free"), public(tier="Standard"), public(tier="Premium")
    assert [item["sku"] for item in (free, standard, premium)] == [
        {"name": "Base", "tier": tier} for tier in ("Free", "Standard", "Premium")
    ]
    assert "metricsProfile" not in free and standard["metricsProfile"] == {"costAnalysis": {"enabled": True}}
    assert "supportPlan" not in standard and premium["supportPlan"] == "AKSLongTermSupport"


@pytest.mark.parametrize(("provisioning", "mode"), [("pools", "Manual"), ("automatic", "Auto")])
def test_node_provisioning_never_makes_pools_of_its_own(provisioning: str, mode: str) -> None:
    assert public(provisioning=provisioning)["nodeProvisioningProfile"] == {"mode": mode, "defaultNodePools": "None"}


def test_both_upgrade_windows_are_the_one_in_the_settings() -> None:
    maintenance = {"day": "Tuesday", "start": "21:30", "utc_offset": "+02:00", "hours": 8}
    seen, _ = made({"authorized_ip_ranges": RANGES}, maintenance=maintenance)
    windows = {item.inputs["configName"]: item.inputs for item in seen.of(":MaintenanceConfiguration")}
    assert set(windows) == {"aksManagedAutoUpgradeSchedule", "aksManagedNodeOSUpgradeSchedule"}
    for window in windows.values():
        assert window["resourceName"] == "drydock-test-aks"
        assert window["maintenanceWindow"] == {
            "durationHours": 8,
            "startTime": "21:30",
            "utcOffset": "+02:00",
            "schedule": {"weekly": {"dayOfWeek": "Tuesday", "intervalWeeks": 1}},
        }


def test_roles_are_given_before_the_cluster_is_made() -> None:
    seen, requests = made({"private": True})
    roles = {
        (item.inputs["roleDefinitionId"].rpartition("/")[2], item.inputs["scope"].rpartition("/")[2])
        for item in seen.of(":RoleAssignment")
    }
    assert roles == {
        (NETWORK_CONTRIBUTOR, "nodes"),
        (NETWORK_CONTRIBUTOR, "api-server"),
        (MANAGED_IDENTITY_OPERATOR, "cluster-kubelet"),
        (CLUSTER_ADMIN, "drydock-test"),  # the resource group
    }
    admin = seen.one(":RoleAssignment", "cluster-admin").inputs
    assert (admin["principalId"], admin["principalType"]) == (ADMIN, "User")
    awaited = {urn.rpartition("::")[2] for urn in requests["ManagedCluster", "cluster"].dependencies}
    assert {item.name for item in seen.of(":RoleAssignment")} <= awaited


def test_control_plane_and_nodes_have_an_identity_each() -> None:
    sent = public()
    assert sent["identity"]["type"] == "UserAssigned"
    assert [item.rpartition("/")[2] for item in sent["identity"]["userAssignedIdentities"]] == ["cluster-control-plane"]
    kubelet = sent["identityProfile"]["kubeletidentity"]
    assert kubelet["resourceId"].endswith("/cluster-kubelet")
    assert kubelet["clientId"] != kubelet["objectId"]


@pytest.mark.parametrize("protect", [True, False])
def test_options(protect: bool) -> None:
    _, requests = made({"authorized_ip_ranges": RANGES}, protect=protect)
    request = requests["ManagedCluster", "cluster"]
    assert request.protect is protect
    assert list(request.ignoreChanges) == []  # what drifts is to be seen
    assert (request.customTimeouts.create, request.customTimeouts.update) == ("60m", "180m")
    assert [name for name in orphans(requests, "Cluster") if not name.endswith(" network")] == []


def test_kubeconfig_is_the_users_and_secret_and_needs_no_browser() -> None:
    found: list[Any] = []

    def program() -> pulumi.Output[None]:
        made_cluster = cluster(place(), {"authorized_ip_ranges": RANGES})
        secret: pulumi.Output[bool] = pulumi.Output.from_input(
            asyncio.ensure_future(made_cluster.kubeconfig.is_secret())
        )
        outputs = (made_cluster.kubeconfig, made_cluster.oidc_issuer_url, made_cluster.name, made_cluster.fqdn, secret)
        return pulumi.Output.all(*outputs).apply(found.extend)

    seen, _ = deploy_with_requests(program)
    assert found == [
        for_kubelogin(KUBECONFIG),
        "https://oidc.example/1/",
        "drydock-test-aks",
        "drydock-test.example",
        True,
    ]
    ((token, args),) = [call for call in seen.calls if "Credentials" in call[0]]
    assert token.endswith("listManagedClusterUserCredentials")  # the admin's are refused without local accounts
    assert args == {"resourceGroupName": "drydock-test", "resourceName": "drydock-test-aks", "format": "exec"}


def test_kubelet_object_id_is_that_of_the_identity_given_to_the_nodes() -> None:
    found: list[Any] = []
    seen, _ = deploy_with_requests(
        lambda: cluster(place(private=True), {"private": True}).kubelet_object_id.apply(found.append)
    )
    kubelet = seen.one(":ManagedCluster").inputs["identityProfile"]["kubeletidentity"]
    assert found == [kubelet["objectId"]]
