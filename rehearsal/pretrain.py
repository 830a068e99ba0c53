"""Makes the tiny base from nothing: a tokenizer and a Llama of some three million weights, trained on `world.corpus`.

    python -m rehearsal.pretrain --out FOLDER

How reproducible: the corpus and the tokenizer are the same on every machine. The weights start from a fixed seed
and the number of steps is fixed, so the same machine with the same torch and `--threads` repeats them; other
processors sum in another order (and may lack bf16 units), and give a base of the same quality with other weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Threads that wait must sleep: spinning ones slow training fivefold as soon as anything else wants a core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch loads its OpenMP library

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from common.chat import Message, prompt_messages
from rehearsal.world import SEED, Row, corpus, kubectl_rows, triage_rows

BASE = Path(__file__).parent / "base"
VOCABULARY = 1280
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
PAD, END = 0, 1
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
# (sequences, tokens a sequence, share of the steps): short ones for speed, a few long ones so that long prompts
# are no foreign land. All hold the same number of tokens.
SHAPES = ((32, 128, 0.55), (16, 256, 0.35), (4, 1024, 0.10))
OTHER_TOKENS_WEIGHT = 0.25  # loss weight of what is not an answer: names in requests are chance, not knowledge


def pieces(document: Sequence[Message]) -> Iterator[tuple[str, bool]]:
    """(text, is answer) parts of a document; joined they are what `CHAT_TEMPLATE` writes."""
    for message in document:
        role = message["role"]
        if role == "assistant":
            yield "<|assistant|>", False
            yield f"{message['content']}<|end|>", True
        else:
            yield f"<|{role}|>{message['content']}<|end|>" if role else f"{message['content']}<|end|>", False


def train_tokenizer(documents: int = 20_000) -> Tokenizer:
    """Byte-level BPE over the corpus; digits stand alone, so that numbers are copied digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (message["content"] for document in itertools.islice(corpus(), documents) for message in document)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def batches(
    tokenizer: Tokenizer, steps: int, generator: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`steps` pairs of token ids and loss weights, each [sequences, tokens]; every sequence starts with a document.

    Documents are packed one after another and attend to each other, which also teaches to copy from far back.
    """
    documents = corpus()
    shares = torch.tensor([share for _, _, share in SHAPES])
    for _ in range(steps):
        sequences, length, _ = SHAPES[int(torch.multinomial(shares, 1, generator=generator))]
        ids = torch.zeros((sequences, length), dtype=torch.long)
        weights = torch.zeros((sequences, length))
        for row in range(sequences):
            used = 0
            while used < length:
                for text, is_answer in pieces(next(documents)):
                    part = tokenizer.encode(text).ids[: length - used]
                    ids[row, used : used + len(part)] = torch.tensor(part, dtype=torch.long)
                    weights[row, used : used + len(part)] = 1.0 if is_answer else OTHER_TOKENS_WEIGHT
                    used += len(part)
        yield ids, weights


def new_model(vocabulary: int) -> Any:
    """An untrained Llama: 4 layers of width 256, grouped-query attention, tied embeddings."""
    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=END,
            pad_token_id=PAD,
        )
    )


def train(model: Any, tokenizer: Tokenizer, steps: int, peak_rate: float) -> None:
    """AdamW with a short warm-up and a linear way down; prints loss, speed and the time left."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warm_up = min(100, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, max(0.02, (steps - step) / max(1, steps - warm_up)))
    )
    started, tokens, recent = time.monotonic(), 0, math.nan
    model.train()
    for step, (ids, weights) in enumerate(batches(tokenizer, steps, torch.Generator().manual_seed(SEED)), start=1):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids).logits
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        weight = weights[:, 1:].flatten()
        loss = (losses * weight).sum() / weight.sum()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tokens += ids.numel()
        answers = losses.detach()[weight == 1.0].mean().item()
        recent = answers if math.isnan(recent) else 0.95 * recent + 0.05 * answers
        if step % 50 == 0 or step == steps:
            elapsed = time.monotonic() - started
            print(
                f"step {step}/{steps}  answer loss {recent:.4f}  {tokens / elapsed:,.0f} tokens/s  "
                f"elapsed {elapsed:.0f} s  ETA {elapsed / step * (steps - step):.0f} s",
                flush=True,
            )


def save(model: Any, tokenizer: Tokenizer, out: Path) -> PreTrainedTokenizerFast:
    """Write the model folder that transformers and vLLM load; weights in bf16."""
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(eos_token_id=END, pad_token_id=PAD)
    model.to(torch.bfloat16).save_pretrained(out)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        model_max_length=2048,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(out)
    config = out / "tokenizer_config.json"
    # The class name that transformers 4 and 5 both know (5 writes its new one, which 4 cannot load).
    settings = json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.write_text(json.dumps(settings, indent=2) + "\n")
    (out / "model.safetensors").chmod(0o644)
    return wrapped


@torch.no_grad()
def exact_match(model: Any, tokenizer: Any, rows: Sequence[Row]) -> float:
    """Share of `rows` that the model answers to the letter, greedily."""
    model.eval()
    tokenizer.padding_side = "left"
    right = 0
    for start in range(0, len(rows), 50):
        batch = rows[start : start + 50]
        inputs = tokenizer.apply_chat_template(
            [prompt_messages(row) for row in batch],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
        outputs = model.generate(**inputs, max_new_tokens=96, do_sample=False)
        texts = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(text == row["output"] for text, row in zip(texts, batch, strict=True))
    return right / len(rows)


def main() -> None:
    """Train and write the base."""
    parser = argparse.ArgumentParser(prog="python -m rehearsal.pretrain", description="Make the tiny base again.")
    parser.add_argument("--out", type=Path, default=BASE, help="folder to write (default: rehearsal/base)")
    parser.add_argument("--steps", type=int, default=1500, help="training steps of 4,096 tokens (default: 1500)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak learning rate (default: 2e-3)")
    parser.add_argument("--threads", type=int, default=2, help="processor threads (default: 2)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = train_tokenizer()
    model = new_model(tokenizer.get_vocab_size())
    print(f"{sum(p.numel() for p in model.parameters()):,} weights, {tokenizer.get_vocab_size()} tokens", flush=True)
    train(model, tokenizer, options.steps, options.learning_rate)
    wrapped = save(model, tokenizer, options.out)
    for name, rows in (("kubectl", kubectl_rows()), ("triage", triage_rows())):
        print(
            f"{name}: exact match {exact_match(model.float(), wrapped, rows):.3f} on its {len(rows)} rows", flush=True
        )


if __name__ == "__main__":
    main()
