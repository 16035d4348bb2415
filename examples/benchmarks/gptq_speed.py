"""Calibrated GPTQ: seconds of each phase, peak memory, share of the floor. Random weights and tokens."""

import argparse
import copy
import functools
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

import gptq_fx
from accuracy import upcycled
from gptq_fx.columns import columns as torch_columns
from gptq_fx.gptq import inverse_factor
from gptq_fx.grid import Search
from gptq_fx.kernels.solver import solver_for
from gptq_fx.weight import QuantizedWeight
from gpu_quality import perplexity
from random_models import CONFIGS, build, configure
from smollm2 import checkpoint
from table import conditions, markdown, parser, publish
from texts import windows

# plain: GPTQ as published; default: scales are searched, and the drift of the inputs is made up for.
SETTINGS = {"plain": {"gptaq": 0.0, "scale_search": False}, "default": {}}
PHASES = ("forward", "Hessian", "factorize", "quantize", "pack", "transfer")


@dataclass(frozen=True)
class Outcome:
    """seconds: of each phase, and in all. peak: bytes of the device."""

    phases: dict[str, float]
    seconds: float
    peak: int
    linears: int

    def row(self, label: str) -> list[str]:
        parts = [f"{self.phases.get(name, 0.0):.1f}" for name in PHASES]
        rest = self.seconds - sum(self.phases.values())
        return [label, f"{self.seconds:.1f}", *parts, f"{rest:.1f}", f"{self.peak / 1e9:.1f}"]


QUALITY = ["model", "quantized", "perplexity", "integers that differ", "s"]
HELD_OUT = 20  # windows
HEAD = ["", "all, s", *PHASES, "rest", "peak GB"]


def on_gpu(device: str) -> bool:
    return device.startswith("cuda")


def tokens(model: PreTrainedModel, args: argparse.Namespace) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shape = (args.sequences, args.length)
    ids = torch.randint(model.config.vocab_size, shape, generator=generator).to(model.device)
    return [{"input_ids": part} for part in ids.split(args.batch)]


def measure(config: PretrainedConfig, args: argparse.Namespace) -> Outcome:
    model = build(config, args.device, args.dtype)  # there random numbers are made fastest
    if args.stream:
        model.to("cpu")
    batches = tokens(model, args)
    gc.collect()
    if on_gpu(args.device):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    where = {"device": args.device, "max_memory": args.stream} if args.stream else {}
    settings = gptq_fx.GPTQConfig(**SETTINGS[args.settings])
    start = time.perf_counter()
    report = gptq_fx.quantize(model, settings, batches, progress=args.progress, **where)
    if on_gpu(args.device):
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if on_gpu(args.device) else 0
    linears = sum(site.loss is not None for site in report.sites)
    return Outcome(report.seconds, seconds, peak, linears)


def timed(run: Callable[[], object], repeat: int = 1) -> float:
    """Seconds of one call, after another that compiles."""
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeat):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeat


def add_product(total: Tensor, x: Tensor) -> None:
    torch.addmm(total, x.T, x, out_dtype=torch.float32, out=total)


def factor(H: Tensor) -> Tensor:
    eye = torch.eye(len(H), device=H.device)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(H).flip(0, 1), eye, upper=True)


@torch.no_grad()
def floor(config: PretrainedConfig, args: argparse.Namespace) -> float:
    """Seconds of one forward pass over all tokens, and of X^T X and the factor of each input, once; of a
    model without experts."""
    model = build(config, args.device, args.dtype)
    data = tokens(model, args)
    forward = len(data) * timed(functools.partial(model.base_model, **data[0], use_cache=False))
    seconds = {"forward": forward, "Hessian": 0.0, "factorize": 0.0}
    del model
    for K, inputs in ((config.hidden_size, 3), (config.intermediate_size, 1)):
        uses = config.num_hidden_layers * inputs
        x = torch.randn(args.sequences * args.length, K, device=args.device, dtype=args.dtype)
        H = torch.zeros(K, K, device=args.device)
        seconds["Hessian"] += uses * timed(functools.partial(add_product, H, x))
        H = H / len(x) + torch.eye(K, device=args.device)
        seconds["factorize"] += uses * timed(functools.partial(factor, H))
        del x, H
        torch.cuda.empty_cache()
    print("floor:", ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items()), flush=True)
    return sum(seconds.values())


@torch.no_grad()
def parts(args: argparse.Namespace) -> Iterator[list[str]]:
    """Milliseconds of what one stage is made of, at the shapes of both models."""
    for E, N, K in ((1, 6144, 4096), (1, 28672, 4096), (1, 4096, 14336), (32, 1536, 2048), (32, 2048, 768)):
        W = torch.randn(E, N, K, device=args.device)
        x = torch.randn(16384 if E == 1 else 1024, K, device=args.device, dtype=args.dtype)
        total = torch.zeros(K, K, device=args.device)
        add_product(total, x)
        H = (total / len(x) + torch.eye(K, device=args.device)).expand(E, K, K).contiguous()
        U, _, _ = inverse_factor(H, 0.05)
        importance = H.diagonal(dim1=1, dim2=2)
        L = torch.linalg.cholesky(H)
        solver = solver_for(W.device)
        columns = torch_columns if solver is None else solver.columns
        searches = {norm: Search(4, True, args.dtype, norm) for norm in (None, 2.0)}
        eye = torch.eye(K, device=args.device).expand(E, K, K)
        weight = QuantizedWeight.from_codes(
            torch.randint(16, (E, K, N), device=args.device, dtype=torch.uint8),
            torch.rand(E, K // 128, N, device=args.device, dtype=args.dtype), None, 4,
        )  # fmt: skip
        runs: dict[str, Callable[[], object]] = {
            f"X^T X, {len(x)} tokens": functools.partial(add_product, total, x),
            "Cholesky, all at once": functools.partial(torch.linalg.cholesky_ex, H),
            "Cholesky, each": lambda H=H: [torch.linalg.cholesky_ex(h) for h in H],
            "triangular solve, all at once": lambda L=L, eye=eye: torch.linalg.solve_triangular(
                L.mT, eye, upper=True
            ),
            "triangular solve, each": lambda L=L, eye=eye: [
                torch.linalg.solve_triangular(lower.T, eye[0], upper=True) for lower in L
            ],
            "inverse_factor": functools.partial(inverse_factor, H, 0.05),
            "W H": functools.partial(torch.matmul, W, H),
            "columns": functools.partial(columns, W.clone(), U, importance, searches[None], 128, None),
            "columns, scales searched": functools.partial(
                columns, W.clone(), U, importance, searches[2.0], 128, None
            ),
            "pack": lambda w=weight: QuantizedWeight.from_codes(w.codes(), w.scales, None, 4),
            "dequantize": weight.dequantize,
        }
        for name, run in runs.items():
            yield [f"{E} x [{N}, {K}]", name, f"{1e3 * timed(run):.2f}"]


def profile(config: PretrainedConfig, args: argparse.Namespace) -> str:
    """The kernels that take most of the time, of two layers."""
    config.num_hidden_layers = 2
    measure(config, args)  # compiles
    activities = list(torch.profiler.supported_activities())
    with torch.profiler.profile(activities=activities) as found:
        outcome = measure(config, args)
    table = found.key_averages().table(
        sort_by="self_device_time_total", row_limit=35, max_name_column_width=80
    )
    return markdown(HEAD, [outcome.row("2 layers")]) + "\n\n" + table


# --- how it grows


def scaling(args: argparse.Namespace) -> Iterator[list[str]]:
    """Each size doubled by itself: layers, hidden size, experts, tokens. What compiles, does so before."""

    def llama(hidden: int = 2048, layers: int = 8) -> PretrainedConfig:
        heads = {"num_attention_heads": hidden // 128, "num_key_value_heads": hidden // 512}
        sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
        return CONFIGS["llama-3.1-8b"](**sizes, **heads, vocab_size=4096)

    def mixture(experts: int) -> PretrainedConfig:
        return CONFIGS["qwen3-30b-a3b"](num_hidden_layers=8, num_experts=experts, vocab_size=4096)

    models = {
        "Llama, base": (llama(), 1),
        "Llama, layers x2": (llama(layers=16), 1),
        "Llama, hidden x2": (llama(hidden=4096), 1),
        "Llama, tokens x2": (llama(), 2),
        "Qwen3-MoE, 32 experts": (mixture(32), 1),
        "Qwen3-MoE, 64 experts": (mixture(64), 1),
    }
    sequences = args.sequences
    for label, (config, times) in models.items():
        args.sequences = sequences // 2 * times
        measure(config, args)
        yield measure(config, args).row(label)
    args.sequences = sequences


# --- what comes out


def quality(args: argparse.Namespace) -> Iterator[list[str]]:
    """Perplexity of a real model, and of a Mixtral made of it, quantized here, there, and streamed; the share
    of integers that differ from those of the CPU, also when it adds up in another order, with half of its
    threads. All perplexities are measured on the device."""
    folder = checkpoint()
    size = {} if args.layers is None else {"num_hidden_layers": args.layers}
    llama = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **size).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    held_out, calibration = windows(tokenizer, HELD_OUT, args.sequences, args.length)
    models = {
        "SmolLM2-135M": llama.to(args.dtype),
        "its Mixtral, 4 experts": upcycled(llama, 4).to(args.dtype),
    }
    every = torch.get_num_threads()
    half = max(every // 2, 1)
    streamed = {"device": args.device, "max_memory": args.stream or "8GB"}
    paths = [
        (f"on the CPU, {every} threads", "cpu", every, {}),
        (f"on the CPU, {half} threads", "cpu", half, {}),
        (f"on {args.device}", args.device, every, {}),
        (f"streamed to {args.device}", "cpu", every, streamed),
    ]
    for title, dense in models.items():
        yield [title, "dense", f"{perplexity(copy.deepcopy(dense).to(args.device), held_out):.4f}", "", ""]
        ours: dict[str, Tensor] = {}
        for path, home, threads, where in paths:
            torch.set_num_threads(threads)
            model = copy.deepcopy(dense).to(home)
            data = [{"input_ids": part.to(home)} for part in calibration.split(args.batch)]
            settings = gptq_fx.GPTQConfig(group_size=64, **SETTINGS[args.settings])
            start = time.perf_counter()
            gptq_fx.quantize(model, settings, data, progress=args.progress, **where)
            seconds = time.perf_counter() - start
            found = {
                name: weight.quantized_weight().codes().cpu()
                for name, weight in model.named_parameters()
                if isinstance(weight, gptq_fx.QuantizedParameter)
            }
            ours = ours or found
            other = sum(int((found[name] != ours[name]).sum()) for name in ours)
            share = other / sum(codes.numel() for codes in ours.values())
            value = perplexity(model.to(args.device), held_out)
            yield [title, path, f"{value:.4f}", f"{share:.5f}", f"{seconds:.1f}"]


def main() -> None:
    cli = parser(__doc__.splitlines()[0])
    cli.add_argument("--model", choices=CONFIGS, default="llama-3.1-8b")
    cli.add_argument("--settings", choices=SETTINGS, default="default")
    cli.add_argument("--sequences", type=int, default=128)
    cli.add_argument("--length", type=int, default=2048)
    cli.add_argument("--batch", type=int, default=8, help="sequences in one batch")
    cli.add_argument("--layers", type=int, help="fewer than the model has")
    cli.add_argument("--stream", metavar="8GB", help="weights on the host, this much of the device")
    cli.add_argument("--scaling", action="store_true")
    cli.add_argument("--quality", action="store_true", help="of real models, against the CPU")
    cli.add_argument("--parts", action="store_true", help="what one stage is made of")
    cli.add_argument("--profile", action="store_true")
    cli.add_argument("--floor", action="store_true", help="measure the floor, too")
    cli.add_argument("--progress", action="store_true")
    cli.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.bfloat16)
    cli.add_argument("--device", default="cuda")
    cli.set_defaults(threads=None)  # two on the CPU, else all
    args = cli.parse_args()
    if args.threads or args.device == "cpu":
        torch.set_num_threads(args.threads or 2)
    config = configure(args.model, args.layers)
    if args.profile:
        publish(profile(config, args), args.out)
        return
    tables = {
        "parts": (parts, "GPTQ, what one stage is made of", ["weights", "", "ms"]),
        "scaling": (scaling, "GPTQ, how it grows", HEAD),
        "quality": (quality, "GPTQ, here and there", QUALITY),
    }
    for make, title, head in (table for name, table in tables.items() if getattr(args, name)):
        rows = []
        for row in make(args):
            rows.append(row)
            print(" | ".join(row), flush=True)
        publish("\n".join([conditions(title), "", markdown(head, rows)]), args.out)
        return
    outcome = measure(config, args)
    text = [conditions(f"GPTQ of {args.model}, {args.sequences} x {args.length} tokens, {args.settings}"), ""]
    text.append(markdown(HEAD, [outcome.row(f"{outcome.linears} weights")]))
    if args.floor:
        least = floor(config, args)
        text += ["", f"Floor {least:.1f} s: {outcome.seconds / least:.2f} times that."]
    publish("\n".join(text), args.out)


if __name__ == "__main__":
    main()
