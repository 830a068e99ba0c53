"""What counts as going wrong: the alerts of an environment over the metrics of its pods, Jobs and Deployments.

Our pods' metrics have `kubernetes_namespace` (workloads/metrics.py), those of kube-state-metrics have `namespace`. Of
the latter AKS keeps a part (its minimal ingestion profile, otelcollector/shared/configmap/mp in
Azure/prometheus-collector); what is used here and not among them is in `workloads.metrics.KEPT`. On GPUs' metrics
`namespace` and `pod` are those of the pod that has the GPU (workloads/gpu_metrics.py).

No alert is about an expiry, for nothing here expires by itself: pods sign in by tokens that the kubelet renews, AKS
renews its own certificates, and API keys hold until they are removed. A Hugging Face token may: then
the mirror Job fails.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from infra.alerts import Alert
from infra.identities import KAITO_TUNING
from infra.settings import Environment
from workloads.engine import startup_seconds
from workloads.gpu_metrics import PROGRAMS_XIDS, SLOWED
from workloads.metrics import NAMESPACE_LABEL
from workloads.namespaces import GPU, SERVING, TUNING
from workloads.scaling import NODE_SECONDS
from workloads.tuning import HASH_LENGTH

_SERVING = f'{NAMESPACE_LABEL}="{SERVING}"'
_TUNING = f'{NAMESPACE_LABEL}="{TUNING}"'
_JOBS = f'namespace=~"{TUNING}|{SERVING}"'
_TUNE = f'namespace="{TUNING}",job_name=~"tune-.+"'

# Of a Job's failure kube-state-metrics names these three alone (internal/store/job.go). What is left of ours is a
# `podFailurePolicy` that ended it at once: exit code 2 or 3 (common/exits.py).
_RETRIED = "BackoffLimitExceeded|DeadlineExceeded|Evicted"
# A failed pod goes with its node, which an empty GPU pool loses within minutes: look back for a day.
_MEMORY = "1d"
_EVALUATION_SECONDS = 1800  # what comes after the last step, and counts against the deadline too
_DEADLINE_SHARE = 0.9

KV_CACHE_FULL = 0.9
FRONT_FULL = 0.8
REGISTRY_SECONDS = 600
FEW = 5  # requests in ten minutes: what less of them have says nothing
RESTARTS = 2  # in half an hour; one is a hang that the liveness probe mended


def alerts(env: Environment) -> tuple[Alert, ...]:
    """All alerts of this environment: names, limits and times follow its settings.

    Of what KAITO serves none, as managed Prometheus does not see it (docs/kaito.md).
    """
    gpus = _gpus() if env.cluster.gpu_metrics else ()
    if env.serving.runtime == "kaito":
        return (*_tuning(env), *gpus)
    return (*_tuning(env), *_serving(env), *gpus, *_eyes(env))


def _tuning(env: Environment) -> Iterator[Alert]:
    by_kaito = env.tuning.runtime == "kaito"
    jobs = f'namespace=~"{TUNING}|{SERVING}|{KAITO_TUNING}"' if by_kaito else _JOBS
    failed = f'kube_job_failed{{{jobs},condition="true"}} == 1'
    ended_at_once = f'kube_job_status_failed{{{jobs},reason!~"{_RETRIED}"}} > 0'
    yield Alert(
        "GateFailed",
        # Nobody retries exit code 3, and it comes after tuning; the pod's own metrics are gone with it.
        f"{failed} and on (namespace, job_name) {ended_at_once} "
        f"and on (namespace, job_name) {_init_container('Completed', container='adopt' if by_kaito else 'tune')}",
        0,
        2,
        "{{ $labels.job_name }}: the adapter did not pass its gate; replicas stay on the version before",
    )
    yield Alert(
        "JobFailed",
        f'{failed} and on (namespace, job_name) (kube_job_status_failed{{{jobs},reason=~"{_RETRIED}"}} == 1 '
        f'or kube_job_failed{{{jobs},job_name!~"tune-.+",condition="true"}} '
        f"or {_init_container('.*Error|OOMKilled')})",
        0,
        2,
        "{{ $labels.namespace }}/{{ $labels.job_name }} failed and is not tried again",
    )
    yield Alert(
        "TuningStalled",
        f"changes(drydock_tuning_step{{{_TUNING}}}[10m]) == 0 "
        f"and drydock_tuning_step{{{_TUNING}}} < drydock_tuning_total_steps{{{_TUNING}}}",
        20,
        1,
        "{{ $labels.adapter }}: no optimiser step for half an hour, on a GPU that is paid for",
    )
    deadline = env.tuning.deadline_hours * 3600
    job = '"job_name", "$1", "batch_kubernetes_io_job_name", "(.+)"'  # the pod's label by which Kubernetes says so
    eta = f"label_replace(drydock_tuning_eta_seconds{{{_TUNING}}}, {job})"
    age = f"time() - kube_job_status_start_time{{{_TUNE}}}"
    yield Alert(
        "TuningLate",
        f"max by (job_name) ({eta}) + max by (job_name) ({age}) > {max(0, deadline - _EVALUATION_SECONDS):.0f} "
        f"or max by (job_name) ({age} and on (namespace, job_name) kube_job_status_active{{{_TUNE}}} > 0) "
        f"> {_DEADLINE_SHARE * deadline:.0f}",
        15,
        1,
        "{{ $labels.job_name }} will not end within its deadline of "
        f"{env.tuning.deadline_hours:g} hours, and then be stopped as failed",
    )


def _serving(env: Environment) -> Iterator[Alert]:
    settings, start = env.serving, NODE_SECONDS + startup_seconds(env.base.figures.parameters)
    start_minutes = math.ceil(start / 60)
    refused = f"drydock_adapter_refused_total{{{_SERVING}}}"
    yield Alert(
        "AdapterRefused",
        # A counter that begins with its first event shows no increase of it.
        f"count by (adapter, version) (increase({refused}[1h]) > 0 or ({refused} unless {refused} offset 1h) > 0)",
        0,
        1,
        "{{ $labels.adapter }} {{ $labels.version }}: {{ $value }} replicas refuse what was promoted, and stay on the "
        "version before",
    )
    yield Alert(
        "EngineStalled",
        f"max_over_time(drydock_engine_stalled_seconds{{{_SERVING}}}[5m]) >= {settings.stall_seconds:g}",
        0,
        1,
        "{{ $labels.kubernetes_pod_name }}: the engine hung for {{ $value }} s with requests in it",
    )
    waiting = f"vllm:num_requests_waiting{{{_SERVING}}}"
    yield Alert(
        "QueueGrowing",
        # Longer than a further replica takes: there is none to come, or it does not help.
        f"sum({waiting}) > {settings.queue_target} * count({waiting})",
        start_minutes if settings.min_replicas < settings.max_replicas else 10,
        1,
        "{{ $value }} requests wait, and no replica has come to take them",
    )
    yield Alert(
        "KvCacheFull",
        f"vllm:kv_cache_usage_perc{{{_SERVING}}} > {KV_CACHE_FULL} "
        f"and on (kubernetes_pod_name) rate(vllm:num_preemptions_total{{{_SERVING}}}[10m]) > 0",
        10,
        2,
        "{{ $labels.kubernetes_pod_name }}: the KV cache is full, and answers are begun anew for it",
    )
    least = settings.min_replicas
    if least:
        yield Alert(
            "ReplicasMissing",
            f'kube_deployment_status_replicas_available{{namespace="{SERVING}",deployment="engine"}} < {least}',
            start_minutes,
            1,
            f"{{{{ $value }}}} of at least {least} replicas are ready, for longer than a new one takes",
        )
    always = "engine|router" if least else "router"
    down = f'kube_deployment_status_replicas_available{{namespace="{SERVING}",deployment=~"{always}"}}'
    yield Alert(
        "ServingDown",
        # Not where it has yet to come up for the first time.
        f"{down} == 0 and max_over_time({down}[{_MEMORY}]) > 0",
        3,
        0,
        "No {{ $labels.deployment }} is ready: nobody is answered",
    )
    yield Alert(
        "RequestsUnplaced",
        f'sum(increase(vllm_router_request_errors_total{{{_SERVING},error_type="no_available_workers"}}[5m])) > 0',
        start_minutes,
        0,
        "Requests find no replica, for longer than one takes to come",
    )
    share, limit = env.alerts.failed_share, env.alerts.time_to_first_token_seconds
    errors, all_of = f'drydock_requests_total{{{_SERVING},outcome="error"}}', f"drydock_requests_total{{{_SERVING}}}"
    yield Alert(
        "RequestsFailing",
        f"sum(rate({errors}[10m])) / sum(rate({all_of}[10m])) > {share:g} and sum(increase({errors}[10m])) > {FEW}",
        5,
        0,
        "{{ $value }} of the requests end in an error of ours (as a share)",
    )
    yield Alert(
        "RequestsBroken",
        # What ends between clients and engines, or with an engine, no engine counts.
        f"{_broken('rate')} / ({_broken('rate')} + (sum(rate({all_of}[10m])) or vector(0))) > {share:g} "
        f"and {_broken('increase')} > {FEW}",
        5,
        0,
        "{{ $value }} of the requests got no whole answer, and no engine knows of it (as a share)",
    )
    yield Alert(
        "FrontFull",
        f"haproxy_frontend_current_sessions{{{_SERVING}}} "
        f"/ haproxy_frontend_limit_sessions{{{_SERVING}}} > {FRONT_FULL}",
        5,
        1,
        "{{ $labels.kubernetes_pod_name }}: {{ $value }} of the connections that it takes are open (as a share)",
    )
    first = f"drydock_time_to_first_token_seconds_%s{{{_SERVING}}}[10m]"
    yield Alert(
        "FirstTokenLate",
        f"histogram_quantile(0.95, sum by (model, le) (rate({first % 'bucket'}))) > {limit:g} "
        f"and on (model) sum by (model) (increase({first % 'count'})) > {20 * FEW}",
        10,
        2,
        f"{{{{ $labels.model }}}}: one answer in twenty begins after {{{{ $value }}}} s, wanted are {limit:g} s",
    )
    yield Alert(
        "RegistryUnreachable",
        f"max(drydock_registry_unreachable_seconds{{{_SERVING}}}) > {REGISTRY_SECONDS}",
        0,
        2,
        "Replicas have not seen the registry for {{ $value }} s: promotions and rollbacks wait",
    )
    yield Alert(
        "PodsRestarting",
        "sum by (pod, container) "
        f'(increase(kube_pod_container_status_restarts_total{{namespace="{SERVING}"}}[30m])) > {RESTARTS}',
        0,
        1,
        "{{ $labels.pod }}: {{ $labels.container }} starts again and again",
    )


def _gpus() -> Iterator[Alert]:
    """Of the GPUs of our pools, whoever has them."""
    broken = ("ROW_REMAP_FAILURE", "ROW_REMAP_PENDING", "RETIRED_PENDING")
    yield Alert(
        "GpuFaulty",
        # What the exporter counts is forgotten after five minutes, and what DCGM calls the last error never is.
        f'max by (node, gpu, xid) (max_over_time(DCGM_EXP_XID_ERRORS_COUNT{{xid!~"|0|{PROGRAMS_XIDS}"}}[1h])) > 0 or '
        + " or ".join(f"max by (node, gpu) (DCGM_FI_DEV_{name}) > 0" for name in broken)
        # Of AKS's own node problem detector: of a GPU that is not there, DCGM says nothing.
        + ' or max by (node, condition) (kube_node_status_condition{condition=~"GPUMissing|NVLinkStatusInactive",'
        'status="true"}) == 1',
        0,
        1,
        "{{ $labels.node }}: a GPU is broken, or its memory is; what runs on it may fail or not start again",
    )
    yield Alert(
        "GpuSlowed",
        f"max by (node, gpu, clock_event) (DCGM_EXP_CLOCK_EVENTS_COUNT{{{SLOWED}}}) > 0",
        15,
        2,
        "{{ $labels.node }}: GPU {{ $labels.gpu }} runs slower than it could ({{ $labels.clock_event }})",
    )
    yield Alert(
        "GpuIdle",
        # Replicas may be idle: they wait for requests on purpose.
        f'max by (node, pod) (max_over_time(DCGM_FI_DEV_GPU_UTIL{{namespace="{TUNING}"}}[10m])) == 0',
        20,
        1,
        "{{ $labels.pod }} has had a GPU for half an hour and done nothing with it",
    )


def _eyes(env: Environment) -> Iterator[Alert]:
    """Without metrics none of the others could fire."""
    available = f'kube_deployment_status_replicas_available{{namespace="{SERVING}",deployment="engine"}}'
    engines = f"vllm:num_requests_running{{{_SERVING}}}"
    gpus = ""
    if env.cluster.gpu_metrics:
        gpus = (
            ' or max by (node) (kube_node_status_allocatable{resource="nvidia_com_gpu"}) > 0 '
            f'unless on (node) up{{{NAMESPACE_LABEL}="{GPU}"}} == 1'
        )
    yield Alert(
        "MetricsMissing",
        f"absent({available}) or absent({engines}) and on () {available} > 0{gpus}",
        15,
        1,
        "No metrics come from the cluster, from its engines or from a node's GPUs: no other alert can be relied on",
    )


def _broken(of: str) -> str:
    """`of` (rate, increase) what HAProxy could not bring to its router, or got no whole answer for."""
    sums = (
        f"(sum({of}(haproxy_backend_{what}_errors_total{{{_SERVING}}}[10m])) or vector(0))"
        for what in ("connection", "response")
    )
    return f"({' + '.join(sums)})"


def _init_container(reason: str, container: str = ".+") -> str:
    """Namespace and Job of the pods of a tuning Job whose init container ended for `reason`; both are patterns."""
    ended = f'namespace="{TUNING}",container=~"{container}",reason=~"{reason}"'
    pod = f"(tune-.+-[0-9a-f]{{{HASH_LENGTH}}})(-[0-9]+)?-[a-z0-9]{{5}}"  # of several pods each has its number
    return (
        f"label_replace(max_over_time(kube_pod_init_container_status_terminated_reason{{{ended}}}[{_MEMORY}]) == 1, "
        f'"job_name", "$1", "pod", "{pod}")'
    )
