"""Private endpoints as Azure gets them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from infra.endpoints import Endpoints, EndpointsArgs
from infra.network import Network, NetworkArgs
from infra.settings import Network as NetworkSettings
from tests.unit.pulumi_mocks import Recorder, place
from tests.unit.registrations import Request, deploy_with_requests, orphans

REGISTRY, STORAGE = "/subscriptions/0/registries/acr", "/subscriptions/0/storageAccounts/st"
SERVICES = [
    ("endpoints-registry", REGISTRY, "registry", "privatelink.azurecr.io"),
    ("endpoints-blob", STORAGE, "blob", "privatelink.blob.core.windows.net"),
]


@pytest.fixture(scope="module")
def made() -> tuple[Recorder, dict[tuple[str, str], Request]]:
    def program() -> None:
        where = place(private=True)
        network = Network("network", NetworkArgs(where, NetworkSettings(private=True)))
        # Only the IDs of the two are of interest here, and their components have tests of their own.
        registry, storage = cast(Any, SimpleNamespace(id=REGISTRY)), cast(Any, SimpleNamespace(id=STORAGE))
        Endpoints("endpoints", EndpointsArgs(where, network, registry, storage))

    return deploy_with_requests(program)


@pytest.mark.parametrize(("name", "service", "group", "zone"), SERVICES)
def test_each_service_has_an_endpoint_in_the_subnet(made: Any, name: str, service: str, group: str, zone: str) -> None:
    sent = made[0].one(":PrivateEndpoint", name).inputs
    assert sent["subnet"]["id"].endswith("/subnets/endpoints")
    (connection,) = sent["privateLinkServiceConnections"]
    assert (connection["privateLinkServiceId"], connection["groupIds"]) == (service, [group])


@pytest.mark.parametrize(("name", "service", "group", "zone"), SERVICES)
def test_its_name_leads_to_the_endpoint(made: Any, name: str, service: str, group: str, zone: str) -> None:
    seen = made[0]
    sent = seen.one(":PrivateZone", name).inputs
    assert (sent["privateZoneName"], sent["location"]) == (zone, "global")
    link = seen.one(":VirtualNetworkLink", name).inputs
    assert link["virtualNetwork"]["id"].endswith("VirtualNetwork/network")
    assert (link["registrationEnabled"], link["location"]) == (False, "global")
    group_sent = seen.one(":PrivateDnsZoneGroup", name).inputs
    (configuration,) = group_sent["privateDnsZoneConfigs"]
    assert configuration["privateDnsZoneId"].endswith(f"PrivateZone/{name}")


def test_one_zone_group_an_endpoint(made: Any) -> None:
    seen, requests = made
    groups = {item.inputs["privateEndpointName"] for item in seen.of(":PrivateDnsZoneGroup")}
    assert len(groups) == len(seen.of(":PrivateDnsZoneGroup")) == len(seen.of(":PrivateEndpoint")) == 2
    own = {key: request for key, request in requests.items() if key[1].startswith("endpoints")}
    assert orphans(own, "Endpoints") == []
