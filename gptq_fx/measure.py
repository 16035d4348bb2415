"""Perplexity, generation and speed of a causal language model, for the command line and the examples."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from gptq_fx.errors import CalibrationError
from gptq_fx.progress import progress


@dataclass(frozen=True)
class Speed:
    """Medians of greedy generation, as the caller of `generate` sees it, in tokens/s and seconds.

    prefill: of the prompt, up to the first new token. decode: of the new tokens after the first; NaN if
    there is none. compile_seconds: the first call less a later one.
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
def perplexity(
    model: Any, held_out: Sequence[Tensor] | Tensor, *, eager: bool = False, show: bool = True
) -> float:
    """exp of the mean negative log-likelihood of each token after the first of each window.

    eager: by `model.forward`, which model.compile leaves as it is: no graph is compiled for the windows.
    """
    call = model.forward if eager else model
    total, count = 0.0, 0
    for ids in progress(list(held_out), "perplexity", show=show):
        ids = ids[None].to(model.device)
        logits = call(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return math.exp(min(total / count, 700.0))


class _Stopwatch:
    """A streamer that notes when `generate` hands over the prompt and then each new token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


def generate(
    model: Any, ids: Tensor, new_tokens: int, *, exactly: bool = False, streamer: Any = None
) -> Tensor:
    """The new tokens, greedily.

    The static cache gives prefill and decode one graph each; `disable_compile` keeps transformers from
    compiling decode on its own, so that both go through `model.compile`.
    """
    tokens: Tensor = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens if exactly else None,
        do_sample=False,
        cache_implementation="static",
        disable_compile=True,
        streamer=streamer,
    )
    return tokens[0, ids.shape[1] :]


def random_prompt(model: Any, length: int) -> Tensor:
    """Token ids [1, length]."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(3, vocabulary, (1, length), generator=generator).to(model.device)


def speed(
    model: Any, ids: Tensor, new_tokens: int, repeats: int, *, exactly: bool = False, show: bool = True
) -> tuple[Speed, Tensor]:
    """Time generation of `new_tokens` (or fewer, if not `exactly`) behind the prompt ids [1, L].

    The first call compiles; medians of the `repeats` calls after it. Also returns the new tokens.
    """

    def run() -> tuple[Tensor, list[float]]:
        watch = _Stopwatch()
        tokens = generate(model, ids, new_tokens, exactly=exactly, streamer=watch)
        return tokens, watch.times

    tokens, cold = run()
    runs = [run()[1] for _ in progress(range(repeats), "generate", show=show)]
    first = median(times[1] - times[0] for times in runs)
    steps = [b - a for times in runs for a, b in pairwise(times[1:])]
    found = Speed(
        prefill=ids.shape[1] / first,
        decode=1 / median(steps) if steps else math.nan,
        first_token_seconds=first,
        compile_seconds=max(cold[-1] - cold[0] - median(times[-1] - times[0] for times in runs), 0.0),
        weight_bytes=int(model.get_memory_footprint()),
    )
    return found, tokens
