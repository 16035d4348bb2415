"""Perplexity, generation and speed of a causal language model, as the command line shows them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from gptq_fx.errors import CalibrationError
from gptq_fx.progress import progress


@dataclass(frozen=True)
class Speed:
    """Medians of greedy generation, in tokens/s and seconds.

    compile_seconds: the first call less a later one.
    """

    prefill: float
    decode: float
    first_token_seconds: float
    compile_seconds: float
    weight_bytes: int


def read_text(source: str) -> str:
    """The text of a file (plain, or JSON lines with "text"), or of a data set of the package `datasets`.

    Data sets are named as NAME[:CONFIG[:SPLIT]]; wikitext2 is short for one of them.
    Raises CalibrationError if it is neither.
    """
    path = Path(source)
    if path.is_file():
        text = path.read_text(encoding="utf-8", errors="replace")
        if path.suffix in (".jsonl", ".json"):
            return "\n\n".join(_lines(source, text))
        return text
    name, *rest = {"wikitext2": "wikitext:wikitext-2-raw-v1:test"}.get(source, source).split(":")
    try:
        from datasets import load_dataset  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise CalibrationError(
            f"{source}: no such file; for a data set of that name, install the package datasets"
        ) from None
    try:
        rows = load_dataset(name, rest[0] if rest else None, split=rest[1] if len(rest) > 1 else "train")
        return "\n\n".join(row["text"] for row in rows)
    except Exception as error:
        raise CalibrationError(f"{source}: no such file, and no data set: {error}") from None


def _lines(source: str, text: str) -> list[str]:
    """The "text" of each line of JSON."""
    try:
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        return [str(row["text"]) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise CalibrationError(f'{source}: found {error}. Legal: lines of JSON with a "text"') from None


def windows(tokenizer: Any, text: str, count: int, length: int, source: str) -> list[Tensor]:
    """Up to `count` windows of token ids, int64 [length], one behind the other."""
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]
    found = [w for w in ids.split(length) if len(w) == length][:count]
    if not found:
        raise CalibrationError(f"{source}: found {len(ids)} tokens. Legal: at least {length} (--length)")
    return found


@torch.no_grad()
def perplexity(model: Any, held_out: Sequence[Tensor], *, show: bool = True) -> float:
    """exp of the mean negative log-likelihood of each token after the first of each window."""
    total, count = 0.0, 0
    for ids in progress(held_out, "perplexity", show=show):
        ids = ids[None].to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return math.exp(min(total / count, 700.0))


def generate(model: Any, ids: Tensor, new_tokens: int, *, exactly: bool = False) -> Tensor:
    """The new tokens, greedily, by the static cache that compiled models need."""
    tokens: Tensor = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens if exactly else None,
        do_sample=False,
        cache_implementation="static",
        disable_compile=True,
    )
    return tokens[0, ids.shape[1] :]


def speed(model: Any, prompt: int, new_tokens: int, repeats: int, *, show: bool = True) -> Speed:
    """Time generation of `new_tokens` behind a prompt of `prompt` random tokens."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (1, prompt), generator=generator).to(model.device)

    def seconds(tokens: int) -> float:
        start = time.perf_counter()
        generate(model, ids, tokens, exactly=True)
        return time.perf_counter() - start

    cold = seconds(new_tokens)
    first, whole = [], []
    for _ in progress(range(repeats), "generate", show=show):
        first.append(seconds(1))
        whole.append(seconds(new_tokens))
    prefill, total = median(first), median(whole)
    return Speed(
        prefill=prompt / prefill,
        decode=(new_tokens - 1) / max(total - prefill, 1e-9),
        first_token_seconds=prefill,
        compile_seconds=max(cold - total, 0.0),
        weight_bytes=int(model.get_memory_footprint()),
    )
