"""Packs rows into one sequence without padding, and keeps each row to itself: positions, attention and loss.

    ids        [[ a0 a1 a2 | b0 b1 | c0 c1 c2 c3 ]]    one sequence, three rows
    positions  [[  0  1  2 |  0  1 |  0  1  2  3 ]]    each row starts anew
    attention  of each row by itself, causal: no mask exists, and no score between two rows is ever computed
    logits     only where the next token is a token of an answer

Linear layers, where the time goes, see all tokens of a forward pass at once. A block-diagonal mask over the whole
sequence would give the same numbers, but computes every score between rows only to mask it, and keeps SDPA from its
fastest kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from training.encode import Example

ATTENTION = "rows_apart"
"""The name of `attend` as `attn_implementation` of a transformers model."""


def pack(rows: Sequence[Example], budget: int) -> list[list[Example]]:
    """Distribute `rows` over as few groups of at most `budget` tokens as first-fit finds, the longest rows first.

    A row longer than `budget` gets a group of its own. The order depends on the rows and their order alone.
    """
    groups: list[list[Example]] = []
    room: list[int] = []
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        size = len(row.ids)
        place = next((number for number, left in enumerate(room) if size <= left), None)
        if place is None:
            place = len(groups)
            groups.append([])
            room.append(budget)
        groups[place].append(row)
        room[place] -= size
    return groups


def summed_loss(model: Any, rows: Sequence[Example], device: torch.device) -> torch.Tensor:
    """Cross entropy summed over the answer tokens of `rows`, a scalar in nats: one forward pass without padding.

    A base in bf16 computes in bf16, its adapter (kept in fp32) included, by autocast.
    """
    starts = [0, *accumulate(len(row.ids) for row in rows)]
    ids = torch.tensor([token for row in rows for token in row.ids])
    positions = torch.cat([torch.arange(len(row.ids)) for row in rows])
    answers = torch.cat(
        [
            torch.arange(start + max(1, row.prompt_length), start + len(row.ids))
            for start, row in zip(starts, rows, strict=False)
        ]
    )
    half = model.dtype == torch.bfloat16
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
        logits = model(
            input_ids=ids[None].to(device),
            position_ids=positions[None].to(device),
            logits_to_keep=(answers - 1).to(device),
            row_starts=starts,
            use_cache=False,
        ).logits
    return cross_entropy(logits[0].float(), ids[answers].to(device), reduction="sum")


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    row_starts: Sequence[int] | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each packed row by itself; `[1, heads, tokens, width]` to `[1, tokens, heads, width]`.

    `row_starts` are the first tokens of the rows, and the number of all tokens; without it there is one row. It
    reaches this place through the keyword arguments of the model's `forward`, as those of flash attention do.
    """
    lengths = [end - first for first, end in pairwise(row_starts or [0, query.shape[2]])]
    heads = query.shape[1] // key.shape[1]
    grouped = heads > 1 and query.dtype != torch.float32
    if heads > 1 and not grouped:  # in fp32 no fused kernel of CUDA takes fewer heads of keys than of queries
        key, value = (each.repeat_interleave(heads, dim=1) for each in (key, value))
    parts = []
    # Not slices: the backward pass of each would fill a gradient as long as the whole pass with zeros.
    for q, k, v in zip(*(torch.split(each, lengths, dim=2) for each in (query, key, value)), strict=True):
        band = _band(q.shape[2], sliding_window, query.device)
        part = scaled_dot_product_attention(
            q, k, v, attn_mask=band, dropout_p=dropout, is_causal=band is None, scale=scaling, enable_gqa=grouped
        )
        parts.append(part.transpose(1, 2))
    return torch.cat(parts, dim=1), None


def _band(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """The mask of a row longer than the base's sliding window; shorter rows need none."""
    if window is None or length <= window:
        return None
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)


def _no_mask(*_: Any, attention_mask: torch.Tensor | None = None, **__: Any) -> None:
    if attention_mask is not None:
        raise ValueError("packed rows have no padding; leave out attention_mask")


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, _no_mask)
