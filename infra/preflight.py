"""What can be known before anything is asked of Azure: do the models fit their GPUs, are the datasets good."""

from __future__ import annotations

import functools
import ipaddress
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pulumi

from blobs import BlobError
from common.settings import SettingsError
from infra.catalog import sku
from infra.fit import check_driver, check_evaluation, check_serving, check_tuning
from infra.network import subnets
from infra.settings import ROOT, Environment, load_environment, located
from training import source
from training.dataset import Limits, Problem, is_held_out, read, split_problem

SHOWN_PROBLEMS = 20  # of one dataset: enough to see the pattern
EXAMPLE_RANGES = tuple(ipaddress.IPv4Network(text) for text in ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24"))


def load(project: str, stack: str, root: Path = ROOT) -> Environment:
    """The running program's settings, checked as far as this machine can; `pulumi.RunError` with every problem.

    Their datasets are files of this machine: those from elsewhere have been fetched and proved.
    """
    files: dict[str, Path] = {}
    try:
        env = load_environment(project, stack, root)
        files, lacking = datasets(env, root)
        found = located([*lacking, *problems(env, files)], project=project, file=root / f"Pulumi.{stack}.yaml")
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
    if not env.api_keys and env.serving.runtime == "direct":
        pulumi.log.warn(
            "no API keys: every request will be refused; add one for each client: "
            "pulumi config set --secret --path 'drydock:api_keys.CLIENT' \"$(openssl rand -hex 32)\""
        )
    if env.cluster.admin_group_id is None and (env.protect or os.environ.get("CI")):
        pulumi.log.warn(
            "cluster.admin_group_id: without a group, whoever runs `pulumi up` administers cluster and data, and takes "
            "these roles from whoever ran it before: give the object ID of an Entra group that all of you are in"
        )
    here = {
        name: adapter.model_copy(update={"dataset": str(files[name]), "dataset_sha256": None})
        for name, adapter in env.adapters.items()
    }
    return env.model_copy(update={"adapters": here})


def datasets(env: Environment, root: Path) -> tuple[dict[str, Path], list[str]]:
    """`(file of each adapter's dataset, problems)`: paths are below `root`; what lies elsewhere is fetched, once."""
    files: dict[str, Path] = {}
    lacking: list[str] = []
    fetch = functools.cache(lambda dataset, sha256: source.local(dataset, sha256, root=root))  # adapters may share one
    for name, adapter in env.adapters.items():
        if source.is_elsewhere(adapter.dataset):  # it may take a while, and Pulumi shows no log of ours
            pulumi.log.info(f"adapters.{name}.dataset: from {source.public(adapter.dataset)}")
        try:
            file = fetch(adapter.dataset, adapter.dataset_sha256)
            if file.is_file():
                files[name] = file
            else:
                lacking.append(f"adapters.{name}.dataset: {adapter.dataset}: no such file below the project's folder")
        except SettingsError as error:
            lacking += [f"adapters.{name}.dataset: {line}" for line in error.problems]
        except BlobError as error:
            lacking.append(f"adapters.{name}.dataset: {error}")
    return files, lacking


def problems(env: Environment, files: Mapping[str, Path]) -> list[str]:
    """Everything that would fail later, each with its setting first; `files` are the datasets that are here."""
    return [*_addresses(env), *_fit(env), *_datasets(env, files)]


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


def _drivers(env: Environment) -> dict[tuple[str, str], str]:
    """(pool, size) whose GPUs our images cannot use, and why. KAITO's is made for an older CUDA (torch 2.11, cu129)."""
    if env.serving.device != "cuda":
        return {}
    ours = {env.tuning.pool} if env.adapters else set()  # tuned by KAITO, an adapter is still evaluated by our image
    ours |= {env.serving.pool} if env.serving.runtime == "direct" else set()
    sizes = ((pool, size) for pool in sorted(ours) for size in env.pools[pool].sizes)
    return {(pool, size): problem for pool, size in sizes if (problem := check_driver(sku(size)))}


def _fit(env: Environment) -> Iterator[str]:
    undriven = _drivers(env)
    for (pool, size), problem in undriven.items():
        yield f"pools.{pool}.{'vm_size' if size == env.pools[pool].vm_size else 'alternatives'}: {problem}"

    def usable(pool: str) -> list[str]:  # what would fit another one is not to be tried there
        return [size for size in env.pools[pool].sizes if (pool, size) not in undriven]

    serving, sizes = env.serving, usable(env.tuning.pool)
    for size in usable(serving.pool) if serving.device == "cuda" else ():
        found = check_serving(
            env.base.model, env.base.figures, size, serving, adapters=len(env.adapters), lora_rank=env.max_lora_rank
        )
        yield from (f"serving.max_model_len: {line}" for line in found)
    for name, adapter in env.adapters.items() if sizes else ():
        found = check_tuning(name, adapter, env.base.figures, sizes, gpus=env.tuning.gpus, nodes=env.tuning.nodes)
        if serving.device == "cuda":
            found += check_evaluation(name, adapter, serving, env.base.figures, sizes)
        yield from (f"adapters.{name}: {line}" for line in found)


def _datasets(env: Environment, files: Mapping[str, Path]) -> Iterator[str]:
    checked: set[tuple[Path, int]] = set()  # adapters may share a file: its rows are told once
    for name, path in files.items():
        adapter, prefix = env.adapters[name], f"adapters.{name}.dataset: {source.public(env.adapters[name].dataset)}"
        split, more = [0, 0], 0
        problems: list[str] = []
        for item in read(path, Limits(adapter.max_seq_length)):
            if not isinstance(item, Problem):
                split[is_held_out(item[1], adapter.held_out_fraction)] += 1
            elif len(problems) < SHOWN_PROBLEMS:
                problems.append(f"{prefix}:{item}")
            else:
                more += 1
        key = (path, adapter.max_seq_length)
        if key not in checked:
            yield from problems
            if more:
                yield f"{prefix}: {more:,} more problems: python -m training check {source.public(adapter.dataset)}"
        checked.add(key)
        least = adapter.gate.min_examples
        if not problems and (lack := split_problem(split[0], split[1], adapter.held_out_fraction, least)):
            yield f"{prefix}: {lack}"
