"""Serve a GPTQ checkpoint of gptq_fx with vLLM or SGLang.

    python examples/serve.py FOLDER                 # who can serve it, by which commands
    python examples/serve.py FOLDER --run vllm      # serve it

Both engines find the quantization in config.json: neither needs a flag for it. See docs/several-gpus.md.
"""

import argparse
import os
import shlex
from collections.abc import Sequence

from gptq_fx.checkpoint.inspect import Inspection, Module, inspect

# name -> (its name among the readers of a checkpoint, the command)
ENGINES = {
    "vllm": ("vLLM", "vllm serve {path} --tensor-parallel-size {ranks} --port {port}"),
    "sglang": (
        "SGLang",
        "python -m sglang.launch_server --model-path {path} --tp-size {ranks} --port {port}",
    ),
}
# Linears that both split along their inputs; they split all others along their outputs.
BY_INPUTS = ("o_proj", "down_proj", "w2", "out_proj", "dense_4h_to_h", "fc2")
MIN_INPUTS, MIN_OUTPUTS = 128, 64  # what Marlin's kernels want of the part of one rank


def refusals(found: Inspection, engine: str, ranks: int) -> list[str]:
    """Why an engine cannot serve the checkpoint on so many GPUs."""
    reader = next(r for r in found.readers if r.name == ENGINES[engine][0])
    return [*reader.reasons, *filter(None, (_split(module, ranks) for module in found.modules))][:4]


def _split(module: Module, ranks: int) -> str:
    if ranks == 1 or module.name == "lm_head":
        return ""
    by_inputs = module.name.rpartition(".")[2] in BY_INPUTS
    size = module.in_features if by_inputs else module.out_features
    group = module.scheme.group_size
    step = max(MIN_INPUTS, group) if by_inputs else MIN_OUTPUTS
    if size % (ranks * step) == 0:
        return ""
    what = "inputs" if by_inputs else "outputs"
    return f"{module.name}: {size} {what} do not make {ranks} parts of a multiple of {step}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="what gptq_fx.save_pretrained or gptq-fx quantize wrote")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs that share the model")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--run", choices=ENGINES, help="become this engine")
    args = parser.parse_args(argv)
    found = inspect(args.folder)
    for problem in found.problems:
        print(f"damaged: {problem}")
    for engine, (name, command) in ENGINES.items():
        line = command.format(path=shlex.quote(args.folder), ranks=args.ranks, port=args.port)
        reasons = refusals(found, engine, args.ranks)
        print(f"{name}: {line}")
        print("\n".join(f"  no: {reason}" for reason in reasons) or "  yes")
        if engine == args.run:
            if reasons or found.problems:
                raise SystemExit(f"{name} cannot serve {args.folder}")
            words = shlex.split(line)
            os.execvp(words[0], words)


if __name__ == "__main__":
    main()
