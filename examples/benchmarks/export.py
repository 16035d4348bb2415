"""A model as a program: export, quantize, save, load in a fresh process, calls; and an AOTInductor package.

SmolLM2-135M in fp32, one text of 64 tokens. Error: of the logits, against the quantized model that
torch.compile(backend="gptq") compiled.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import gptq_fx

sys.path.append(str(Path(__file__).parents[1]))  # the examples beside this folder
from smollm2 import checkpoint
from table import conditions, markdown, parser, publish

LOADED = """
import sys, time, torch
import gptq_fx  # its ops
torch.set_num_threads(int(sys.argv[3]))
ids, expected = torch.load(sys.argv[2])
start = time.perf_counter()
if sys.argv[1].endswith(".pt2") and sys.argv[4] == "package":
    run = torch._inductor.aoti_load_package(sys.argv[1])
else:
    run = torch.export.load(sys.argv[1]).module()
times = [time.perf_counter() - start]
with torch.no_grad():
    for _ in range(6):
        start = time.perf_counter()
        found = run(ids)
        times.append(time.perf_counter() - start)
print(*times, float((found - expected).norm() / expected.norm()))
"""


class Logits(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, use_cache=False).logits


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def in_a_process(path: Path, data: Path, threads: int, kind: str) -> list[float]:
    command = [sys.executable, "-c", LOADED, str(path), str(data), str(threads), kind]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "TRANSFORMERS_OFFLINE": "1"}
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return [float(word) for word in done.stdout.split()]


@torch.no_grad()
def main() -> None:
    cli = parser(__doc__.splitlines()[0])
    cli.add_argument("--layers", type=int, default=30)
    args = cli.parse_args()
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint(), dtype=torch.float32, num_hidden_layers=args.layers
    )
    model.eval().requires_grad_(False)
    ids = torch.randint(model.config.vocab_size, (1, 64))
    config = gptq_fx.GPTQConfig(group_size=64)
    rows = []

    def show(what: str, seconds: float, more: str = "") -> None:
        rows.append([what, f"{seconds:.2f}", more])
        print(" | ".join(rows[-1]), flush=True)

    free = ({1: torch.export.Dim.AUTO},)
    program, seconds = timed(
        lambda: torch.export.export(Logits(model), (ids,), dynamic_shapes=free, strict=False)
    )
    show("export", seconds)
    small, seconds = timed(lambda: gptq_fx.quantize_exported(program, config, progress=False))
    show("quantize_exported", seconds)
    gptq_fx.quantize(model, config, progress=False)
    compiled = torch.compile(Logits(model), backend="gptq")
    expected, seconds = timed(lambda: compiled(ids))
    show("torch.compile(backend='gptq'), first call", seconds)
    show("the same, further calls", median(timed(lambda: compiled(ids))[1] for _ in range(5)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save((ids, expected), folder / "data")
        _, seconds = timed(lambda: torch.export.save(small, folder / "program.pt2"))
        show("save", seconds, f"{(folder / 'program.pt2').stat().st_size / 2**20:.0f} MiB")
        fixed = torch.export.export(small.module(), (ids,), strict=False)
        path, seconds = timed(
            lambda: torch._inductor.aoti_compile_and_package(fixed, package_path=str(folder / "package.pt2"))
        )
        show("aoti_compile_and_package", seconds, f"{Path(path).stat().st_size / 2**20:.0f} MiB")
        for kind, file in (("program", folder / "program.pt2"), ("package", Path(path))):
            load, first, *further, error = in_a_process(file, folder / "data", args.threads, kind)
            show(f"{kind} in a fresh process: load", load)
            show(f"{kind}: first call", first, f"error {error:.1e}")
            show(f"{kind}: further calls", median(further))
    title = conditions(f"A program of torch.export: SmolLM2-135M, {args.layers} layers, fp32, 4 bits, g64")
    publish("\n".join((title, "", markdown(["", "seconds", ""], rows))), args.out)


if __name__ == "__main__":
    main()
