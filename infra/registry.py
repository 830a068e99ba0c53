"""The container registry: images that it builds itself, adapters as artifacts, and a cache of public images."""

from __future__ import annotations

from dataclasses import dataclass

import pulumi
from pulumi_azure_native import containerregistry

from infra.place import Place
from infra.roles import ACR_PULL, ACR_PUSH, grant

# What nodes and builds take from public registries, and the repository it is kept in: an upstream that is down, or
# throttles by address, stops neither a new node nor a build. Upstreams that need no credentials only.
CACHE = {
    "nvcr.io/nvidia/k8s-device-plugin": "cache/nvidia/k8s-device-plugin",
    "nvcr.io/nvidia/k8s/dcgm-exporter": "cache/nvidia/dcgm-exporter",
    "public.ecr.aws/docker/library/python": "cache/python",
}


@dataclass(frozen=True)
class RegistryArgs:
    """`kubelet_object_id`: principal of the identity with which nodes pull; `zones`: whether the region has zones."""

    place: Place
    kubelet_object_id: pulumi.Input[str]
    zones: bool = False


class Registry(pulumi.ComponentResource):
    """The registry, its cache rules, the nodes' right to pull and the administrators' to push."""

    id: pulumi.Output[str]
    name: pulumi.Output[str]
    login_server: pulumi.Output[str]
    cache_prefix: pulumi.Output[str]

    def __init__(self, name: str, args: RegistryArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("drydock:infra:Registry", name, None, opts)
        place = args.place
        registry = containerregistry.Registry(
            f"{name}-registry",
            registry_name=place.names.unique("acr", 50),
            resource_group_name=place.group,
            location=place.location,
            # Private endpoints are Premium's. Standard otherwise: Basic includes 10 GB, about one serving image.
            sku=containerregistry.SkuArgs(name="Premium" if place.private else "Standard"),
            admin_user_enabled=False,  # a password that everybody shares
            anonymous_pull_enabled=False,  # the images hold this repository's code
            public_network_access="Disabled" if place.private else "Enabled",
            # Lets Defender scan the images of a private registry; builds do not come this way (infra/images.py).
            network_rule_bypass_options="AzureServices",
            data_endpoint_enabled=place.private or None,  # Premium's: layers come from a host of this registry's own
            # Premium's. The SDK sends Disabled where nothing is said, and it cannot be changed later.
            zone_redundancy="Enabled" if place.private and args.zones else "Disabled",
            policies=containerregistry.PoliciesArgs(
                # A token for Azure Resource Manager opens far more than a registry. Pods and the kubelets of all
                # supported versions ask for the registry's own (cloud-provider-azure #8592).
                azure_ad_authentication_as_arm_policy=containerregistry.AzureADAuthenticationAsArmPolicyArgs(
                    status="disabled"
                ),
                # It deletes manifests without a tag, and pods refer to manifests by digest. Premium's.
                retention_policy=containerregistry.RetentionPolicyArgs(status="disabled") if place.private else None,
                # `az acr import` would copy images into a registry outside of the network.
                export_policy=containerregistry.ExportPolicyArgs(status="disabled") if place.private else None,
            ),
            opts=pulumi.ResourceOptions(parent=self, protect=place.protect),  # adapters live here
        )
        for source, target in CACHE.items():
            rule = target.replace("/", "-")
            containerregistry.CacheRule(
                f"{name}-{rule}",
                cache_rule_name=rule,
                registry_name=registry.name,
                resource_group_name=place.group,
                source_repository=source,
                target_repository=target,
                opts=pulumi.ResourceOptions(parent=self),
            )
        grant(
            f"{name}-kubelet-pull",
            place,
            role=ACR_PULL,
            scope=registry.id,
            principal_id=args.kubelet_object_id,
            key="kubelet pulls from the registry",
            opts=pulumi.ResourceOptions(parent=self),
        )
        grant(
            f"{name}-admin-push",
            place,
            role=ACR_PUSH,  # of an administrator who owns nothing: to roll an adapter back is to move its tag
            scope=registry.id,
            principal_id=place.admin_id,
            principal_type=place.admin_type,
            key="admin moves tags",
            opts=pulumi.ResourceOptions(parent=self),
        )
        self.id = registry.id
        self.name = registry.name
        # Azure says it too, but in the plan of every change of this registry, tags included, the provider calls that
        # unknown: each Job and Deployment would be shown as replaced. A name stays known.
        self.login_server = pulumi.Output.concat(registry.name, ".azurecr.io")
        self.cache_prefix = pulumi.Output.concat(self.login_server, "/cache")
        self.register_outputs(
            {
                "id": self.id,
                "name": self.name,
                "login_server": self.login_server,
                "cache_prefix": self.cache_prefix,
            }
        )
