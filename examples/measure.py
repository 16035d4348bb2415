"""What the examples measure: the speed of `model.generate` and perplexity on held-out text."""

import math
import time
from dataclasses import dataclass
from itertools import pairwise
from pydoc_data.topics import topics
from statistics import median

import torch
from rich.console import Console
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

Tokenizer = PreTrainedTokenizerBase


class Stopwatch(BaseStreamer):
    """Notes the time at which `generate` hands over the prompt and then each new token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@dataclass(frozen=True)
class Generation:
    """Greedy generation for one prompt, as the caller of `generate` sees it."""

    text: str
    compile_seconds: float  # the first call less a later one
    prefill: float  # tokens/s of the prompt, up to the first new token
    decode: float  # tokens/s of the new tokens after the first


def generation(
    model: PreTrainedModel, tokenizer: Tokenizer, prompt: str, new_tokens: int, repeats: int = 3
) -> Generation:
    """The first call compiles prefill and decode; medians of the `repeats` calls after it."""
    message = [{"role": "user", "content": prompt}]
    if tokenizer.chat_template:
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    length = inputs.input_ids.shape[1]

    def generate() -> tuple[torch.Tensor, list[float]]:
        stopwatch = Stopwatch()
        # The static cache gives prefill and decode one graph each. `disable_compile` stops
        # transformers from compiling decode on its own: both go through `model.compile` instead.
        tokens = model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            do_sample=False,
            cache_implementation="static",
            disable_compile=True,
            streamer=stopwatch,
        )
        return tokens[0, length:], stopwatch.times

    with Console(stderr=True).status("compiling prefill and decode"):
        tokens, first = generate()
    runs = [generate()[1] for _ in tqdm(range(repeats), desc="generate", delay=2)]
    steps = [b - a for times in runs for a, b in pairwise(times[1:])]
    return Generation(
        text=tokenizer.decode(tokens, skip_special_tokens=True),
        compile_seconds=first[-1] - first[0] - median(times[-1] - times[0] for times in runs),
        prefill=length / median(times[1] - times[0] for times in runs),
        decode=1 / median(steps) if steps else math.nan,
    )


def windows(
    tokenizer: Tokenizer, held_out: int, calibration: int, length: int = 512
) -> tuple[torch.Tensor, torch.Tensor]:
    """([held_out, length], [calibration, length]) token ids out of the help texts of every Python.

    Both are spread evenly over the texts, and have no window in common. The texts differ between Python
    versions: compare only what one run prints.
    """
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    every = ids[: len(ids) // length * length].view(-1, length)
    test = _spread(len(every), held_out)
    rest = torch.tensor(sorted(set(range(len(every))) - set(test.tolist())))
    return every[test], every[rest[_spread(len(rest), calibration)]]


def _spread(length: int, count: int) -> torch.Tensor:
    return torch.linspace(0, length - 1, min(count, length)).long()


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: torch.Tensor) -> float:
    """exp of the mean negative log-likelihood of each window's tokens, given those before them."""
    losses = []
    for window in tqdm(windows.to(model.device), desc="perplexity", unit="window", delay=2):
        # `forward` is the eager way; calling the model would compile one more graph for this shape.
        logits = model.forward(window[None], use_cache=False).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, window[1:]))
    return torch.stack(losses).mean().exp().item()
