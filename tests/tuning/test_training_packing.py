"""Packed rows: the same loss and gradients as rows alone, nothing between rows, and no fp32 copies in bf16."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy

from training.encode import Example
from training.fused import fuse
from training.model import own_precision
from training.packing import ATTENTION, attend, pack, summed_loss
from training.spec import TuningSpec
from training.tune import steps

CPU = torch.device("cpu")
VOCABULARY = 80


def rows(lengths: list[int], *, prompt: int = 5, seed: int = 0) -> list[Example]:
    numbers = random.Random(seed)
    return [
        Example(line, tuple(numbers.randrange(VOCABULARY) for _ in range(length)), prompt)
        for line, length in enumerate(lengths, 1)
    ]


def tuned(
    family: str, attention: str, *, dtype: torch.dtype = torch.float32, dropout: float = 0.0, **change: Any
) -> Any:
    """A tiny base of `family` with an adapter on every linear layer, always with the same weights."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
    } | change  # fmt: skip
    torch.manual_seed(3)
    config = AutoConfig.for_model(family, **settings)
    base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    layers = sorted(
        {name.rpartition(".")[2] for name, m in base.named_modules() if isinstance(m, torch.nn.Linear)} - {"lm_head"}
    )
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=layers, lora_dropout=dropout))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)  # 0 at the start, which would hide lora_A's gradient
    return model.train()


def gradients(model: Any) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("mistral", {"sliding_window": 16}),  # shorter than some of the rows
    ("qwen2", {}),
    ("qwen3", {"head_dim": 8}),
    ("phi3", {}),
]


@pytest.mark.parametrize(("family", "change"), FAMILIES, ids=[family for family, _ in FAMILIES])
def test_loss_and_gradients_are_those_of_each_row_alone_in_plain_transformers(
    family: str, change: dict[str, Any]
) -> None:
    examples = rows([23, 9, 40, 16, 7])
    packed, plain = tuned(family, ATTENTION, **change), tuned(family, "eager", **change)
    together = summed_loss(packed, examples, CPU)
    together.backward()  # type: ignore[no-untyped-call]
    apart = 0.0
    for example in examples:
        ids = torch.tensor([example.ids])
        logits = plain(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        start = example.prompt_length
        loss = cross_entropy(logits[start - 1 : -1], ids[0, start:], reduction="sum")
        loss.backward()  # type: ignore[no-untyped-call]
        apart += loss.item()
    assert together.item() == pytest.approx(apart, rel=1e-5)
    assert gradients(plain).abs().max() > 0.01
    assert torch.allclose(gradients(packed), gradients(plain), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "change"), FAMILIES[:2], ids=[family for family, _ in FAMILIES[:2]])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(family: str, change: dict[str, Any]) -> None:
    examples, found, kept = rows([23, 9, 40, 16, 7]), [], []
    for again in (False, True):
        model = tuned(family, ATTENTION, dropout=0.1, **change)
        fuse(model)
        if again:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        losses: list[torch.Tensor] = []
        torch.manual_seed(5)  # the second forward pass must drop what the first did

        def forward(model: Any = model, losses: list[torch.Tensor] = losses) -> torch.Tensor:
            losses.append(summed_loss(model, examples, CPU))
            return losses[0]

        kept.append(sum(kept_bytes(model, forward).values()))
        found.append((losses[0].item(), gradients(model)))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    assert kept[1] < 0.3 * kept[0], "and it keeps far less"


def test_no_row_sees_another() -> None:
    model = tuned("llama", ATTENTION)
    answer, first, second = rows([30]), rows([20], prompt=20, seed=1), rows([20], prompt=20, seed=2)
    with torch.no_grad():  # rows that are all prompt add nothing to the loss themselves
        losses = [
            [summed_loss(model, packed, CPU).item() for packed in (other + answer, answer + other)]
            for other in (first, second)
        ]
    assert losses[0] == losses[1], "bit for bit, before and after it"
    alone = summed_loss(model, answer, CPU).item()
    assert losses[0] == pytest.approx([alone, alone], rel=1e-5), "and its positions start at 0"


@pytest.mark.parametrize("window", [None, 4])
def test_attention_never_touches_another_rows_numbers(window: int | None) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 17, 8)
    starts = [0, 7, 17]
    clean, _ = attend(torch.nn.Module(), query, key, value, None, sliding_window=window, row_starts=starts)
    whole, _ = attend(torch.nn.Module(), query, key, value, None, sliding_window=window)
    assert not torch.allclose(clean[:, 7:], whole[:, 7:]), "one row of 17 would see the first seven"
    for each in (query, key, value):
        each[:, :, :7] = torch.nan
    spoilt, _ = attend(torch.nn.Module(), query, key, value, None, sliding_window=window, row_starts=starts)
    assert spoilt[:, :7].isnan().all()
    assert torch.equal(spoilt[:, 7:], clean[:, 7:])


def test_padding_is_refused_instead_of_attended_to() -> None:
    ids = torch.ones(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="packed rows have no padding"):
        tuned("llama", ATTENTION)(input_ids=ids, attention_mask=torch.ones_like(ids))


# How rows share forward passes.


@pytest.mark.parametrize("seed", range(20))
def test_a_step_takes_all_its_rows_in_few_passes_within_the_budget(seed: int, tiny_base: Path, rows_file: Path) -> None:
    numbers = random.Random(seed)
    size, accumulation, longest = numbers.randint(1, 6), numbers.randint(1, 6), numbers.randint(8, 60)
    examples = rows([numbers.randint(2, longest) for _ in range(numbers.randint(1, 90))], prompt=1, seed=seed)
    spec = TuningSpec(
        adapter="a", base_model=str(tiny_base), dataset=str(rows_file), per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation, max_seq_length=longest, num_train_epochs=1,
    )  # fmt: skip
    seen: list[int] = []
    for _, (passes,) in steps(examples, spec, start=0):
        assert len(passes) <= accumulation
        assert all(sum(len(row.ids) for row in packed) <= size * longest for packed in passes)
        lines = [row.line for packed in passes for row in packed]
        assert len(lines) == size * accumulation or len(seen) + len(lines) == len(examples)
        seen += lines
    assert sorted(seen) == [row.line for row in examples]


def test_short_rows_share_a_pass_and_a_long_one_is_never_split() -> None:
    examples = rows([3, 10, 4, 3, 12])
    assert [[len(row.ids) for row in group] for group in pack(examples, 10)] == [[12], [10], [4, 3, 3]]
    assert pack(examples, 10) == pack(examples, 10)


# Precision.


def kept_bytes(model: Any, forward: Callable[[], torch.Tensor]) -> dict[tuple[torch.dtype, int], int]:
    """Bytes that autograd keeps of `forward()` for the backward pass, by precision and width of the last dimension."""
    storages: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss = forward()
    total: dict[tuple[torch.dtype, int], int] = {}
    for place, tensor in storages.items():
        if place not in weights and tensor.dim() and tensor.shape[-1] != VOCABULARY:
            kind = (tensor.dtype, tensor.shape[-1])
            total[kind] = total.get(kind, 0) + tensor.untyped_storage().nbytes()
    loss.backward()  # type: ignore[no-untyped-call]
    return total


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_in_bf16_no_adapter_keeps_an_fp32_copy_of_its_input(dropout: float) -> None:
    examples, inside = rows([30, 20]), 96  # only down_proj's input is so wide, beside what the MLP itself keeps
    model = tuned("llama", ATTENTION, dtype=torch.bfloat16, dropout=dropout, intermediate_size=inside)
    ids = torch.tensor([[token for example in examples for token in example.ids]])
    by_peft = kept_bytes(model, lambda: model(input_ids=ids).logits.float().sum())
    model.zero_grad()
    with own_precision(model):
        ours = kept_bytes(model, lambda: summed_loss(model, examples, CPU))
    full = torch.float32
    assert by_peft[full, inside] >= 2 * 50 * inside * 4, "two layers, 50 tokens: what peft does by itself"
    assert (full, inside) not in ours
    # What is left in fp32 is what the norms keep, twice a layer and once at the end.
    assert ours[full, 32] <= (2 * 2 + 1) * 50 * 32 * 4
    assert sum(ours.values()) < 0.75 * sum(by_peft.values())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {full}, "the adapter itself is kept and updated in fp32"
    assert {parameter.grad.dtype for parameter in trained} == {full}


@pytest.fixture
def losses() -> Callable[[torch.dtype], tuple[float, torch.Tensor]]:
    def at(dtype: torch.dtype) -> tuple[float, torch.Tensor]:
        model = tuned("llama", ATTENTION, dtype=dtype, initializer_range=0.05)
        with own_precision(model):
            loss = summed_loss(model, rows([30, 20, 11]), CPU)
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.item(), gradients(model)

    return at


def test_bf16_gives_the_loss_and_gradients_of_fp32_within_its_precision(
    losses: Callable[[torch.dtype], tuple[float, torch.Tensor]],
) -> None:
    (half, half_gradients), (full, full_gradients) = losses(torch.bfloat16), losses(torch.float32)
    assert half == pytest.approx(full, rel=0.01)
    assert torch.cosine_similarity(half_gradients, full_gradients, dim=0) > 0.99


def test_fp32_stays_fp32() -> None:
    model = tuned("llama", ATTENTION, dropout=0.05)
    with own_precision(model):
        assert {dtype for dtype, _ in kept_bytes(model, lambda: summed_loss(model, rows([30, 20]), CPU))} <= {
            torch.float32,
            torch.int64,
        }
