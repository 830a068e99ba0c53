"""The fused adapter: PEFT's own output and gradients, for each kind of layer that it meets."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from training.fused import fuse


def adapted(**settings: Any) -> Any:
    """Two adapted layers, one with a bias, and one without an adapter; the adapters are no zeros."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.SiLU(), torch.nn.Linear(40, 8, bias=False))
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"], **settings))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    return model.train()


def both(model: Any, shape: tuple[int, ...], half: bool = False) -> list[list[torch.Tensor]]:
    """Output and all gradients by PEFT and then by the fused layers."""
    found = []
    for each in (copy.deepcopy(model), model):
        if each is model:
            fuse(each)
        torch.manual_seed(1)
        x = torch.randn(shape, requires_grad=True)
        torch.manual_seed(2)  # of dropout
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            y = each(x)
        y.float().square().sum().backward()
        found.append([y.detach(), x.grad, *(p.grad for p in each.parameters() if p.requires_grad)])
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(6, 24), (1, 6, 24), (2, 3, 24)], ids=str)
def test_output_and_gradients_are_those_of_peft(shape: tuple[int, ...], dropout: float) -> None:
    for theirs, ours in zip(*both(adapted(lora_dropout=dropout), shape), strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_under_autocast_the_weights_keep_fp32_gradients() -> None:
    for theirs, ours in zip(*both(adapted(), (1, 6, 24), half=True), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05 * theirs.abs().max().item())


def test_a_layer_that_is_not_plain_is_left_to_peft() -> None:
    assert fuse(adapted()) == 2
    assert fuse(adapted(use_dora=True)) == 0


def test_with_the_adapter_switched_off_it_is_the_base() -> None:
    model, x = adapted(), torch.randn(3, 24)
    fuse(model)
    with torch.no_grad(), model.disable_adapter():
        off = model(x)
    plain = model.unload()
    assert torch.equal(off, plain(x))
