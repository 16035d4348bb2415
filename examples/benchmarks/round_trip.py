"""A real model, quantized, saved, and loaded in a process of its own: perplexity, text and speed there.

With act-order and without: what the gather costs where kernels know no g_idx.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gptq_fx
from gptq_fx.measure import perplexity, speed
from table import conditions, markdown, parser, publish

sys.path.append(str(Path(__file__).parents[1]))  # the examples beside this folder
from smollm2 import checkpoint
from texts import prompt_ids, windows

# What takes long and matters to quality alone is off: the question is what files keep.
PLAIN: dict[str, Any] = {"bits": 4, "group_size": 64, "scale_search": False, "gptaq": 0.0}
CASES: dict[str, dict[str, Any]] = {
    "4 bits, g64": PLAIN,
    "4 bits, g64, act-order": {**PLAIN, "desc_act": True},
}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    found = parser(__doc__)
    found.add_argument("--model", help="folder or HF id (default: SmolLM2-135M from a PyPI wheel)")
    found.add_argument("--windows", type=int, default=8, help="of 512 tokens, for perplexity")
    found.add_argument("--calibration", type=int, default=4, help="windows of 512 tokens for GPTQ")
    found.add_argument("--new-tokens", type=int, default=48)
    found.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    return found.parse_args(argv)


def load(args: argparse.Namespace) -> None:
    """In a fresh process: what the checkpoint alone gives."""
    tokenizer = AutoTokenizer.from_pretrained(args.load)
    model = gptq_fx.from_pretrained(args.load)
    held_out, _ = windows(tokenizer, args.windows, args.calibration)
    found: dict[str, Any] = {"perplexity": perplexity(model, held_out, show=False)}
    model.compile(backend="gptq")
    ids = prompt_ids(tokenizer, "Why is the sky blue?")
    run, tokens = speed(model, ids, args.new_tokens, repeats=5, show=False)
    found |= {"prefill": run.prefill, "decode": run.decode, "text": tokenizer.decode(tokens)}
    weights = [p.packed for p in model.parameters() if isinstance(p, gptq_fx.QuantizedParameter)]
    found["kernels"] = sorted({weight.kernel.name for weight in weights})
    found["sorted"] = sum(weight.sorted for weight in weights)
    found["merged"] = sum(weight.merged is not None for weight in weights)
    print(json.dumps(found))


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    if args.load is not None:
        return load(args)
    source = args.model or checkpoint()
    tokenizer = AutoTokenizer.from_pretrained(source)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, case in CASES.items():
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
            held_out, calibration = windows(tokenizer, args.windows, args.calibration)
            config = gptq_fx.GPTQConfig(**case)
            gptq_fx.quantize(model, config, [{"input_ids": ids[None]} for ids in calibration])
            before = perplexity(model, held_out)
            folder = Path(temporary) / str(len(rows))
            gptq_fx.save_pretrained(model, folder, tokenizer=tokenizer)
            del model
            numbers = ("--windows", "--calibration", "--new-tokens", "--threads")
            values = (args.windows, args.calibration, args.new_tokens, args.threads)
            pairs = [str(word) for pair in zip(numbers, values, strict=True) for word in pair]
            command = [sys.executable, __file__, "--load", str(folder), *pairs]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            print(f"{name}: {found['text']}")
            rows.append(
                [
                    name,
                    f"{before:.6f}",
                    f"{found['perplexity']:.6f}",
                    f"{found['prefill']:.0f}",
                    f"{found['decode']:.1f}",
                    ", ".join(found["kernels"]),
                    f"{found['sorted']}",
                    f"{found['merged']}",
                ]
            )
    head = ["scheme", "perplexity", "in a fresh process", "prefill [tokens/s]", "decode [tokens/s]"]
    head += ["kernels", "weights sorted", "weights merged"]
    publish(f"{conditions('SmolLM2 saved and loaded')}\n\n{markdown(head, rows)}", args.out)
    return None


if __name__ == "__main__":
    main()
