"""One GPU against two: decode of Llama-3.1-70B in 4 bits, and calibration of the 8B by data.

    python examples/benchmarks/two_gpus.py --out two_gpus.md

starts its four jobs itself, those on one GPU side by side. The 70B is never dense: random codes are made
where they stay. Decode: 256 tokens of eager prefill into a static cache, then 64 greedy steps with CUDA
graphs, one synchronization at the end. Calibration: --sequences of 2048 random tokens, in batches of --batch,
bf16; another of one layer before it compiles the kernels.
"""

import gc
import json
import os
import re
import subprocess
import sys
import threading
import time
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, StaticCache

import gptq_fx
from gptq_fx.packed import PackedWeight
from gptq_fx.parallel import distribute, is_split, run_local
from gptq_fx.parameter import as_parameter
from gptq_fx.weight import QuantizedWeight
from random_models import build, configure
from table import conditions, markdown, parser, publish

CONTEXT, STEPS, GROUP = 256, 64, 128
MODELS = ("llama-3.1-70b", "llama-3.1-8b", "tiny")
START = time.perf_counter()


# --- the jobs, on each rank


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def here() -> torch.device:
    """The device of this rank."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", 0))
    torch.accelerator.set_device_index(index)
    return torch.device(torch.accelerator.current_accelerator().type, index)


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def memory(device: torch.device, what: str) -> float:
    """Gigabytes."""
    return getattr(torch.accelerator, what)() / 1e9 if device.type != "cpu" else 0.0


def say(*words: object) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"[{time.perf_counter() - START:6.1f} s]", *words, flush=True)


def random_quantized(rows: int, columns: int, inputs: int, name: str, device: torch.device) -> nn.Parameter:
    """A weight [N, K] of random codes; `inputs`: of the whole weight, to keep activations at one size."""
    qweight = torch.randint(-(2**31), 2**31, (columns // 8, rows), dtype=torch.int32, device=device)
    scales = torch.full((columns // GROUP, rows), 0.2 / inputs**0.5, dtype=torch.bfloat16, device=device)
    packed = PackedWeight(QuantizedWeight(4, columns, qweight, scales), gptq_fx.Scheme(4, GROUP), None)
    return as_parameter(gptq_fx.QuantizedParameter(packed, name))


def fill(model: nn.Module, device: torch.device) -> None:
    """Random numbers for all parameters of a model on the meta device, linears quantized."""
    from transformers.distributed.sharding_utils import _dtensor_from_local_like

    for name, module in model.named_modules():
        for leaf, meta in list(module.named_parameters(recurse=False)):
            shape = meta.to_local().shape if is_split(meta) else meta.shape
            if isinstance(module, nn.Linear) and not name.endswith("lm_head"):
                new = random_quantized(*shape, meta.shape[1], name, device)
                run_local(module)
            else:
                local = torch.ones(shape, dtype=torch.bfloat16, device=device)
                if meta.ndim > 1:
                    local.normal_(0, 0.02)
                new = nn.Parameter(_dtensor_from_local_like(local, meta) if is_split(meta) else local, False)
            setattr(module, leaf, new)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)


def decode(name: str, layers: int | None, mode: str) -> dict[str, Any]:
    device = here()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(configure(name, layers), dtype=torch.bfloat16)
    if ranks() > 1:
        model = distribute(model, {"tp_size": ranks()})
    fill(model.eval().requires_grad_(False), device)
    synchronize(device)
    say(f"model made, {memory(device, 'memory_allocated'):.2f} GB")
    cache = StaticCache(model.config, max_cache_len=CONTEXT + STEPS + 1)
    head = model.config.hidden_size // model.config.num_attention_heads
    cache.early_initialization(1, model.config.num_key_value_heads // ranks(), head, torch.bfloat16, device)
    ids = torch.randint(1000, (1, CONTEXT), generator=torch.Generator().manual_seed(1)).to(device)

    def step(tokens: Tensor) -> Tensor:
        return model(tokens, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

    def run(step: Any, steps: int) -> float:
        cache.reset()
        token = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)
        synchronize(device)
        start = time.perf_counter()
        for _ in range(steps):
            torch.compiler.cudagraph_mark_step_begin()
            token = step(token).clone()
        synchronize(device)
        return (time.perf_counter() - start) / steps

    start = time.perf_counter()
    options = {"mode": mode} if device.type != "cpu" else {"inner_backend": "aot_eager"}
    compiled = torch.compile(step, backend="gptq", options=options, fullgraph=True, dynamic=False)
    run(compiled, 3)
    first = time.perf_counter() - start
    say(f"first call {first:.1f} s")
    seconds = [run(compiled, STEPS) for _ in range(3)]
    say("ms a token:", *(f"{1e3 * s:.3f}" for s in seconds))
    kinds = {
        m.weight.packed.kernel.name
        for m in model.modules()
        if isinstance(m, nn.Linear) and m is not model.lm_head
    }
    return {
        "seconds": median(seconds),
        "weights GB": memory(device, "memory_allocated"),
        "peak GB": memory(device, "max_memory_allocated"),
        "first call s": first,
        "kernels": sorted(kinds),
    }


def calibrate(name: str, layers: int | None, shape: tuple[int, int], batch: int) -> dict[str, Any]:
    device = here()
    group = dist.group.WORLD if dist.is_initialized() else None

    def run(layers: int | None, sequences: int) -> dict[str, Any]:
        model = build(configure(name, layers), device)
        rng = torch.Generator().manual_seed(2)
        ids = torch.randint(model.config.vocab_size, (sequences, shape[1]), generator=rng).to(device)
        batches = [{"input_ids": part} for part in ids.split(batch)]
        gc.collect()
        if device.type != "cpu":
            torch.accelerator.empty_cache()
            torch.accelerator.reset_peak_memory_stats()
        synchronize(device)
        if group is not None:
            dist.barrier()
        say(f"model made, {memory(device, 'memory_allocated'):.2f} GB")
        start = time.perf_counter()
        report = gptq_fx.quantize(model, None, batches, progress=False, process_group=group)
        synchronize(device)
        losses = [site.loss for site in report.sites if site.loss is not None]
        return {
            "seconds": time.perf_counter() - start,
            "peak GB": memory(device, "max_memory_allocated"),
            "mean loss": sum(losses) / len(losses),
            **{phase: round(seconds, 2) for phase, seconds in report.seconds.items()},
        }

    say(f"one layer: {run(1, ranks() * batch)}")
    return run(layers, shape[0])


def job(args: Any) -> None:
    torch.set_grad_enabled(False)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        device = here()
        dist.init_process_group(
            "gloo" if device.type == "cpu" else "nccl", device_id=None if device.type == "cpu" else device
        )
    if args.job == "decode":
        found = decode(args.decode_model, args.decode_layers, args.mode)
    else:
        found = calibrate(args.calibration_model, args.layers, (args.sequences, args.length), args.batch)
    if int(os.environ.get("RANK", 0)) == 0:
        print("RESULT", json.dumps(found), flush=True)
    if dist.is_initialized():
        torch.compiler.reset()  # else NCCL may wait for CUDA graphs that hold its collectives
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()


# --- the program that starts them


def start(kind: str, gpus: str, args: Any, found: dict[tuple[str, int], Any]) -> threading.Thread:
    """Run a job on some GPUs, print what it says, keep its result."""
    count = len(gpus.split(","))
    own = [__file__, "--job", kind, *sys.argv[1:]]
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpus}

    def follow() -> None:
        begun = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *launcher, *own],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        clock = threading.Timer(args.limit, process.kill)
        clock.start()
        for line in process.stdout or ():
            if match := re.search(r"RESULT (\{.*\})", line):
                found[kind, count] = json.loads(match[1])
            print(f"{kind} on {count}: {line.rstrip()}", flush=True)
        clock.cancel()
        found.setdefault((kind, count), {"failed": f"exit code {process.wait()}"})
        print(f"{kind} on {count}: ended after {time.perf_counter() - begun:.0f} s", flush=True)

    thread = threading.Thread(target=follow)
    thread.start()
    return thread


def table(found: dict[tuple[str, int], Any]) -> str:
    rows = []
    for kind in ("decode", "calibrate"):
        one = found.get((kind, 1), {})
        for count in (1, 2):
            got = found.get((kind, count))
            if got is None:
                continue
            if "failed" in got:
                rows.append([kind, str(count), got["failed"], "", "", "", ""])
                continue
            speed = f"{1 / got['seconds']:.1f} tokens/s" if kind == "decode" else f"{got['seconds']:.1f} s"
            ratio = f"{one['seconds'] / got['seconds']:.2f}" if "seconds" in one else ""
            key = "weights GB" if kind == "decode" else "peak GB"
            part = f"{got[key] / one[key]:.2f}" if one.get(key) else ""
            rest = {k: v for k, v in got.items() if k not in ("seconds", key)}
            rows.append([kind, str(count), speed, ratio, f"{got[key]:.2f}", part, str(rest)])
    return markdown(["job", "GPUs", "speed", "times one", "GB a GPU", "of one", "more"], rows)


def main() -> None:
    cli = parser(__doc__.splitlines()[0])
    cli.add_argument("--only", nargs="+", choices=["decode", "calibrate"], default=["decode", "calibrate"])
    cli.add_argument("--gpus", nargs="+", type=int, choices=[1, 2], default=[1, 2])
    cli.add_argument("--decode-model", choices=MODELS, default="llama-3.1-70b")
    cli.add_argument("--decode-layers", type=int)
    cli.add_argument("--mode", default="reduce-overhead", help='Inductor\'s; "default" makes no CUDA graphs')
    cli.add_argument("--calibration-model", choices=MODELS, default="llama-3.1-8b")
    cli.add_argument("--layers", type=int, help="of the model to calibrate; all, if left out")
    cli.add_argument("--sequences", type=int, default=128)
    cli.add_argument("--length", type=int, default=2048)
    cli.add_argument("--batch", type=int, default=8, help="sequences in one batch")
    cli.add_argument("--limit", type=float, default=200, help="seconds after which a job is killed")
    cli.add_argument(
        "--job", choices=["decode", "calibrate"], help="what this process does; set by the program"
    )
    args = cli.parse_args()
    if args.job:
        job(args)
        return
    found: dict[tuple[str, int], Any] = {}
    if 1 in args.gpus:
        for thread in [start(kind, str(gpu), args, found) for gpu, kind in enumerate(args.only)]:
            thread.join()
    for kind in args.only if 2 in args.gpus else ():
        start(kind, "0,1", args, found).join()
    publish("\n\n".join([conditions("One GPU and two"), table(found)]), args.out)


if __name__ == "__main__":
    main()
