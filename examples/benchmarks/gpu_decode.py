"""Whole models on a GPU: decode and prefill of bf16, gptq_fx and torchao int4, in one process.

Random weights of real configurations. Decode: 256 tokens of eager prefill into a static cache, then 127
greedy steps of a compiled step with CUDA graphs, one synchronization at the end; the median of --repeat runs.
A line is printed as soon as it is known, so that a run that is cut off still shows what it had.
"""

import contextlib
import functools
import gc
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

import gptq_fx
from random_models import CONFIGS, build, configure
from table import conditions, markdown, parser, publish

CONTEXT, STEPS, PREFILL = 256, 127, 2048


def say(*words: object) -> None:
    print(f"[{time.perf_counter() - START:6.1f} s]", *words, flush=True)


def on_gpu() -> bool:
    return DEVICE.startswith("cuda")


def synchronize() -> None:
    if on_gpu():
        torch.cuda.synchronize()


def free() -> None:
    torch.compiler.reset()  # CUDA graphs hold memory as long as their code lives
    gc.collect()
    if on_gpu():
        torch.cuda.empty_cache()


def gigabytes(ask: Callable[[], Any]) -> float:
    return (ask() or 0) / 1e9 if on_gpu() else 0.0


@contextlib.contextmanager
def grouped_attention(on: bool) -> Iterator[None]:
    """Transformers' own switch between repeated keys and enable_gqa, for the column of bf16."""
    from transformers.integrations import sdpa_attention

    before = sdpa_attention.use_gqa_in_sdpa
    if on:
        sdpa_attention.use_gqa_in_sdpa = lambda *args, **kwargs: True
    try:
        yield
    finally:
        sdpa_attention.use_gqa_in_sdpa = before


def with_gptq_fx(model: PreTrainedModel, **options: Any) -> None:
    start = time.perf_counter()
    report = gptq_fx.quantize(model, gptq_fx.GPTQConfig(bits=4, group_size=128, **options), progress=False)
    synchronize()
    say(f"quantized {len(report.sites)} sites by rounding in {time.perf_counter() - start:.1f} s")


def with_torchao(model: PreTrainedModel) -> None:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    config = Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d")
    quantize_(model, config, filter_fn=lambda m, name: isinstance(m, torch.nn.Linear) and name != "lm_head")


@dataclass(frozen=True)
class Variant:
    """prepare: changes a fresh model in place. ours: compiled by backend "gptq", with this `kernel`.
    grouped: attention on keys and values that are not repeated, for one token."""

    prepare: Callable[[PreTrainedModel], None] = lambda model: None
    ours: bool = False
    grouped: bool = False
    kernel: str = "auto"


LM_HEAD = {"lm_head": True, "dynamic": {"lm_head": {"bits": 8}}}
VARIANTS = {
    "bf16": Variant(),
    "bf16, grouped attention": Variant(grouped=True),
    "gptq_fx": Variant(with_gptq_fx, ours=True),
    "gptq_fx, grouped attention": Variant(with_gptq_fx, ours=True, grouped=True),
    "gptq_fx, lm_head 8 bits": Variant(functools.partial(with_gptq_fx, **LM_HEAD), ours=True, grouped=True),
    "gptq_fx, humming": Variant(with_gptq_fx, ours=True, grouped=True, kernel="humming"),
    "gptq_fx, marlin": Variant(with_gptq_fx, ours=True, grouped=True, kernel="marlin"),
    "gptq_fx, marlin, lm_head 8 bits": Variant(
        functools.partial(with_gptq_fx, **LM_HEAD), ours=True, grouped=True, kernel="marlin"
    ),
    "torchao int4": Variant(with_torchao),
}


@contextlib.contextmanager
def setting(variant: Variant) -> Iterator[None]:
    os.environ["GPTQ_FX_SKIP"] = "" if variant.grouped else "attention"
    with grouped_attention(variant.grouped and not variant.ours):
        yield


def compiled(function: Callable[..., Any], variant: Variant, mode: str | None) -> Callable[..., Any]:
    if variant.ours:
        options = {"kernel": variant.kernel, **({"mode": mode} if mode else {})}
        return torch.compile(function, backend="gptq", options=options, fullgraph=True, dynamic=False)
    return torch.compile(function, mode=mode, fullgraph=True, dynamic=False)


def make_cache(model: PreTrainedModel, batch: int, length: int) -> StaticCache:
    config = model.config
    cache = StaticCache(config, max_cache_len=length)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache.early_initialization(batch, config.num_key_value_heads, size, torch.bfloat16, model.device)
    return cache


@dataclass
class Decoder:
    """One compiled step of one model at one batch size."""

    model: PreTrainedModel
    variant: Variant
    batch: int

    def __post_init__(self) -> None:
        torch.compiler.reset()
        self.cache = make_cache(self.model, self.batch, CONTEXT + STEPS + 1)

        def step(tokens: Tensor) -> Tensor:
            return self.model(tokens, past_key_values=self.cache, use_cache=True).logits[:, -1:].argmax(-1)

        self.step = compiled(step, self.variant, "reduce-overhead")

    def fill(self) -> Tensor:
        self.cache.reset()
        rng = torch.Generator().manual_seed(1)
        ids = torch.randint(self.model.config.vocab_size, (self.batch, CONTEXT), generator=rng).to(DEVICE)
        logits = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        return logits.argmax(-1)

    def run(self, steps: int, around: Any = None) -> float:
        """Seconds for each step. around: a context manager for the steps alone."""
        token = self.fill()
        synchronize()
        with around or contextlib.nullcontext():
            start = time.perf_counter()
            for _ in range(steps):
                torch.compiler.cudagraph_mark_step_begin()
                token = self.step(token).clone()
            synchronize()
            return (time.perf_counter() - start) / steps

    def first_call(self) -> float:
        start = time.perf_counter()
        self.run(1)
        return time.perf_counter() - start


CLASSES = (
    ("quantized GEMM", r"humming|marlin|tinygemm|int4"),
    ("attention", r"fmha|flash|attention|cudnn|softmax|bmm"),
    ("dense GEMM", r"gemm|gemv|cutlass|nvjet|xmma|splitK|cublas"),
    ("Triton", r"^triton|^_align|^_activate|^_combine"),
)


def breakdown(decoder: Decoder) -> str:
    """Device time of one step by kind of kernel, in us."""
    decoder.run(4)
    profile = torch.profiler.profile(activities=list(torch.profiler.supported_activities()))
    decoder.run(8, profile)
    token_kernels: dict[str, float] = {}
    names: dict[str, float] = {}
    for event in profile.key_averages():
        if "cuda" not in str(event.device_type).lower():
            continue
        kind = next((k for k, pattern in CLASSES if re.search(pattern, event.key)), "other")
        token_kernels[kind] = token_kernels.get(kind, 0.0) + event.self_device_time_total
        names[event.key] = event.self_device_time_total
    top = sorted(names.items(), key=lambda item: -item[1])[:12]
    for name, total in top:
        say(f"    {total / 8:9.1f} us a step  {name[:90]}")
    return ", ".join(f"{kind} {total / 8:.0f}" for kind, total in sorted(token_kernels.items()))


def prefill(model: PreTrainedModel, variant: Variant, repeat: int) -> tuple[float, float]:
    """(compiled, eager) ms for PREFILL tokens."""
    cache = make_cache(model, 1, PREFILL)
    rng = torch.Generator().manual_seed(2)
    ids = torch.randint(model.config.vocab_size, (1, PREFILL), generator=rng).to(DEVICE)

    def forward(tokens: Tensor) -> Tensor:
        return model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    def timed(function: Callable[..., Any]) -> float:
        seconds = []
        for _ in range(repeat + 2):
            cache.reset()
            synchronize()
            start = time.perf_counter()
            function(ids)
            synchronize()
            seconds.append(time.perf_counter() - start)
        return 1e3 * median(seconds[2:])

    torch.compiler.reset()
    return timed(compiled(forward, variant, None)), timed(forward)


def measure(model: PreTrainedModel, label: str, variant: Variant, args: Any) -> list[list[str]]:
    rows = []
    stored = gigabytes(torch.cuda.memory_allocated)
    for batch in args.batch:
        decoder = Decoder(model, variant, batch)
        first = decoder.first_call()
        say(f"{label}, batch {batch}: first call {first:.1f} s")
        decoder.run(8)
        gigabytes(torch.cuda.reset_peak_memory_stats)
        seconds = [decoder.run(STEPS) for _ in range(args.repeat)]
        peak = gigabytes(torch.cuda.max_memory_allocated)
        kinds = breakdown(decoder) if args.breakdown else ""
        ms = 1e3 * median(seconds)
        row = [label, str(batch), f"{ms:.3f}", f"{batch * 1e3 / ms:.0f}", f"{stored:.2f}", f"{peak:.2f}"]
        rows.append([*row, f"{first:.1f}", kinds])
        say(" | ".join(rows[-1]), "| runs", *(f"{1e3 * s:.3f}" for s in seconds))
    if not args.no_prefill:
        with_graph, eager = prefill(model, variant, args.repeat)
        say(f"{label}: prefill of {PREFILL} tokens: compiled {with_graph:.1f} ms, eager {eager:.1f} ms")
        rows.append([label, f"prefill {PREFILL}", f"{with_graph:.1f} (eager {eager:.1f})", *[""] * 5])
    return rows


HEAD = ["", "batch", "ms", "tokens/s", "weights GB", "peak GB", "first call s", "kernels, us a step"]


@torch.inference_mode(False)
@torch.no_grad()
def main() -> None:
    cli = parser(__doc__.splitlines()[0])
    cli.add_argument("--model", choices=CONFIGS, default="llama-3.1-8b")
    cli.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    cli.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    cli.add_argument("--repeat", type=int, default=3)
    cli.add_argument("--no-prefill", action="store_true")
    cli.add_argument("--breakdown", action="store_true")
    cli.add_argument("--device", default="cuda")
    args = cli.parse_args()
    global DEVICE
    DEVICE = args.device
    rows: list[list[str]] = []
    model, made_by = None, None
    for label in args.only:
        variant = VARIANTS[label]
        try:
            if model is None or made_by != variant.prepare:
                model = None
                free()
                model = build(configure(args.model), DEVICE)
                say(f"{label}: model built, {gigabytes(torch.cuda.memory_allocated):.2f} GB")
                variant.prepare(model)
                made_by = variant.prepare
                free()
            with setting(variant):
                rows += measure(model, label, variant, args)
        except Exception as error:  # the next variant may still run
            say(f"{label}: FAILED: {type(error).__name__}: {error}")
            if os.environ.get("TRACE"):
                raise
            rows.append([label, f"failed: {type(error).__name__}", *[""] * 6])
    text = [conditions(f"Decode and prefill of {args.model}, random weights"), ""]
    publish("\n".join([*text, markdown(HEAD, rows)]), args.out)


DEVICE = "cuda"
START = time.perf_counter()

if __name__ == "__main__":
    main()
