"""Decode and prefill speed: bf16 with Inductor, gptq_fx and torchao's int4, paired in one run.

All variants of a model are alive at once and take turns, so a slow spell of the machine meets all.
A ratio is the median over rounds of the ratio within one round.
"""

import copy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, StaticCache

import gptq_fx
from table import conditions, markdown, parser, publish

sys.path.append(str(Path(__file__).parents[1]))
from smollm2 import checkpoint

STEPS = 32  # decode steps in one round


def random_llama() -> PreTrainedModel:
    config = LlamaConfig(
        hidden_size=2048,
        num_hidden_layers=16,
        intermediate_size=8192,
        vocab_size=32000,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def smollm2() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint(), dtype=torch.bfloat16).eval()


def with_inductor(model: PreTrainedModel, group_size: int) -> None:
    model.compile()


def with_gptq_fx(model: PreTrainedModel, group_size: int) -> None:
    gptq_fx.quantize(model, gptq_fx.GPTQConfig(bits=4, group_size=group_size))
    model.compile(backend="gptq")


def with_torchao(model: PreTrainedModel, group_size: int) -> None:
    """int4 weight-only by `aten._weight_int4pack_mm_for_cpu`: asymmetric, floating zero points.

    It is torchao 0.18's only weight-only path on CPUs: the formats of `Int4WeightOnlyConfig` are
    for accelerators. lm_head stays bf16, as in gptq_fx.
    """
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    # The same settings of Inductor for all variants: torchao would change them for the process.
    config = PrototypeInt4WeightOnlyConfig(group_size=group_size, set_inductor_config=False)
    quantize_(
        model,
        config,
        filter_fn=lambda module, name: isinstance(module, torch.nn.Linear) and name != "lm_head",
    )
    model.compile()


Variants = dict[str, Callable[[PreTrainedModel, int], None]]
VARIANTS: Variants = {
    "bf16, Inductor": with_inductor,
    "gptq_fx, 4 bits": with_gptq_fx,
    "torchao, int4": with_torchao,
}


@dataclass
class Runner:
    """One variant of a model, with its own static cache. A round: a prefill, some decode steps."""

    model: PreTrainedModel
    prompt: torch.Tensor  # token ids [1, length]
    prefill: list[float] = field(default_factory=list)  # tokens/s, one entry per round
    decode: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = self.model.config
        length = self.prompt.shape[1]
        self.cache = StaticCache(config, max_cache_len=length + STEPS)
        heads, size = config.num_key_value_heads, config.head_dim
        self.cache.early_initialization(1, heads, size, torch.bfloat16, self.model.device)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.model(tokens, past_key_values=self.cache, logits_to_keep=1).logits
        return logits.argmax(-1)

    @torch.no_grad()
    def round(self) -> None:
        self.cache.reset()
        start = time.perf_counter()
        token = self.forward(self.prompt)
        between = time.perf_counter()
        for _ in range(STEPS):
            token = self.forward(token)
        end = time.perf_counter()
        self.prefill.append(self.prompt.shape[1] / (between - start))
        self.decode.append(STEPS / (end - between))

    def forget(self) -> None:
        self.prefill.clear()
        self.decode.clear()


def compare(
    model: PreTrainedModel, group_size: int, rounds: int, prompt: int, variants: Variants | None = None
) -> str:
    ids = torch.arange(prompt)[None] % model.config.vocab_size
    torch.compiler.reset()
    runners: dict[str, Runner] = {}
    for name, prepare in (variants or VARIANTS).items():
        variant = copy.deepcopy(model)
        with Console(stderr=True).status(f"{name}: compiling prefill and decode"):
            prepare(variant, group_size)
            runners[name] = Runner(variant, ids)
            runners[name].round()  # compiles
            runners[name].round()  # warms up
        runners[name].forget()
    for _ in tqdm(range(rounds), desc="rounds", delay=2):
        for runner in runners.values():
            runner.round()

    base = runners["bf16, Inductor"]
    rows = [
        [
            name,
            f"{median(runner.decode):.1f}",
            f"{median(a / b for a, b in zip(runner.decode, base.decode, strict=True)):.2f}",
            f"{median(runner.prefill):.0f}",
            f"{median(a / b for a, b in zip(runner.prefill, base.prefill, strict=True)):.2f}",
            f"{sum(map(stored_bytes, runner.model.parameters())) / 1e6:.0f}",
        ]
        for name, runner in runners.items()
    ]
    head = ["", "decode [tokens/s]", "ratio", "prefill [tokens/s]", "ratio", "weights [MB]"]
    return markdown(head, rows)


def stored_bytes(tensor: torch.Tensor) -> int:
    """What a tensor really holds: torchao's reports the bytes of the dense one."""
    if isinstance(tensor, gptq_fx.QuantizedParameter) or not is_traceable_wrapper_subclass(tensor):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(stored_bytes(getattr(tensor, name)) for name in names)


MODELS = {
    "llama": ("Random Llama: hidden 2048, 16 layers, ffn 8192, vocabulary 32000", random_llama, 128),
    "smollm2": ("SmolLM2-135M, de-quantized from Q4_1", smollm2, 64),
}


def main() -> None:
    cli = parser(__doc__.splitlines()[0])
    cli.add_argument("--rounds", type=int, default=15)
    cli.add_argument("--prompt", type=int, default=512, help="tokens of context before decode")
    cli.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    args = cli.parse_args()
    torch.set_num_threads(args.threads)
    parts = [
        conditions("Decode and prefill, batch 1"),
        f"* medians of {args.rounds} rounds: {args.prompt} tokens of prefill, then {STEPS} of decode",
    ]
    for title, build, group_size in (MODELS[name] for name in args.models):
        parts.append(f"\n## {title}; group size {group_size}\n")
        parts.append(compare(build(), group_size, args.rounds, args.prompt))
    publish("\n".join(parts), args.out)


if __name__ == "__main__":
    main()
