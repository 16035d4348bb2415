"""What the passes cost: their time against the whole compile time, for Llamas of 8 to 64 layers."""

import time

import torch
import torch._inductor.config as inductor_config
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig

import gptq_fx
from table import conditions, markdown, parser, publish

LAYERS = (1, 8, 16, 32, 64)  # the first one also pays what a process pays once


@torch.no_grad()
def measure(layers: int) -> tuple[float, dict[str, float]]:
    """Seconds of a cold compile, and of each pass in it."""
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1024,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    tokens = torch.arange(16)[None]
    torch.compiler.reset()
    gptq_fx.passes.reset_timings()
    model.compile(backend="gptq")

    def call() -> float:
        start = time.perf_counter()
        model(tokens, use_cache=False)
        return time.perf_counter() - start

    cold = call()
    passes = dict(gptq_fx.passes.timings())
    return cold - call(), passes


def main() -> None:
    args = parser(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    inductor_config.force_disable_caches = True  # every compile is a cold one
    results = {}
    for layers in LAYERS:
        with Console(stderr=True).status(f"compiling {layers} layers"):
            results[layers] = measure(layers)

    rows = []
    for layers, (whole, passes) in results.items():
        total = sum(passes.values())
        rows.append(
            [
                f"{layers}",
                f"{whole:.1f}",
                f"{total:.2f}",
                f"{total / whole:.1%}",
                f"{1000 * total / layers:.1f}",
                *(f"{1000 * seconds:.0f}" for seconds in passes.values()),
            ]
        )
    names = [f"{name} [ms]" for name in results[LAYERS[0]][1]]
    head = ["layers", "compile [s]", "passes [s]", "share", "passes per layer [ms]", *names]
    title = "Time of the passes, hidden size 256, dense weights quantized at compile time"
    note = "The first row also has what a process pays once: first use of ops, checks of kernels."
    publish(f"{conditions(title)}\n\n{markdown(head, rows)}\n\n{note}", args.out)


if __name__ == "__main__":
    main()
