"""Private endpoints: registry and storage answer inside the virtual network, under their usual names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pulumi
from pulumi_azure_native import network, privatedns

from infra.place import Place

if TYPE_CHECKING:
    from infra.network import Network
    from infra.registry import Registry
    from infra.storage import Storage

# learn.microsoft.com/azure/private-link/private-endpoint-dns (public cloud)
REGISTRY_ZONE = "privatelink.azurecr.io"
BLOB_ZONE = "privatelink.blob.core.windows.net"


@dataclass(frozen=True)
class EndpointsArgs:
    place: Place
    network: Network
    registry: Registry
    storage: Storage


class Endpoints(pulumi.ComponentResource):
    """For each service an endpoint in the subnet, and the DNS zone that leads its name there."""

    def __init__(self, name: str, args: EndpointsArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("drydock:infra:Endpoints", name, None, opts)
        self._endpoint(f"{name}-registry", args, args.registry.id, group="registry", zone_name=REGISTRY_ZONE)
        self._endpoint(f"{name}-blob", args, args.storage.id, group="blob", zone_name=BLOB_ZONE)
        self.register_outputs({})

    def _endpoint(
        self, name: str, args: EndpointsArgs, service_id: pulumi.Input[str], *, group: str, zone_name: str
    ) -> None:
        place, child = args.place, pulumi.ResourceOptions(parent=self)
        zone = privatedns.PrivateZone(
            name,
            private_zone_name=zone_name,
            resource_group_name=place.group,
            location="global",  # DNS zones are in no region
            opts=child,
        )
        privatedns.VirtualNetworkLink(
            name,
            virtual_network_link_name=place.names.of("vnet"),
            private_zone_name=zone.name,
            resource_group_name=place.group,
            location="global",
            virtual_network=privatedns.SubResourceArgs(id=args.network.id),
            registration_enabled=False,  # the zone is for the endpoint alone, not for the network's machines
            opts=child,
        )
        endpoint = network.PrivateEndpoint(
            name,
            private_endpoint_name=place.names.of(f"{group}-endpoint"),
            resource_group_name=place.group,
            location=place.location,
            subnet=network.SubnetArgs(id=args.network.endpoints_subnet_id),
            private_link_service_connections=[
                network.PrivateLinkServiceConnectionArgs(
                    name=group, private_link_service_id=service_id, group_ids=[group]
                )
            ],
            opts=child,
        )
        # Exactly one group an endpoint; Azure rejects a second (#2179).
        network.PrivateDnsZoneGroup(
            name,
            private_dns_zone_group_name="default",
            private_endpoint_name=endpoint.name,
            resource_group_name=place.group,
            private_dns_zone_configs=[network.PrivateDnsZoneConfigArgs(name=group, private_dns_zone_id=zone.id)],
            opts=child,
        )
