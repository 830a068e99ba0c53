"""The AKS cluster with its system pool, its two identities and the times at which AKS may upgrade it."""

from __future__ import annotations

import base64
from dataclasses import dataclass

import pulumi
from pulumi_azure_native import authorization, containerservice, managedidentity

from infra.kubeconfig import for_kubelogin
from infra.network import DNS_SERVICE_IP, POD_CIDR, SERVICE_CIDR, Network
from infra.place import Place
from infra.pools import CPU_OS_DISK_GIB, MAX_PODS
from infra.roles import CLUSTER_ADMIN, MANAGED_IDENTITY_OPERATOR, NETWORK_CONTRIBUTOR, grant
from infra.settings import Cluster as ClusterSettings
from infra.settings import Network as NetworkSettings

SYSTEM_TAINT = "CriticalAddonsOnly=true:NoSchedule"  # AKS's own pods tolerate it; ours run elsewhere
UPGRADE_WINDOWS = ("aksManagedAutoUpgradeSchedule", "aksManagedNodeOSUpgradeSchedule")  # AKS knows them by these names


@dataclass(frozen=True)
class ClusterArgs:
    place: Place
    settings: ClusterSettings
    network_settings: NetworkSettings
    network: Network
    log_workspace_id: pulumi.Input[str]


class Cluster(pulumi.ComponentResource):
    """AKS: Entra identities only, workload identity, overlay network with Cilium, KEDA, managed Prometheus.

    Whoever administers the environment may use it as soon as it is there: roles are given on the resource group before
    the cluster is made, since they take minutes to spread.
    """

    id: pulumi.Output[str]
    name: pulumi.Output[str]
    resource: containerservice.ManagedCluster
    oidc_issuer_url: pulumi.Output[str]
    kubelet_object_id: pulumi.Output[str]
    """Of the identity with which nodes pull images; known before the cluster is."""
    kubeconfig: pulumi.Output[str]
    """Secret. The user's kubeconfig, made to sign in without a browser: by kubelogin and the Azure CLI."""
    fqdn: pulumi.Output[str]
    """Of the API server."""

    def __init__(self, name: str, args: ClusterArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("drydock:infra:Cluster", name, None, opts)
        control_plane, kubelet = self._identity(name, "control-plane", args), self._identity(name, "kubelet", args)
        roles = self._roles(name, args, control_plane, kubelet)
        self.resource = self._cluster(name, args, control_plane, kubelet, roles)
        for window in UPGRADE_WINDOWS:
            self._maintenance(name, window, args)
        self.id, self.name = self.resource.id, self.resource.name
        self.oidc_issuer_url = self.resource.oidc_issuer_profile.apply(lambda profile: profile.issuer_url)
        self.kubelet_object_id = kubelet.principal_id
        self.kubeconfig = self._user_credentials(args.place)
        self.fqdn = self.resource.private_fqdn if args.network_settings.private else self.resource.fqdn
        self.register_outputs(
            {
                "id": self.id,
                "name": self.name,
                "oidc_issuer_url": self.oidc_issuer_url,
                "kubelet_object_id": self.kubelet_object_id,
                "kubeconfig": self.kubeconfig,
                "fqdn": self.fqdn,
            }
        )

    def _identity(self, name: str, kind: str, args: ClusterArgs) -> managedidentity.UserAssignedIdentity:
        return managedidentity.UserAssignedIdentity(
            f"{name}-{kind}",
            resource_name_=args.place.names.of(kind),
            resource_group_name=args.place.group,
            location=args.place.location,
            opts=pulumi.ResourceOptions(parent=self),
        )

    def _roles(
        self,
        name: str,
        args: ClusterArgs,
        control_plane: managedidentity.UserAssignedIdentity,
        kubelet: managedidentity.UserAssignedIdentity,
    ) -> list[authorization.RoleAssignment]:
        """What the control plane needs to make nodes, load balancers and its own endpoint, and who administers."""
        child = pulumi.ResourceOptions(parent=self)
        needs = {
            "nodes-subnet": (NETWORK_CONTRIBUTOR, args.network.nodes_subnet_id),
            "api-server-subnet": (NETWORK_CONTRIBUTOR, args.network.api_server_subnet_id),
            "kubelet-identity": (MANAGED_IDENTITY_OPERATOR, kubelet.id),
        }
        own = [
            grant(
                f"{name}-{what}",
                args.place,
                role=role,
                scope=scope,
                principal_id=control_plane.principal_id,
                key=f"control plane on {what}",
                opts=child,
            )
            for what, (role, scope) in needs.items()
        ]
        admin = grant(
            f"{name}-admin",
            args.place,
            role=CLUSTER_ADMIN,
            scope=args.place.group_id,
            principal_id=args.place.admin_id,
            principal_type=args.place.admin_type,
            key="admin administers cluster",
            opts=child,
        )
        return [*own, admin]

    def _cluster(
        self,
        name: str,
        args: ClusterArgs,
        control_plane: managedidentity.UserAssignedIdentity,
        kubelet: managedidentity.UserAssignedIdentity,
        roles: list[authorization.RoleAssignment],
    ) -> containerservice.ManagedCluster:
        wanted, place, private = args.settings, args.place, args.network_settings.private
        paid = wanted.tier != "Free"
        return containerservice.ManagedCluster(
            name,
            resource_name_=place.names.of("aks"),
            resource_group_name=place.group,
            location=place.location,
            dns_prefix=place.names.prefix,
            kubernetes_version=wanted.kubernetes_version,
            sku=containerservice.ManagedClusterSKUArgs(name="Base", tier=wanted.tier),
            support_plan="AKSLongTermSupport" if wanted.tier == "Premium" else None,  # what Premium is paid for
            identity=containerservice.ManagedClusterIdentityArgs(
                type="UserAssigned", user_assigned_identities=[control_plane.id]
            ),
            identity_profile={
                "kubeletidentity": containerservice.UserAssignedIdentityArgs(
                    resource_id=kubelet.id, client_id=kubelet.client_id, object_id=kubelet.principal_id
                )
            },
            # People and pods: Entra alone. Nobody holds a certificate that outlives his account.
            enable_rbac=True,
            disable_local_accounts=True,
            aad_profile=containerservice.ManagedClusterAADProfileArgs(
                managed=True, enable_azure_rbac=True, tenant_id=place.tenant_id
            ),
            oidc_issuer_profile=containerservice.ManagedClusterOIDCIssuerProfileArgs(enabled=True),
            security_profile=containerservice.ManagedClusterSecurityProfileArgs(
                workload_identity=containerservice.ManagedClusterSecurityProfileWorkloadIdentityArgs(enabled=True),
                # Weekly: images of 10 GB that no pod uses any more fill a node's disk.
                image_cleaner=containerservice.ManagedClusterSecurityProfileImageCleanerArgs(
                    enabled=True, interval_hours=168
                ),
            ),
            public_network_access="Disabled" if private else "Enabled",
            api_server_access_profile=containerservice.ManagedClusterAPIServerAccessProfileArgs(
                # Nodes reach the API server by a private address in any case: no tunnel, no DNS, no egress address to
                # keep among the ranges; and a public cluster can become a private one in place.
                enable_vnet_integration=True,
                subnet_id=args.network.api_server_subnet_id,
                enable_private_cluster=private,
                private_dns_zone="system" if private else None,  # AKS keeps the zone and links it to the network
                enable_private_cluster_public_fqdn=False if private else None,  # no public name for a private address
                authorized_ip_ranges=None if private else list(args.network_settings.authorized_ip_ranges),
                disable_run_command=True,  # it would run commands in the cluster from anywhere, past ranges and network
            ),
            network_profile=containerservice.ContainerServiceNetworkProfileArgs(
                network_plugin="azure",
                network_plugin_mode="overlay",  # pods take no addresses of the virtual network
                network_dataplane="cilium",  # NetworkPolicy enforced in eBPF; Azure's own manager retires in 2028
                network_policy="cilium",
                pod_cidr=POD_CIDR,
                service_cidr=SERVICE_CIDR,
                dns_service_ip=DNS_SERVICE_IP,
                load_balancer_sku="standard",
                outbound_type="userAssignedNATGateway"
                if args.network_settings.outbound == "nat_gateway"
                else "loadBalancer",
            ),
            agent_pool_profiles=[self._system_pool(args)],
            auto_scaler_profile=_autoscaler(),
            node_provisioning_profile=containerservice.ManagedClusterNodeProvisioningProfileArgs(
                mode="Auto" if wanted.provisioning == "automatic" else "Manual",
                # The stack's own NodePools alone, which are tainted: no pod is for both it and the autoscaler of apps.
                default_node_pools="None",
            ),
            auto_upgrade_profile=containerservice.ManagedClusterAutoUpgradeProfileArgs(
                upgrade_channel="patch",  # the minor version is a setting, and stays what it says
                node_os_upgrade_channel="NodeImage",  # weekly images, with the GPU driver that belongs to them
            ),
            ai_toolchain_operator_profile=containerservice.ManagedClusterAIToolchainOperatorProfileArgs(enabled=True)
            if place.kaito
            else None,
            workload_auto_scaler_profile=containerservice.ManagedClusterWorkloadAutoScalerProfileArgs(
                keda=containerservice.ManagedClusterWorkloadAutoScalerProfileKedaArgs(enabled=True)
            ),
            azure_monitor_profile=containerservice.ManagedClusterAzureMonitorProfileArgs(
                metrics=containerservice.ManagedClusterAzureMonitorProfileMetricsArgs(enabled=True)
            ),
            # No Azure Policy add-on: Pod Security admission and the policy pack refuse the same before it would, and
            # its pods take memory of the system nodes. A platform team that assigns policies switches it on.
            addon_profiles={
                "omsagent": containerservice.ManagedClusterAddonProfileArgs(
                    enabled=True,  # sends containers' logs, by the rule in infra.observability
                    config={"logAnalyticsWorkspaceResourceID": args.log_workspace_id, "useAADAuth": "true"},
                )
            },
            # Only Standard and up may have it: what each namespace costs.
            metrics_profile=containerservice.ManagedClusterMetricsProfileArgs(
                cost_analysis=containerservice.ManagedClusterCostAnalysisArgs(enabled=True)
            )
            if paid
            else None,
            # No pod of ours claims a volume, and each driver is pods on every node. Those in which KAITO tunes do.
            storage_profile=containerservice.ManagedClusterStorageProfileArgs(
                blob_csi_driver=containerservice.ManagedClusterStorageProfileBlobCSIDriverArgs(
                    enabled=place.kaito_tunes
                ),
                disk_csi_driver=containerservice.ManagedClusterStorageProfileDiskCSIDriverArgs(enabled=False),
                file_csi_driver=containerservice.ManagedClusterStorageProfileFileCSIDriverArgs(enabled=False),
                snapshot_controller=containerservice.ManagedClusterStorageProfileSnapshotControllerArgs(enabled=False),
            ),
            # Whoever changes nodes behind AKS's back breaks the next upgrade.
            node_resource_group_profile=containerservice.ManagedClusterNodeResourceGroupProfileArgs(
                restriction_level="ReadOnly"
            ),
            opts=pulumi.ResourceOptions(
                parent=self,
                protect=place.protect,
                depends_on=roles,  # without them, making the cluster fails; the administrator's has time to spread
                # An upgrade of control plane and nodes, with drains, takes far longer than anything else.
                custom_timeouts=pulumi.CustomTimeouts(create="60m", update="180m", delete="60m"),
            ),
        )

    def _system_pool(self, args: ClusterArgs) -> containerservice.ManagedClusterAgentPoolProfileArgs:
        """The one pool that AKS wants inline; others here could never be changed apart (#4264)."""
        wanted = args.settings
        return containerservice.ManagedClusterAgentPoolProfileArgs(
            name="system",
            mode="System",
            vm_size=wanted.system_vm_size,
            count=wanted.system_nodes,
            enable_auto_scaling=False,  # what runs here does not grow with the load
            orchestrator_version=wanted.kubernetes_version,
            os_type="Linux",
            os_sku="Ubuntu",
            # Small enough for AKS to take the size's local disk, where it has one: faster, and free.
            os_disk_size_gb=CPU_OS_DISK_GIB,
            max_pods=MAX_PODS,
            availability_zones=list(wanted.zones) or None,
            vnet_subnet_id=args.network.nodes_subnet_id,
            node_taints=[SYSTEM_TAINT],
            upgrade_settings=containerservice.AgentPoolUpgradeSettingsArgs(max_surge="33%"),
            security_profile=containerservice.AgentPoolSecurityProfileArgs(enable_vtpm=True, enable_secure_boot=True),
        )

    def _maintenance(self, name: str, window: str, args: ClusterArgs) -> None:
        wanted = args.settings.maintenance
        containerservice.MaintenanceConfiguration(
            f"{name}-{window}",
            config_name=window,
            resource_name_=self.resource.name,
            resource_group_name=args.place.group,
            maintenance_window=containerservice.MaintenanceWindowArgs(
                duration_hours=wanted.hours,
                start_time=wanted.start,
                utc_offset=wanted.utc_offset,
                schedule=containerservice.ScheduleArgs(
                    weekly=containerservice.WeeklyScheduleArgs(day_of_week=wanted.day, interval_weeks=1)
                ),
            ),
            opts=pulumi.ResourceOptions(parent=self),
        )

    def _user_credentials(self, place: Place) -> pulumi.Output[str]:
        found = containerservice.list_managed_cluster_user_credentials_output(
            resource_group_name=place.group,
            resource_name=self.resource.name,  # an output of the cluster: asked once it is there
            format="exec",  # kubelogin; the other format is the removed auth provider
            opts=pulumi.InvokeOutputOptions(parent=self),
        )
        return pulumi.Output.secret(
            found.apply(lambda result: for_kubelogin(base64.b64decode(result.kubeconfigs[0].value).decode()))
        )


def _autoscaler() -> containerservice.ManagedClusterPropertiesAutoScalerProfileArgs:
    """For all autoscaled pools, since AKS has one profile a cluster. Every value is text."""
    return containerservice.ManagedClusterPropertiesAutoScalerProfileArgs(
        # From the order to a node with driver and device plugin: AKS's 15 minutes would give scarce GPU nodes up.
        max_node_provision_time="20m",
        # Every pod of ours has an emptyDir; a tuning pod says itself that it may not be moved (safe-to-evict: false).
        skip_nodes_with_local_storage="false",
        # Replicas of AKS's own pods may sit on `apps` nodes; they have disruption budgets and move.
        skip_nodes_with_system_pods="false",
    )
