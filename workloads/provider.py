"""The provider of everything in the cluster, which knows it again whatever its kubeconfig says."""

from __future__ import annotations

import pulumi
import pulumi_kubernetes


def cluster_provider(
    name: str,
    *,
    kubeconfig: pulumi.Input[str],
    identifier: str,
    opts: pulumi.ResourceOptions | None = None,
) -> pulumi_kubernetes.Provider:
    """`kubeconfig` signs in without a person, as `infra.kubeconfig` makes it.

    `identifier` names the cluster for as long as it lives and is known at preview. Without it a kubeconfig that is not
    known yet, or that AKS wrote anew, is taken for another cluster, and every object in it is made again
    (pulumi-kubernetes #2745). To destroy a stack whose cluster is already gone, set PULUMI_K8S_DELETE_UNREACHABLE=true:
    it is no default here, since an API server that is out of reach for an hour would be forgotten with all it runs.
    """
    return pulumi_kubernetes.Provider(
        name,
        kubeconfig=pulumi.Output.secret(kubeconfig),
        cluster_identifier=identifier,
        enable_server_side_apply=True,
        enable_config_map_mutable=True,  # for those that are not marked immutable
        enable_secret_mutable=True,  # a new API key changes the Secret in place: replicas read it, no pod is replaced
        opts=opts,
    )
