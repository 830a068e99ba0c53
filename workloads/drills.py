"""The drills as a Job: it breaks what serves under load, scenario by scenario, judges what came of it, and reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pulumi
from pulumi_azure_native import managedidentity
from pulumi_kubernetes import core, meta, rbac

from infra.cluster import Cluster
from infra.datasets import Datasets
from infra.identities import AUDIENCE, Identities
from infra.place import Place
from infra.settings import Drills as Settings
from infra.settings import Environment
from infra.storage import REPORTS
from stress.scenarios import NOTICED_SECONDS, DrillSpec
from workloads.engine import FAULTS, ROUTER_LABELS, SIDECAR_METRICS
from workloads.engine import LABELS as ENGINE_LABELS
from workloads.jobs import ROLE_WAIT_SECONDS, job, job_pod
from workloads.namespaces import SERVING
from workloads.placement import apps_node_selector
from workloads.pods import TOKEN, api_token, config, container_security, mount, resources, scratch
from workloads.policies import egress_https, egress_to, ingress_from, network_policy
from workloads.router import PORT, inside_url
from workloads.stress import DATASETS, ENVIRONMENT, OUT, SCRATCH, SETUP_SECONDS, SPECS, fetches, job_name, key_variable

LABELS = {"app": "drills"}
ACCOUNT = "drills"
UNREACHABLE = "registry-unreachable"


@dataclass(frozen=True)
class DrillsArgs:
    """The settings, in which a run is named, and what other components have made for it; the image by digest.

    `account` is the storage account's name. The namespaces as outputs of their components make everything here wait
    for them.
    """

    place: Place
    env: Environment
    cluster: Cluster
    identities: Identities
    image: pulumi.Input[str]
    datasets: Datasets
    account: pulumi.Input[str]
    namespace: pulumi.Input[str]
    tuning_namespace: pulumi.Input[str]


class Drills(pulumi.ComponentResource):
    """Job `drills-<hash>` on the apps pool, and an account that may do what its scenarios need and nothing else.

    `pulumi up` does not wait. As with the stress test, only `drydock:drills` decides the name, and thus whether another
    Job starts. Something not measured, or a bound not kept, ends it as failed; log and report have the figures.
    """

    job_name: pulumi.Output[str]
    report: pulumi.Output[str]
    """az://ACCOUNT/reports/drills/RUN, where report.html and report.json are once the Job has ended."""
    follow: pulumi.Output[str]
    """Command that shows its log."""

    def __init__(self, name: str, args: DrillsArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("drydock:workloads:Drills", name, None, opts)
        child = pulumi.ResourceOptions(parent=self)
        env, settings = args.env, args.env.drills
        title, key_value = job_name(settings, "drills"), env.key_of(settings)
        if key_value is None:
            raise ValueError("the settings name no API key for the drills")  # infra.settings tells it before
        self.report = pulumi.Output.concat("az://", args.account, f"/{REPORTS}/drills/{settings.run}")
        account, credential = self._account(name, args, child)
        rights = self._rights(name, args, account, child)
        if UNREACHABLE in settings.scenarios:
            rights += self._faults(name, args, child)
        specs = core.v1.ConfigMap(
            title,
            metadata=meta.v1.ObjectMetaArgs(name=title, namespace=args.namespace),
            data={"drills.json": spec(env).model_dump_json(indent=2)},
            immutable=True,
            opts=pulumi.ResourceOptions(parent=self, ignore_changes=["data"]),
        )
        key = core.v1.Secret(
            f"{name}-key",
            metadata=meta.v1.ObjectMetaArgs(name="drills-key", namespace=args.namespace),
            string_data={"key": pulumi.Output.secret(key_value.get_secret_value())},
            opts=child,
        )
        policy = network_policy(
            "drills",
            args.namespace,
            labels=LABELS,
            egress=[
                egress_to(ROUTER_LABELS, PORT),
                egress_https(),  # the API server, Entra and Blob
                *([egress_to(ENGINE_LABELS, SIDECAR_METRICS)] if UNREACHABLE in settings.scenarios else []),
            ],
            resource_name=f"{name}-network",
            opts=child,
        )
        started = job(
            title,
            args.namespace,
            _pod(args, account, specs.metadata.name, key.metadata.name, self.report),
            labels=LABELS,
            retries=0,  # another try would break everything once more, and nobody asked for it
            deadline_seconds=deadline_seconds(settings),
            resource_name=title,
            # Moved to another node, it would begin anew.
            annotations={"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"},
            # Its resource has the Job's name: what is ignored here is that of this run, never that of the one before.
            opts=pulumi.ResourceOptions(parent=self, depends_on=[*rights, policy, credential], ignore_changes=["spec"]),
        )
        self.job_name = started.metadata.name
        self.follow = pulumi.Output.format("kubectl -n {0} logs -f job/{1}", args.namespace, self.job_name)
        self.register_outputs({"job_name": self.job_name, "report": self.report})

    def _account(
        self, name: str, args: DrillsArgs, child: pulumi.ResourceOptions
    ) -> tuple[pulumi.Output[str], pulumi.Resource]:
        """Service account `drills`: towards Azure it is the stress test, which reads datasets and writes reports."""
        credential = managedidentity.FederatedIdentityCredential(
            f"{name}-kubernetes",
            federated_identity_credential_resource_name="kubernetes-drills",
            resource_name_=args.place.names.of("stress"),
            resource_group_name=args.place.group,
            issuer=args.cluster.oidc_issuer_url,
            subject=f"system:serviceaccount:{SERVING}:{ACCOUNT}",
            audiences=[AUDIENCE],
            # Azure answers 409 to concurrent writes (pulumi-azure-native #4343).
            opts=pulumi.ResourceOptions(parent=self, depends_on=[args.identities]),
        )
        made = core.v1.ServiceAccount(
            f"{name}-account",
            metadata=meta.v1.ObjectMetaArgs(
                name=ACCOUNT,
                namespace=args.namespace,
                annotations={"azure.workload.identity/client-id": args.identities.stress.client_id},
            ),
            automount_service_account_token=False,  # one container alone gets a token
            opts=child,
        )
        made_name: pulumi.Output[str] = made.metadata.apply(lambda metadata: str(metadata.name))
        return made_name, credential

    def _rights(
        self, name: str, args: DrillsArgs, account: pulumi.Output[str], child: pulumi.ResourceOptions
    ) -> list[pulumi.Resource]:
        """The bindings; without those of a scenario that was not chosen."""
        chosen = args.env.drills.scenarios
        subject = rbac.v1.SubjectArgs(kind="ServiceAccount", name=account, namespace=args.namespace)
        bindings: list[pulumi.Resource] = []
        for place, namespace, rules in (
            ("serving", args.namespace, serving_rules(chosen)),
            ("tuning", args.tuning_namespace, tuning_rules(chosen)),
        ):
            if not rules:
                continue
            metadata = meta.v1.ObjectMetaArgs(name="drills", namespace=namespace)
            role = rbac.v1.Role(f"{name}-{place}-role", metadata=metadata, rules=rules, opts=child)
            binding = rbac.v1.RoleBinding(
                f"{name}-{place}-binding",
                metadata=metadata,
                role_ref=_ref("Role", role.metadata.name),
                subjects=[subject],
                opts=child,
            )
            bindings.append(binding)
        if rules := cluster_rules(chosen):
            metadata = meta.v1.ObjectMetaArgs(name="drydock-drills")
            cluster_role = rbac.v1.ClusterRole(f"{name}-nodes-role", metadata=metadata, rules=rules, opts=child)
            bindings.append(
                rbac.v1.ClusterRoleBinding(
                    f"{name}-nodes-binding",
                    metadata=metadata,
                    role_ref=_ref("ClusterRole", cluster_role.metadata.name),
                    subjects=[subject],
                    opts=child,
                )
            )
        return bindings

    def _faults(self, name: str, args: DrillsArgs, child: pulumi.ResourceOptions) -> list[pulumi.Resource]:
        """What tells the sidecars of a loss, empty, and the way to ask them what they make of it."""
        faults = core.v1.ConfigMap(
            f"{name}-faults",
            metadata=meta.v1.ObjectMetaArgs(name=FAULTS, namespace=args.namespace),
            opts=pulumi.ResourceOptions.merge(child, pulumi.ResourceOptions(ignore_changes=["data"])),  # a drill's
        )
        asked = network_policy(
            "engine-drills",
            args.namespace,
            labels=ENGINE_LABELS,
            ingress=[ingress_from(LABELS, SIDECAR_METRICS)],
            resource_name=f"{name}-sidecars-network",
            opts=child,
        )
        return [faults, asked]


def serving_rules(scenarios: Sequence[str]) -> list[rbac.v1.PolicyRuleArgs]:
    """What the scenarios do in the replicas' namespace; `stress.cluster` asks for no more."""
    kills = bool({"replica-loss", "outage"} & set(scenarios))
    rules = [_rule("pods", "list", *(["delete"] if kills else []))]
    if "node-drain" in scenarios:
        rules.append(_rule("pods/eviction", "create"))
    if UNREACHABLE in scenarios:
        rules.append(_rule("configmaps", "patch", names=[FAULTS]))
    return rules


def tuning_rules(scenarios: Sequence[str]) -> list[rbac.v1.PolicyRuleArgs]:
    """What the scenarios do in the tuning Jobs' namespace; the log tells at which step a Job goes on."""
    if "tuning-eviction" not in scenarios:
        return []
    return [
        _rule("pods", "list"),
        _rule("pods/log", "get"),
        _rule("pods/eviction", "create"),
    ]


def cluster_rules(scenarios: Sequence[str]) -> list[rbac.v1.PolicyRuleArgs]:
    """What the scenarios do to nodes. RBAC knows no fields: whoever may cordon may also change labels and taints."""
    if "node-drain" not in scenarios:
        return []
    return [_rule("nodes", "get", "patch")]


def spec(env: Environment) -> DrillSpec:
    """What the container parses."""
    settings = env.drills
    return DrillSpec(
        load=settings.spec(env.served),
        scenarios=settings.scenarios,
        bounds=settings.bounds,
        before_seconds=settings.before_seconds,
        after_seconds=settings.after_seconds,
    )


def deadline_seconds(settings: Settings) -> int:
    """Seconds from the Job's start after which something is stuck: all waits at their longest, and the loads."""
    load = settings.ramp_seconds + 4 * settings.request_timeout_seconds + 60
    around = settings.before_seconds + settings.after_seconds
    whole = 0.0
    for scenario in settings.scenarios:
        # Until all replicas are ready, then until they are again; a drain waits for its disruption budget as well.
        whole += 3 * settings.bounds.timeout_seconds(scenario)
        whole += 2 * (load + settings.duration_seconds) if scenario == "long-prompts" else load + around
        whole += NOTICED_SECONDS if scenario == UNREACHABLE else 0
    return math.ceil(SETUP_SECONDS + ROLE_WAIT_SECONDS + 2 * settings.wait_seconds + whole)


def _rule(resource: str, *verbs: str, names: list[str] | None = None) -> rbac.v1.PolicyRuleArgs:
    return rbac.v1.PolicyRuleArgs(api_groups=[""], resources=[resource], verbs=list(verbs), resource_names=names)


def _ref(kind: str, name: pulumi.Input[str]) -> rbac.v1.RoleRefArgs:
    return rbac.v1.RoleRefArgs(api_group="rbac.authorization.k8s.io", kind=kind, name=name)


def _pod(
    args: DrillsArgs,
    account: pulumi.Input[str],
    specs: pulumi.Input[str],
    key: pulumi.Input[str],
    report: pulumi.Output[str],
) -> core.v1.PodSpecArgs:
    return job_pod(
        account,
        [_container(args, key, report)],
        [scratch("work"), scratch("cache"), scratch("tmp"), config("specs", specs), api_token()],
        node_selector=apps_node_selector(),
        init_containers=fetches(args.env, args.image, args.datasets),
    )


def _container(args: DrillsArgs, key: pulumi.Input[str], report: pulumi.Output[str]) -> core.v1.ContainerArgs:
    return core.v1.ContainerArgs(
        name="drills",
        image=args.image,
        command=[
            *("python", "-m", "stress", "drills", "--settings", f"{SPECS}/drills.json"),
            *("--target", inside_url(args.namespace), "--dataset", DATASETS, "--out", OUT),
            *("--namespace", args.namespace, "--tuning-namespace", args.tuning_namespace),
            *("--wait-seconds", str(args.env.drills.wait_seconds), "--push", report),
        ],
        env=[*ENVIRONMENT, key_variable(key)],
        # The load is a process of its own, beside the one that watches.
        resources=resources(cpu="1", cpu_limit="2", memory="2Gi", storage="4Gi"),
        security_context=container_security(),
        volume_mounts=[
            *SCRATCH,
            mount("specs", SPECS, read_only=True),
            mount("token", TOKEN, read_only=True),
        ],
    )
