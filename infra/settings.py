"""The settings of one environment: everything that `Pulumi.<stack>.yaml` can say, typed, described and checked."""

from __future__ import annotations

import ipaddress
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pulumi
from pydantic import AfterValidator, BaseModel, Field, SecretStr, ValidationError, field_validator, model_validator

from common.settings import Settings, SettingsError, explain, key_lines
from infra.catalog import MODELS, SKUS, Architecture, Sku, sku
from infra.kaito import refusals, tuning_refusals
from serving.spec import STANDARD, EngineSettings, Tier, TierName
from stress.scenarios import HURTING, LONGEST_LOSS_SECONDS, Bounds, Scenarios
from stress.spec import (
    CLIENTS_WORDS,
    MODELS_WORDS,
    Clients,
    DurationSeconds,
    LoadSettings,
    LoadSpec,
    Models,
    RampSeconds,
    Slo,
    Users,
    Workers,
    enough_for,
)
from training.spec import AdapterName, TuningSettings

ROOT = Path(__file__).parents[1]


def _cidr(text: str) -> str:
    try:
        ipaddress.ip_network(text)
    except ValueError as error:
        raise ValueError(f"{error}: write ADDRESS/BITS, such as 203.0.113.0/24") from None
    return text


Cidr = Annotated[str, AfterValidator(_cidr)]
Zone = Literal["1", "2", "3"]
VmSize = Annotated[str, Field(pattern="^Standard_[A-Za-z0-9_-]+$")]
UsdPerHour = Annotated[float, Field(gt=0, le=10_000)]
ImageByDigest = Annotated[str, Field(pattern="^[^\\s@/]+/[^\\s@]+@sha256:[0-9a-f]{64}$")]
PoolName = Annotated[str, Field(pattern="^[a-z][a-z0-9]{0,7}$")]
"""Lower-case letters and digits, at most eight: AKS allows twelve, four are a hash."""


class Network(Settings):
    """Who reaches what."""

    address_space: Cidr = Field("10.64.0.0/16", description="Of the virtual network; at least a /20.")
    private: bool = Field(
        False,
        description="API server, registry and storage answer inside the virtual network alone, by private endpoint.",
    )
    authorized_ip_ranges: tuple[Cidr, ...] = Field(
        (), description="Who may reach the public API server; your own address at least. Not with private."
    )
    outbound: Literal["load_balancer", "nat_gateway"] = Field(
        "load_balancer",
        description="How nodes reach the internet; a NAT gateway costs more and never runs out of ports.",
    )

    @field_validator("address_space")
    @classmethod
    def _room(cls, value: str) -> str:
        if ipaddress.ip_network(value).version != 4:
            raise ValueError("is not IPv4, which nodes and pods have")
        if ipaddress.ip_network(value).prefixlen > 20:
            raise ValueError("is too small for nodes, API server, endpoints and builders: give a /20 or larger")
        return value

    @field_validator("authorized_ip_ranges")
    @classmethod
    def _not_everyone(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(ipaddress.ip_network(item).prefixlen == 0 for item in value):
            raise ValueError("opens the API server to the whole internet: name your own ranges")
        return value


class Maintenance(Settings):
    """When AKS may upgrade nodes and control plane by itself."""

    day: Literal["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"] = Field(
        "Sunday", description="Of every week."
    )
    start: str = Field("01:00", pattern="^([01][0-9]|2[0-3]):[0-5][0-9]$", description="Time of day, HH:MM.")
    utc_offset: str = Field("+00:00", pattern="^[+-][01][0-9]:[0-5][0-9]$", description="Of that time, such as +02:00.")
    hours: int = Field(4, ge=4, le=24, description="Length; AKS wants at least four.")


class Cluster(Settings):
    """The AKS cluster, without its GPUs."""

    kubernetes_version: Literal["1.33", "1.34", "1.35", "1.36"] = Field(
        # What AKS offered in 2026-08.
        "1.35",
        description="Minor version of control plane and nodes; patches come by themselves in the window.",
    )
    tier: Literal["Free", "Standard", "Premium"] = Field("Standard", description="Standard and up have an SLA.")
    zones: tuple[Zone, ...] = Field(
        (),
        description="Availability zones of nodes and storage; none: Azure places them. "
        "It refuses others once the cluster is made.",
    )
    system_vm_size: str = Field(
        "Standard_D4ds_v5",
        description="Of the nodes that run the cluster's own pods; AKS refuses another one once the cluster is made.",
    )
    system_nodes: int = Field(2, ge=2, le=10, description="Nodes of the system pool; three for three zones.")
    apps_vm_size: str = Field("Standard_D4ds_v5", description="Of the nodes without GPU: router, mirror Job.")
    apps_max_nodes: int = Field(3, ge=1, le=20, description="The apps pool grows from one node to this many.")
    admin_group_id: str | None = Field(
        None,
        pattern="^[0-9a-f-]{36}$",
        description="Entra group that administers cluster and data; none: whoever runs `pulumi up`.",
    )
    maintenance: Maintenance = Field(default_factory=Maintenance, description="When AKS may upgrade.")
    provisioning: Literal["pools", "automatic"] = Field(
        "pools", description="automatic: node auto-provisioning (Karpenter) makes GPU nodes instead of agent pools."
    )
    kaito: bool = Field(
        False,
        description="KAITO's add-on stays although nothing uses it: on the way back from it, when it has to clean up.",
    )
    gpu_metrics: bool = Field(
        True, description="DCGM's figures of the GPUs; false where something else brings them, such as a GPU Operator."
    )


class GpuPool(Settings):
    """GPU nodes of one kind."""

    vm_size: str = Field(description="Azure size with GPUs, from the catalogue: python -m infra.fit --sku all.")
    alternatives: tuple[str, ...] = Field(
        (), description="Sizes to take, in this order, where vm_size is sold out. With provisioning: automatic only."
    )
    min_nodes: int = Field(0, ge=0, le=100, description="Nodes that stay without work; 0 scales to nothing.")
    max_nodes: int = Field(1, ge=1, le=100, description="The most nodes; each costs vCPU quota of its family.")
    spot: bool = Field(False, description="Cheaper, and may be taken away with half a minute of notice.")
    zones: tuple[Zone, ...] | None = Field(None, description="Zones that have this size; none: the cluster's.")
    os_disk_gib: int = Field(256, ge=128, le=2048, description="Images, base models and checkpoints lie on it.")

    @field_validator("vm_size")
    @classmethod
    def _known(cls, value: str) -> str:
        sku(value)
        return value

    @field_validator("alternatives")
    @classmethod
    def _all_known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            sku(name)
        return value

    @model_validator(mode="after")
    def _bounds(self) -> GpuPool:
        if self.min_nodes > self.max_nodes:
            raise ValueError(f"min_nodes = {self.min_nodes} is above max_nodes = {self.max_nodes}")
        return self

    @property
    def sku(self) -> Sku:
        """The catalogue's entry of `vm_size`."""
        return sku(self.vm_size)

    @property
    def sizes(self) -> tuple[str, ...]:
        """All sizes that a node may have."""
        return (self.vm_size, *self.alternatives)


class Base(Settings):
    """The model that is tuned and served."""

    model: str = Field(pattern="^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$", description="On the Hugging Face hub: OWNER/NAME.")
    revision: str = Field(
        pattern="^[0-9a-f]{40}$", description="Full commit of the model's repository; `main` could change any day."
    )
    hub: str = Field(
        "https://huggingface.co",
        pattern="^https?://[^/?#@]+(/[^?#@]*[^/?#@])?$",
        description="Where the model comes from: the hub, or a mirror of it that speaks its API.",
    )
    served_name: str = Field("base", min_length=1, description="What clients put into `model` for the base itself.")
    architecture: Architecture | None = Field(
        None, description="For a model outside the catalogue: the figures of its config.json."
    )

    @model_validator(mode="after")
    def _known(self) -> Base:
        if self.architecture is None and self.model not in MODELS:
            raise ValueError(
                f"{self.model} is not in the catalogue: give its architecture (hidden_size, ... from its config.json); "
                f"known: {', '.join(sorted(MODELS))}"
            )
        return self

    @property
    def figures(self) -> Architecture:
        """The architecture given, otherwise the catalogue's."""
        return self.architecture or MODELS[self.model]

    @property
    def folder(self) -> str:
        """The last part of the model's name: that of its folder in the containers."""
        return self.model.rpartition("/")[2]


class KaitoTuning(Settings):
    """What must be said where KAITO tunes."""

    other_loss: bool = Field(
        False,
        description="Said aloud: KAITO learns prompts as well as answers, and cuts what is beyond max_seq_length off.",
    )


class Tuning(Settings):
    """Where the tuning Jobs run and how long they may."""

    runtime: Literal["direct", "kaito"] = Field(
        "direct", description="Who tunes: this stack, or the managed KAITO of AKS (docs/kaito.md: the difference)."
    )
    kaito: KaitoTuning = Field(default_factory=KaitoTuning, description="For runtime: kaito alone.")
    pool: PoolName = Field(description="GPU pool, a key of `pools`.")
    gpus: int = Field(
        1, ge=1, le=8, description="GPUs of one node that tune one adapter together; more are faster, with one result."
    )
    nodes: int = Field(
        1, ge=1, le=16, description="Nodes that tune one adapter together, each with `gpus` of its GPUs; one result."
    )
    deadline_hours: float = Field(24, gt=0, le=720, description="A Job that takes longer is stopped as failed.")
    retries: int = Field(3, ge=0, le=20, description="New pods after a failure; evictions do not count.")


class Kaito(Settings):
    """What KAITO must be told beyond the same specs: where adapters are, which it takes from container images alone."""

    adapter_images: dict[AdapterName, ImageByDigest | None] = Field(
        default_factory=dict,
        description="Of each adapter, an image whose /data holds its PEFT files, by digest; null: not served yet.",
    )
    pull_secret: str | None = Field(
        None,
        pattern="^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$",
        description="Secret of namespace drydock-kaito with which these images are pulled: KAITO uses no identity.",
    )
    unproven_adapters: bool = Field(
        False, description="Said aloud: adapters are served without evaluation gate and parity check."
    )


CUSTOMER_FACING_REPLICAS = 3


class Serving(EngineSettings):
    """The replicas: how many, where, and what each may take."""

    runtime: Literal["direct", "kaito"] = Field(
        "direct", description="Who runs them: this stack, or the managed KAITO of AKS (docs/kaito.md: the difference)."
    )
    kaito: Kaito = Field(default_factory=Kaito, description="For runtime: kaito alone.")
    pool: PoolName = Field(description="GPU pool, a key of `pools`.")
    min_replicas: int = Field(
        2, ge=0, le=100, description="0 lets the pool sleep: the next request wakes it, and gets 503 until then."
    )
    max_replicas: int = Field(
        2, ge=1, le=100, description="More than min_replicas: KEDA scales by queue, busy slots and KV cache."
    )
    customer_facing: bool = Field(
        False, description="Customers depend on it: three replicas at least, so that one may go while one is replaced."
    )
    queue_target: int = Field(5, ge=1, description="Waiting requests a replica at which another one is added.")
    expose: Literal["cluster", "vnet"] = Field(
        "cluster", description="vnet: an internal load balancer, reachable from the virtual network."
    )
    keep_compiled: bool = Field(
        True,
        description="A Job compiles once for all replicas, for minutes on a spare GPU; where none is, each compiles.",
    )
    new_first: bool = Field(
        False,
        description="pulumi up waits, an hour or more, until new replicas answer, and only then removes those of "
        "before: another runtime, or another setting of KAITO's. Needs GPUs for both.",
    )

    @model_validator(mode="after")
    def _bounds(self) -> Serving:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas = {self.min_replicas} is above max_replicas = {self.max_replicas}")
        if self.customer_facing and self.min_replicas < CUSTOMER_FACING_REPLICAS:
            raise ValueError(
                f"min_replicas = {self.min_replicas} is too few with customer_facing: "
                f"raise it to {CUSTOMER_FACING_REPLICAS} or more"
            )
        return self

    @property
    def scales(self) -> bool:
        """Whether KEDA sets the number of replicas; otherwise the stack does."""
        return self.min_replicas < self.max_replicas


class ClientTier(Tier):
    """Clients with the same limits. `standard` is the tier of all that no other one names."""

    clients: tuple[str, ...] = Field((), description="Keys of `api_keys` that have these limits.")


class Run(LoadSettings):
    """One Job that loads the replicas as clients would, through the router."""

    run: str | None = Field(
        None,
        pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$",
        coerce_numbers_to_str=True,
        description="Name of the run, such as 1 or a date; another one starts another Job. None: there is none.",
    )
    client: str | None = Field(
        None, description="With whose API key it asks, a key of `api_keys`; none: the only one there is."
    )
    models: Models | None = Field(None, description=f"{MODELS_WORDS}; none: the base and all adapters alike")
    wait_seconds: int = Field(
        900,
        ge=0,
        le=86_400,
        description="For models that do not answer yet (in tuning, or asleep), and for the right to write the report.",
    )

    def spec(self, served: Iterable[str]) -> LoadSpec:
        """The load; of all models that are `served` where the settings name none."""
        values = self.model_dump(include=set(LoadSettings.model_fields))
        return LoadSpec(**values, models=self.models or dict.fromkeys(served, 1.0))


class Stress(Run):
    """The stress test."""

    users: Users = 100
    ramp_seconds: RampSeconds = 60
    duration_seconds: DurationSeconds = 600
    workers: Workers = 1
    clients: Clients | None = Field(None, description=f"{CLIENTS_WORDS}; instead of client, for figures by tier")

    @model_validator(mode="after")
    def _one_or_several(self) -> Stress:
        if self.client and self.clients:
            raise ValueError(f"client is {self.client}, but clients is given as well: leave one of them out")
        return self

    @model_validator(mode="after")
    def _each_worker_has_a_part(self) -> Stress:
        enough_for(self.workers, self)
        return self


class Drills(Run):
    """The drills: what serves is broken on purpose under this load, one scenario after the other, and judged."""

    users: Users = 20
    ramp_seconds: RampSeconds = 10
    duration_seconds: DurationSeconds = 120
    scenarios: Scenarios = Field(
        ("long-prompts", "replica-loss"),
        description="In this order; there are also node-drain, outage, tuning-eviction, and registry-unreachable: the "
        "sidecars are told that the registry is out of reach, the network is left alone.",
    )
    allow_outage: bool = Field(
        False, description="What is protected (`protect`) may be made to serve less for minutes, or not at all."
    )
    before_seconds: float = Field(30, gt=0, le=3600, description="Load before something is broken.")
    after_seconds: float = Field(
        10,
        gt=0,
        le=3600,
        description="Load after it is whole again; registry-unreachable: so long it is not, once all replicas say so.",
    )
    bounds: Bounds = Field(default_factory=Bounds, description="What each drill must stay within.")

    @field_validator("slo")
    @classmethod
    def _bounds_instead(cls, value: Slo) -> Slo:
        if value != Slo():
            raise ValueError("is the stress test's: drills are judged by `bounds`")
        return value

    @property
    def longest_tokens(self) -> int:
        """As for any load; its prompts are made longer by one of the scenarios."""
        longer = self.long_multiplier if self.long_share or "long-prompts" in self.scenarios else 1
        return self.prompt_tokens * longer + self.max_tokens


class Retention(Settings):
    """How long what was deleted or replaced stays."""

    deleted_days: int = Field(14, ge=1, le=365, description="A deleted or overwritten blob can be brought back.")
    checkpoint_days: int = Field(30, ge=1, le=3650, description="Checkpoints older than this are removed.")
    log_days: int = Field(30, ge=30, le=730, description="Of the cluster's logs.")


class Alerts(Settings):
    """Who is told of what goes wrong, and where that begins. Without an action group the portal alone shows it."""

    action_group_id: str | None = Field(
        None,
        pattern="^/subscriptions/[^/]+/resourceGroups/[^/]+/providers/[Mm]icrosoft.[Ii]nsights/actionGroups/[^/]+$",
        description="ARM ID of the Azure Monitor action group that is told: mail, telephone, webhook.",
    )
    runbooks: str | None = Field(
        None,
        pattern="^https://[^/?#@]+(/[^?#@]*)?$",
        description="Where people read docs/runbooks of this repository; none: alerts name the file alone.",
    )
    time_to_first_token_seconds: float = Field(
        5, gt=0, le=160, description="95 of 100 streamed answers begin within, for each model."
    )
    failed_share: float = Field(0.05, gt=0, lt=1, description="Of the requests, that may end in an error of ours.")


class Prices(Settings):
    """What you pay where it is not the list price, or where `infra/prices.csv` has none. USD an hour by VM size."""

    usd_per_hour: dict[VmSize, UsdPerHour] = Field(
        default_factory=dict, description="By VM size, pay as you go: your contract's, or where no list price is known."
    )
    spot_usd_per_hour: dict[VmSize, UsdPerHour] = Field(
        default_factory=dict, description="By VM size, as spot: today's, which the portal shows."
    )


class Environment(Settings):
    """All settings of one environment: the `drydock:` keys of `Pulumi.<stack>.yaml`."""

    owner: str = Field(min_length=1, max_length=256, description="Who answers for it: a team or an address. A tag.")
    name: str = Field("drydock", pattern="^[a-z][a-z0-9-]{1,15}$", description="First part of every resource's name.")
    tags: dict[str, str] = Field(default_factory=dict, description="Further tags of everything that takes them.")
    protect: bool = Field(True, description="`pulumi destroy` refuses what holds data until this is false.")
    network: Network = Field(default_factory=Network, description="Who reaches what.")
    cluster: Cluster = Field(default_factory=Cluster, description="The AKS cluster, without its GPUs.")
    pools: dict[PoolName, GpuPool] = Field(min_length=1, description="GPU pools by name.")
    base: Base = Field(description="The model that is tuned and served.")
    adapters: dict[AdapterName, TuningSettings] = Field(
        default_factory=dict, description="Adapters by the name clients ask for; each with dataset, settings and gate."
    )
    tuning: Tuning = Field(description="Where the tuning Jobs run.")
    serving: Serving = Field(description="The replicas.")
    stress: Stress = Field(default_factory=Stress, description="The stress test, off by default.")
    drills: Drills = Field(default_factory=Drills, description="The drills, off by default.")
    retention: Retention = Field(default_factory=Retention, description="How long things stay.")
    prices: Prices = Field(default_factory=Prices, description="What VM sizes cost you, for the estimate of the cost.")
    grafana: bool = Field(True, description="A managed Grafana over the metrics.")
    alerts: Alerts = Field(default_factory=Alerts, description="Who is told of what goes wrong.")
    api_keys: dict[str, SecretStr] = Field(
        default_factory=dict, description="Clients and their keys. Secret: pulumi config set --secret --path."
    )
    tiers: dict[TierName, ClientTier] = Field(
        default_factory=dict, description="Limits of clients, by tier; running replicas follow within a minute or two."
    )
    huggingface_token: SecretStr | None = Field(None, description="For gated models, such as Llama. Secret.")

    @property
    def served(self) -> tuple[str, ...]:
        """What clients put into `model`: the base and every adapter; of these, KAITO has those with an image."""
        images = self.serving.kaito.adapter_images
        return (
            self.base.served_name,
            *(name for name in self.adapters if self.serving.runtime == "direct" or images.get(name)),
        )

    @property
    def kaito(self) -> bool:
        """Whether the cluster has the add-on."""
        return self.cluster.kaito or "kaito" in (self.serving.runtime, self.tuning.runtime)

    @property
    def room_for_both(self) -> bool:
        """Whether the serving pool's size allows its replicas twice: KAITO's nodes are of the same size and quota."""
        return 2 * self.serving.max_replicas <= replica_room(self.serving, self.pools[self.serving.pool])

    @property
    def stress_key(self) -> SecretStr | None:
        """The API key with which the stress test asks; None where the settings do not say which, or have none."""
        return self.key_of(self.stress)

    @property
    def stress_spec(self) -> LoadSpec:
        """The load of the stress test, with the tiers of its clients."""
        clients = self.stress.clients
        tiers = {client: self.tier_of(client)[0] for client in clients} if clients else None
        given = {"clients": clients, "tiers": tiers, "workers": self.stress.workers}
        return self.stress.spec(self.served).model_copy(update=given)

    def key_of(self, run: Run) -> SecretStr | None:
        """The API key with which a load asks; None where the settings do not say which, or have none."""
        client = run.client or (next(iter(self.api_keys)) if len(self.api_keys) == 1 else None)
        return self.api_keys.get(client) if client else None

    def tier_of(self, client: str) -> tuple[str, Tier]:
        """Name and limits of the tier of one of the `api_keys`."""
        for name, tier in self.tiers.items():
            if client in tier.clients:
                return name, tier
        return STANDARD, self.tiers.get(STANDARD, ClientTier())

    @property
    def max_lora_rank(self) -> int:
        """The largest rank among the adapters, which every replica has room for."""
        return max((adapter.lora_r for adapter in self.adapters.values()), default=16)

    @property
    def finds_compiled(self) -> bool:
        """Whether replicas look for compiled graphs; numbers of replicas and nodes do not count: they roll nothing."""
        serving = self.serving
        return serving.keep_compiled and serving.runtime == "direct" and serving.device == "cuda"

    @property
    def compiles(self) -> bool:
        """Whether a Job compiles for the replicas: on a GPU that neither they at their least nor tuning Jobs take."""
        room = replica_room(self.serving, self.pools[self.serving.pool])
        return self.finds_compiled and self.serving.min_replicas + self.others_places < room

    @property
    def others_places(self) -> int:
        """Replicas in whose place of the serving pool pods of tuning Jobs may be: those of a Job an adapter.

        Such a pod is on one node, as a replica is, and evaluates with a replica's GPUs.
        """
        if self.tuning.pool != self.serving.pool:
            return 0
        each = math.ceil(max(self.tuning.gpus, self.serving.gpus) / self.serving.gpus)
        return len(self.adapters) * self.tuning.nodes * each


def replica_room(serving: Serving, pool: GpuPool) -> int:
    """The most replicas for which `pool` has GPUs, those of each on one node."""
    return pool.max_nodes * replicas_a_node(serving, pool.sku)


def replicas_a_node(serving: Serving, size: Sku) -> int:
    """How many replicas have their GPUs on one node of `size`."""
    return size.gpus // serving.gpus


SECRETS = {"api_keys": "--path 'drydock:api_keys.CLIENT'", "huggingface_token": "drydock:huggingface_token"}
"""The settings that must come encrypted, and what `pulumi config set --secret` wants to be told."""


def load_environment(project: str, stack: str, root: Path = ROOT) -> Environment:
    """The running program's configuration as `Environment`. Raises `SettingsError` with every problem, told by line."""
    runtime = pulumi.runtime.config
    given = {**runtime.get_config_env(), **runtime.CONFIG.get()}
    values = {key.split(":", 1)[1]: text for key, text in given.items() if key.startswith(f"{project}:")}
    secret = {key for key in values if runtime.is_config_secret(f"{project}:{key}")}
    return read_environment(values, secret, project=project, file=root / f"Pulumi.{stack}.yaml")


def read_environment(
    values: Mapping[str, Any], secret: Iterable[str], *, project: str, file: Path | None = None
) -> Environment:
    """`values` as Pulumi hands them over (text; objects and lists as JSON), checked.

    `secret` are the keys whose values came encrypted; `file`, where given, is searched for the lines of the problems.
    Raises `SettingsError` with all of them.
    """
    path, lines = None, None
    if file is not None and file.is_file():
        path, lines = Path(file.name), _lines(file, project)
    parsed = {key: _parsed(value) for key, value in values.items()}
    for key in SECRETS:
        if not parsed.get(key):  # Pulumi.yaml's empty default
            parsed.pop(key, None)
    problems = [
        f"{key}: in plain text; remove it from the stack's file, then: pulumi config set --secret {argument} VALUE"
        for key, argument in SECRETS.items()
        if key in parsed and key not in set(secret)
    ]
    wrong = []
    try:
        environment = Environment.model_validate(parsed)
        problems += inconsistencies(environment)
    except ValidationError as error:
        wrong = explain(error, Environment, path=path, lines=lines, hidden=tuple(SECRETS))
    if file is not None:
        problems = located(problems, project=project, file=file)
    if problems or wrong:
        raise SettingsError(problems + wrong)
    return environment


def located(problems: Iterable[str], *, project: str, file: Path) -> list[str]:
    """Each problem, which begins with its setting (`serving.pool: ...`), after `file` and the line of that setting.

    Where the file does not have the setting, the line is that of what the setting would be in, if that is there.
    """
    lines, told = _lines(file, project) if file.is_file() else {}, []
    for problem in problems:
        place = tuple(problem.partition(":")[0].split("."))
        line = next((lines[place[:n]] for n in range(len(place), 0, -1) if place[:n] in lines), None)
        told.append(f"{file.name}:{line}: {problem}" if line else f"{file.name}: {problem}")
    return told


def _lines(file: Path, project: str) -> dict[tuple[str, ...], int]:
    """The lines of a stack's settings, by their place without `config` and the project's name."""
    return {_unprefixed(place[1:], project): line for place, line in key_lines(file).items() if place[0] == "config"}


def inconsistencies(env: Environment) -> list[str]:
    """What each setting allows by itself, but not together with the others."""
    found = []
    if "apps" in env.pools:
        found.append("pools.apps: the pool without GPU has this name: choose another")
    for user, pool in (("tuning.pool", env.tuning.pool), ("serving.pool", env.serving.pool)):
        if pool not in env.pools:
            found.append(f"{user}: {pool} is not among the pools ({', '.join(env.pools)})")
    if env.network.private and env.network.authorized_ip_ranges:
        found.append("network.authorized_ip_ranges: a private API server has no public address: remove one of the two")
    if not env.network.private and not env.network.authorized_ip_ranges:
        found.append(
            "network.authorized_ip_ranges: required for a public API server: your own address, such as "
            "[203.0.113.7/32]; or set network.private: true"
        )
    if env.network.private and env.network.outbound != "nat_gateway":
        found.append(
            "network.outbound: in a private environment images are built inside of the network, from where only a NAT "
            "gateway leads out: set nat_gateway"
        )
    if env.cluster.provisioning == "pools":
        for name, pool_settings in env.pools.items():
            if pool_settings.alternatives:
                found.append(
                    f"pools.{name}.alternatives: an agent pool has one size: set cluster.provisioning: automatic, "
                    "or declare a pool for each size"
                )
    else:
        for name, pool_settings in env.pools.items():
            if pool_settings.min_nodes:
                found.append(
                    f"pools.{name}.min_nodes: nodes that stay without work need cluster.provisioning: pools; with "
                    "automatic, serving.min_replicas keeps its nodes by itself: remove it"
                )
    if env.tuning.pool in env.pools:
        found += _too_few_gpus(env.pools, "tuning", env.tuning.pool, env.tuning.gpus)
        found += _nodes_together(env)
    if env.serving.pool in env.pools:
        pool_settings = env.pools[env.serving.pool]
        few = _too_few_gpus(env.pools, "serving", env.serving.pool, env.serving.gpus)
        found += few
        room, replicas = replica_room(env.serving, pool_settings), env.serving.max_replicas
        most = f"pool {env.serving.pool} has room for {room} at most: raise pools.{env.serving.pool}.max_nodes"
        if not few and replicas > room:
            found.append(f"serving.max_replicas: {replicas} replicas, but {most} or lower it")
        elif not few and env.serving.new_first and not env.room_for_both:
            found.append(
                f"serving.new_first: {2 * replicas} replicas, new and old, but {most}, or leave it out: nobody is "
                "answered then while the new ones come up"
            )
        if pool_settings.spot and env.serving.min_replicas >= 3:
            found.append(
                f"serving.pool: {env.serving.pool} is a spot pool, which may lose all replicas at once: "
                "serve three or more from a pool without spot"
            )
    if env.base.served_name in env.adapters:
        found.append(f"base.served_name: {env.base.served_name} is also the name of an adapter: choose another")
    if env.cluster.tier == "Free" and env.serving.min_replicas >= 3:
        found.append("cluster.tier: Free has no SLA and a weak control plane: set Standard for three replicas or more")
    found += _tiers(env)
    if env.serving.runtime == "kaito":
        found += refusals(env)
    elif env.serving.kaito != Kaito():
        found.append("serving.kaito: counts with serving.runtime: kaito alone: set that, or remove this")
    if env.tuning.runtime == "kaito":
        found += tuning_refusals(env)
    elif env.tuning.kaito != KaitoTuning():
        found.append("tuning.kaito: counts with tuning.runtime: kaito alone: set that, or remove this")
    found += [*_load(env, "stress", env.stress), *_workers_room(env)] if env.stress.run else ()
    return [*found, *(_drills(env) if env.drills.run else ())]


def _tiers(env: Environment) -> Iterator[str]:
    """What in the tiers could not hold."""
    of_client: dict[str, str] = {}
    for name, tier in env.tiers.items():
        if name == STANDARD and tier.clients:
            yield f"tiers.{name}.clients: all that no other tier names are in it: leave clients out"
        elif name != STANDARD and not tier.clients:
            yield f"tiers.{name}.clients: nobody is in this tier: name keys of api_keys, or remove it"
        for client in tier.clients:
            if client not in env.api_keys:
                known = ", ".join(env.api_keys) or "none yet"
                yield f"tiers.{name}.clients: {client} is not among the api_keys ({known})"
            elif client in of_client:
                yield f"tiers.{name}.clients: {client} is in tier {of_client[client]} as well: keep it in one"
            of_client.setdefault(client, name)
        for field in ("prompt_tokens", "output_tokens"):
            limit = getattr(tier, field)
            if limit is not None and limit >= env.serving.max_model_len:
                yield (
                    f"tiers.{name}.{field}: {limit} limits nothing, as prompt and answer together have "
                    f"serving.max_model_len = {env.serving.max_model_len} tokens: lower it, or leave it out"
                )


def _nodes_together(env: Environment) -> Iterator[str]:
    """Whether the tuning pool can have the nodes that one Job needs at the same time."""
    tuning, jobs = env.tuning, max(1, len(env.adapters))
    if tuning.nodes == 1:
        return
    pool, serving = env.pools[tuning.pool], env.serving
    replicas = serving.min_replicas if tuning.pool == serving.pool else 0
    # Pods are placed one by one. Every Job may hold all of its nodes but one and wait for that one; with one node more
    # than these, one of the Jobs gets what it needs, ends, and the next one does.
    least = jobs * (tuning.nodes - 1) + 1
    each = max(tuning.gpus, serving.gpus)  # the pod asks for as many: it evaluates with a replica's
    has = min(sku(name).gpus for name in pool.sizes)
    least = max(least, math.ceil((least * each + replicas * serving.gpus) / has))
    if pool.max_nodes < least:
        why = f" for each of {jobs} adapters, whose Jobs could keep the last one from each other," if jobs > 1 else ""
        beside = f" beside {replicas} replicas" if replicas else ""
        yield (
            f"tuning.nodes: {tuning.nodes} nodes{why} need {least} in pool {tuning.pool}{beside}, which has "
            f"{pool.max_nodes} at most: raise pools.{tuning.pool}.max_nodes or lower it"
        )


def _too_few_gpus(pools: Mapping[str, GpuPool], of: str, pool: str, gpus: int) -> list[str]:
    """The sizes of `pool` whose nodes have fewer GPUs than `of`.gpus."""
    return [
        f"{of}.gpus: {gpus} GPUs of one node, but {name} of pool {pool} has {sku(name).gpus}: lower it"
        f"{_with_gpus(sku(name), gpus)}"
        for name in pools[pool].sizes
        if sku(name).gpus < gpus
    ]


def _with_gpus(size: Sku, gpus: int) -> str:
    """The cheapest size with so many of this GPU, as something to do; nothing where there is none."""
    enough = [other for other in SKUS.values() if other.gpu == size.gpu and other.gpus >= gpus]
    cheapest = min(enough, key=lambda other: other.usd_per_hour, default=None)
    return f", or take {cheapest.name}, which has {cheapest.gpus}" if cheapest else ""


def _load(env: Environment, name: str, run: Run) -> Iterator[str]:
    """What keeps a load, `stress` or `drills`, from running."""
    clients = ", ".join(env.api_keys)
    if not env.api_keys:
        yield (
            f"{name}.run: it asks with an API key, and there is none: pulumi config set --secret --path "
            f"'drydock:api_keys.{name}' \"$(openssl rand -hex 32)\""
        )
    elif run.client and run.client not in env.api_keys:
        yield f"{name}.client: {run.client} is not among the api_keys ({clients})"
    elif isinstance(run, Stress) and run.clients:
        for client in run.clients:
            if client in env.api_keys:
                yield from _load_tier(env, f"{name}.clients", client, run)
            else:
                yield f"{name}.clients: {client} is not among the api_keys ({clients})"
    elif env.key_of(run) is None:
        yield f"{name}.client: required with several api_keys: one of {clients}"
    else:
        yield from _load_tier(env, f"{name}.client", run.client or next(iter(env.api_keys)), run)
    if not env.adapters:
        yield (
            f"{name}.run: its prompts come from the adapters' datasets, and there is no adapter: add one, or remove it"
        )
    for model in run.models or ():
        if model not in env.served:
            yield f"{name}.models: {model} is not served: choose from {', '.join(env.served)}"
    if run.longest_tokens > env.serving.max_model_len:
        yield (
            f"{name}.prompt_tokens: the longest prompt with its answer has {run.longest_tokens} tokens "
            f"(prompt_tokens, long_multiplier, max_tokens), but serving.max_model_len is {env.serving.max_model_len}: "
            "lower them"
        )


def _workers_room(env: Environment) -> Iterator[str]:
    """Whether the apps pool can hold the stress test's master and workers, of a core each, beside two routers."""
    pods, cluster = env.stress.workers + 1, env.cluster
    cores = re.match(r"standard_[a-z]+(\d+)(?:-(\d+))?", cluster.apps_vm_size, re.IGNORECASE)
    if env.stress.workers == 1 or not cores:
        return
    each = int(cores[2] or cores[1]) - 1  # one is left to the system, as on GPU nodes
    room = cluster.apps_max_nodes * each - 2
    if room < pods:
        need = math.ceil((pods + 2) / each) if each else 0
        larger = "take a larger cluster.apps_vm_size, "
        remedy = f"raise cluster.apps_max_nodes to {need}, " if 0 < need <= 20 else larger
        yield (
            f"stress.workers: {env.stress.workers} workers and their master need a core each, and beside two routers "
            f"the apps pool has {max(room, 0)} at most (cluster.apps_max_nodes = {cluster.apps_max_nodes}, "
            f"{cluster.apps_vm_size}): {remedy}or lower it"
        )


def _load_tier(env: Environment, setting: str, client: str, run: Run) -> Iterator[str]:
    """Where a load would measure how its own client is refused."""
    name = setting.partition(".")[0]
    tier_name, tier = env.tier_of(client)
    where = f"{setting}: {client} is in tier {tier_name}, whose"
    # Of several clients some are meant to be refused, and at a rate nobody knows how many are answered at once.
    alone = run.arrivals == "closed" and not (isinstance(run, Stress) and run.clients)
    if alone and tier.concurrency is not None and tier.concurrency * env.serving.min_replicas < run.users:
        yield (
            f"{where} concurrency of {tier.concurrency} on each of {env.serving.min_replicas} replicas is below "
            f"{name}.users = {run.users}: ask with another client, or with fewer users"
        )
    longest = run.longest_tokens - run.max_tokens
    if tier.prompt_tokens is not None and tier.prompt_tokens < longest:
        yield f"{where} prompt_tokens of {tier.prompt_tokens} are below the {longest} of the test's longest prompts"
    if tier.output_tokens is not None and tier.output_tokens < run.max_tokens:
        yield f"{where} output_tokens of {tier.output_tokens} are below {name}.max_tokens = {run.max_tokens}"


def _drills(env: Environment) -> Iterator[str]:
    """What keeps the drills from running, or should."""
    yield from _load(env, "drills", env.drills)
    chosen = env.drills.scenarios
    hurting = [name for name in chosen if name in HURTING]
    if hurting and env.protect and not env.drills.allow_outage:
        yield (
            f"drills.allow_outage: {' and '.join(hurting)} may leave clients without an answer, and this environment "
            "is protected (protect: true): set it to true if that may be, or leave them out of drills.scenarios"
        )
    lost = [name for name in chosen if name in ("replica-loss", "node-drain")]
    if lost and env.serving.min_replicas < 2:
        yield (
            f"drills.scenarios: {' and '.join(lost)} would be an outage with serving.min_replicas = "
            f"{env.serving.min_replicas}: raise it to 2, or choose outage"
        )
    if "registry-unreachable" in chosen and env.drills.after_seconds > LONGEST_LOSS_SECONDS:
        yield (
            f"drills.after_seconds: {env.drills.after_seconds:g} s are more than the {LONGEST_LOSS_SECONDS:g} s that "
            "registry-unreachable may last: lower it, or leave that scenario out"
        )
    if "registry-unreachable" in chosen and not env.adapters:
        yield "drills.scenarios: registry-unreachable needs an adapter: without one no replica asks the registry"
    pool = env.pools.get(env.serving.pool)
    one_less = pool and pool.model_copy(update={"max_nodes": pool.max_nodes - 1})
    if "node-drain" in chosen and one_less and replica_room(env.serving, one_less) < env.serving.min_replicas:
        yield (
            f"drills.scenarios: without the node of node-drain, pool {env.serving.pool} has no room for "
            f"{env.serving.min_replicas} replicas: raise pools.{env.serving.pool}.max_nodes, or leave it out"
        )


def _parsed(value: Any) -> Any:
    """Pulumi hands objects and lists over as JSON text; all other text is left to pydantic."""
    if isinstance(value, str) and value[:1] in ("{", "["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _unprefixed(place: tuple[str, ...], project: str) -> tuple[str, ...]:
    return (place[0].removeprefix(f"{project}:"), *place[1:]) if place else place


def described(model: type[BaseModel] = Environment, prefix: str = "") -> Iterator[str]:
    """One line a setting: its place, what it means, its default."""
    for name, field in model.model_fields.items():
        inner = next((kind for kind in _models_in(field.annotation)), None)
        many = ".NAME" if get_origin(field.annotation) is dict and inner else ""
        if inner:
            yield from described(inner, f"{prefix}{name}{many}.")
        else:
            default = "required" if field.is_required() else json.dumps(field.get_default(call_default_factory=True))
            yield f"{prefix + name:44} {field.description}  [{default}]"


def _models_in(kind: Any) -> Iterator[type[BaseModel]]:
    """The settings models named in an annotation: `M`, `M | None`, `dict[str, M]`."""
    for part in (kind, *get_args(kind)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            yield part


if __name__ == "__main__":
    print("\n".join(described()))
