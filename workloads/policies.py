"""Who may talk to whom: the pieces from which each component writes the network policies of its own pods.

Every namespace of ours denies both ways by default (`workloads.namespaces`); a policy only ever adds to that.
Pods are named by labels and never by address: Cilium matches an `ipBlock` against what is outside the cluster alone.
The kubelet's probes come from the pod's own node, which Cilium always lets in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pulumi
from pulumi_kubernetes import meta, networking

EVERYWHERE = "0.0.0.0/0"
METADATA = "169.254.169.254/32"  # the node's own identity: a pod that reaches it is the node for all of Azure
WIRE_SERVER = "168.63.129.16/32"  # hands nodes their settings and bootstrap token (the WireServing flaw of 2024)
LOCAL_DNS = "169.254.10.11/32"  # AKS LocalDNS for pods, on the node itself; on by itself from Kubernetes 1.37
CLUSTER_DNS = {"k8s-app": "kube-dns"}  # CoreDNS keeps the old label
SCRAPER = {"rsName": "ama-metrics"}  # managed Prometheus: the pods that follow annotations, not the node agents
SYSTEM = "kube-system"


def egress_dns() -> networking.v1.NetworkPolicyEgressRuleArgs:
    """Name resolution by the cluster's own servers, and by no other."""
    return networking.v1.NetworkPolicyEgressRuleArgs(
        to=[pods(CLUSTER_DNS, SYSTEM), _addresses(LOCAL_DNS)], ports=[*_ports(53, protocol="UDP"), *_ports(53)]
    )


def egress_https(*further: int) -> networking.v1.NetworkPolicyEgressRuleArgs:
    """HTTPS (and `further` ports) to anything outside the cluster but the node's metadata: Entra, Blob, registry, hub.

    All of them have changing addresses, and names in policies are a paid feature of AKS (`advanced_networking`).
    """
    return networking.v1.NetworkPolicyEgressRuleArgs(
        to=[_addresses(EVERYWHERE, without=(METADATA, WIRE_SERVER))], ports=_ports(443, *further)
    )


def egress_to(
    labels: Mapping[str, str], *ports: int, namespace: str | None = None
) -> networking.v1.NetworkPolicyEgressRuleArgs:
    """TCP to pods with these labels, of the policy's own namespace or of the one named; no `ports`: to all."""
    return networking.v1.NetworkPolicyEgressRuleArgs(to=[pods(labels, namespace)], ports=_ports(*ports))


def ingress_from(
    labels: Mapping[str, str], *ports: int, namespace: str | None = None
) -> networking.v1.NetworkPolicyIngressRuleArgs:
    """TCP from pods with these labels, of the policy's own namespace or of the one named; no `ports`: to all."""
    return networking.v1.NetworkPolicyIngressRuleArgs(from_=[pods(labels, namespace)], ports=_ports(*ports))


def ingress_from_addresses(cidrs: Sequence[str], *ports: int) -> networking.v1.NetworkPolicyIngressRuleArgs:
    """TCP from outside the cluster, such as the virtual network."""
    return networking.v1.NetworkPolicyIngressRuleArgs(from_=[_addresses(cidr) for cidr in cidrs], ports=_ports(*ports))


def ingress_scrape(*ports: int) -> networking.v1.NetworkPolicyIngressRuleArgs:
    """Managed Prometheus reads metrics at these ports."""
    return ingress_from(SCRAPER, *ports, namespace=SYSTEM)


def network_policy(
    name: str,
    namespace: pulumi.Input[str],
    *,
    labels: Mapping[str, str],
    ingress: Sequence[networking.v1.NetworkPolicyIngressRuleArgs] = (),
    egress: Sequence[networking.v1.NetworkPolicyEgressRuleArgs] = (),
    resource_name: str | None = None,
    opts: pulumi.ResourceOptions | None = None,
) -> networking.v1.NetworkPolicy:
    """Allow this, and nothing else, to the pods of `namespace` that have `labels` (none: to all of them)."""
    return networking.v1.NetworkPolicy(
        resource_name or name,
        metadata=meta.v1.ObjectMetaArgs(name=name, namespace=namespace),
        spec=networking.v1.NetworkPolicySpecArgs(
            pod_selector=meta.v1.LabelSelectorArgs(match_labels=dict(labels)),
            policy_types=["Ingress", "Egress"],  # stated: without egress rules, Egress would be left out and thus open
            ingress=list(ingress),
            egress=list(egress),
        ),
        opts=opts,
    )


def pods(labels: Mapping[str, str], namespace: str | None = None) -> networking.v1.NetworkPolicyPeerArgs:
    """Pods with all these labels (none: every pod), of the policy's own namespace or of the one named."""
    selected = meta.v1.LabelSelectorArgs(match_labels=dict(labels))
    if namespace is None:
        return networking.v1.NetworkPolicyPeerArgs(pod_selector=selected)
    # Kubernetes itself puts this label on every namespace, so that no one can take another's name.
    there = meta.v1.LabelSelectorArgs(match_labels={"kubernetes.io/metadata.name": namespace})
    return networking.v1.NetworkPolicyPeerArgs(pod_selector=selected, namespace_selector=there)


def _addresses(cidr: str, *, without: Sequence[str] = ()) -> networking.v1.NetworkPolicyPeerArgs:
    return networking.v1.NetworkPolicyPeerArgs(
        ip_block=networking.v1.IPBlockArgs(cidr=cidr, except_=list(without) or None)
    )


def _ports(*ports: int, protocol: str = "TCP") -> list[networking.v1.NetworkPolicyPortArgs]:
    # A rule without ports would allow every protocol; one that has a protocol alone means all ports of it.
    return [networking.v1.NetworkPolicyPortArgs(port=port, protocol=protocol) for port in ports or (None,)]
