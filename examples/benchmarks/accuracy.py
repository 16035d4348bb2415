"""What quantization costs in quality: each setting of gptq_fx, and GPTQModel, on one model and text.

The weights that are judged are unpacked from the stored integers by plain arithmetic here, scales
rounded to float16 as files store them, and put into the dense model: fp32, no kernel of anybody's.
"""

import argparse
import copy
import math
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from statistics import mean, stdev

import torch
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import gptq_fx
from anarchism import texts
from gptq_fx import GPTQConfig
from table import conditions, installed, markdown, parser, publish

sys.path.append(str(Path(__file__).parents[1]))
from smollm2 import CACHE, checkpoint

Grid = dict[str, float | bool]

LENGTH = 512
FIRST = 20  # windows of the shorter test slice
PLAIN = {"scale_search": False, "gptaq": 0.0}  # what GPTQModel has on by default
SETTINGS = {
    "natural order": {**PLAIN, "act_group_aware": False},
    "act_group_aware": PLAIN,
    "desc_act": {**PLAIN, "desc_act": True},
    "desc_act, static_groups": {**PLAIN, "desc_act": True, "static_groups": True},
    "act_group_aware, mse 2": {**PLAIN, "mse": 2.0},
    "act_group_aware, scale_search": {"gptaq": 0.0},
    "act_group_aware, gptaq": {"scale_search": False},
    "default: act_group_aware, scale_search, gptaq": {},
    "desc_act, static_groups, scale_search, gptaq": {"desc_act": True, "static_groups": True},
    "default, sequential off": {"sequential": False},
}
EXPERT_SETTINGS = {
    "act_group_aware, route_all": {**PLAIN, "route_all": True},
    "act_group_aware, scale_search, route_all": {"gptaq": 0.0, "route_all": True},
    "default, route_all": {"route_all": True},
}
GRIDS = {
    "4 bits, g64, sym": {"bits": 4, "group_size": 64},
    "4 bits, g32, sym": {"bits": 4, "group_size": 32},
    "4 bits, g64, asym": {"bits": 4, "group_size": 64, "sym": False},
    "3 bits, g32, sym": {"bits": 3, "group_size": 32},
    "8 bits, g64, sym": {"bits": 8, "group_size": 64},
}


@dataclass(frozen=True)
class Quality:
    """Means over each window: negative log-likelihood, KL(dense || quantized), agreement of argmax."""

    loss: list[float]
    divergence: list[float]
    agreement: list[float]
    seconds: float


def windows(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> torch.Tensor:
    ids = tokenizer(text[: count * LENGTH * 6], return_tensors="pt", add_special_tokens=False, verbose=False)
    return ids.input_ids[0, : count * LENGTH].view(count, LENGTH)


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, window: torch.Tensor) -> torch.Tensor:
    return model(window[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)


@dataclass(frozen=True)
class Data:
    """Token ids [windows, 512], and what the dense model says of the test windows."""

    calibration: torch.Tensor
    test: torch.Tensor
    expected: list[torch.Tensor]  # log-probabilities [511, vocabulary]


def judge(model: PreTrainedModel, data: Data, seconds: float) -> Quality:
    columns: tuple[list[float], ...] = ([], [], [])
    for window, p in zip(tqdm(data.test, "judging", delay=2, leave=False), data.expected, strict=True):
        q = log_probabilities(model, window)
        columns[0].append(-q.gather(1, window[1:, None]).mean().item())
        columns[1].append((p.exp() * (p - q)).sum(-1).mean().item())
        columns[2].append((p.argmax(-1) == q.argmax(-1)).float().mean().item())
    return Quality(*columns, seconds)


# --- weights, unpacked independently of the code under test


def unpack(qweight: torch.Tensor, bits: int, rows: int) -> torch.Tensor:
    """int32 [R, N] -> [rows, N]: values of `bits` bits, one behind the other, little end first."""
    shifts = torch.arange(32, device=qweight.device).view(1, 32, 1)
    stream = (qweight.long().unsqueeze(1) >> shifts & 1).flatten(0, 1)  # [R * 32, N] single bits
    digits = stream[: rows * bits].view(rows, bits, -1)
    return (digits << torch.arange(bits, device=qweight.device).view(1, bits, 1)).sum(1)


def dense_weight(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    g_idx: torch.Tensor,
    bits: int,
    features: int,
) -> torch.Tensor:
    """[N, K] fp32; zeros: the zero points [G, N]; g_idx [K]."""
    codes, scales = unpack(qweight, bits, features), scales.half().float()
    return ((codes - zeros[g_idx]) * scales[g_idx]).T.contiguous()


def with_our_weights(dense: PreTrainedModel, quantized: PreTrainedModel) -> PreTrainedModel:
    result = copy.deepcopy(dense)
    for name, parameter in quantized.named_parameters():
        if not isinstance(parameter, gptq_fx.QuantizedParameter):
            continue
        weight = parameter.quantized_weight()
        if parameter.ndim == 2:
            result.get_parameter(name).data = unpacked(weight)
            continue
        stack = torch.stack([unpacked(weight.expert(e)) for e in range(parameter.shape[0])])
        result.get_parameter(name).data = stack.mT.contiguous() if parameter.transposed else stack
    return result


def unpacked(weight: gptq_fx.QuantizedWeight) -> torch.Tensor:
    """[N, K] fp32."""
    K, (G, N) = weight.in_features, weight.scales.shape
    zeros = torch.full((G, N), 2 ** (weight.bits - 1), device=weight.scales.device)
    if weight.qzeros is not None:
        zeros = unpack(weight.qzeros.T.contiguous(), weight.bits, N).T
    g_idx = torch.arange(K, device=zeros.device) // (K // G)
    if weight.g_idx is not None:
        g_idx = weight.g_idx.long()
    return dense_weight(weight.qweight, weight.scales, zeros, g_idx, weight.bits, K)


def with_their_weights(dense: PreTrainedModel, folder: Path, bits: int) -> PreTrainedModel:
    result = copy.deepcopy(dense)
    files = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    tensors = {name: tensor for file in files for name, tensor in file.items()}
    for name in (key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")):
        module = result.get_submodule(name)
        N, K = module.weight.shape
        stored = unpack(tensors[f"{name}.qzeros"].T.contiguous(), bits, N).T
        zeros = (stored + 1) & (2**bits - 1)  # version 1 of the format keeps z - 1
        g_idx = tensors[f"{name}.g_idx"].long()
        module.weight.data = dense_weight(
            tensors[f"{name}.qweight"], tensors[f"{name}.scales"], zeros, g_idx, bits, K
        )
    return result


# --- a mixture of experts


def upcycled(dense: PreTrainedModel, experts: int, noise: float = 0.05) -> PreTrainedModel:
    """A Mixtral whose experts are copies of the dense MLP, apart by noise (relative to the weights), and
    whose router is random: no trained experts, but a real language model that runs through them."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_parameters", "tie_word_embeddings")
    same = {name: getattr(dense.config, name) for name in (*names, "max_position_embeddings")}
    config = MixtralConfig(**same, num_local_experts=experts, num_experts_per_tok=2, sliding_window=None)
    model = MixtralForCausalLM(config).eval()
    known = {name: tensor.cpu() for name, tensor in dense.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        mlp = name.partition(".mlp.")[0] + ".mlp"
        if name in known:
            tensor.copy_(known[name])
        elif name.endswith("mlp.gate.weight"):
            tensor.normal_(0, 0.02, generator=generator)
        else:
            parts = ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
            weight = torch.cat([known[f"{mlp}.{part}.weight"] for part in parts])
            spread = torch.randn(tensor.shape, generator=generator) * noise * weight.std()
            tensor.copy_(weight + spread)
    return model.to(dense.device)


# --- the quantizers


def ours(
    dense: PreTrainedModel, grid: Grid, calibration: torch.Tensor | None, settings: Grid
) -> tuple[PreTrainedModel, float]:
    model = copy.deepcopy(dense)
    batches = None if calibration is None else [{"input_ids": ids} for ids in calibration.split(1)]
    start = time.perf_counter()
    gptq_fx.quantize(model, GPTQConfig(**grid, **settings), batches)
    seconds = time.perf_counter() - start
    return with_our_weights(dense, model), seconds


def theirs(
    dense: PreTrainedModel, grid: Grid, calibration: torch.Tensor, path: str
) -> tuple[PreTrainedModel, float]:
    """GPTQModel with its defaults, quantizing the checkpoint on the CPU."""
    os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # with its own choice, loading dies on two cores
    from gptqmodel import GPTQModel, QuantizeConfig

    model = GPTQModel.load(path, QuantizeConfig(**grid, device="cpu"), dtype=torch.float32)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in calibration.cpu()]
    start = time.perf_counter()
    model.quantize(batches, batch_size=1)
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        return with_their_weights(dense, Path(folder), int(grid["bits"])), seconds


# --- the table


def row(name: str, quality: Quality, base: Quality | None) -> list[str]:
    paired = ["", ""]
    if base is not None and base is not quality:
        paired = [difference(quality.loss, base.loss), difference(quality.divergence, base.divergence)]
    return [
        name,
        f"{quality.seconds:.0f}",
        f"{math.exp(mean(quality.loss[:FIRST])):.2f}",
        f"{math.exp(mean(quality.loss)):.2f}",
        f"{mean(quality.divergence[:FIRST]):.4f}",
        f"{mean(quality.divergence):.4f}",
        f"{mean(quality.agreement):.3f}",
        *paired,
    ]


def difference(values: list[float], base: list[float]) -> str:
    """Mean of the paired differences over the windows, with its standard error."""
    gaps = [value - other for value, other in zip(values, base, strict=True)]
    error = stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else math.nan
    return f"{mean(gaps):+.4f} ± {error:.4f}"


def table(grid: Grid, dense: PreTrainedModel, data: Data, args: argparse.Namespace) -> str:
    quantizers = {"round to nearest": lambda: ours(dense, grid, None, {})}
    for name in args.settings:
        settings = (SETTINGS | EXPERT_SETTINGS)[name]
        quantizers[name] = lambda settings=settings: ours(dense, grid, data.calibration, settings)
    if args.peer:
        path = str(args.model)
        quantizers[installed("gptqmodel")] = lambda: theirs(dense, grid, data.calibration, path)
    found = {"dense": judge(dense, data, 0.0)}
    for name, quantizer in quantizers.items():
        model, seconds = quantizer()
        found[name] = judge(model, data, seconds)
        print(row(name, found[name], None), file=sys.stderr, flush=True)
    base = found[installed("gptqmodel")] if args.peer else found.get("act_group_aware")
    few, all_ = FIRST, args.windows
    head = [
        "",
        "seconds",
        f"ppl, {few}",
        f"ppl, {all_}",
        f"KL, {few}",
        f"KL, {all_}",
        "top-1",
        "d log ppl",
        "d KL",
    ]
    return markdown(head, [row(name, quality, base) for name, quality in found.items()])


def load_data(args: argparse.Namespace, dense: PreTrainedModel) -> Data:
    if args.tokens:
        kept = torch.load(args.tokens)
        calibration, test = kept[args.calibration], kept["test"]
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        train, held_out = texts(CACHE)
        if args.calibration == "python":
            train = "\n\n".join(topics[name] for name in sorted(topics))
        calibration = windows(tokenizer, train, args.samples)
        test = windows(tokenizer, held_out, args.windows)
    test = test[: args.windows].long().to(dense.device)
    expected = [log_probabilities(dense, window) for window in tqdm(test, "dense model", delay=2)]
    return Data(calibration[: args.samples].long().to(dense.device), test, expected)


def main() -> None:
    cli = parser(__doc__.splitlines()[0])
    cli.add_argument("--model", type=Path, help="folder (default: SmolLM2-135M from a PyPI wheel)")
    cli.add_argument("--device", default="cpu")
    cli.add_argument("--samples", type=int, default=32, help="windows of 512 tokens to calibrate on")
    cli.add_argument("--windows", type=int, default=80, help="windows of 512 tokens to judge by")
    cli.add_argument("--calibration", choices=("prose", "python"), default="prose")
    cli.add_argument("--tokens", type=Path, help="a file with the token ids, where there is no network")
    cli.add_argument("--experts", type=int, help="make it a Mixtral of so many experts first")
    cli.add_argument("--grids", nargs="+", choices=GRIDS, default=list(GRIDS))
    cli.add_argument("--settings", nargs="*", choices=SETTINGS | EXPERT_SETTINGS, default=list(SETTINGS))
    cli.add_argument("--peer", action="store_true", help="GPTQModel too, which must be installed")
    args = cli.parse_args()
    torch.set_num_threads(args.threads)
    args.model = args.model or checkpoint()
    dense = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval().to(args.device)
    if args.experts:
        dense = upcycled(dense, args.experts)
    data = load_data(args, dense)
    name = "SmolLM2-135M (de-quantized from Q4_1)"
    if args.experts:
        name += f", made a Mixtral of {args.experts} experts, apart by 5 % noise"
    parts = [
        conditions(f"Quality of {name}, all linears of its decoder quantized"),
        f"* calibration: {len(data.calibration)} x {LENGTH} tokens ({args.calibration})",
        f"* judged on {len(data.test)} x {LENGTH} tokens; fp32; weights unpacked from the stored integers",
        "* d: paired difference to GPTQModel, or to act_group_aware where that was not run, ± standard error",
    ]
    for grid in args.grids:
        parts.append(f"\n## {grid}\n")
        parts.append(table(GRIDS[grid], dense, data, args))
    publish("\n".join(parts), args.out)


if __name__ == "__main__":
    main()
