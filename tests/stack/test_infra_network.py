"""The virtual network as Azure gets it."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest

from common.settings import SettingsError
from infra.network import API_SERVER, BUILDS, ENDPOINTS, NODES, RUNNERS, Network, NetworkArgs, subnets
from infra.settings import Network as NetworkSettings
from tests.unit.pulumi_mocks import Recorder, place
from tests.unit.registrations import Request, deploy_with_requests, orphans


def made(**settings: Any) -> tuple[Recorder, dict[tuple[str, str], Request]]:
    return deploy_with_requests(lambda: Network("network", NetworkArgs(place(), NetworkSettings(**settings))))


@pytest.mark.parametrize("space", ["10.64.0.0/16", "172.16.16.0/20", "10.128.0.0/9"])
def test_subnets_lie_in_the_space_and_apart(space: str) -> None:
    cidrs = {name: ipaddress.IPv4Network(cidr) for name, cidr in subnets(space).items()}
    assert set(cidrs) == {NODES, API_SERVER, ENDPOINTS, BUILDS, RUNNERS}
    assert all(cidr.subnet_of(ipaddress.IPv4Network(space)) for cidr in cidrs.values())
    assert not any(a.overlaps(b) for a in cidrs.values() for b in cidrs.values() if a is not b)
    assert cidrs[API_SERVER].prefixlen == 28  # the smallest that AKS takes


def test_a_space_that_grows_moves_no_subnet() -> None:
    assert subnets("10.64.0.0/20") == subnets("10.64.0.0/16")


@pytest.mark.parametrize(("space", "whose"), [("10.0.0.0/12", "services"), ("192.168.64.0/20", "pods")])
def test_a_space_that_the_cluster_uses_itself_is_refused(space: str, whose: str) -> None:
    with pytest.raises(SettingsError, match=f"{space} overlaps .* the addresses of the cluster's {whose}: choose"):
        subnets(space)


@pytest.mark.parametrize(("space", "cidr"), [("172.30.0.0/16", "172.30.0.0/16"), ("172.16.0.0/12", "172.31.0.0/16")])
def test_a_space_that_aks_keeps_is_refused(space: str, cidr: str) -> None:
    with pytest.raises(SettingsError, match=f"{space} overlaps {cidr}, which AKS keeps for itself: choose"):
        subnets(space)


def test_network_has_its_subnets_inline() -> None:
    seen, requests = made()
    vnet = seen.one(":VirtualNetwork").inputs
    assert vnet["addressSpace"] == {"addressPrefixes": ["10.64.0.0/16"]}
    by_name = {subnet["name"]: subnet for subnet in vnet["subnets"]}
    assert {name: subnet["addressPrefix"] for name, subnet in by_name.items()} == subnets("10.64.0.0/16")
    assert [item["serviceName"] for item in by_name[API_SERVER]["delegations"]] == [
        "Microsoft.ContainerService/managedClusters"
    ]
    assert "delegations" not in by_name[NODES]
    assert not seen.of(":Subnet") and not seen.of(":NatGateway") and not seen.of(":PublicIPAddress")
    assert orphans(requests, "Network") == []


def test_nat_gateway_is_on_the_subnets_of_nodes_and_builders_alone() -> None:
    seen, requests = made(outbound="nat_gateway")
    address, gateway = seen.one(":PublicIPAddress").inputs, seen.one(":NatGateway").inputs
    assert (address["sku"]["name"], address["publicIPAllocationMethod"]) == ("Standard", "Static")
    assert gateway["publicIpAddresses"][0]["id"].endswith("PublicIPAddress/network-outbound")
    with_gateway = {item["name"]: item.get("natGateway") for item in seen.one(":VirtualNetwork").inputs["subnets"]}
    assert with_gateway[NODES]["id"].endswith("NatGateway/network-nat")
    assert with_gateway[BUILDS] == with_gateway[NODES]
    assert with_gateway[API_SERVER] is None and with_gateway[ENDPOINTS] is None
    assert orphans(requests, "Network") == []
