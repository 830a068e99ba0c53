"""What an environment costs an hour and a month, at least and at most, and what one tuning run costs: an estimate.

    python -m infra.cost dev

By Azure's list prices, each dated (infra/prices.py), or yours (the setting `prices`). Nothing is asked of Azure.
At least: what stays when nobody asks and nothing is tuned. At most: every pool at its max_nodes.
Exit codes: 0 told, 2 settings that cannot be read or a VM size without a price.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pulumi

from common import cli, exits
from common.settings import SettingsError
from infra import offline, prices
from infra.catalog import Architecture, Sku, sku
from infra.fit import GIB, tuning_load
from infra.pools import CPU_OS_DISK_GIB
from infra.settings import ROOT, Environment, GpuPool, located, replicas_a_node
from training import source
from training.spec import TuningSettings

BYTES_PER_TOKEN = 4
"""Of a dataset's file, its JSON included. English text has about as many under the tokenizers of Llama and its like."""
MFU = (0.15, 0.45)
"""Model FLOPs utilisation at worst and at best: an assumption, since tuning has not been measured on these GPUs yet
(`make bench-tuning` would). Chowdhery et al. 2022 (PaLM, section 4.1) find 0.21 to 0.46 for well-tuned large models."""
MFU_4BIT = 0.5
"""Share of the lower figure that is left when the base is in 4 bits and is unpacked layer by layer: an assumption."""
BESIDE_HOURS = (0.25, 1.0)
"""Of a Job beside tuning, paid as well: a node with its driver (up to 20 minutes), images of some 10 GB, the base's
weights, the evaluation in vLLM, and 10 minutes until a node without work goes."""
PEAK_FLOPS = {
    "T4": 8.1e12,  # fp32: training.model takes that where the GPU has no bf16
    "A10": 125e12,
    "1/2 A10": 125e12 / 2,
    "1/3 A10": 125e12 / 3,
    "1/6 A10": 125e12 / 6,
    "A100 40GB": 312e12,
    "A100 80GB": 312e12,
    "H100 NVL": 835e12,
    "H100 80GB": 989e12,
    "H200": 989e12,
}
"""Dense bf16 by the catalogue's name of the GPU, from NVIDIA's datasheets."""

Range = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One resource: `minimum` and `maximum` in USD an hour, and how they come about."""

    resource: str
    what: str
    minimum: float
    maximum: float


@dataclass(frozen=True)
class Run:
    """One tuning run: hours and USD, at best and at worst; None where the dataset's size is not known here."""

    adapter: str
    where: str
    hours: Range | None
    usd: Range | None
    note: str


@dataclass(frozen=True)
class Estimate:
    """All lines and runs, and what is not in them."""

    location: str
    lines: tuple[Line, ...]
    runs: tuple[Run, ...]
    not_counted: tuple[str, ...]

    @property
    def minimum(self) -> float:
        """USD an hour of what stays without work."""
        return sum(line.minimum for line in self.lines)

    @property
    def maximum(self) -> float:
        """USD an hour when every pool is at its largest."""
        return sum(line.maximum for line in self.lines)

    def summary(self) -> str:
        """All of it in one line."""
        low, high = self.minimum, self.maximum
        month = f"${low * prices.HOURS_A_MONTH:,.0f} to ${high * prices.HOURS_A_MONTH:,.0f}"
        text = f"cost, estimated by list prices of {prices.AS_OF}: {_usd(low, high)} an hour, {month} a month"
        told = [f"{run.adapter} {_usd(*run.usd)}" for run in self.runs if run.usd]
        return text + (f"; one tuning run: {', '.join(told)}" if told else "")

    def brief(self) -> dict[str, Any]:
        """The stack output."""
        return {
            "prices_of": prices.AS_OF,
            "usd_per_hour": [round(self.minimum, 2), round(self.maximum, 2)],
            "usd_per_month": [round(usd * prices.HOURS_A_MONTH) for usd in (self.minimum, self.maximum)],
            "usd_per_tuning_run": {
                run.adapter: [round(usd, 2) for usd in run.usd] if run.usd else None for run in self.runs
            },
        }

    def whole(self) -> dict[str, Any]:
        """Everything, for `--json`."""
        lines, runs = [asdict(line) for line in self.lines], [asdict(run) for run in self.runs]
        about = {"location": self.location, "currency": prices.CURRENCY, "hours_a_month": prices.HOURS_A_MONTH}
        return about | self.brief() | {"lines": lines, "runs": runs, "not_counted": list(self.not_counted)}


def estimate(env: Environment, location: str, dataset_bytes: Mapping[str, int]) -> Estimate:
    """What `env` costs in `location`; `dataset_bytes`: the size of each adapter's dataset, where it is known.

    Raises `SettingsError`, each problem with its setting first, for VM sizes without a price.
    """
    problems = list(dict.fromkeys(_unpriced(env, location)))
    if problems:
        raise SettingsError(problems)
    lines = (
        Line("cluster", f"AKS, tier {env.cluster.tier}", *[prices.AKS_TIER[env.cluster.tier]] * 2),
        *_cpu_pools(env, location),
        *(_gpu_pool(env, name, location) for name in env.pools),
        *_kaito_trains(env, location),
        *_disks(env),
        *_network(env),
        _registry(env),
        _blob(env, dataset_bytes),
    )
    runs = tuple(_run(env, name, location, dataset_bytes.get(name)) for name in env.adapters)
    return Estimate(prices.region_name(location), lines, runs, tuple(_not_counted(env)))


def tuning_hours(
    model: Architecture, size: Sku, settings: TuningSettings, dataset_bytes: int, *, gpus: int = 1, nodes: int = 1
) -> Range:
    """Hours of tuning alone on `gpus` GPUs of each of `nodes` nodes of `size`, at best and at worst.

    FLOPs a token: 4 for each weight that multiplies it (forward, and the gradient of its input; the frozen base gets
    none of its weights), and of attention 6 x layers x width of all heads x row (half of the 12 of Chowdhery et al.
    2022, appendix B, since it is causal); gradient checkpointing runs forward once more. Rows count as max_seq_length.
    """
    tokens = dataset_bytes / BYTES_PER_TOKEN * (1 - settings.held_out_fraction) * settings.num_train_epochs
    again = tuning_load(settings, model, [size.name], gpus=gpus, nodes=nodes).gradient_checkpointing
    layers = model.num_hidden_layers
    weights = layers * sum(inputs * outputs for inputs, outputs in model.linear_layers.values())
    weights += model.vocab_size * model.hidden_size
    attention = layers * model.query_size * settings.max_seq_length
    flops = tokens * ((6 if again else 4) * weights + (8 if again else 6) * attention)
    worst, best = MFU
    at_best = flops / (PEAK_FLOPS[size.gpu.name] * gpus * nodes * best) / 3600
    return at_best, at_best * best / (worst * (MFU_4BIT if settings.load_in_4bit else 1))


def tell(env: Environment, location: str) -> dict[str, Any] | None:
    """Say what `env` costs in one line of the preview; the stack output, None where a price is lacking.

    The datasets are files of this machine (`infra.preflight.load`).
    """
    sizes = {name: (ROOT / adapter.dataset).stat().st_size for name, adapter in env.adapters.items()}
    try:
        found = estimate(env, location, sizes)
    except SettingsError as error:
        pulumi.log.warn("\n".join(["the cost is not estimated:", *error.problems]))
        return None
    if pulumi.runtime.is_dry_run():
        pulumi.log.info(f"{found.summary()}; line by line: python -m infra.cost {pulumi.get_stack()}")
    return found.brief()


# The lines


def _unpriced(env: Environment, location: str) -> Iterator[str]:
    """The sizes that have no price, each after the setting that names it."""
    cluster = env.cluster
    wanted = [("cluster.system_vm_size", cluster.system_vm_size, False)]
    wanted.append(("cluster.apps_vm_size", cluster.apps_vm_size, False))
    for name, pool in env.pools.items():
        wanted += [(f"pools.{name}.vm_size", pool.vm_size, pool.spot)]
        wanted += [(f"pools.{name}.alternatives", size, pool.spot) for size in pool.alternatives]
    for setting, size, spot in wanted:
        try:
            prices.vm_price(size, location, spot=spot, given=env.prices)
        except ValueError as error:
            yield f"{setting}: {size}: {error}: {{{size}: USD an hour}}"


def _price(env: Environment, size: str, location: str, *, spot: bool = False) -> tuple[float, str]:
    """USD an hour, and what to say of it where it is not that of the environment's own region."""
    found = prices.vm_price(size, location, spot=spot, given=env.prices)
    how = " spot" if spot else ""
    return found.usd, how + ("" if found.source == prices.region_name(location) else f", price of {found.source}")


def _cpu_pools(env: Environment, location: str) -> Iterator[Line]:
    cluster = env.cluster
    for name, size, low, high in (
        ("system", cluster.system_vm_size, cluster.system_nodes, cluster.system_nodes),
        ("apps", cluster.apps_vm_size, 1, cluster.apps_max_nodes),
    ):
        usd, how = _price(env, size, location)
        yield Line(f"pool {name}", f"{_count(low, high)} x {size}{how}", low * usd, high * usd)


def _nodes(env: Environment, name: str, size: str) -> tuple[int, int]:
    """Nodes of pool `name`, were they all of `size`: those that stay for min_nodes and min_replicas, and the most."""
    pool = env.pools[name]
    replicas = env.serving.min_replicas if env.serving.pool == name else 0
    least = max(pool.min_nodes, math.ceil(replicas / replicas_a_node(env.serving, sku(size))))
    return min(least, pool.max_nodes), pool.max_nodes


def _gpu_pool(env: Environment, name: str, location: str) -> Line:
    """Of several sizes, which provisioning `automatic` may take, the cheapest at least and the dearest at most."""
    pool = env.pools[name]
    low, high, told = [], [], []
    for size in pool.sizes:
        usd, how = _price(env, size, location, spot=pool.spot)
        least, most = _nodes(env, name, size)
        low.append(least * usd)
        high.append(most * usd)
        told.append(f"{_count(least, most)} x {size}{how}")
    return Line(f"pool {name}", " or ".join(told), min(low), max(high))


def _kaito_trains(env: Environment, location: str) -> Iterator[Line]:
    """The nodes that KAITO orders beside the pools: one for each training, and gone when that has ended."""
    if env.tuning.runtime == "kaito" and env.adapters:
        size, most = env.pools[env.tuning.pool].vm_size, len(env.adapters)
        usd, how = _price(env, size, location)
        yield Line("KAITO's tuning", f"{_count(0, most)} x {size}{how}", 0, most * usd)


def _disks(env: Environment) -> Iterator[Line]:
    """OS disks: AKS takes a size's own disk, at no price, where it is large enough, and a Premium SSD otherwise."""
    cluster = env.cluster
    low = high = 0.0
    for size, least, most in (
        (cluster.system_vm_size, cluster.system_nodes, cluster.system_nodes),
        (cluster.apps_vm_size, 1, cluster.apps_max_nodes),
    ):
        if not re.match(r"standard_[a-z]+\d+[a-z]*d", size.lower()):  # the d of D4ds says that it has a disk of its own
            low += least * prices.disk_price(CPU_OS_DISK_GIB)
            high += most * prices.disk_price(CPU_OS_DISK_GIB)
    for pool in env.pools.values():
        if any(sku(size).temp_gib < pool.os_disk_gib for size in pool.sizes):
            # A cache as large may hold it; that is not in the catalogue, so it counts at most only.
            high += pool.max_nodes * prices.disk_price(pool.os_disk_gib)
    if high:
        yield Line("OS disks", "Premium SSD, where a node's own disk may not hold it", low, high)


def _network(env: Environment) -> Iterator[Line]:
    if env.network.outbound == "nat_gateway":
        usd, what = prices.NAT_GATEWAY + prices.PUBLIC_IP, "NAT gateway, public address"
    else:
        usd, what = prices.LOAD_BALANCER + prices.PUBLIC_IP, "load balancer, public address"
    yield Line("outbound", what, usd, usd)
    if env.serving.expose == "vnet":
        yield Line("endpoint", "internal load balancer", prices.LOAD_BALANCER, prices.LOAD_BALANCER)
    if env.network.private:
        usd = 2 * prices.PRIVATE_ENDPOINT + 3 * prices.DNS_ZONE
        yield Line("private endpoints", "registry, storage; 3 DNS zones", usd, usd)


def _registry(env: Environment) -> Line:
    tier = "Premium" if env.network.private else "Standard"  # as in infra.registry
    return Line("registry", f"ACR {tier}", prices.REGISTRY[tier], prices.REGISTRY[tier])


def _blob(env: Environment, dataset_bytes: Mapping[str, int]) -> Line:
    """The base's weights, two bytes a parameter, and the datasets; checkpoints and reports are small."""
    gib = (2 * env.base.figures.parameters + sum(dataset_bytes.values())) / GIB
    kind = "ZRS" if env.cluster.zones else "LRS"
    usd = gib * prices.BLOB_GIB[kind]
    return Line("storage", f"Blob {kind}, {gib:.1f} GiB: base model and datasets", usd, usd)


def _not_counted(env: Environment) -> Iterator[str]:
    yield "data sent and processed, transactions, logs (some $3 a GB), metrics, nodes that an upgrade adds, tax"
    if env.compiles:
        yield f"for each image and setting that serves, minutes of a GPU of pool {env.serving.pool} to compile"
    if env.grafana:
        yield "the managed Grafana (no price known here)"
    if env.network.private:
        yield "the registry's build agents (no price known here; 8 vCPU at a task's $0.0001 a second: $2.88 an hour)"
    own = {size.lower() for size in env.prices.spot_usd_per_hour}
    if any(size.lower() not in own for pool in env.pools.values() if pool.spot for size in pool.sizes):
        share = f"{prices.SPOT_SHARE:.1%}"
        yield f"what spot costs beyond {share} of the list price, which it was lately; it may rise to all of it"


# The runs


def _run(env: Environment, adapter: str, location: str, dataset_bytes: int | None) -> Run:
    pool, gpus, settings = env.pools[env.tuning.pool], env.tuning.gpus, env.adapters[adapter]
    nodes = f"{env.tuning.nodes} nodes with " if env.tuning.nodes > 1 else ""
    where = nodes + " or ".join(f"{gpus} x {sku(size).gpu.name} of {size}" for size in pool.sizes)
    where += " spot" * pool.spot
    if dataset_bytes is None:
        return Run(adapter, where, None, None, "the dataset is elsewhere; the preview, which fetches it, tells")
    every = [_run_on(env, settings, pool, size, location, dataset_bytes) for size in pool.sizes]
    hours = min(low for (low, _), _ in every), max(high for (_, high), _ in every)
    usd = min(low for _, (low, _) in every), max(high for _, (_, high) in every)
    rows = dataset_bytes / BYTES_PER_TOKEN * (1 - settings.held_out_fraction)
    note = f"some {_short(rows)} tokens x {settings.num_train_epochs} epochs"
    if hours[1] > env.tuning.deadline_hours:
        surely = "is" if hours[0] > env.tuning.deadline_hours else "may be"
        note += f"; {surely} beyond tuning.deadline_hours = {env.tuning.deadline_hours:g}, when it is stopped"
    return Run(adapter, where, hours, usd, note)


def _run_on(
    env: Environment, settings: TuningSettings, pool: GpuPool, size: str, location: str, dataset_bytes: int
) -> tuple[Range, Range]:
    """Hours and USD; whole nodes are paid, also where other GPUs of them are free."""
    gpus, nodes = env.tuning.gpus, env.tuning.nodes
    best, worst = tuning_hours(env.base.figures, sku(size), settings, dataset_bytes, gpus=gpus, nodes=nodes)
    hours = best + BESIDE_HOURS[0], worst + BESIDE_HOURS[1]
    usd, _ = _price(env, size, location, spot=pool.spot)
    return hours, (hours[0] * nodes * usd, hours[1] * nodes * usd)


# The command


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m infra.cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stack", metavar="STACK", help="whose settings are in Pulumi.STACK.yaml, such as dev")
    parser.add_argument("--json", action="store_true", help="everything as one JSON object, in place of the table")
    return cli.run(_answer, parser.parse_args(arguments))


def _answer(arguments: argparse.Namespace) -> int:
    found = estimate_of(arguments.stack)
    print(json.dumps(found.whole(), indent=2) if arguments.json else "\n".join(_table(arguments.stack, found)))
    return exits.OK


def estimate_of(stack: str, root: Path = ROOT) -> Estimate:
    """The estimate of a stack by its file alone, with the datasets that are on this machine.

    Raises `SettingsError` with every problem, told by file and line.
    """
    stack_file = offline.read(stack, root)
    env = stack_file.env
    problems, sizes = [], {}
    for name, adapter in env.adapters.items():
        if (root / adapter.dataset).is_file():
            sizes[name] = (root / adapter.dataset).stat().st_size
        elif not source.is_elsewhere(adapter.dataset):
            problems.append(f"adapters.{name}.dataset: {adapter.dataset}: no such file below the project's folder")
    if stack_file.location is None:
        problems.append("azure-native:location: required, but absent: the Azure region, such as eastus")
    try:
        found = estimate(env, str(stack_file.location), sizes)
    except SettingsError as error:
        problems += error.problems
    if problems:
        raise SettingsError(located(problems, project=stack_file.project, file=stack_file.file))
    return found


def _table(stack: str, found: Estimate) -> Iterator[str]:
    yield f"{stack} in {found.location}: an estimate in USD by Azure's list prices, or yours where you gave some."
    yield f"Virtual machines as of {prices.AS_OF}; dates and sources of all: infra/prices.py"
    width = max(len(line.what) for line in found.lines) + 2
    yield f"\n{'':<{18 + width}}{'an hour':>16}{'a month (730 h)':>20}"
    yield f"{'resource':<18}{'what':<{width}}{'min':>8}{'max':>8}{'min':>10}{'max':>10}"
    total = Line("total", "", found.minimum, found.maximum)
    for line in (*found.lines, total):
        low, high = line.minimum * prices.HOURS_A_MONTH, line.maximum * prices.HOURS_A_MONTH
        hour = f"{line.minimum:>8.2f}{line.maximum:>8.2f}"
        yield f"{line.resource:<18}{line.what:<{width}}{hour}{low:>10,.0f}{high:>10,.0f}"
    for run in found.runs:
        cost = "not known"
        if run.usd and run.hours:
            cost = f"{_usd(*run.usd)} for {run.hours[0]:.1f} to {run.hours[1]:.1f} h"
        yield f"\none tuning run of {run.adapter}: {cost}\n  on {run.where}; {run.note}"
    if found.runs:
        yield "\nA run: 4 FLOPs a weight and token (6 with gradient checkpointing) and attention, at an MFU of"
        yield f"{MFU[0]} to {MFU[1]}, which is assumed, and with {BYTES_PER_TOKEN} bytes a token; beside it"
        beside = f"{BESIDE_HOURS[0]} to {BESIDE_HOURS[1]:g} h"
        yield f"{beside} for node, images, weights and evaluation. The whole node is paid."
    yield "\nnot counted: " + "\n             ".join(found.not_counted)


def _count(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"


def _usd(low: float, high: float) -> str:
    return f"${low:,.2f} to ${high:,.2f}"


def _short(number: float) -> str:
    return f"{number / 1e6:,.1f}M" if number >= 1e5 else f"{number:,.0f}"


if __name__ == "__main__":
    sys.exit(main())
