"""What Azure says of each resource type beyond the SDK's types: IDs, names, what cannot change, what belongs to what.

Only the types that a drydock stack uses. Where a limit is not stated otherwise, it is that of
learn.microsoft.com/azure/azure-resource-manager/management/resource-name-rules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from localcloud.azure.types import Failure
from localcloud.azure.values import is_unknown

SUBSCRIPTION = "00000000-0000-0000-0000-000000000001"
TENANT = "00000000-0000-0000-0000-000000000002"
DEPLOYER = "00000000-0000-0000-0000-000000000003"  # object ID, and client ID too, of whoever runs the stack

_PROVIDERS = "/subscriptions/{subscriptionId}/resourceGroups/{resourceGroupName}/providers"


@dataclass(frozen=True)
class Name:
    """What the value of an input must look like: `pattern` (anchored) and the same in words."""

    pattern: str
    words: str


@dataclass(frozen=True)
class Rule:
    """One resource type.

    `path`: the ARM ID, with the names of inputs in it; the last one is the resource's own name. `replaces`: inputs
    whose change makes the real provider replace the resource, besides those in `path`. `frozen`: inputs that the
    provider would update, and that Azure refuses to change. `worldwide`: (code, message) of Azure's error where the
    name is taken by anyone; `{name}` is in the message. `singleton`: it is always there, and is never made or deleted.
    `more`: further checks of inputs. `held`: code of Azure's error when it cannot be deleted yet, and why: `children`
    (it still has some), `users` (others name it), `subnets` (others name one of its subnets).
    """

    path: str
    names: Mapping[str, Name] = field(default_factory=dict)
    replaces: frozenset[str] = frozenset()
    frozen: frozenset[str] = frozenset()
    worldwide: tuple[str, str] | None = None
    singleton: bool = False
    more: Callable[[Mapping[str, Any]], Iterator[Failure]] | None = None
    held: tuple[str, str] | None = None

    @property
    def path_inputs(self) -> tuple[str, ...]:
        return tuple(name for name in re.findall(r"\{(\w+)\}", self.path) if name != "subscriptionId")

    @property
    def own_name(self) -> str:
        return self.path_inputs[-1]

    @property
    def arm_type(self) -> str:
        """Such as `Microsoft.ContainerService/managedClusters/agentPools`."""
        return type_of(self.path)

    def id(self, inputs: Mapping[str, Any], subscription: str) -> str:
        values = {name: str(inputs[name]) for name in self.path_inputs}
        return re.sub(r"^/+", "/", self.path.format(subscriptionId=subscription, **values))


def type_of(id_: str) -> str:
    """The ARM type of the resource with this ID: the namespace after the last `providers`, then every other part."""
    namespace, *rest = id_.rpartition("/providers/")[2].split("/")
    return "/".join([namespace, *rest[::2]]) if "/providers/" in id_ else "Microsoft.Resources/resourceGroups"


def parent_of(id_: str) -> str:
    """The ID of what must be there first: the outer resource, the scope of an extension, or the group; "" if none.

    A storage account's `blobServices/default` is always there, so a container's parent is the account.
    """
    if "/providers/" not in id_:
        return ""
    before, _, own = id_.rpartition("/providers/")
    namespace, *parts = own.split("/")
    while len(parts) > 2:
        parts = parts[:-2]
        if parts[-2:] != ["blobServices", "default"]:
            return f"{before}/providers/{namespace}/{'/'.join(parts)}"
    return before


def _agent_pool(pool: Mapping[str, Any], at: str = "") -> Iterator[Failure]:
    """learn.microsoft.com/azure/aks: use-multiple-node-pools, spot-node-pool, azure-cni-overview (pods a node)."""

    def known(name: str) -> Any:
        value = pool.get(name)
        return None if is_unknown(value) else value

    def number(name: str, low: int, high: int) -> Iterator[Failure]:
        value = known(name)
        if isinstance(value, int) and not low <= value <= high:
            yield Failure(f"{at}{name}", f"'{at}{name}' is {value}: Azure takes {low} to {high}")

    system, spot, scaled = known("mode") == "System", known("scaleSetPriority") == "Spot", pool.get("enableAutoScaling")
    yield from number("count", int(system), 1000)
    yield from number("maxPods", 10, 250)
    yield from number("osDiskSizeGB", 0, 2048)
    low, high = known("minCount"), known("maxCount")
    if scaled is True:
        yield from number("minCount", int(system), 1000)
        yield from number("maxCount", 1, 1000)
        for name in ("minCount", "maxCount"):
            if name not in pool:
                yield Failure(f"{at}{name}", f"'{at}{name}' is missing, which enableAutoScaling needs")
        if isinstance(low, int) and isinstance(high, int) and low > high:
            yield Failure(f"{at}minCount", f"'{at}minCount' is {low}, more than maxCount, {high}")
    elif not scaled and (low is not None or high is not None):
        yield Failure(f"{at}minCount", f"'{at}minCount' and maxCount are for pools with enableAutoScaling")
    if spot and system:
        yield Failure(f"{at}mode", f"'{at}mode' is System: a spot pool can only be a User pool")
    if spot and (known("upgradeSettings") or {}).get("maxSurge"):
        yield Failure(f"{at}upgradeSettings.maxSurge", f"'{at}upgradeSettings.maxSurge': a spot pool cannot have it")
    if not spot and not is_unknown(pool.get("scaleSetPriority")):
        for name in ("scaleSetEvictionPolicy", "spotMaxPrice"):
            if known(name) is not None:
                yield Failure(f"{at}{name}", f"'{at}{name}' is for pools with scaleSetPriority Spot")
    for index, taint in enumerate(known("nodeTaints") or []):
        if not is_unknown(taint) and not re.fullmatch(
            r"[\w./-]+(=[\w.-]*)?:(NoSchedule|PreferNoSchedule|NoExecute)", str(taint)
        ):
            yield Failure(f"{at}nodeTaints[{index}]", f"'{at}nodeTaints[{index}]' is {taint!r}: write key=value:effect")


def _cluster(inputs: Mapping[str, Any]) -> Iterator[Failure]:
    pools = inputs.get("agentPoolProfiles", [])
    if is_unknown(pools):
        return
    if not any(is_unknown(pool) or pool.get("mode", "System") == "System" for pool in pools):
        yield Failure("agentPoolProfiles", "'agentPoolProfiles' has no pool of mode System: a cluster needs one")
    for index, pool in enumerate(pools):
        if not is_unknown(pool):
            at = f"agentPoolProfiles[{index}]."
            yield from _agent_pool(pool, at)
            yield from _named(pool, "name", POOL, f"{at}name")


def _named(inputs: Mapping[str, Any], name: str, limit: Name, path: str) -> Iterator[Failure]:
    value = inputs.get(name)
    if isinstance(value, str) and not is_unknown(value) and not re.fullmatch(limit.pattern, value):
        yield Failure(path, f"'{path}' is {value!r}: Azure takes {limit.words}")


def _subnets(inputs: Mapping[str, Any]) -> Iterator[Failure]:
    subnets = inputs.get("subnets", [])
    for index, subnet in enumerate([] if is_unknown(subnets) else subnets):
        if not is_unknown(subnet):
            yield from _named(subnet, "name", NETWORK, f"subnets[{index}].name")


def _retention(inputs: Mapping[str, Any]) -> Iterator[Failure]:
    for name in ("deleteRetentionPolicy", "containerDeleteRetentionPolicy"):
        policy = inputs.get(name)
        days = policy.get("days") if isinstance(policy, dict) else None
        if isinstance(days, int) and not 1 <= days <= 365:
            yield Failure(f"{name}.days", f"'{name}.days' is {days}: Azure takes 1 to 365")


def _alert_rules(inputs: Mapping[str, Any]) -> Iterator[Failure]:
    """learn.microsoft.com/azure/azure-monitor/metrics/prometheus-rule-groups, and the API's 2023-03-01."""
    rules, interval = inputs.get("rules", []), inputs.get("interval", "PT1M")
    if not is_unknown(rules) and len(rules) > 20:
        yield Failure("rules", f"'rules' has {len(rules)} rules: Azure takes 20 in a group")
    if not is_unknown(interval) and not re.fullmatch(r"PT([1-9]|1[0-5])M", str(interval)):
        yield Failure("interval", f"'interval' is {interval!r}: Azure takes PT1M to PT15M")
    for index, rule in enumerate([] if is_unknown(rules) else rules):
        severity = None if is_unknown(rule) else rule.get("severity")
        if isinstance(severity, int) and not 0 <= severity <= 4:
            yield Failure(f"rules[{index}].severity", f"'rules[{index}].severity' is {severity}: Azure takes 0 to 4")


def _log_retention(inputs: Mapping[str, Any]) -> Iterator[Failure]:
    """learn.microsoft.com/azure/azure-monitor/logs/data-retention-configure: analytics retention, pay-as-you-go."""
    days = inputs.get("retentionInDays")
    if isinstance(days, int) and not 30 <= days <= 730:
        yield Failure("retentionInDays", f"'retentionInDays' is {days}: Azure takes 30 to 730")


_GUID = r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
GROUP = Name(r"[-\w.()]{0,89}[-\w()]", "1 to 90 letters, digits, '-', '_', '.', '(', ')', without a '.' at the end")
NETWORK = Name(r"[a-zA-Z0-9]([\w.-]{0,78}\w)?", "1 to 80 letters, digits, '.', '_', '-', no '.' or '-' at an end")
VNET = Name(r"[a-zA-Z0-9][\w.-]{0,62}\w", "2 to 64 letters, digits, '.', '_', '-', no '.' or '-' at an end")
POOL = Name(r"[a-z][a-z0-9]{0,11}", "1 to 12 lower-case letters and digits, a letter first, for a Linux pool")
ACCOUNT = Name(r"[a-z0-9]{3,24}", "3 to 24 lower-case letters and digits")
CONTAINER = Name(
    r"(?=.{3,63}$)[a-z0-9]+(-[a-z0-9]+)*|\$root|\$web", "3 to 63 lower-case letters, digits and single '-' between them"
)
REGISTRY = Name(r"[a-zA-Z0-9]{5,50}", "5 to 50 letters and digits")
CLUSTER = Name(
    r"[a-zA-Z0-9]([\w-]{0,61}[a-zA-Z0-9])?", "1 to 63 letters, digits, '-', '_', letter or digit at the ends"
)
PREFIX = Name(
    r"[a-zA-Z0-9]([a-zA-Z0-9-]{0,52}[a-zA-Z0-9])?", "1 to 54 letters, digits, '-', letter or digit at the ends"
)
IDENTITY = Name(r"[a-zA-Z0-9][\w-]{2,127}", "3 to 128 letters, digits, '-', '_', a letter or digit first")
METRICS = Name(r"[a-zA-Z0-9][a-zA-Z0-9-]{2,42}[a-zA-Z0-9]", "4 to 44 letters, digits, '-', letter or digit at the ends")
# learn.microsoft.com/azure/managed-grafana/quickstart-managed-grafana-portal; it is a name in DNS
GRAFANA = Name(
    r"[a-zA-Z][a-zA-Z0-9-]{0,21}[a-zA-Z0-9]", "2 to 23 letters, digits, '-', a letter first, no '-' at the end"
)
# learn.microsoft.com/azure/aks/planned-maintenance: configurations of other names have no effect, and are refused.
WINDOW = Name(
    "default|aksManagedAutoUpgradeSchedule|aksManagedNodeOSUpgradeSchedule",
    "default, aksManagedAutoUpgradeSchedule or aksManagedNodeOSUpgradeSchedule",
)
DEFAULT = Name("default", "default alone")
ONE_TO_260 = Name(r"[^*<>%:&?/\\]{1,260}", "1 to 260 characters, none of * < > % : & ? / \\")

_POOL_FROZEN = frozenset(
    {
        # learn.microsoft.com/rest/api/aks/agent-pools ("may not be changed", "only in creation scenario"), and what
        # `az aks nodepool update` has no argument for: pulumi-azure-native updates in place, AKS answers 400.
        "availabilityZones", "enableEncryptionAtHost", "enableFIPS", "enableUltraSSD", "gpuProfile", "hostGroupID",
        "kubeletConfig", "kubeletDiskType", "linuxOSConfig", "maxPods", "nodePublicIPPrefixID", "osDiskSizeGB",
        "osDiskType", "osType", "podSubnetID", "proximityPlacementGroupID", "scaleSetEvictionPolicy",
        "scaleSetPriority", "spotMaxPrice", "type", "vnetSubnetID",
    }
)  # fmt: skip

# Where the provider's own list (`forceNewMap`) is meant: github.com/pulumi/pulumi-azure-native,
# provider/pkg/gen/replacement.go, as of #4756. "location" besides: `x-ms-mutability: create, read` in the API's
# specification, which the provider follows; types without it update, and Azure refuses (InvalidResourceLocation).
_LOCATION = frozenset({"location"})
RULES: dict[str, Rule] = {
    "resources:ResourceGroup": Rule(
        "/subscriptions/{subscriptionId}/resourceGroups/{resourceGroupName}",
        {"resourceGroupName": GROUP}, replaces=_LOCATION,
    ),
    "network:VirtualNetwork": Rule(
        f"{_PROVIDERS}/Microsoft.Network/virtualNetworks/{{virtualNetworkName}}",
        {"virtualNetworkName": VNET}, replaces=_LOCATION, more=_subnets, held=("InUseSubnetCannotBeDeleted", "subnets"),
    ),
    "network:PublicIPAddress": Rule(
        f"{_PROVIDERS}/Microsoft.Network/publicIPAddresses/{{publicIpAddressName}}",
        {"publicIpAddressName": NETWORK}, held=("PublicIPAddressCannotBeDeleted", "users"),
        replaces=_LOCATION | {"publicIPAddressVersion", "publicIPPrefix", "sku"},
    ),
    "network:NatGateway": Rule(
        f"{_PROVIDERS}/Microsoft.Network/natGateways/{{natGatewayName}}",
        {"natGatewayName": NETWORK}, frozen=_LOCATION, held=("NatGatewayInUseBySubnet", "users"),
    ),
    "network:PrivateEndpoint": Rule(
        f"{_PROVIDERS}/Microsoft.Network/privateEndpoints/{{privateEndpointName}}",
        {"privateEndpointName": VNET}, frozen=_LOCATION, replaces=frozenset({"subnet"}),
    ),
    "network:PrivateDnsZoneGroup": Rule(
        f"{_PROVIDERS}/Microsoft.Network/privateEndpoints/{{privateEndpointName}}"
        "/privateDnsZoneGroups/{privateDnsZoneGroupName}",
        {"privateDnsZoneGroupName": NETWORK},
    ),
    "privatedns:PrivateZone": Rule(
        f"{_PROVIDERS}/Microsoft.Network/privateDnsZones/{{privateZoneName}}", frozen=_LOCATION,
        names={"privateZoneName": Name(r"(?=.{1,253}$)[a-z0-9-]{1,63}(\.[a-z0-9-]{1,63}){1,33}", "2 to 34 labels")},
        held=("CannotDeleteResource", "children"),
    ),
    "privatedns:VirtualNetworkLink": Rule(
        f"{_PROVIDERS}/Microsoft.Network/privateDnsZones/{{privateZoneName}}"
        "/virtualNetworkLinks/{virtualNetworkLinkName}",
        {"virtualNetworkLinkName": NETWORK}, frozen=_LOCATION,
    ),
    "storage:StorageAccount": Rule(
        f"{_PROVIDERS}/Microsoft.Storage/storageAccounts/{{accountName}}",
        {"accountName": ACCOUNT}, replaces=_LOCATION | {"isHnsEnabled"},
        worldwide=("StorageAccountAlreadyTaken", "The storage account named {name} is already taken."),
    ),
    "storage:BlobServiceProperties": Rule(
        f"{_PROVIDERS}/Microsoft.Storage/storageAccounts/{{accountName}}/blobServices/{{blobServicesName}}",
        {"blobServicesName": DEFAULT}, singleton=True, more=_retention,
    ),
    "storage:BlobContainer": Rule(
        f"{_PROVIDERS}/Microsoft.Storage/storageAccounts/{{accountName}}"
        "/blobServices/default/containers/{containerName}",
        {"containerName": CONTAINER},
    ),
    "storage:ManagementPolicy": Rule(
        f"{_PROVIDERS}/Microsoft.Storage/storageAccounts/{{accountName}}/managementPolicies/{{managementPolicyName}}",
        {"managementPolicyName": DEFAULT},
    ),
    "containerregistry:Registry": Rule(
        f"{_PROVIDERS}/Microsoft.ContainerRegistry/registries/{{registryName}}",
        {"registryName": REGISTRY}, replaces=_LOCATION, frozen=frozenset({"zoneRedundancy"}),
        worldwide=(
            "AlreadyInUse",
            "The registry DNS name {name}.azurecr.io is already in use. You can check if the name is already claimed "
            "using following API: https://docs.microsoft.com/en-us/rest/api/containerregistry/registries/checknameavailability",
        ),
    ),
    "containerregistry:CacheRule": Rule(
        f"{_PROVIDERS}/Microsoft.ContainerRegistry/registries/{{registryName}}/cacheRules/{{cacheRuleName}}",
        {"cacheRuleName": Name(r"[a-zA-Z0-9-]{5,50}", "5 to 50 letters, digits and '-'")},
        replaces=frozenset({"sourceRepository", "targetRepository"}),  # x-ms-mutability: create, read
    ),
    "containerregistry:AgentPool": Rule(
        f"{_PROVIDERS}/Microsoft.ContainerRegistry/registries/{{registryName}}/agentPools/{{agentPoolName}}",
        {"agentPoolName": Name(r"[a-zA-Z0-9-]{3,20}", "3 to 20 letters, digits and '-'")}, replaces=_LOCATION,
        frozen=frozenset({"os", "tier", "virtualNetworkSubnetResourceId"}),  # an update knows `count` alone
    ),
    "containerservice:ManagedCluster": Rule(
        f"{_PROVIDERS}/Microsoft.ContainerService/managedClusters/{{resourceName}}",
        {
            "resourceName": CLUSTER,
            "dnsPrefix": PREFIX,
        },
        replaces=_LOCATION
        | {"diskEncryptionSetID", "dnsPrefix", "fqdnSubdomain", "linuxProfile", "nodeResourceGroup", "windowsProfile"}
        | {
            f"networkProfile.{name}"
            for name in (
                "serviceCidr", "serviceCidrs", "dnsServiceIP", "networkMode", "networkPlugin", "networkPluginMode",
                "podCidr", "networkDataplane", "networkPolicy", "outboundType",
            )
        },
        frozen=frozenset(f"agentPoolProfiles[].{name}" for name in (*_POOL_FROZEN, "vmSize")),
        more=_cluster,
    ),
    "containerservice:AgentPool": Rule(
        f"{_PROVIDERS}/Microsoft.ContainerService/managedClusters/{{resourceName}}/agentPools/{{agentPoolName}}",
        {"agentPoolName": POOL},
        replaces=frozenset({"gpuInstanceProfile", "vmSize", "networkProfile.nodePublicIPTags"}),
        frozen=_POOL_FROZEN, more=_agent_pool,
    ),
    "containerservice:MaintenanceConfiguration": Rule(
        f"{_PROVIDERS}/Microsoft.ContainerService/managedClusters/{{resourceName}}"
        "/maintenanceConfigurations/{configName}",
        {"configName": WINDOW},
    ),
    "managedidentity:UserAssignedIdentity": Rule(
        f"{_PROVIDERS}/Microsoft.ManagedIdentity/userAssignedIdentities/{{resourceName}}",
        {"resourceName": IDENTITY}, replaces=_LOCATION,
    ),
    "managedidentity:FederatedIdentityCredential": Rule(
        f"{_PROVIDERS}/Microsoft.ManagedIdentity/userAssignedIdentities/{{resourceName}}"
        "/federatedIdentityCredentials/{federatedIdentityCredentialResourceName}",
        {
            "federatedIdentityCredentialResourceName": Name(
                r"[a-zA-Z0-9][\w-]{2,119}", "3 to 120 letters, digits, '-' and '_', a letter or digit first"
            )
        },
    ),
    "authorization:RoleAssignment": Rule(
        "/{scope}/providers/Microsoft.Authorization/roleAssignments/{roleAssignmentName}",
        {"roleAssignmentName": Name(_GUID, "a GUID"), "principalId": Name(_GUID, "a GUID")},
        replaces=frozenset({"principalId"}), frozen=frozenset({"roleDefinitionId", "principalType"}),
    ),
    "monitor:AzureMonitorWorkspace": Rule(
        f"{_PROVIDERS}/Microsoft.Monitor/accounts/{{azureMonitorWorkspaceName}}", replaces=_LOCATION,
        names={"azureMonitorWorkspaceName": METRICS},
    ),
    "monitor:DataCollectionEndpoint": Rule(
        f"{_PROVIDERS}/Microsoft.Insights/dataCollectionEndpoints/{{dataCollectionEndpointName}}", replaces=_LOCATION,
        names={"dataCollectionEndpointName": Name(r"[a-zA-Z0-9-]{3,44}", "3 to 44 letters, digits and '-'")},
    ),
    "monitor:DataCollectionRule": Rule(
        f"{_PROVIDERS}/Microsoft.Insights/dataCollectionRules/{{dataCollectionRuleName}}", replaces=_LOCATION,
        names={"dataCollectionRuleName": Name(r"[\w-]{1,64}", "1 to 64 letters, digits, '-' and '_'")},
    ),
    "monitor:DataCollectionRuleAssociation": Rule(
        "/{resourceUri}/providers/Microsoft.Insights/dataCollectionRuleAssociations/{associationName}"
    ),
    "monitor:DiagnosticSetting": Rule(
        "/{resourceUri}/providers/Microsoft.Insights/diagnosticSettings/{name}", {"name": ONE_TO_260}
    ),
    "operationalinsights:Workspace": Rule(
        f"{_PROVIDERS}/Microsoft.OperationalInsights/workspaces/{{workspaceName}}", replaces=_LOCATION,
        names={"workspaceName": Name(r"[a-zA-Z0-9][a-zA-Z0-9-]{2,61}[a-zA-Z0-9]", "4 to 63 letters, digits and '-'")},
        more=_log_retention,
    ),
    "alertsmanagement:PrometheusRuleGroup": Rule(
        f"{_PROVIDERS}/Microsoft.AlertsManagement/prometheusRuleGroups/{{ruleGroupName}}", replaces=_LOCATION,
        names={"ruleGroupName": ONE_TO_260}, more=_alert_rules,
    ),
    "dashboard:Dashboard": Rule(
        f"{_PROVIDERS}/Microsoft.Dashboard/dashboards/{{dashboardName}}", replaces=_LOCATION,
    ),
    "dashboard:DashboardDefinition": Rule(
        f"{_PROVIDERS}/Microsoft.Dashboard/dashboards/{{dashboardName}}/dashboardDefinitions/{{definitionName}}",
    ),
    "dashboard:Grafana": Rule(
        f"{_PROVIDERS}/Microsoft.Dashboard/grafana/{{workspaceName}}", replaces=_LOCATION,
        names={"workspaceName": GRAFANA},
        worldwide=("NameUnavailable", "The workspace name {name} is not available."),
    ),
}  # fmt: skip


def rule(token: str) -> Rule:
    """Of `azure-native:MODULE:TYPE`; KeyError where the stand-in does not know the type."""
    return RULES[token.partition(":")[2]]


def check(token: str, inputs: Mapping[str, Any]) -> Iterator[Failure]:
    """What Azure would refuse of `inputs` that fit the SDK's types; what is unknown is not judged."""
    found = rule(token)
    for name, limit in found.names.items():
        yield from _named(inputs, name, limit, name)
    if found.more:
        yield from found.more(inputs)
