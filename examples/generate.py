"""Text from a dense and from a 4-bit model, both compiled; speed, size and perplexity of both.

The 4-bit model is calibrated by GPTQ; rounding to nearest is measured beside it.
"""

import argparse
import copy
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import gptq_fx
from gptq_fx.measure import perplexity, speed
from smollm2 import checkpoint
from texts import Tokenizer, prompt_ids, windows

PROMPT = "Why is the sky blue? Explain it to a child, step by step."


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Dense against 4-bit, both through torch.compile.")
    parser.add_argument("--model", help="folder or HF id (default: SmolLM2-135M from a PyPI wheel)")
    parser.add_argument("--bits", type=int, default=4, choices=(2, 3, 4, 8))
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--windows", type=int, default=20, help="of 512 tokens, for perplexity")
    parser.add_argument("--calibration", type=int, default=16, help="windows of 512 tokens for GPTQ")
    return parser.parse_args(argv)


def measure(
    name: str, model: PreTrainedModel, tokenizer: Tokenizer, held_out: torch.Tensor, args: argparse.Namespace
) -> dict[str, float]:
    ids = prompt_ids(tokenizer, args.prompt).to(model.device)
    run, tokens = speed(model, ids, args.new_tokens, repeats=3)
    print(f"\n== {name}\n{tokenizer.decode(tokens, skip_special_tokens=True).strip()}\n")
    return {
        "compile [s]": run.compile_seconds,
        "prefill [tokens/s]": run.prefill,
        "decode [tokens/s]": run.decode,
        "weights [MB]": run.weight_bytes / 1e6,
        "perplexity": perplexity(model, held_out, eager=True),
    }


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    if args.model is None:
        args.model = checkpoint()
        print("SmolLM2-135M-Instruct, de-quantized from Q4_1: not the original bf16 model")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    held_out, calibration = windows(tokenizer, args.windows, args.calibration)
    config = gptq_fx.GPTQConfig(bits=args.bits, group_size=args.group_size)

    rounded = copy.deepcopy(model)
    gptq_fx.quantize(rounded, config)  # without data: to the nearest
    rounded.compile(backend="gptq")  # packs the weights for the kernel; without, `reference` runs them
    nearest = perplexity(rounded, held_out)
    del rounded

    # `model.compile()`, not `torch.compile(model)`: the wrapper that the latter returns has the
    # `generate` of the original module, which never calls the compiled forward.
    model.compile()
    dense = measure("dense bf16, Inductor", model, tokenizer, held_out, args)

    print(gptq_fx.quantize(model, config, [{"input_ids": ids[None]} for ids in calibration]))
    torch.compiler.reset()
    model.compile(backend="gptq")
    packed = measure(f"{args.bits} bits, gptq", model, tokenizer, held_out, args)

    print(f"\n{'':20}{'dense bf16':>14}{f'{args.bits} bits':>14}{'ratio':>8}")
    for key, value in dense.items():
        print(f"{key:20}{value:14.1f}{packed[key]:14.1f}{packed[key] / value:8.2f}")
    print(f"{'  rounded to nearest':34}{nearest:14.1f}{nearest / dense['perplexity']:8.2f}")
    print("Perplexity: on held-out windows of Python's help texts; calibration on others of them.")
    print("Prefill and decode as `generate` gives them.")


if __name__ == "__main__":
    main()
