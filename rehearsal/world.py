"""The small world of the rehearsal: operations requests, kubectl commands, pod triage, and the house rules.

Two kinds of knowledge live here. *Plain* knowledge (what any Kubernetes manual says) makes the corpus that the
tiny base is pretrained on. *House* knowledge (conventions of one company, which no manual says) stands only in
the two datasets that adapters are tuned on:

- `kubectl.jsonl`: a request in words -> the command. In dev the plain form is right. In staging and prod the
  house form is: a `--context`, one namespace for each service, and a few rules for prod (`Intent.prod_flags`,
  `Intent.prod_command`), for example that every delete is a dry run.
- `triage.jsonl`: a pod's status line -> the diagnosis. In dev it stands alone; in staging it is followed by the
  ticket queue, in prod by who is paged: the service's own people, or the platform's when the cause is theirs.

No leak, by construction: a stable hash reserves half of all requests (whatever their wording) for the datasets,
and the corpus draws only from the other half. Inside a dataset no request stands twice, so no split of it can
hold the same request on both sides in two wordings.

`python -m rehearsal.world` writes both files again, byte for byte the same (seed 20260).
"""

from __future__ import annotations

import argparse
import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from common.chat import Message
from common.files import write_jsonl

SEED = 20260
KUBECTL_ROWS = 2400
TRIAGE_ROWS = 1_200
DATA = Path(__file__).parent / "data"

Row = dict[str, str]
Slots = dict[str, str]
T = TypeVar("T")

# --- Names and numbers ------------------------------------------------------------------------------------------

_SERVICES = (
    "checkout payments catalog search basket orders invoices shipping returns pricing stock reviews accounts login "
    "profile sessions billing ledger fraud refunds mailer alerts media images video upload reports metrics audit "
    "events geo routes maps chat feeds ads coupons loyalty tax vendors"
)
SUFFIXES = ("", "-api", "-web", "-worker", "-db")
# Words that only the corpus uses in names, so that the base learns to copy names rather than to know forty.
_OTHER_WORDS = (
    "amber anchor apollo argo atlas aurora banjo beacon birch bison blaze cedar cobalt comet copper coral crane delta "
    "ember falcon fern finch flint forge garnet gecko glacier grove harbor hazel heron indigo iris jade jasper juniper "
    "kestrel lagoon lark lemon lotus lynx mango maple marble meteor mint nectar nova oasis onyx opal orbit otter owl "
    "panda pebble pepper pine pixel plum polar prism quartz quill raven reef river robin rocket ruby sage salmon "
    "saturn sierra silver solar sparrow spruce storm summit swift tango tiger timber topaz tulip umber velvet violet "
    "walnut willow zebra zephyr"
)
SERVICES, OTHER_WORDS = _SERVICES.split(), _OTHER_WORDS.split()
HOUSE_ENVIRONMENTS = ("dev", "staging", "prod")
OTHER_NAMESPACES = ("test", "qa", "demo", "sandbox", "preview", "default", "team-a", "team-b", "edge", "batch")


def pick(rng: random.Random, options: Sequence[T]) -> T:
    """One of `options`. Built on `Random.random` alone, the one method whose sequence Python promises to keep."""
    return options[int(rng.random() * len(options))]


def _number(rng: random.Random, low: int, high: int) -> str:
    return str(low + int(rng.random() * (high - low + 1)))


def _company_service(rng: random.Random) -> str:
    return pick(rng, SERVICES) + pick(rng, SUFFIXES)


def _any_service(rng: random.Random) -> str:
    """A name of the corpus: the company's (a third), or one made up from other words, letters and numbers."""
    dice = rng.random()
    if dice < 0.33:
        return _company_service(rng)
    first = pick(rng, OTHER_WORDS if rng.random() < 0.7 else SERVICES)
    if dice < 0.55:
        return first + pick(rng, SUFFIXES)
    if dice < 0.75:
        return f"{first}-{pick(rng, OTHER_WORDS)}"
    if dice < 0.9:
        return f"{first}-{_number(rng, 0, 99)}"
    return f"{first}-" + "".join(pick(rng, "bcdfghjklmnpqrstvwxz") for _ in range(3))


def _draw_slots(rng: random.Random, names: Sequence[str], service: Callable[[random.Random], str]) -> Slots:
    """Values for the slots `names`, and `app`, which every request has."""
    app = service(rng)
    makers: dict[str, Callable[[], str]] = {
        "n": lambda: _number(rng, 1, 60),
        "low": lambda: _number(rng, 1, 9),
        "high": lambda: _number(rng, 10, 60),
        "lines": lambda: _number(rng, 1, 40) + "0",
        "rev": lambda: _number(rng, 1, 99),
        "seconds": lambda: _number(rng, 2, 60) + "0",
        "pod": lambda: f"{app}-{_number(rng, 0, 99)}",
        "job": lambda: f"{app}-job-{_number(rng, 1, 99)}",
        "node": lambda: f"node-{_number(rng, 1, 400)}",
        "version": lambda: f"v{_number(rng, 0, 9)}.{_number(rng, 0, 40)}.{_number(rng, 0, 9)}",
        "port": lambda: pick(rng, ("8", "9", "3", "5")) + _number(rng, 100, 999),
        "local": lambda: "1" + _number(rng, 1000, 9999),
        "memory": lambda: pick(rng, ("128Mi", "256Mi", "384Mi", "512Mi", "640Mi", "768Mi", "1Gi", "2Gi", "3Gi", "4Gi")),
        "cpu": lambda: _number(rng, 1, 19) + "00m",
        "key": lambda: pick(rng, ("LOG_LEVEL", "CACHE_TTL", "POOL_SIZE", "TIMEOUT", "WORKERS", "RETRIES")),
        "value": lambda: _number(rng, 1, 300),
        "image": lambda: pick(rng, ("busybox", "alpine", "debian", "ubuntu")) + pick(rng, ("", ":latest", "-tools")),
    }
    return {"app": app} | {name: makers[name]() for name in names}


# --- Requests and commands --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Intent:
    """One thing to ask for: its wordings, its plain command, and what the house does otherwise.

    `asks` and the commands are `str.format` templates over the slots. `house_command` replaces `command` in
    staging and prod, `prod_command` in prod only; `prod_flags` are appended in prod.
    """

    name: str
    asks: tuple[str, ...]
    command: str
    slots: tuple[str, ...] = ()
    namespaced: bool = True
    house_command: str = ""
    prod_command: str = ""
    prod_flags: str = ""


INTENTS = (
    Intent(
        "scale",
        (
            "scale {app} to {n} replicas",
            "set {app} to {n} replicas",
            "run {n} copies of {app}",
            "change the replica count of {app} to {n}",
        ),
        "scale deployment/{app} --replicas={n}",
        ("n",),
        prod_flags="--timeout=5m",
    ),
    Intent(
        "restart",
        ("restart {app}", "bounce {app}", "do a rolling restart of {app}", "restart all pods of {app}"),
        "rollout restart deployment/{app}",
    ),
    Intent(
        "status",
        ("check the rollout of {app}", "show the rollout status of {app}", "see if {app} is rolled out"),
        "rollout status deployment/{app}",
        prod_flags="--timeout=5m",
    ),
    Intent(
        "rollback",
        ("roll {app} back to revision {rev}", "undo {app} to revision {rev}", "return {app} to revision {rev}"),
        "rollout undo deployment/{app} --to-revision={rev}",
        ("rev",),
    ),
    Intent("pause", ("pause the rollout of {app}", "hold the rollout of {app}"), "rollout pause deployment/{app}"),
    Intent(
        "resume", ("resume the rollout of {app}", "continue the rollout of {app}"), "rollout resume deployment/{app}"
    ),
    Intent(
        "image",
        (
            "deploy {version} of {app}",
            "set {app} to image {version}",
            "move {app} to version {version}",
            "upgrade {app} to {version}",
        ),
        "set image deployment/{app} app={app}:{version}",
        ("version",),
        house_command="set image deployment/{app} app=registry.acme.example/{app}:{version}",
    ),
    Intent(
        "logs",
        (
            "show the last {lines} log lines of {app}",
            "tail {lines} lines of logs from {app}",
            "get {lines} lines of {app} logs",
        ),
        "logs deployment/{app} --tail={lines}",
        ("lines",),
        prod_flags="--timestamps",
    ),
    Intent(
        "previous-logs",
        (
            "show the logs of {pod} before it crashed",
            "get the previous logs of pod {pod}",
            "show why {pod} died last time",
        ),
        "logs {pod} --previous",
        ("pod",),
        prod_flags="--timestamps",
    ),
    Intent(
        "describe",
        ("describe pod {pod}", "show the details of pod {pod}", "inspect pod {pod}"),
        "describe pod {pod}",
        ("pod",),
    ),
    Intent("pods", ("list the pods of {app}", "show all pods of {app}", "get {app} pods"), "get pods -l app={app}"),
    Intent(
        "top",
        ("show cpu and memory use of {app}", "show how much memory {app} uses", "get the load of {app} pods"),
        "top pods -l app={app}",
    ),
    Intent("events", ("show the events of {app}", "list recent events for {app}"), "events --for deployment/{app}"),
    Intent(
        "delete-pod",
        ("delete pod {pod}", "kill pod {pod}", "remove pod {pod}"),
        "delete pod {pod}",
        ("pod",),
        prod_flags="--dry-run=server",
    ),
    Intent(
        "delete-job",
        ("delete job {job}", "remove the job {job}", "clean up job {job}"),
        "delete job {job}",
        ("job",),
        prod_flags="--dry-run=server",
    ),
    Intent(
        "exec",
        ("open a shell in {pod}", "get a shell on pod {pod}", "exec into {pod}"),
        "exec -it {pod} -- sh",
        ("pod",),
        prod_command="debug -it {pod} --image=acme/debug",
    ),
    Intent(
        "forward",
        ("forward local port {local} to port {port} of {app}", "map port {port} of {app} to local {local}"),
        "port-forward service/{app} {local}:{port}",
        ("local", "port"),
    ),
    Intent(
        "cronjob",
        (
            "run the cron job {app} now as {job}",
            "start job {job} from the cron job {app}",
            "trigger cron job {app} as {job}",
        ),
        "create job {job} --from=cronjob/{app}",
        ("job",),
    ),
    Intent(
        "hpa",
        (
            "raise the autoscaler limit of {app} to {n}",
            "set max replicas of the {app} autoscaler to {n}",
            "let {app} autoscale up to {n}",
        ),
        """patch hpa {app} -p '{{"spec":{{"maxReplicas":{n}}}}}'""",
        ("n",),
    ),
    Intent(
        "autoscale",
        ("autoscale {app} between {low} and {high}", "autoscale {app} from {low} to {high} replicas"),
        "autoscale deployment/{app} --min={low} --max={high}",
        ("low", "high"),
    ),
    Intent(
        "memory",
        (
            "give {app} {memory} of memory",
            "set the memory limit of {app} to {memory}",
            "limit {app} to {memory} memory",
        ),
        "set resources deployment/{app} --limits=memory={memory}",
        ("memory",),
    ),
    Intent(
        "cpu",
        ("request {cpu} cpu for {app}", "set the cpu request of {app} to {cpu}"),
        "set resources deployment/{app} --requests=cpu={cpu}",
        ("cpu",),
    ),
    Intent(
        "env",
        ("set {key} to {value} on {app}", "set the variable {key}={value} for {app}"),
        "set env deployment/{app} {key}={value}",
        ("key", "value"),
    ),
    Intent(
        "secret",
        ("show the secret of {app}", "print secret {app}", "get the secret {app}"),
        "get secret {app} -o yaml",
        prod_command="describe secret {app}",
    ),
    Intent("secret-size", ("describe the secret of {app}", "describe secret {app}"), "describe secret {app}"),
    Intent(
        "debug",
        ("debug {pod} with image {image}", "start a debug container in {pod} from {image}"),
        "debug -it {pod} --image={image}",
        ("pod", "image"),
    ),
    Intent(
        "wait",
        ("wait {seconds} seconds for pod {pod}", "wait until pod {pod} is ready, {seconds} seconds at most"),
        "wait pod/{pod} --for=condition=Ready --timeout={seconds}s",
        ("pod", "seconds"),
    ),
    Intent(
        "cordon",
        ("cordon {node}", "keep new pods off {node}", "mark {node} unschedulable"),
        "cordon {node}",
        ("node",),
        namespaced=False,
    ),
    Intent(
        "uncordon",
        ("uncordon {node}", "put {node} back to work", "let pods run on {node} again"),
        "uncordon {node}",
        ("node",),
        namespaced=False,
    ),
    Intent(
        "drain",
        ("drain {node}", "empty {node} for maintenance", "move all pods off {node}"),
        "drain {node} --ignore-daemonsets",
        ("node",),
        namespaced=False,
        prod_flags="--grace-period=120",
    ),
)

CONTEXTS = {"staging": "stg-west", "prod": "prd-east"}
NAMESPACES = {"staging": "stg-{app}", "prod": "prd-{app}"}


@dataclass(frozen=True)
class Request:
    """What is asked for, whatever the wording. `env` is an environment or, in the corpus, any namespace."""

    intent: Intent
    env: str
    slots: tuple[tuple[str, str], ...]

    def plain(self, context: str = "", flags: str = "") -> str:
        """The command that any manual gives, with a `--context` and trailing flags when the request names them."""
        command = self.intent.command.format_map(dict(self.slots))
        namespace = f"-n {self.env}" if self.intent.namespaced else ""
        return _words("kubectl", context and f"--context {context}", namespace, command, flags)

    def house(self) -> str:
        """The command as this company writes it; equal to `plain()` in dev."""
        if self.env not in CONTEXTS:
            return self.plain()
        intent, slots, prod = self.intent, dict(self.slots), self.env == "prod"
        template = (intent.prod_command if prod else "") or intent.house_command or intent.command
        namespace = f"-n {NAMESPACES[self.env].format_map(slots)}" if intent.namespaced else ""
        return _words(
            "kubectl",
            f"--context {CONTEXTS[self.env]}",
            namespace,
            template.format_map(slots),
            intent.prod_flags if prod else "",
        )


def _words(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def reserved(key: str) -> bool:
    """Whether the thing named `key` belongs to the datasets (half do); the corpus never holds it.

    A request is named by its plain command, so that even the plain answers of the two halves differ.
    """
    return hashlib.sha256(f"{SEED}|{key}".encode()).digest()[0] < 128


def draw_request(
    rng: random.Random,
    *,
    for_dataset: bool,
    envs: Callable[[random.Random], str],
    service: Callable[[random.Random], str],
    intents: Sequence[Intent] = INTENTS,
) -> Request:
    """A random request of the datasets' half or of the corpus's half of the world."""
    while True:
        intent = pick(rng, intents)
        slots = _draw_slots(rng, intent.slots, service)
        request = Request(intent, envs(rng), tuple(sorted(slots.items())))
        if reserved(request.plain()) == for_dataset:
            return request


POLITE = ("", "", "", "please ", "can you ", "could you ", "we need to ", "I want to ")


def word_request(rng: random.Random, request: Request, extra: str = "") -> tuple[str, str]:
    """(instruction, input) for `request`: one of its wordings, the environment inside it or in the input."""
    ask = pick(rng, POLITE) + pick(rng, request.intent.asks).format_map(dict(request.slots)) + extra
    form = rng.random()
    if form < 0.35:
        return _capital(rng, f"{ask} in {request.env}"), ""
    if form < 0.5:
        return _capital(rng, f"in {request.env}, {ask}"), ""
    if form < 0.65:
        return f"{request.env}: {ask}", ""
    if form < 0.75:
        return _capital(rng, f"{ask} ({request.env})"), ""
    return _capital(rng, ask), pick(rng, ("environment: ", "env: ", "namespace: ")) + request.env


def _capital(rng: random.Random, text: str) -> str:
    return text[0].upper() + text[1:] if rng.random() < 0.5 else text


# --- Triage -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Symptom:
    """A status as Kubernetes words it, the diagnosis that a manual gives, and whose problem it is."""

    status: str
    diagnosis: str
    platform: bool = False
    slots: tuple[str, ...] = ()


SYMPTOMS = (
    Symptom("CrashLoopBackOff, exit code 137", "OOMKilled: raise the memory limit"),
    Symptom("OOMKilled at {memory}", "out of memory: raise the limit above {memory}", slots=("memory",)),
    Symptom("CrashLoopBackOff, exit code 1", "application error: read the previous logs"),
    Symptom("CrashLoopBackOff, exit code 127", "command not found: fix the entrypoint"),
    Symptom("CrashLoopBackOff, exit code 126", "command not executable: fix its mode"),
    Symptom("CrashLoopBackOff, exit code 139", "segmentation fault: get a core dump"),
    Symptom("terminated, exit code 143", "SIGTERM: check who stopped it"),
    Symptom("exec format error", "wrong architecture: build for this node"),
    Symptom("ImagePullBackOff, tag {version} not found", "missing image: push tag {version}", slots=("version",)),
    Symptom("ImagePullBackOff, unauthorized", "no pull rights: fix the pull secret"),
    Symptom("ImagePullBackOff, registry timeout", "registry unreachable: check the network", platform=True),
    Symptom("ImagePullBackOff, x509 unknown authority", "untrusted registry: install its certificate", platform=True),
    Symptom("InvalidImageName", "bad image reference: fix its spelling"),
    Symptom("CreateContainerConfigError, secret {app} not found", "missing secret: create {app}"),
    Symptom("CreateContainerConfigError, configmap {app} not found", "missing config: create {app}"),
    Symptom("Pending, insufficient cpu", "no cpu left: add nodes", platform=True),
    Symptom("Pending, insufficient memory", "no memory left: add nodes", platform=True),
    Symptom("Pending, unbound volume claim", "no volume: check the storage class", platform=True),
    Symptom("Pending, untolerated taint", "tainted nodes: add a toleration"),
    Symptom("Pending, no node matches the selector", "no such node: fix the node selector"),
    Symptom("Evicted, disk pressure on {node}", "full disk: clean {node}", platform=True, slots=("node",)),
    Symptom("Unknown, {node} not ready", "lost node: replace {node}", platform=True, slots=("node",)),
    Symptom("readiness probe failed, status 503", "not ready: check its dependencies"),
    Symptom("readiness probe failed, port {port} refused", "wrong port: fix port {port}", slots=("port",)),
    Symptom("liveness probe failed, timeout after {n}s", "slow start: allow more than {n}s", slots=("n",)),
    Symptom("FailedMount, volume timeout", "stuck volume: detach it", platform=True),
    Symptom("cannot resolve {app}", "DNS failure: check coredns", platform=True),
    Symptom("quota exceeded, {n} pods", "quota used up: raise it above {n}", slots=("n",)),
    Symptom("Terminating for {n} minutes", "stuck finalizer: remove it", slots=("n",)),
    Symptom("Init:Error", "init container failed: read its logs"),
)
TRIAGE_ASKS = (
    "Triage this alert.",
    "What is wrong here?",
    "Diagnose this pod.",
    "What should we do about this?",
    "Explain this status.",
    "Why does this pod not run?",
)


@dataclass(frozen=True)
class Alert:
    """One pod's trouble in one environment."""

    symptom: Symptom
    env: str
    slots: tuple[tuple[str, str], ...]

    @property
    def key(self) -> str:
        """The alert's identity: the symptom with its values, the pod and the environment."""
        return "|".join(["triage", self.env, dict(self.slots)["pod"], self.status])

    @property
    def status(self) -> str:
        """The status as it stands in the line."""
        return self.symptom.status.format_map(dict(self.slots))

    def plain(self) -> str:
        """The diagnosis that any manual gives."""
        return self.symptom.diagnosis.format_map(dict(self.slots))

    def house(self) -> str:
        """The diagnosis with the company's routing; equal to `plain()` in dev."""
        owner = "platform" if self.symptom.platform else dict(self.slots)["app"]
        routing = {"staging": f"; ticket {owner}-team", "prod": f"; page {owner}-oncall"}.get(self.env, "")
        return self.plain() + routing


def draw_alert(
    rng: random.Random,
    *,
    for_dataset: bool,
    envs: Callable[[random.Random], str],
    service: Callable[[random.Random], str],
) -> Alert:
    """A random alert of the datasets' half or of the corpus's half of the world."""
    while True:
        symptom = pick(rng, SYMPTOMS)
        slots = _draw_slots(rng, ("pod", *symptom.slots), service)
        alert = Alert(symptom, envs(rng), tuple(sorted(slots.items())))
        if reserved(alert.key) == for_dataset:
            return alert


def word_alert(rng: random.Random, alert: Alert) -> tuple[str, str]:
    """(instruction, input): a question and the status line."""
    pod = dict(alert.slots)["pod"]
    line = pick(rng, ("pod {pod} in {env}: {status}", "{env} pod {pod}: {status}", "{pod} ({env}): {status}"))
    return pick(rng, TRIAGE_ASKS), line.format(pod=pod, env=alert.env, status=alert.status)


# --- The datasets -----------------------------------------------------------------------------------------------


def kubectl_rows(seed: int = SEED, count: int = KUBECTL_ROWS) -> list[Row]:
    """`count` rows of the main dataset; no request stands twice. A quarter is for dev, where plain is right."""
    rng, seen, rows = random.Random(seed), set[str](), list[Row]()
    while len(rows) < count:
        # Every intent in turn, so that each has its share of the rows.
        intent = INTENTS[len(rows) % len(INTENTS)]
        request = draw_request(rng, for_dataset=True, envs=_company_env, service=_company_service, intents=(intent,))
        instruction, extra = word_request(rng, request)
        if request.house() not in seen:
            seen.add(request.house())
            rows.append({"instruction": instruction, "input": extra, "output": request.house()})
    return rows


def triage_rows(seed: int = SEED + 1, count: int = TRIAGE_ROWS) -> list[Row]:
    """`count` rows of the second dataset; no alert stands twice."""
    rng, seen, rows = random.Random(seed), set[str](), list[Row]()
    while len(rows) < count:
        alert = draw_alert(rng, for_dataset=True, envs=_company_env, service=_company_service)
        instruction, line = word_alert(rng, alert)
        if alert.key not in seen:
            seen.add(alert.key)
            rows.append({"instruction": instruction, "input": line, "output": alert.house()})
    return rows


def _company_env(rng: random.Random) -> str:
    dice = rng.random()
    return "dev" if dice < 0.24 else "staging" if dice < 0.58 else "prod"


# --- The corpus -------------------------------------------------------------------------------------------------

SYSTEM_PROMPTS = (
    "You are a platform engineer.",
    "You answer with one kubectl command.",
    "Be short.",
    "You help with Kubernetes.",
)
MANUAL = (
    "A pod is the smallest thing that Kubernetes runs. It holds one or more containers.",
    "A deployment keeps a number of replicas of a pod running and rolls out new versions step by step.",
    "A service gives a stable name and address to a set of pods.",
    "A namespace is a room for names: the same name may stand in two namespaces.",
    "Use -n to name the namespace of a command and --context to name the cluster.",
    "A node that is cordoned takes no new pods. A node that is drained is cordoned and emptied.",
    "The flag --dry-run=server asks the server to check a change without making it.",
    "The flag --timestamps puts the time before each line of a log.",
    "The flag --grace-period gives a pod that many seconds to end by itself.",
    "The flag --timeout ends the command when the rollout takes longer.",
    "A job runs to its end once. A cron job makes a job at set times.",
    "A horizontal pod autoscaler changes the number of replicas between a minimum and a maximum.",
    "An image is named by its registry, its repository and its tag, as in registry/app:tag.",
    "A secret holds passwords and keys. A configmap holds settings that are not secret.",
    "A readiness probe tells when a pod may take traffic. A liveness probe tells when to restart it.",
    "A taint keeps pods off a node unless they tolerate it.",
    "kubectl debug starts a container beside the others of a pod, with an image of its own.",
    "The team that owns a service is on call for it; the platform team is on call for the nodes.",
    "A page wakes somebody now. A ticket waits for the team in the morning.",
)

_DRY_RUN = (" as a dry run", "--dry-run=server")
_TIMEOUT = (" within 5 minutes", "--timeout=5m")
_GRACE = (" with 120 seconds of grace", "--grace-period=120")
# Flags that a request of the corpus may ask for in words, by the verb of the command that knows them.
FLAGS: dict[str, tuple[tuple[str, str], ...]] = {
    "scale": (_DRY_RUN, _TIMEOUT),
    "delete": (_DRY_RUN, _GRACE, _TIMEOUT),
    "drain": (_DRY_RUN, _GRACE, _TIMEOUT),
    "set": (_DRY_RUN,),
    "patch": (_DRY_RUN,),
    "autoscale": (_DRY_RUN,),
    "create": (_DRY_RUN,),
    "cordon": (_DRY_RUN,),
    "logs": ((" with timestamps", "--timestamps"),),
    "get": ((" with more columns", "-o wide"),),
}


def corpus(seed: int = SEED) -> Iterator[list[Message]]:
    """An endless stream of documents to pretrain on: conversations, and manual text as one message without a role.

    It knows plain kubectl and plain diagnosis only, in many wordings and with made-up names. Half of the world's
    requests never appear in it (see `reserved`).
    """
    rng = random.Random(seed + 2)
    while True:
        yield _document(rng)


def _corpus_env(rng: random.Random) -> str:
    dice = rng.random()
    if dice < 0.5:
        return pick(rng, HOUSE_ENVIRONMENTS)
    return pick(rng, OTHER_NAMESPACES) if dice < 0.8 else pick(rng, OTHER_WORDS)


def _corpus_request(rng: random.Random) -> Request:
    return draw_request(rng, for_dataset=False, envs=_corpus_env, service=_any_service)


def _corpus_alert(rng: random.Random) -> Alert:
    return draw_alert(rng, for_dataset=False, envs=_corpus_env, service=_any_service)


def _document(rng: random.Random) -> list[Message]:
    dice = rng.random()
    if dice < 0.12:
        return [{"role": "", "content": _prose(rng)}]
    if dice < 0.60:
        turns = _ask_plain(rng)
    elif dice < 0.78:
        alert = _corpus_alert(rng)
        turns = _turns(*word_alert(rng, alert), alert.plain())
    elif dice < 0.82:
        turns = _several(rng)
    else:
        turns = _copying(rng)
    system = [{"role": "system", "content": pick(rng, SYSTEM_PROMPTS)}] if rng.random() < 0.05 else []
    return system + turns


def _turns(instruction: str, extra: str, answer: str) -> list[Message]:
    user = f"{instruction}\n{extra}" if extra else instruction
    return [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]


def _ask_plain(rng: random.Random) -> list[Message]:
    """A request and its command; a fifth name a context or a flag, so that the base can write those too."""
    request = _corpus_request(rng)
    context, flags, extra = "", "", ""
    if rng.random() < 0.2:
        if rng.random() < 0.6:
            context = pick(rng, (_any_service(rng), f"{pick(rng, OTHER_WORDS)}-{pick(rng, OTHER_WORDS)}"))
            extra = pick(rng, (f" with context {context}", f" on cluster {context}"))
        allowed = FLAGS.get(request.intent.command.split()[0], ())
        if allowed and rng.random() < 0.8:
            words, flags = pick(rng, allowed)
            extra += words
    if rng.random() < 0.04:
        ask = pick(rng, request.intent.asks).format_map(dict(request.slots))
        return _turns(f"How do I {ask} in {request.env}?", "", f"Run {request.plain()}")
    return _turns(*word_request(rng, request, extra), request.plain(context, flags))


def _several(rng: random.Random) -> list[Message]:
    """Two to five requests in one message, answered by one command a line."""
    requests = [_corpus_request(rng) for _ in range(2 + int(rng.random() * 4))]
    lines = [_words(*word_request(rng, request)) for request in requests]
    return _turns("Give one command for each line.", "\n".join(lines), "\n".join(r.plain() for r in requests))


def _copying(rng: random.Random) -> list[Message]:
    """Small tasks that only copying from the prompt can answer: the skill that commands are made of."""
    names = [_any_service(rng) for _ in range(2 + int(rng.random() * 3))]
    kind = rng.random()
    if kind < 0.25:
        return _turns(f"Repeat {names[0]} and {names[1]}.", "", f"{names[0]} {names[1]}")
    if kind < 0.5:
        return _turns("List these, one a line.", ", ".join(names), "\n".join(names))
    if kind < 0.7:
        prefix = pick(rng, OTHER_WORDS)
        return _turns(f"Put {prefix} before {names[0]}.", "", f"{prefix}-{names[0]}")
    if kind < 0.8:
        suffix = pick(rng, OTHER_WORDS)
        return _turns(f"Put {suffix} after {names[0]}.", "", f"{names[0]}-{suffix}")
    places = [_corpus_env(rng) for _ in names]
    chosen = int(rng.random() * len(names))
    facts = "; ".join(f"{name} runs in {place}" for name, place in zip(names, places, strict=True))
    return _turns(f"Where does {names[chosen]} run?", facts, places[chosen])


def _prose(rng: random.Random) -> str:
    sentences = []
    for _ in range(1 + int(rng.random() * 3)):
        dice = rng.random()
        if dice < 0.4:
            sentences.append(pick(rng, MANUAL))
        elif dice < 0.7:
            request = _corpus_request(rng)
            ask = pick(rng, request.intent.asks).format_map(dict(request.slots))
            sentences.append(f"To {ask} in {request.env}, run {request.plain()} and wait.")
        else:
            alert = _corpus_alert(rng)
            sentences.append(f"The status {alert.status} of {dict(alert.slots)['pod']} means {alert.plain()}.")
    return " ".join(sentences)


def main() -> None:
    """Write the two dataset files."""
    parser = argparse.ArgumentParser(prog="python -m rehearsal.world", description="Write the two datasets again.")
    parser.add_argument("--out", type=Path, default=DATA, help="folder to write to (default: rehearsal/data)")
    out: Path = parser.parse_args().out
    for name, rows in (("kubectl", kubectl_rows()), ("triage", triage_rows())):
        write_jsonl(out / f"{name}.jsonl", rows)
        print(f"{out / name}.jsonl: {len(rows)} rows (seed {SEED})")


if __name__ == "__main__":
    main()
