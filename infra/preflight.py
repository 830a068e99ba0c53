"""What can be known before anything is asked of Azure: do the models fit their GPUs, are the datasets good."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from pathlib import Path

import pulumi

from common.settings import SettingsError
from infra.fit import check_serving, check_tuning
from infra.network import subnets
from infra.settings import ROOT, Environment, load_environment, located
from training.dataset import Checked, Limits, Problem, read

SHOWN_PROBLEMS = 20  # of one dataset: enough to see the pattern
EXAMPLE_RANGES = tuple(ipaddress.IPv4Network(text) for text in ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24"))


def load(project: str, stack: str, root: Path = ROOT) -> Environment:
    """The running program's settings, checked as far as this machine can; `pulumi.RunError` with every problem."""
    try:
        env = load_environment(project, stack, root)
        found = located(problems(env, root), project=project, file=root / f"Pulumi.{stack}.yaml")
    except SettingsError as error:
        found = error.problems
    for text in example_addresses(env) if not found else ():
        line = f"network.authorized_ip_ranges: {text} is an example of the documentation: put your own address there"
        if pulumi.runtime.is_dry_run():
            pulumi.log.warn(line)  # a first look at the plan needs no address
        else:
            found.append(line)
    if found:
        raise pulumi.RunError("\n".join([f"the settings of {stack} cannot work:", *found]))
    if not env.api_keys:
        pulumi.log.warn(
            "no API keys: every request will be refused; add one for each client: "
            "pulumi config set --secret --path 'drydock:api_keys.CLIENT' \"$(openssl rand -hex 32)\""
        )
    return env


def problems(env: Environment, root: Path) -> list[str]:
    """Everything that would fail later, each with its setting first; datasets are searched below `root`."""
    return [*_addresses(env), *_fit(env), *_datasets(env, root)]


def example_addresses(env: Environment) -> list[str]:
    """The ranges that are still those of the documentation (RFC 5737): nobody's, so they would lock everyone out."""
    return [text for text in env.network.authorized_ip_ranges if _inside_examples(ipaddress.ip_network(text))]


def _inside_examples(network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> bool:
    return isinstance(network, ipaddress.IPv4Network) and any(network.subnet_of(each) for each in EXAMPLE_RANGES)


def _addresses(env: Environment) -> list[str]:
    try:
        subnets(env.network.address_space)
    except SettingsError as error:
        return error.problems
    return []


def _fit(env: Environment) -> Iterator[str]:
    serving, pool = env.serving, env.pools[env.serving.pool]
    for size in (pool.vm_size, *pool.alternatives) if serving.device == "cuda" else ():
        found = check_serving(
            env.base.model,
            env.base.figures,
            size,
            context=serving.max_model_len,
            concurrency=serving.max_num_seqs,
            adapters=len(env.adapters),
            lora_rank=env.max_lora_rank,
            dtype=serving.dtype,
            gpu_memory_utilization=serving.gpu_memory_utilization,
        )
        yield from (f"serving.max_model_len: {line}" for line in found)
    pool = env.pools[env.tuning.pool]
    for name, adapter in env.adapters.items():
        for size in (pool.vm_size, *pool.alternatives):
            found = check_tuning(
                name,
                env.base.figures,
                size,
                batch_rows=adapter.per_device_train_batch_size,
                max_seq_length=adapter.max_seq_length,
                lora_r=adapter.lora_r,
                target_modules=adapter.lora_target_modules,
            )
            yield from (f"adapters.{name}: {line}" for line in found)


def _datasets(env: Environment, root: Path) -> Iterator[str]:
    checked: dict[tuple[str, int], list[str]] = {}  # adapters may share a file: it is read, and told, once
    for name, adapter in env.adapters.items():
        key = (adapter.dataset, adapter.max_seq_length)
        if key not in checked:
            checked[key] = list(_dataset(root / adapter.dataset, adapter.dataset, adapter.max_seq_length))
            yield from (f"adapters.{name}.dataset: {line}" for line in checked[key])


def _dataset(path: Path, shown: str, max_seq_length: int) -> Iterator[str]:
    if not path.is_file():
        yield f"{shown}: no such file below the project's folder"
        return
    found, summary = 0, Checked()
    for item in read(path, Limits(max_seq_length), summary):
        if isinstance(item, Problem):
            found += 1
            if found <= SHOWN_PROBLEMS:
                yield f"{shown}:{item}"
    if found > SHOWN_PROBLEMS:
        yield f"{shown}: {found - SHOWN_PROBLEMS} more problems: python -m training check {shown}"
