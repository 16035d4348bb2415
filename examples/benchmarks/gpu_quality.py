"""A real model by every kernel of a GPU, against the reference kernel on the CPU: perplexity in bf16.

SmolLM2-135M, and a Mixtral made of it; weights rounded to 4 bits, so that all have the same integers.
"""

import copy
import math
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import gptq_fx
from accuracy import upcycled, windows
from smollm2 import checkpoint
from table import conditions, markdown, parser, publish


def text() -> str:
    """English from the standard library."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics))


@torch.no_grad()
def perplexity(model: PreTrainedModel, data: torch.Tensor) -> float:
    losses = [model(ids[None].to(model.device), labels=ids[None].to(model.device)).loss for ids in data]
    return math.exp(float(torch.stack(losses).double().mean()))


def by(model: PreTrainedModel, device: str, kernel: str) -> PreTrainedModel:
    twin = copy.deepcopy(model).to(device)
    torch.compiler.reset()
    twin.compile(backend="gptq", options={"kernel": kernel, "inner_backend": "eager"}, dynamic=False)
    return twin


def rows(
    title: str, model: PreTrainedModel, data: torch.Tensor, device: str, names: Sequence[str]
) -> list[list[str]]:
    gptq_fx.quantize(model, gptq_fx.GPTQConfig(group_size=64), progress=False)
    expected = perplexity(by(model, "cpu", "reference"), data)
    found = [[title, "reference, cpu", f"{expected:.4f}", "1.0000"]]
    for name in names:
        value = perplexity(by(model, device, name), data)
        found.append([title, f"{name}, {device}", f"{value:.4f}", f"{value / expected:.4f}"])
        print(" | ".join(found[-1]), flush=True)
    return found


def main() -> None:
    cli = parser(__doc__.splitlines()[0])
    cli.add_argument("--device", default="cuda")
    cli.add_argument("--kernels", nargs="+", default=["humming", "marlin", "triton"])
    cli.add_argument("--windows", type=int, default=10, help="of 512 tokens")
    args = cli.parse_args()
    torch.set_num_threads(args.threads)
    folder = checkpoint()
    data = windows(AutoTokenizer.from_pretrained(folder), text(), args.windows)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    mixtral = upcycled(dense, 4).bfloat16()
    found = rows("SmolLM2-135M", dense.bfloat16(), data, args.device, args.kernels)
    found += rows("its Mixtral, 4 experts", mixtral, data, args.device, args.kernels)
    title = conditions(f"Perplexity by kernel: 4 bits, g64, rounded; bf16; {args.windows} x 512 tokens")
    publish("\n".join((title, "", markdown(["model", "kernel", "perplexity", "ratio"], found))), args.out)


if __name__ == "__main__":
    main()
