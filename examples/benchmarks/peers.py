"""Checkpoints both ways: GPTQModel reads ours, we read GPTQModel's; logits against a third reading.

Run it in the environment that install_peers.sh makes. The third reading unpacks the files with numpy
alone, and runs a dense model in fp32.
"""

import argparse
import json
import multiprocessing
import os
import re
import tempfile
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it fails to load on machines of two cores without

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import gptq_fx
from table import conditions, markdown, parser, publish

VOCABULARY = 128
CASES: dict[str, dict[str, Any]] = {
    "4 bits, g128": {"bits": 4, "group_size": 128},
    "4 bits, g32, act-order": {"bits": 4, "group_size": 32, "desc_act": True},
    "4 bits, g64, asymmetric": {"bits": 4, "group_size": 64, "sym": False},
    "4 bits, one group": {"bits": 4, "group_size": -1},
    "8 bits, g128": {"bits": 8, "group_size": 128},
    "3 bits, g32": {"bits": 3, "group_size": 32},
    "2 bits, g32": {"bits": 2, "group_size": 32},
}
MOE = ("qwen3_moe", "mixtral", "deepseek_v3")
V1 = {"4 bits, g64, asymmetric, v1": {"bits": 4, "group_size": 64, "sym": False, "v1": True}}
MIXED = {r"-:.*layers\.0\.mlp\.down_proj": {}, r".*up_proj": {"bits": 8, "group_size": 64}}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    found = parser(__doc__)
    found.add_argument("--json", action="store_true", help="one line of JSON at the end, for tests")
    found.add_argument("--only", default="", help="cases with this in their name")
    return found.parse_args(argv)


def tokens(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


COMMON = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 128}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": COMMON,
    "qwen3_moe": {**COMMON, **EXPERTS, "num_experts": 4, "head_dim": 64},
    "mixtral": {**COMMON, "num_experts_per_tok": 2, "num_local_experts": 4},
    "deepseek_v3": {
        **COMMON,
        **EXPERTS,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "kv_lora_rank": 64,
        "q_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
        "n_group": 2,
        "topk_group": 1,
    },
}


def dense_model(folder: Path, kind: str) -> None:
    """A random model of two layers, with a tokenizer, which GPTQModel does not do without."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **CONFIGS[kind]))
    for parameter in model.parameters():
        if parameter.ndim == 3:  # stacks of experts start as uninitialised memory
            torch.nn.init.normal_(parameter, 0, 0.02)
    model.half().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "w0", "pad_token": "w0", "bos_token": "w1", "eos_token": "w2"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


def fields(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """int32 [R, words] -> the fields of each row, little end first [R, count]."""
    little = np.unpackbits(words.view("<u4").view(np.uint8), axis=1, bitorder="little")
    values = little[:, : count * bits].reshape(len(words), count, bits)
    return (values << np.arange(bits)).sum(-1)


def third_reading(folder: Path) -> PreTrainedModel:
    """The dense model in fp32 that the files of a checkpoint mean."""
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    state = load_file(folder / "model.safetensors")
    for name in [n.removesuffix(".qweight") for n in state if n.endswith(".qweight")]:
        parts = (state.pop(f"{name}.{leaf}") for leaf in ("qweight", "qzeros", "scales", "g_idx"))
        qweight, qzeros, scales, g_idx = (
            part.float().numpy() if part.is_floating_point() else part.numpy() for part in parts
        )
        K, N = len(g_idx), scales.shape[1]
        bits = qweight.shape[0] * 32 // K
        codes = fields(np.ascontiguousarray(qweight.T), bits, K).T
        if settings["checkpoint_format"] == "gptq" and bits != 3:  # v1 is 1 less in all fields of a word
            ones = sum(1 << shift for shift in range(0, 32, bits))
            qzeros = qzeros.view(np.uint32) + np.uint32(ones)
        zeros = fields(np.ascontiguousarray(qzeros), bits, N)
        if settings["checkpoint_format"] == "gptq" and bits == 3:
            zeros = (zeros + 1) % 8
        dense = scales[g_idx] * (codes - zeros[g_idx])
        state[f"{name}.weight"] = torch.from_numpy(np.ascontiguousarray(dense.T)).float()
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).float().eval()
    known = model.state_dict().keys()
    state = stacked({name.replace(".block_sparse_moe.", ".mlp."): t.float() for name, t in state.items()})
    model.load_state_dict({n: t for n, t in state.items() if n in known})
    return model


def stacked(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The experts as the model has them: [E, 2I, H], gate before up, and [E, H, I]."""
    found: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    rest = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name)
        if match is None:
            rest[name] = tensor
            continue
        leaf = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(match[3], match[3])
        found.setdefault(match[1], {}).setdefault(int(match[2]), {})[leaf] = tensor
    for block, experts in found.items():
        each = [experts[e] for e in range(len(experts))]
        both = [torch.cat([e["gate_proj"], e["up_proj"]]) for e in each]
        rest[f"{block}.gate_up_proj"] = torch.stack(both)
        rest[f"{block}.down_proj"] = torch.stack([e["down_proj"] for e in each])
    return rest


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(tokens(1, 2, 32), use_cache=False).logits
    return found.double()


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def peer_logits(folder: Path) -> torch.Tensor:
    from gptqmodel import BACKEND, GPTQModel

    loaded = GPTQModel.load(str(folder), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16)
    kinds = {type(m).__name__ for m in loaded.model.modules()}
    assert "TorchLinear" in kinds, kinds
    return logits(loaded.model)


def errors(folder: Path, peer: Executor) -> dict[str, float | str]:
    """Relative errors of the logits of both readers, or what the peer says of a checkpoint it refuses."""
    dense = third_reading(folder)
    wanted = logits(dense)
    found: dict[str, float | str] = {
        "dense, bf16": relative(logits(dense.bfloat16()), wanted),
        "ours, fp16": relative(logits(gptq_fx.from_pretrained(folder, dtype=torch.float16)), wanted),
        "ours, bf16": relative(logits(gptq_fx.from_pretrained(folder, dtype=torch.bfloat16)), wanted),
    }
    try:
        found["GPTQModel, fp16"] = relative(peer.submit(peer_logits, folder).result(), wanted)
    except ValueError as error:
        found["GPTQModel, fp16"] = str(error).split(" '")[0]
    return found


def ours(dense: Path, out: Path, settings: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float16).float().eval()
    batches = [{"input_ids": tokens(i, 1, 64)} for i in range(4)]
    gptq_fx.quantize(model, gptq_fx.GPTQConfig(**settings), batches, progress=False)
    gptq_fx.save_pretrained(model.half(), out)


def theirs(dense: Path, out: Path, settings: dict[str, Any]) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization import FORMAT

    extra: dict[str, Any] = {}
    settings = dict(settings)
    if settings.get("sym") is False:
        extra["format"] = FORMAT.GPTQ if settings.pop("v1", False) else FORMAT.GPTQ_V2
    if settings["group_size"] == -1 or settings.get("desc_act"):
        extra["act_group_aware"] = False
    config = QuantizeConfig(**settings, **extra, offload_to_disk=False)
    model = GPTQModel.load(str(dense), config, device="cpu")
    batches = [{"input_ids": row.tolist(), "attention_mask": [1] * 64} for row in tokens(0, 16, 64)]
    model.quantize(batches, batch_size=4)
    model.save(str(out))


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    results: dict[str, dict[str, float | str]] = {}
    # In a process of its own: it replaces classes of transformers by its own.
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as temporary, ProcessPoolExecutor(1, context) as peer:
        folder = Path(temporary)
        os.chdir(folder)  # GPTQModel writes logs to where it runs
        mixed = {"mixed, by rules": {"bits": 4, "group_size": 32, "dynamic": MIXED}}
        cases = [("gptq_fx", ours, "llama", name, case) for name, case in (CASES | mixed).items()]
        cases += [("GPTQModel", theirs, "llama", name, case) for name, case in (CASES | V1).items()]
        grid = {"bits": 4, "group_size": 32}
        cases += [("gptq_fx", ours, kind, f"{kind}, 4 bits, g32", grid) for kind in MOE]
        cases += [("GPTQModel", theirs, kind, f"{kind}, 4 bits, g32", grid) for kind in MOE]
        for writer, write, kind, name, case in cases:
            if args.only not in name:
                continue
            if not (folder / kind).exists():
                dense_model(folder / kind, kind)
            out = folder / f"{writer}-{len(results)}"
            if write is theirs:
                peer.submit(theirs, folder / kind, out, case).result()
            else:
                ours(folder / kind, out, case)
            results[f"{writer}: {name}"] = errors(out, peer)
    head = ["written by", *next(iter(results.values()))]
    rows = [
        [name, *(e if isinstance(e, str) else f"{e:.1e}" for e in found.values())]
        for name, found in results.items()
    ]
    title = "Checkpoints read and written, against GPTQModel"
    note = "Relative error of the logits of random models of two layers (a llama where none is named), "
    note += "against a third reading in fp32. "
    note += "Dense, bf16: that reading rounded to bf16; where it is off, a router chose other experts."
    publish(f"{conditions(title)}\n\n{note}\n\n{markdown(head, rows)}", args.out)
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
