"""What an environment costs: sums that can be done by hand, and every price that is lacking told with its setting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pulumi
import pytest
import yaml

from common import exits
from common.settings import SettingsError
from infra import cost, prices
from infra.catalog import MODELS, SKUS, sku
from infra.cost import PEAK_FLOPS, Estimate, Line, estimate, estimate_of, tuning_hours
from infra.settings import Environment, Prices
from tests.unit.pulumi_mocks import mocked
from tests.unit.test_environment import ROOT, SEED, environment
from training.spec import TuningSettings

A100, A100_TWICE, H100 = "Standard_NC24ads_A100_v4", "Standard_NC48ads_A100_v4", "Standard_NC40ads_H100_v5"
LLAMA = MODELS["meta-llama/Llama-3.1-8B"]


def of(env: Environment, location: str = "swedencentral", data: int = 0) -> Estimate:
    return estimate(env, location, dict.fromkeys(env.adapters, data))


def line(found: Estimate, resource: str) -> Line:
    return next(each for each in found.lines if each.resource == resource)


def seed(**sections: dict[str, Any]) -> Environment:
    """The seed's environment with these keys put into its sections."""
    config = yaml.safe_load(SEED)["config"]
    for name, values in sections.items():
        config[f"drydock:{name}"] = {**config.get(f"drydock:{name}", {}), **values}
    return environment(yaml.safe_dump({"config": config}))


def test_every_gpu_size_has_a_price_and_a_speed() -> None:
    for size in SKUS.values():
        assert size.usd_per_hour > 0.1 and size.price_region in ("eastus", "eastus2"), size.name
        assert PEAK_FLOPS[size.gpu.name] > 0
    assert prices.AS_OF in prices.TABLE.read_text()


def test_a_price_is_yours_before_the_regions_and_the_regions_before_east_us() -> None:
    given = Prices(usd_per_hour={"Standard_D4ds_v5": 0.2})
    assert prices.vm_price("standard_d4ds_V5", "swedencentral", spot=False, given=given) == prices.VmPrice(
        0.2, "prices.usd_per_hour"
    )
    listed = prices.vm_price(A100, "Sweden Central", spot=False, given=given)
    assert listed == prices.VmPrice(4.775, "swedencentral")
    elsewhere = prices.vm_price(A100, "austriaeast", spot=False, given=given)
    assert elsewhere == prices.VmPrice(3.673, "eastus")
    spot = prices.vm_price(A100, "eastus", spot=True, given=given)
    assert spot.usd == pytest.approx(0.679, abs=0.001), "what Azure's spot meter said in 2026-08"


def test_a_price_that_you_give_must_be_one() -> None:
    with pytest.raises(SettingsError) as caught:
        environment(prices=json.dumps({"usd_per_hour": {A100: 0}, "spot_usd_per_hour": {"NC24": 1}}))
    assert len(caught.value.problems) == 2


def test_the_lines_are_what_the_settings_say_times_the_price() -> None:
    found = of(environment(), data=2**30)
    sweden = {name: prices.table()[name]["swedencentral"] for name in ("standard_d4ds_v5", A100.lower())}
    assert line(found, "cluster").minimum == line(found, "cluster").maximum == 0.10
    assert line(found, "pool system").maximum == pytest.approx(2 * sweden["standard_d4ds_v5"])
    apps = line(found, "pool apps")
    assert (apps.minimum, apps.maximum) == pytest.approx((sweden["standard_d4ds_v5"], 3 * sweden["standard_d4ds_v5"]))
    gpus = line(found, "pool a100")  # two replicas of one GPU each keep both nodes
    assert gpus.minimum == gpus.maximum == pytest.approx(2 * sweden[A100.lower()])
    weights_gib = 8_030_261_248 * 2 / 2**30
    assert line(found, "storage").minimum * 730 == pytest.approx((weights_gib + 1) * 0.0208, rel=1e-3)
    assert found.minimum == pytest.approx(sum(each.minimum for each in found.lines)) and found.minimum < found.maximum


@pytest.mark.parametrize(
    ("pool", "serving", "nodes"),
    [
        ({"max_nodes": 4}, {"min_replicas": 0}, (0, 4)),
        ({"min_nodes": 1, "max_nodes": 4}, {"min_replicas": 0}, (1, 4)),
        ({"min_nodes": 1, "max_nodes": 4}, {"min_replicas": 3, "max_replicas": 4}, (3, 4)),
        ({"vm_size": A100_TWICE, "max_nodes": 4}, {"min_replicas": 3, "max_replicas": 3}, (2, 4)),
        ({"vm_size": A100_TWICE, "max_nodes": 4}, {"min_replicas": 3, "max_replicas": 3, "gpus": 2}, (3, 4)),
    ],
)
def test_nodes_stay_for_min_nodes_and_for_min_replicas(
    pool: dict[str, Any], serving: dict[str, Any], nodes: tuple[int, int]
) -> None:
    env = seed(pools={"a100": {"vm_size": A100, **pool}}, serving=serving)
    usd = prices.table()[env.pools["a100"].vm_size.lower()]["eastus"]
    gpus = line(of(env, "eastus"), "pool a100")
    assert (gpus.minimum, gpus.maximum) == pytest.approx((nodes[0] * usd, nodes[1] * usd))


def test_sizes_that_may_be_taken_instead_make_a_range() -> None:
    pool = {"vm_size": H100, "alternatives": [A100_TWICE, A100], "max_nodes": 2}
    env = seed(pools={"a100": pool}, cluster={"provisioning": "automatic"})
    gpus = line(of(env, "eastus"), "pool a100")
    assert gpus.minimum == pytest.approx(7.346), "one node with two A100s holds both replicas, as two with one each do"
    assert gpus.maximum == pytest.approx(2 * 7.346)
    assert H100 in gpus.what and A100_TWICE in gpus.what


def test_spot_costs_its_share_and_says_so_unless_you_give_the_price() -> None:
    pools = {"a100": {"vm_size": A100, "max_nodes": 2, "spot": True}}
    plain, own = of(seed(pools=pools), "eastus"), of(seed(pools=pools, prices={"spot_usd_per_hour": {A100: 1}}))
    assert line(plain, "pool a100").maximum == pytest.approx(2 * 3.673 * 0.1848)
    assert line(own, "pool a100").maximum == 2
    assert [any("spot" in text for text in each.not_counted) for each in (plain, own)] == [True, False]


def test_a_private_environment_pays_for_its_gateway_its_endpoints_and_the_registrys_tier() -> None:
    network = {"private": True, "outbound": "nat_gateway", "authorized_ip_ranges": []}
    public, private = of(environment()), of(seed(network=network, serving={"expose": "vnet"}))
    assert line(private, "outbound").minimum == pytest.approx(0.05)
    assert line(private, "private endpoints").minimum == pytest.approx(0.02 + 1.5 / 730)
    assert line(private, "endpoint").minimum == 0.025
    assert line(private, "registry").minimum > 2 * line(public, "registry").minimum
    assert "private endpoints" not in [each.resource for each in public.lines]


def test_a_disk_is_paid_where_the_nodes_own_is_too_small() -> None:
    with_disk, without = of(environment()), of(seed(cluster={"system_vm_size": "Standard_D4s_v5"}))
    assert without.minimum - with_disk.minimum == pytest.approx(
        line(without, "OS disks").minimum
        + line(without, "pool system").minimum
        - line(with_disk, "pool system").minimum
    )
    assert line(without, "OS disks").minimum == pytest.approx(2 * prices.disk_price(64))
    assert prices.disk_price(65) == prices.disk_price(128) > prices.disk_price(64)


def test_every_size_without_a_price_is_told_with_its_setting_and_what_to_give() -> None:
    cluster = {"system_vm_size": "Standard_X1", "apps_vm_size": "Standard_X2"}
    with pytest.raises(SettingsError) as caught:
        of(seed(cluster=cluster))
    first, second = caught.value.problems
    assert first.startswith("cluster.system_vm_size: Standard_X1") and "prices.usd_per_hour: {Standard_X1: " in first
    assert second.startswith("cluster.apps_vm_size: Standard_X2")
    given = {"usd_per_hour": {"Standard_X1": 1, "Standard_X2": 2}}
    assert line(of(seed(cluster=cluster, prices=given)), "pool apps").maximum == 6


def settings(**changes: Any) -> TuningSettings:
    return TuningSettings(**({"dataset": "any", "num_train_epochs": 1, "gradient_checkpointing": False} | changes))


def test_hours_of_tuning_are_its_flops_over_those_of_the_gpu() -> None:
    # 7.5e9 weights of Llama 3.1 8B multiply a token (all but the input embedding): 4 FLOPs each are 3.0e16 for 1M.
    million = round(4e6 / 0.9)  # bytes of which 0.9 are tuned on
    best, worst = tuning_hours(LLAMA, sku(A100), settings(max_seq_length=8), million)
    assert best * 3600 == pytest.approx(4 * 7.505e9 * 1e6 / (312e12 * 0.45), rel=0.01)
    assert worst == pytest.approx(3 * best)


def test_hours_of_tuning_follow_epochs_gpus_rows_and_memory_savings() -> None:
    def best(gpus: int = 1, **changes: Any) -> float:
        return tuning_hours(LLAMA, sku(A100_TWICE), settings(**changes), 10**8, gpus=gpus)[0]

    assert best(num_train_epochs=3) == pytest.approx(3 * best())
    assert best(gpus=2) == pytest.approx(best() / 2)
    assert best(gradient_checkpointing=True) == pytest.approx(1.5 * best(), rel=0.05)
    assert best(max_seq_length=8192) > 1.1 * best(max_seq_length=512)
    assert best(held_out_fraction=0.5) == pytest.approx(best(held_out_fraction=0.1) * 5 / 9)
    small = tuning_hours(LLAMA, sku(A100), settings(load_in_4bit=True), 10**8)
    assert small[1] / small[0] > 3


def test_a_run_costs_its_hours_of_the_whole_node_and_tells_of_the_deadline() -> None:
    size = 10**9
    env = seed(tuning={"deadline_hours": 2})
    (run,) = of(env, "eastus", data=size).runs
    assert run.hours and run.usd
    tuned = tuning_hours(LLAMA, sku(A100), env.adapters["domain-llama"], size)
    assert run.hours == pytest.approx((tuned[0] + 0.25, tuned[1] + 1))
    assert run.usd == pytest.approx((run.hours[0] * 3.673, run.hours[1] * 3.673))
    assert "is beyond tuning.deadline_hours = 2" in run.note
    (shared,) = of(seed(tuning={"nodes": 2}, pools={"a100": {"vm_size": A100, "max_nodes": 4}}), "eastus", size).runs
    assert shared.hours and shared.usd
    assert shared.hours == pytest.approx((tuned[0] / 2 + 0.25, tuned[1] / 2 + 1))
    assert shared.usd == pytest.approx((shared.hours[0] * 2 * 3.673, shared.hours[1] * 2 * 3.673))
    (short,) = of(env, "eastus", data=1000).runs
    assert "deadline" not in short.note


def stack(folder: Path, text: str = SEED, dataset: str | None = "rehearsal/data/kubectl.jsonl") -> Path:
    (folder / "Pulumi.yaml").write_text("name: drydock\n")
    (folder / "Pulumi.dev.yaml").write_text(text)
    if dataset:
        (folder / dataset).parent.mkdir(parents=True)
        (folder / dataset).write_text("x" * 4000)
    return folder


@pytest.mark.parametrize("name", ["dev", "prod", "local"])
def test_the_stacks_of_this_repository_are_told_line_by_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cost.main([name]) == exits.OK
    table = capsys.readouterr().out
    assert cost.main([name, "--json"]) == exits.OK
    told = json.loads(capsys.readouterr().out)
    for each in told["lines"]:
        assert each["resource"] in table and each["what"] in table
        assert 0 <= each["minimum"] <= each["maximum"]
    assert told["usd_per_hour"][1] == pytest.approx(sum(each["maximum"] for each in told["lines"]), abs=0.01)
    assert prices.AS_OF in table and "estimate" in table and "not counted" in table
    assert all(run["usd"][0] < run["usd"][1] for run in told["runs"])


def test_a_stack_without_a_file_is_told_with_those_that_have_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cost.main(["../dev"]) == exits.INPUT
    assert capsys.readouterr().err == "Pulumi.../dev.yaml: no such file; stacks with settings: dev, local, prod\n"


def test_problems_of_a_stack_are_told_together_by_line(tmp_path: Path) -> None:
    text = (
        SEED.replace("  azure-native:location: swedencentral\n", "") + "  drydock:cluster: {apps_vm_size: Standard_X}\n"
    )
    with pytest.raises(SettingsError) as caught:
        estimate_of("dev", stack(tmp_path, text, dataset=None))
    lines = text.splitlines()
    dataset, cluster = (
        next(n for n, each in enumerate(lines, 1) if key in each) for key in ("dataset:", "drydock:cluster")
    )
    assert caught.value.problems == [
        f"Pulumi.dev.yaml:{dataset}: adapters.domain-llama.dataset: rehearsal/data/kubectl.jsonl: no such file below "
        "the project's folder",
        "Pulumi.dev.yaml: azure-native:location: required, but absent: the Azure region, such as eastus",
        f"Pulumi.dev.yaml:{cluster}: cluster.apps_vm_size: Standard_X: no list price is known here; give yours as "
        "prices.usd_per_hour: {Standard_X: USD an hour}",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("config: [", "not YAML"),
        ("- 1\n", "expected `name: value` lines"),
        ("other: 1\n", "config: required"),
        (SEED.replace("min_replicas: 2", "min_replicas: two"), "Pulumi.dev.yaml:24: serving.min_replicas"),
    ],
)
def test_a_file_that_cannot_be_read_is_told(text: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=problem):
        estimate_of("dev", stack(tmp_path, text))


def test_encrypted_settings_need_no_key_and_plain_ones_are_refused(tmp_path: Path) -> None:
    encrypted = "  drydock:api_keys: {team: {secure: v1:abc}}\n  drydock:huggingface_token: {secure: v1:def}\n"
    assert estimate_of("dev", stack(tmp_path, SEED + encrypted)).minimum > 0
    (tmp_path / "Pulumi.dev.yaml").write_text(SEED + "  drydock:api_keys: {team: hunter2}\n")
    with pytest.raises(SettingsError, match="in plain text") as caught:
        estimate_of("dev", tmp_path)
    assert "hunter2" not in str(caught.value)


def test_a_dataset_from_elsewhere_is_not_fetched_for_the_estimate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = SEED.replace("rehearsal/data/kubectl.jsonl", "https://example.invalid/rows.jsonl")
    found = estimate_of("dev", stack(tmp_path, text, dataset=None))
    (run,) = found.runs
    assert run.hours is run.usd is None and "preview" in run.note
    assert found.brief()["usd_per_tuning_run"] == {"domain-llama": None}
    assert "one tuning run" not in found.summary()


@pytest.mark.parametrize("preview", [True, False])
def test_the_preview_says_it_in_one_line_and_the_stack_tells_it(preview: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(pulumi.log, "info", said.append)
    monkeypatch.setattr(pulumi.runtime, "is_dry_run", lambda: preview)
    with mocked(stack="dev", config={}):
        told = cost.tell(environment(), "swedencentral")
    assert told and told["usd_per_hour"][0] < told["usd_per_hour"][1]
    size = (ROOT / "rehearsal/data/kubectl.jsonl").stat().st_size
    assert told == of(environment(), data=size).brief()
    assert len(said) == preview
    for text in said:
        assert (
            "\n" not in text and "an hour" in text and "domain-llama $" in text and "python -m infra.cost dev" in text
        )


def test_a_price_that_is_lacking_stops_no_preview(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(pulumi.log, "warn", said.append)
    assert cost.tell(seed(cluster={"apps_vm_size": "Standard_X"}), "eastus") is None
    assert len(said) == 1 and "prices.usd_per_hour: {Standard_X: " in said[0]
