"""Draw the graph of a model before and after the passes: python examples/picture.py --out docs/graph.svg"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import gptq_fx
import smollm2
from gptq_fx.draw import svg


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a folder or Hugging Face id; default: SmolLM2-135M-Instruct")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True, help="the .svg to write")
    args = parser.parse_args(argv)
    path = args.model or smollm2.checkpoint()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).requires_grad_(False)
    ids = torch.arange(8)[None] + 3
    config = gptq_fx.GPTQConfig(group_size=args.group_size)
    (graph,) = gptq_fx.explain(model, ids, use_cache=False, config=config).graphs
    args.out.write_text(svg(graph))


if __name__ == "__main__":
    main()
