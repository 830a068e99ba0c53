"""The settings of an environment: what may be written, and that every mistake is told with its line and remedy."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.settings import SettingsError
from infra.settings import SECRETS, Environment, GpuPool, Serving, described, read_environment, replica_room

ROOT = Path(__file__).parents[2]
STACKS = sorted(path.name.split(".")[1] for path in ROOT.glob("Pulumi.*.yaml"))

# The pipeline that this product was asked for, whole: cluster, A100 pool, dataset, LoRA settings, gate, two replicas.
SEED = """\
config:
  azure-native:location: swedencentral
  drydock:owner: ml-platform
  drydock:network: {authorized_ip_ranges: [198.18.0.7/32]}
  drydock:pools:
    a100:
      vm_size: Standard_NC24ads_A100_v4
      max_nodes: 2
  drydock:base:
    model: meta-llama/Llama-3.1-8B-Instruct
    revision: 0e9e39f249a16976918f6564b8830bc894c89659
  drydock:adapters:
    domain-llama:
      dataset: rehearsal/data/kubectl.jsonl
      learning_rate: 2e-4
      num_train_epochs: 3
      per_device_train_batch_size: 4
      gradient_accumulation_steps: 4
      lora_r: 16
      lora_alpha: 32
      lora_dropout: 0.05
      gate: {metric: exact_match, min_gain: 0.05}
  drydock:tuning: {pool: a100}
  drydock:serving: {pool: a100, min_replicas: 2, max_replicas: 2, max_model_len: 4096}
"""


def as_pulumi(text: str) -> dict[str, Any]:
    """The values as Pulumi's language host gets them: text, objects as JSON."""
    config = yaml.safe_load(text)["config"]
    return {
        key.removeprefix("drydock:"): value if isinstance(value, str) else json.dumps(value)
        for key, value in config.items()
        if key.startswith("drydock:")
    }


def environment(text: str = SEED, **changes: Any) -> Environment:
    return read_environment(as_pulumi(text) | changes, SECRETS, project="drydock")


def problems(
    tmp_path: Path, *edits: tuple[str, str], extra: dict[str, Any] | None = None, secret: tuple[str, ...] = ()
) -> list[str]:
    text = SEED
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    file = tmp_path / "Pulumi.dev.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError) as error:
        read_environment(as_pulumi(text) | (extra or {}), secret, project="drydock", file=file)
    return error.value.problems


def test_the_seed_fits_in_sixty_lines_and_reads_as_meant() -> None:
    assert len(SEED.splitlines()) <= 60
    env = environment()
    assert env.adapters["domain-llama"].learning_rate == 2e-4
    assert env.adapters["domain-llama"].gate.min_gain == 0.05
    assert (env.serving.min_replicas, env.serving.max_replicas) == (2, 2)
    assert env.pools["a100"].sku.gpus == 1
    assert env.base.figures.num_hidden_layers == 32
    assert env.max_lora_rank == 16


@pytest.mark.parametrize("stack", STACKS)
def test_the_committed_environments_are_good(stack: str) -> None:
    text = (ROOT / f"Pulumi.{stack}.yaml").read_text()
    assert environment(text, api_keys='{"me": "k"}').owner  # not committed: each deployer's own
    assert len(text.splitlines()) <= 60


def test_every_size_of_the_pool_has_the_gpus_that_tune_together(tmp_path: Path) -> None:
    sizes = (
        "vm_size: Standard_NC96ads_A100_v4\n      alternatives: [Standard_NC80adis_H100_v5, Standard_ND96isr_H100_v5]"
    )
    edits = [
        ("vm_size: Standard_NC24ads_A100_v4", sizes),
        ("tuning: {pool: a100}", "tuning: {pool: a100, gpus: 4}\n  drydock:cluster: {provisioning: automatic}"),
    ]
    (told,) = problems(tmp_path, *edits)
    assert told.endswith("tuning.gpus: 4 GPUs of one node, but Standard_NC80adis_H100_v5 of pool a100 has 2: lower it")


@pytest.mark.parametrize(
    ("size", "nodes", "gpus", "room"),
    [
        ("Standard_NC24ads_A100_v4", 3, 1, 3),
        ("Standard_NC96ads_A100_v4", 3, 2, 6),
        ("Standard_ND96isr_H100_v5", 2, 8, 2),
        ("Standard_NC48ads_A100_v4", 5, 4, 0),  # two nodes have four GPUs, but no replica is on two nodes
    ],
)
def test_a_replica_has_its_gpus_on_one_node(size: str, nodes: int, gpus: int, room: int) -> None:
    assert replica_room(Serving(pool="a", gpus=gpus), GpuPool(vm_size=size, max_nodes=nodes)) == room


@pytest.mark.parametrize(
    ("tuning", "serving", "places"),
    [
        ({"gpus": 4}, {}, 4),
        ({"gpus": 1}, {"gpus": 2}, 1),  # one GPU tunes, two evaluate
        ({"gpus": 4}, {"gpus": 2}, 2),
        ({"gpus": 4, "nodes": 2}, {"gpus": 4}, 2),
    ],
)
def test_tuning_jobs_may_be_in_the_place_of_replicas(
    tuning: dict[str, Any], serving: dict[str, Any], places: int
) -> None:
    pool = json.dumps({"a100": {"vm_size": "Standard_NC96ads_A100_v4", "max_nodes": 3}})
    env = environment(
        pools=pool,
        tuning=json.dumps({"pool": "a100"} | tuning),
        serving=json.dumps({"pool": "a100", "min_replicas": 1, "max_replicas": 1} | serving),
    )
    assert env.others_places == places


def test_several_adapters_share_one_base() -> None:
    adapters = {name: {"dataset": f"{name}.jsonl", "lora_r": rank} for name, rank in (("a", 8), ("b", 64))}
    env = environment(adapters=json.dumps(adapters))
    assert (list(env.adapters), env.max_lora_rank) == (["a", "b"], 64)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (("vm_size: Standard", "vmsize: Standard"), ["Pulumi.dev.yaml:7: pools.a100.vmsize: unknown setting; did you mean vm_size?", "Pulumi.dev.yaml:6: pools.a100.vm_size: required, but absent"]),
        (("drydock:owner", "drydock:ownr"), ["Pulumi.dev.yaml:3: ownr: unknown setting; did you mean owner?", "Pulumi.dev.yaml: owner: required, but absent"]),
        (("learning_rate", "learning_rte"), ["Pulumi.dev.yaml:15: adapters.domain-llama.learning_rte: unknown setting; did you mean learning_rate?"]),
        (("min_gain", "mingain"), ["Pulumi.dev.yaml:22: adapters.domain-llama.gate.mingain: unknown setting; did you mean min_gain?"]),
        (("NC24ads_A100_v4", "NC24ads_A100v4"), ["Pulumi.dev.yaml:7: pools.a100.vm_size: Standard_NC24ads_A100v4: no such", "did you mean Standard_NC24ads_A100_v4"]),
        (("0e9e39f249a16976918f6564b8830bc894c89659", "main"), ["Pulumi.dev.yaml:11: base.revision: string should match pattern", 'found "main"']),
        (("meta-llama/Llama-3.1-8B-Instruct", "acme/secret-9B"), ["Pulumi.dev.yaml:9: base: acme/secret-9B is not in the catalogue: give its architecture"]),
        (("max_nodes: 2", "max_nodes: 2\n      min_nodes: 3"), ["pools.a100: min_nodes = 3 is above max_nodes = 2"]),
        (("min_replicas: 2", "min_replicas: 3"), ["Pulumi.dev.yaml:24: serving: min_replicas = 3 is above max_replicas = 2"]),
        (("198.18.0.7/32", "0.0.0.0/0"), ["network.authorized_ip_ranges: opens the API server to the whole internet"]),
        (("198.18.0.7/32", "198.18.0.7/24"), ["network.authorized_ip_ranges.0: 198.18.0.7/24 has host bits set: write ADDRESS/BITS"]),
        (("{authorized_ip_ranges", "{address_space: 10.1.0.0/24, authorized_ip_ranges"), ["network.address_space: is too small for nodes"]),
        (("a100:", "A-100:"), ["pools.A-100"]),
        (("lora_r: 16", "lora_r: 1024"), ["Pulumi.dev.yaml:19: adapters.domain-llama.lora_r: should be less than or equal to 512, found 1024"]),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_line_and_remedy(tmp_path: Path, edit: tuple[str, str], told: list[str]) -> None:
    lines = problems(tmp_path, edit)
    for text in told:
        assert any(text in line for line in lines), lines


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (("tuning: {pool: a100}", "tuning: {pool: h100}"), "tuning.pool: h100 is not among the pools (a100)"),
        (("serving: {pool: a100", "serving: {pool: h100"), "serving.pool: h100 is not among the pools (a100)"),
        (("{authorized_ip_ranges", "{private: true, authorized_ip_ranges"), "a private API server has no public address"),
        (("network: {authorized_ip_ranges: [198.18.0.7/32]}", "network: {}"), "required for a public API server"),
        (("max_nodes: 2", "max_nodes: 1"), "serving.max_replicas: 2 replicas, but pool a100 has room for 1 at most: raise pools.a100.max_nodes or lower it"),
        (("max_nodes: 2", "alternatives: [Standard_NC40ads_H100_v5]\n      max_nodes: 2"), "an agent pool has one size: set cluster.provisioning: automatic"),
        (("max_nodes: 2", "max_nodes: 2\n      min_nodes: 1\n  drydock:cluster: {provisioning: automatic}"), "pools.a100.min_nodes: nodes that stay without work need"),
        (("tuning: {pool: a100}", "tuning: {pool: a100, gpus: 4}"), "tuning.gpus: 4 GPUs of one node, but Standard_NC24ads_A100_v4 of pool a100 has 1: lower it, or take Standard_NC96ads_A100_v4, which has 4"),
        (("serving: {pool: a100", "serving: {gpus: 3, pool: a100"), "serving.gpus: should be 1, 2, 4 or 8, as nodes have GPUs, found 3"),
        (("serving: {pool: a100", "serving: {gpus: 4, pool: a100"), "serving.gpus: 4 GPUs of one node, but Standard_NC24ads_A100_v4 of pool a100 has 1: lower it, or take Standard_NC96ads_A100_v4, which has 4"),
        (("{authorized_ip_ranges: [198.18.0.7/32]}", "{private: true}"), "network.outbound: in a private environment images are built inside"),
        (("domain-llama", "base"), "base.served_name: base is also the name of an adapter"),
        (("max_nodes: 2", "max_nodes: 3\n      spot: true"), "is a spot pool, which may lose all replicas at once"),
        (("drydock:tuning", "drydock:cluster: {tier: Free}\n  drydock:tuning"), "cluster.tier: Free has no SLA"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_told(tmp_path: Path, edit: tuple[str, str], told: str) -> None:
    three = ("min_replicas: 2, max_replicas: 2", "min_replicas: 3, max_replicas: 3")
    edits = [
        edit,
        *([three, ("max_nodes: 2", "max_nodes: 3")] if "tier" in told else [three] if "spot" in told else []),
    ]
    lines = problems(tmp_path, *edits)
    assert any(told in line and re.match(r"Pulumi\.dev\.yaml:\d+: ", line) for line in lines), lines


ONE_KEY = {"api_keys": '{"a": "k"}'}
TWO_KEYS = {"api_keys": '{"a": "k", "b": "l"}'}


@pytest.mark.parametrize(
    ("stress", "keys", "told"),
    [
        ("{run: 1}", {}, "stress.run: it asks with an API key, and there is none: pulumi config set --secret --path 'drydock:api_keys.stress'"),
        ("{run: 1}", TWO_KEYS, "stress.client: required with several api_keys: one of a, b"),
        ("{run: 1, client: c}", TWO_KEYS, "stress.client: c is not among the api_keys (a, b)"),
        ("{run: 1, client: c}", ONE_KEY, "stress.client: c is not among the api_keys (a)"),
        ("{run: 1, models: [domain-lama]}", ONE_KEY, "stress.models: domain-lama is not served: choose from base, domain-llama"),
        ("{run: 1, prompt_tokens: 4090}", ONE_KEY, "stress.prompt_tokens: the longest prompt with its answer has 4154 tokens (prompt_tokens, long_multiplier, max_tokens), but serving.max_model_len is 4096: lower them"),
        ("{run: 1, prompt_tokens: 1100, long_share: 0.1}", ONE_KEY, "stress.prompt_tokens: the longest prompt with its answer has 4464 tokens"),
        ("{run: a b}", ONE_KEY, "stress.run: string should match pattern"),
        ("{run: 1, users: 0}", ONE_KEY, "stress.users: should be greater than or equal to 1, found 0"),
        ("{run: 1, slo: {ttft_ms: 3}}", ONE_KEY, "stress.slo.ttft_ms: unknown setting; did you mean ttft_p95_ms?"),
        ("{run: 1, users: 9, max_requests: 3}", ONE_KEY, "stress: max_requests is 3, but 9 users send at least one each"),
        ("{run: 1, models: [base, base]}", ONE_KEY, "stress.models: names one twice"),
        ("{run: 1, models: []}", ONE_KEY, "stress.models: dictionary should have at least 1 item"),
        ("{run: 1, clients: [a, c]}", TWO_KEYS, "stress.clients: c is not among the api_keys (a, b)"),
        ("{run: 1, client: a, clients: [a, b]}", TWO_KEYS, "stress: client is a, but clients is given as well"),
        ("{run: 1, arrivals: poisson}", ONE_KEY, "stress: arrivals is poisson: requests_per_second is required"),
        ("{run: 1, slo: {goodput: {min_rps: 3}}}", ONE_KEY, "stress.slo.goodput: min_rps and min_share need to know"),
        ("{run: 1, wait_seconds: -1}", ONE_KEY, "stress.wait_seconds: should be greater than or equal to 0, found -1"),
        ("{run: 1, users: 3, workers: 4}", ONE_KEY, "stress: workers is 4, but there are only 3 users to share"),
        ("{run: 1, workers: 7}", ONE_KEY, "stress.workers: 7 workers and their master need a core each, and beside two routers the apps pool has 7 at most (cluster.apps_max_nodes = 3, Standard_D4ds_v5): raise cluster.apps_max_nodes to 4, or lower it"),
        ("{run: 1, workers: 64}", ONE_KEY, "stress.workers: 64 workers and their master need a core each, and beside two routers the apps pool has 7 at most (cluster.apps_max_nodes = 3, Standard_D4ds_v5): take a larger cluster.apps_vm_size, or lower it"),
    ],
)  # fmt: skip
def test_a_stress_test_that_cannot_run_is_told(tmp_path: Path, stress: str, keys: dict[str, Any], told: str) -> None:
    line = ("drydock:tuning", f"drydock:stress: {stress}\n  drydock:tuning")
    lines = problems(tmp_path, line, extra=keys, secret=("api_keys",))
    assert len(lines) == 1, lines
    assert f"Pulumi.dev.yaml:23: {told}" in lines[0]


@pytest.mark.parametrize(
    ("tiers", "told"),
    [
        ('{"low": {"clients": ["c"]}}', "tiers.low.clients: c is not among the api_keys (a, b)"),
        ('{"low": {}}', "tiers.low.clients: nobody is in this tier: name keys of api_keys, or remove it"),
        ('{"standard": {"clients": ["a"]}}', "tiers.standard.clients: all that no other tier names are in it: leave clients out"),
        ('{"low": {"clients": ["a"]}, "high": {"clients": ["a"]}}', "tiers.high.clients: a is in tier low as well: keep it in one"),
        ('{"low": {"clients": ["a"], "prompt_tokens": 4096}}', "tiers.low.prompt_tokens: 4096 limits nothing"),
        ('{"standard": {"output_tokens": 9999}}', "as prompt and answer together have serving.max_model_len = 4096 tokens"),
        ('{"low": {"clients": ["a"], "out_tokens": 9}}', "tiers.low.out_tokens: unknown setting; did you mean output_tokens?"),
        ('{"Low!": {"clients": ["a"]}}', "string should match pattern"),
        ('{"low": {"clients": ["a"], "kv_cache": 1.5}}', "tiers.low.kv_cache: should be less than or equal to 1"),
    ],
)  # fmt: skip
def test_a_tier_that_cannot_hold_is_told(tiers: str, told: str) -> None:
    with pytest.raises(SettingsError) as caught:
        environment(tiers=tiers, **TWO_KEYS)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("tier", "told"),
    [
        ('{"concurrency": 10}', "is in tier standard, whose concurrency of 10 on each of 2 replicas is below stress.users = 100"),
        ('{"prompt_tokens": 700}', "whose prompt_tokens of 700 are below the 800 of the test's longest prompts"),
        ('{"output_tokens": 63}', "whose output_tokens of 63 are below stress.max_tokens = 64"),
    ],
)  # fmt: skip
def test_a_stress_test_that_would_measure_its_own_limits_is_told(tier: str, told: str) -> None:
    with pytest.raises(SettingsError) as caught:
        environment(tiers=f'{{"standard": {tier}}}', stress='{"run": "1"}', **ONE_KEY)
    assert told in str(caught.value)


def test_several_clients_may_be_refused_but_not_by_the_length_of_what_they_ask() -> None:
    """A low tier is to be shed: its 429 are counted apart. Each request answered 400 would measure nothing."""
    keys = TWO_KEYS | {"stress": '{"run": "1", "clients": {"a": 3, "b": 1}}'}
    env = environment(tiers='{"low": {"clients": ["b"], "concurrency": 1, "waiting": 1}}', **keys)
    assert env.stress_spec.clients == {"a": 3, "b": 1}
    assert env.stress_spec.tiers == {"a": "standard", "b": "low"}
    with pytest.raises(SettingsError, match=r"stress\.clients: b is in tier low, whose output_tokens of 63 are below"):
        environment(tiers='{"low": {"clients": ["b"], "output_tokens": 63}}', **keys)
    rate = '{"run": "1", "arrivals": "poisson", "requests_per_second": 50}'
    assert environment(tiers='{"standard": {"concurrency": 10}}', stress=rate, **ONE_KEY).stress_spec.clients is None


def test_a_client_has_the_limits_of_its_tier() -> None:
    env = environment(tiers='{"low": {"clients": ["b"], "n": 1}}', **TWO_KEYS)
    assert env.tier_of("b")[0] == "low" and env.tier_of("b")[1].n == 1
    assert env.tier_of("a")[0] == "standard"


def test_a_stress_test_without_an_adapter_has_no_prompts() -> None:
    with pytest.raises(SettingsError) as error:
        environment(adapters="{}", stress='{"run": "1"}', **ONE_KEY)
    assert error.value.problems == [
        "stress.run: its prompts come from the adapters' datasets, and there is no adapter: add one, or remove it"
    ]


def test_the_stress_test_is_off_until_a_run_is_named() -> None:
    stress = environment().stress
    assert stress.run is None
    assert (stress.users, stress.ramp_seconds, stress.duration_seconds, stress.prompt_tokens) == (100, 60, 600, 800)
    assert environment(stress='{"prompt_tokens": 100000, "client": "nobody"}').stress.run is None
    assert environment(stress='{"run": 7}', **ONE_KEY).stress.run == "7"
    assert environment(stress='{"run": 7, "workers": 6}', **ONE_KEY).stress_spec.workers == 6


def test_all_problems_come_together(tmp_path: Path) -> None:
    lines = problems(
        tmp_path,
        ("learning_rate: 2e-4", "learning_rate: 5"),
        ("lora_r", "lora_rank"),
        ("max_nodes: 2", "max_nodes: many"),
    )
    assert len(lines) == 3, lines


def test_secrets_in_plain_text_are_refused_and_not_repeated(tmp_path: Path) -> None:
    lines = problems(tmp_path, extra={"api_keys": '{"team-a": "hunter2"}', "huggingface_token": "hf_hunter2"})
    assert [line.split(": ")[1] for line in lines] == ["api_keys", "huggingface_token"]
    assert all("pulumi config set --secret" in line for line in lines)
    assert "--path 'drydock:api_keys.CLIENT'" in lines[0]
    assert "hunter2" not in "".join(lines)


def test_a_malformed_secret_is_not_shown(tmp_path: Path) -> None:
    lines = problems(tmp_path, extra={"api_keys": '{"team-a": ["hunter2"]}'}, secret=("api_keys",))
    assert lines and "a secret" in lines[0]
    assert "hunter2" not in "".join(lines)


def test_secrets_are_masked_in_the_model() -> None:
    env = environment(api_keys='{"team-a": "hunter2"}', huggingface_token="hf_hunter2")
    assert env.api_keys["team-a"].get_secret_value() == "hunter2"
    assert "hunter2" not in repr(env) + str(env)


def test_the_empty_defaults_of_the_project_file_mean_none() -> None:
    project = yaml.safe_load((ROOT / "Pulumi.yaml").read_text())["config"]
    defaults = {key: entry["default"] for key, entry in project.items() if "default" in entry}
    filled = {key: value if isinstance(value, str) else json.dumps(value) for key, value in defaults.items()}
    env = read_environment(filled | as_pulumi(SEED), (), project="drydock")
    assert env == environment()
    assert env.huggingface_token is None


def test_the_project_file_describes_every_setting_as_the_code_does() -> None:
    project = yaml.safe_load((ROOT / "Pulumi.yaml").read_text())["config"]
    assert list(project) == list(Environment.model_fields)
    for name, entry in project.items():
        field = Environment.model_fields[name]
        assert entry["description"] == field.description
        assert ("default" in entry) != field.is_required(), name


def test_every_setting_is_described() -> None:
    lines = list(described())
    assert len(lines) > 60
    assert not [line for line in lines if " None " in line or "  [" in line.removesuffix("]")[:46]]
    assert any(line.startswith("adapters.NAME.gate.min_gain ") for line in lines)


def test_reading_changes_nothing_that_was_given() -> None:
    values = as_pulumi(SEED)
    before = copy.deepcopy(values)
    read_environment(values, (), project="drydock")
    assert values == before
