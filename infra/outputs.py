"""What an environment tells other stacks and people: its typed outputs, and how another stack reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import pulumi

from infra.images import IMAGES, Images

if TYPE_CHECKING:
    from infra.cluster import Cluster
    from infra.observability import Observability
    from infra.place import Place
    from infra.registry import Registry
    from infra.settings import Environment
    from infra.storage import Storage
    from workloads.drills import Drills
    from workloads.stress import StressTest

CLIENT_LABEL = {"drydock/client": "true"}
"""Label of the namespaces whose pods may ask the endpoint."""


@dataclass(frozen=True)
class Said:
    """What an output is, and whether it is encrypted in the state and hidden in listings."""

    description: str
    secret: bool = False


def said(description: str, *, secret: bool = False) -> dict[str, Said]:
    return {"said": Said(description, secret)}


@dataclass(frozen=True)
class Outputs:
    """The stack's outputs by name: `pulumi stack output NAME`, or `StackReference.require_output(NAME)`."""

    resource_group: pulumi.Input[str] = field(metadata=said("Name of the resource group that holds everything."))
    location: pulumi.Input[str] = field(metadata=said("Azure region."))
    cluster_name: pulumi.Input[str] = field(metadata=said("Name of the AKS cluster."))
    cluster_id: pulumi.Input[str] = field(metadata=said("ARM ID of the AKS cluster."))
    oidc_issuer_url: pulumi.Input[str] = field(
        metadata=said("For federated credentials of other workloads in this cluster.")
    )
    kubeconfig: pulumi.Input[str] = field(
        metadata=said("User kubeconfig that signs in by kubelogin and the Azure CLI.", secret=True)
    )
    registry: pulumi.Input[str] = field(metadata=said("Login server of the container registry."))
    adapter_store: pulumi.Input[str] = field(
        metadata=said("Where adapter versions are: python -m artifacts list STORE.")
    )
    storage_account: pulumi.Input[str] = field(
        metadata=said("Storage account with datasets, models, checkpoints and reports.")
    )
    images: pulumi.Input[dict[str, Any]] = field(metadata=said("The images built from this repository, by digest."))
    endpoint: pulumi.Input[str] = field(metadata=said("Base URL of the OpenAI API, from inside the cluster."))
    replicas: pulumi.Input[str] = field(
        metadata=said("What answers there: deployment/engine, or KAITO's workspace/NAME or inferenceset/NAME.")
    )
    models: pulumi.Input[list[str]] = field(metadata=said("What clients put into `model`: the base and every adapter."))
    client_label: pulumi.Input[dict[str, str]] = field(
        metadata=said("Label of the namespaces whose pods may ask the endpoint.")
    )
    tuning_jobs: pulumi.Input[dict[str, Any]] = field(
        metadata=said("The tuning Job of each adapter, in namespace drydock-tuning (by KAITO: drydock-kaito-tuning).")
    )
    stress_report: pulumi.Input[str | None] = field(
        metadata=said("Where the stress test that the settings name puts its report once it has run, if they name one.")
    )
    drills_report: pulumi.Input[str | None] = field(
        metadata=said("Where the drills that the settings name put their report, if they name some.")
    )
    cost: pulumi.Input[dict[str, Any] | None] = field(
        metadata=said(
            "Estimate in USD, least and most, an hour, a month and a tuning run; none where a price is unknown."
        )
    )
    prometheus_endpoint: pulumi.Input[str] = field(metadata=said("Query endpoint of the managed Prometheus."))
    grafana_url: pulumi.Input[str | None] = field(metadata=said("The managed Grafana, if there is one."))
    next_steps: pulumi.Input[list[Any]] = field(metadata=said("Commands that show how it goes on."))


def export(outputs: Outputs) -> None:
    """Export every output, the secret ones as secrets."""
    for name, words in described().items():
        value = getattr(outputs, name)
        pulumi.export(name, pulumi.Output.secret(value) if words.secret else value)


def described() -> dict[str, Said]:
    """What is said of every output, by name."""
    return {each.name: each.metadata["said"] for each in fields(Outputs)}


def of_environment(
    env: Environment,
    place: Place,
    cluster: Cluster,
    registry: Registry,
    storage: Storage,
    images: Images,
    url: pulumi.Output[str],
    store: pulumi.Output[str],
    jobs: Mapping[str, pulumi.Output[str]],
    watch: str,
    replicas: str,
    eyes: Observability,
    stress: StressTest | None,
    drills: Drills | None,
    cost: dict[str, Any] | None,
) -> Outputs:
    """The outputs of an environment from its components; `jobs`: the tuning Job's name by adapter."""
    tuning = "drydock-kaito-tuning" if env.tuning.runtime == "kaito" else "drydock-tuning"
    return Outputs(
        resource_group=place.group,
        location=place.location,
        cluster_name=cluster.name,
        cluster_id=cluster.id,
        oidc_issuer_url=cluster.oidc_issuer_url,
        kubeconfig=cluster.kubeconfig,
        registry=registry.login_server,
        adapter_store=store,
        storage_account=storage.name,
        images={name: getattr(images, name) for name in IMAGES},
        endpoint=pulumi.Output.concat(url, "/v1"),
        replicas=replicas,
        models=list(env.served),
        client_label=CLIENT_LABEL,
        tuning_jobs=dict(jobs),
        stress_report=stress.report if stress else None,
        drills_report=drills.report if drills else None,
        cost=cost,
        prometheus_endpoint=eyes.query_endpoint,
        grafana_url=eyes.grafana_url,
        next_steps=[
            pulumi.Output.format("az aks get-credentials --resource-group {0} --name {1}", place.group, cluster.name),
            *(
                pulumi.Output.format("kubectl -n {0} logs -f job/{1} --all-containers", tuning, job)
                for job in jobs.values()
            ),
            watch,
            *([stress.follow] if stress else []),
            *([drills.follow] if drills else []),
        ],
    )
