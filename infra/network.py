"""The virtual network: subnets for nodes, API server, private endpoints, builders of images and deploying machines."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

import pulumi
from pulumi_azure_native import network

from common.settings import SettingsError
from infra.place import Place
from infra.settings import Network as NetworkSettings

# Pods and services have addresses of their own (overlay), the same in every environment: nothing outside sees them.
RESERVED = ("169.254.0.0/16", "172.30.0.0/16", "172.31.0.0/16", "192.0.2.0/24")
"""AKS keeps these for itself (azure-aks-docs, concepts-network-cni-overview.md)."""
POD_CIDR = "192.168.0.0/16"  # AKS gives each node a /24 of it: 256 nodes
SERVICE_CIDR = "10.0.0.0/16"
DNS_SERVICE_IP = "10.0.0.10"

NODES, API_SERVER, ENDPOINTS, BUILDS, RUNNERS = "nodes", "api-server", "endpoints", "builds", "runners"


def subnets(address_space: str) -> dict[str, str]:
    """The CIDR of each subnet within `address_space`, which is a /20 or larger; what they leave is free for others.

    Nodes take a /21 (2043 of them, pods need none of it), the API server the first /28 of the next /21 (the smallest
    AKS takes), private endpoints its second /26, the builders of images half of its third, and the other half the
    machines that run `pulumi up` for a private environment. Raises `SettingsError` where the cluster's own addresses
    overlap.
    """
    space = ipaddress.IPv4Network(address_space)
    taken = {POD_CIDR: "the addresses of the cluster's pods", SERVICE_CIDR: "the addresses of the cluster's services"}
    taken |= dict.fromkeys(RESERVED, "which AKS keeps for itself")
    overlaps = [
        f"network.address_space: {address_space} overlaps {cidr}, {what}: choose another, such as 10.64.0.0/16"
        for cidr, what in taken.items()
        if space.overlaps(ipaddress.IPv4Network(cidr))
    ]
    if overlaps:
        raise SettingsError(overlaps)
    halves = space.subnets(new_prefix=21)
    nodes, rest = next(halves), next(halves)
    api_server, endpoints, third, *_ = rest.subnets(new_prefix=26)
    builds, runners = third.subnets(new_prefix=27)
    return {
        NODES: str(nodes),
        API_SERVER: str(next(api_server.subnets(new_prefix=28))),
        ENDPOINTS: str(endpoints),
        BUILDS: str(builds),
        RUNNERS: str(runners),
    }


@dataclass(frozen=True)
class NetworkArgs:
    place: Place
    settings: NetworkSettings


class Network(pulumi.ComponentResource):
    """The virtual network and, with `outbound: nat_gateway`, the gateway of its nodes and builders."""

    id: pulumi.Output[str]
    nodes_subnet_id: pulumi.Output[str]
    api_server_subnet_id: pulumi.Output[str]
    endpoints_subnet_id: pulumi.Output[str]
    builds_subnet_id: pulumi.Output[str]

    def __init__(self, name: str, args: NetworkArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("drydock:infra:Network", name, None, opts)
        cidrs = subnets(args.settings.address_space)
        gateway = None
        if args.settings.outbound == "nat_gateway":
            gateway = network.SubResourceArgs(id=self._nat_gateway(name, args.place).id)
        vnet = network.VirtualNetwork(
            name,
            virtual_network_name=args.place.names.of("vnet"),
            resource_group_name=args.place.group,
            location=args.place.location,
            address_space=network.AddressSpaceArgs(address_prefixes=[args.settings.address_space]),
            # Inline and nowhere else: an update of the network deletes subnets that stand beside it (#611).
            subnets=[
                network.SubnetArgs(
                    name=NODES,
                    address_prefix=cidrs[NODES],
                    nat_gateway=gateway,
                ),
                network.SubnetArgs(
                    name=API_SERVER,
                    address_prefix=cidrs[API_SERVER],
                    delegations=[
                        network.DelegationArgs(name="aks", service_name="Microsoft.ContainerService/managedClusters")
                    ],
                ),
                network.SubnetArgs(name=ENDPOINTS, address_prefix=cidrs[ENDPOINTS]),
                network.SubnetArgs(name=BUILDS, address_prefix=cidrs[BUILDS], nat_gateway=gateway),
                network.SubnetArgs(name=RUNNERS, address_prefix=cidrs[RUNNERS], nat_gateway=gateway),
            ],
            opts=pulumi.ResourceOptions(parent=self),
        )
        self.id = vnet.id
        self.nodes_subnet_id = pulumi.Output.format("{0}/subnets/{1}", vnet.id, NODES)
        self.api_server_subnet_id = pulumi.Output.format("{0}/subnets/{1}", vnet.id, API_SERVER)
        self.endpoints_subnet_id = pulumi.Output.format("{0}/subnets/{1}", vnet.id, ENDPOINTS)
        self.builds_subnet_id = pulumi.Output.format("{0}/subnets/{1}", vnet.id, BUILDS)
        self.register_outputs(
            {
                "id": self.id,
                "nodes_subnet_id": self.nodes_subnet_id,
                "api_server_subnet_id": self.api_server_subnet_id,
                "endpoints_subnet_id": self.endpoints_subnet_id,
                "builds_subnet_id": self.builds_subnet_id,
            }
        )

    def _nat_gateway(self, name: str, place: Place) -> network.NatGateway:
        address = network.PublicIPAddress(
            f"{name}-outbound",
            public_ip_address_name=place.names.of("outbound"),
            resource_group_name=place.group,
            location=place.location,
            sku=network.PublicIPAddressSkuArgs(name="Standard"),  # the only one a NAT gateway takes
            public_ip_allocation_method="Static",
            opts=pulumi.ResourceOptions(parent=self),
        )
        return network.NatGateway(
            f"{name}-nat",
            nat_gateway_name=place.names.of("nat"),
            resource_group_name=place.group,
            location=place.location,
            sku=network.NatGatewaySkuArgs(name="Standard"),
            public_ip_addresses=[network.SubResourceArgs(id=address.id)],
            opts=pulumi.ResourceOptions(parent=self),
        )
