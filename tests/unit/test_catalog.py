"""The catalogue against what is published: parameter counts, sizes, names; and the reading of a config.json."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from common.settings import SettingsError, load_settings
from infra.catalog import MODELS, NEEDED_DRIVER, SKUS, Architecture, architecture, architecture_of, sku

ROOT = Path(__file__).parents[2]

# What the hub shows for each model's safetensors files. Those of Qwen3 0.6B and 1.7B hold the tied output layer as well,
# which is not loaded twice; it is left out here.
PUBLISHED_PARAMETERS = {
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.1-70B-Instruct": 70_553_706_496,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "mistralai/Mistral-Nemo-Instruct-2407": 12_247_782_400,
    "mistralai/Mistral-Small-24B-Instruct-2501": 23_572_403_200,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-14B-Instruct": 14_770_033_664,
    "Qwen/Qwen2.5-32B-Instruct": 32_763_876_352,
    "Qwen/Qwen2.5-72B-Instruct": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 751_632_384 - 151_936 * 1024,
    "Qwen/Qwen3-1.7B": 2_031_739_904 - 151_936 * 2048,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/Phi-3-medium-4k-instruct": 13_960_238_080,
    "microsoft/phi-4": 14_659_507_200,
}

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "rope_theta": 500000.0,
}


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_parameters_are_the_published_number(name):
    assert MODELS[name].parameters == PUBLISHED_PARAMETERS[name]


def test_every_model_counts_the_same_as_a_published_one():
    assert {model.parameters for model in MODELS.values()} == set(PUBLISHED_PARAMETERS.values())


def test_biases_of_a_llama_are_counted():
    plain, biased = Architecture(**_known()), Architecture(**_known(), attention_bias=True, mlp_bias=True)
    layer = (4096 + 2 * 1024 + 4096) + (2 * 14336 + 4096)
    assert biased.parameters - plain.parameters == 32 * layer


def test_sizes_of_heads():
    nemo = MODELS["mistralai/Mistral-Nemo-Instruct-2407"]
    assert (nemo.head_size, nemo.query_size, nemo.key_value_size) == (128, 4096, 1024)  # not hidden_size / heads
    assert MODELS["microsoft/Phi-3-mini-4k-instruct"].head_size == 96


@pytest.mark.parametrize("entry", SKUS.values(), ids=SKUS)
def test_sku_is_plausible(entry):
    assert entry.name.startswith("Standard_")
    assert 0.85 < entry.gpu.driver_gib * 2**30 / (entry.gpu.memory_gb * 1e9) <= 1.08  # vendors' GB are decimal or GiB
    assert entry.usd_per_hour > 0.1 and entry.vcpus >= 4 * entry.gpus and entry.ram_gib >= 28
    assert entry.gpu.bf16 is ("T4" not in entry.name)
    assert (entry.gpu.driver < NEEDED_DRIVER) is ("A10_v5" in entry.name)  # virtual GPUs, whose driver is an older one


def test_the_driver_that_is_asked_for_is_that_of_the_images_cuda():
    """CUDA Toolkit release notes, "CUDA Toolkit and Minimum Required Driver Version for Minor Version Compatibility"."""
    oldest = {"12": 525, "13": 580}
    for lock in ("serving-gpu", "training"):
        text = (ROOT / "requirements" / f"{lock}.lock").read_text()
        [major] = re.findall(r"^nvidia-cuda-runtime==(\d+)\.", text, re.MULTILINE)
        assert oldest[major] == NEEDED_DRIVER, lock


def test_a_sku_by_its_name():
    a100 = sku("Standard_NC24ads_A100_v4")
    assert (a100.gpus, a100.gpu.memory_gb, a100.vcpus, a100.ram_gib) == (1, 80, 24, 220)
    assert (a100.gpu.bf16, a100.gpu.compute_capability, a100.usd_per_hour) == (True, 8.0, 3.673)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "Standard_NC24ads_A100v4",
            "Standard_NC24ads_A100v4: no such GPU size in the catalogue; did you mean Standard_NC24ads_A100_v4",
        ),
        ("standard_nc4as_t4_v3", "did you mean Standard_NC4as_T4_v3"),
        ("NC40ads_H100_v5", "did you mean Standard_NC40ads_H100_v5"),
        ("zzz", "known are Standard_NC4as_T4_v3, "),
    ],
)
def test_an_unknown_sku_tells_the_nearest(name, told):
    with pytest.raises(ValueError) as caught:
        sku(name)
    assert told in str(caught.value)


def test_an_unknown_model_tells_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean meta-llama/Llama-3.1-8B-Instruct"):
        architecture("meta-llama/Meta-Llama-3.1-8B-Instruct")


def test_config_json_is_read_and_its_other_keys_ignored(tmp_path):
    assert architecture_of(_config(tmp_path, **LLAMA_8B)) == MODELS["meta-llama/Llama-3.1-8B"]


def test_config_json_names_all_that_it_lacks(tmp_path):
    partial = {key: LLAMA_8B[key] for key in LLAMA_8B if key not in ("vocab_size", "num_key_value_heads", "model_type")}
    with pytest.raises(SettingsError) as caught:
        architecture_of(_config(tmp_path, **partial))
    told = [problem.partition("config.json: ")[2] for problem in caught.value.problems]
    assert told == [f"{key}: required, but absent" for key in ("model_type", "num_key_value_heads", "vocab_size")]


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ({"num_local_experts": 8}, "num_local_experts: mixtures of experts are not supported"),
        ({"text_config": {}}, "text_config: models of images or sound are not supported"),
        ({"quantization_config": {}}, "give the config.json of the model before quantisation"),
        ({"model_type": "gemma3"}, "model_type: should be 'llama', 'mistral', 'qwen2', 'qwen3' or 'phi3'"),
        ({"num_attention_heads": 30}, "hidden_size = 4096 is no multiple of num_attention_heads = 30; give head_dim"),
        ({"num_key_value_heads": 5}, "num_attention_heads = 32 is no multiple of num_key_value_heads = 5"),
        ({"hidden_size": -1}, "hidden_size: should be greater than or equal to 1, found -1"),
    ],
)
def test_what_is_not_supported_is_told(tmp_path, extra, told):
    with pytest.raises(SettingsError) as caught:
        architecture_of(_config(tmp_path, **{**LLAMA_8B, **extra}))
    assert told in str(caught.value)


def test_a_file_that_is_no_config(tmp_path):
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(SettingsError, match="cannot be read as JSON"):
        architecture_of(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(SettingsError, match="expected the object"):
        architecture_of(tmp_path / "config.json")
    with pytest.raises(SettingsError, match="no such file"):
        architecture_of(tmp_path / "absent.json")


def test_an_architecture_from_yaml_refuses_unknown_keys(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in _known().items()) + "hidden_sizes: 3\n")
    with pytest.raises(SettingsError, match="hidden_sizes: unknown setting; did you mean hidden_size"):
        load_settings(path, Architecture)


def _known() -> dict[str, Any]:
    return {key: value for key, value in LLAMA_8B.items() if key in Architecture.model_fields}


def _config(folder: Path, **values) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return path
