"""Memory and time of loading a 4-bit checkpoint of a billion parameters, each in a process of its own."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gptq_fx
from gptq_fx.packed import PackedWeight
from gptq_fx.parameter import as_parameter
from table import conditions, markdown, parser, publish

GROUP = 64


def arguments() -> argparse.Namespace:
    found = parser(__doc__)
    found.add_argument("--layers", type=int, default=16)
    found.add_argument("--load", choices=["baseline", "mapped", "all pages"], help=argparse.SUPPRESS)
    found.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return found.parse_args()


def random_checkpoint(folder: Path, layers: int) -> int:
    """Random codes: no dense model of this size is made here either. Returns the parameters."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    count = sum(p.numel() for p in model.parameters())
    for name, module in model.named_modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            N, *rest = parameter.shape
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                K = rest[0]
                qweight = torch.randint(-(2**31), 2**31, (K // 8, N), dtype=torch.int32)
                scales = torch.full((K // GROUP, N), 1e-3, dtype=torch.bfloat16)
                weight = gptq_fx.QuantizedWeight(4, K, qweight, scales)
                packed = PackedWeight(weight, gptq_fx.Scheme(4, GROUP), None)
                setattr(module, leaf, as_parameter(gptq_fx.QuantizedParameter(packed, name)))
            elif name != "lm_head":
                setattr(module, leaf, torch.nn.Parameter(torch.ones_like(parameter, device="cpu")))
    model.tie_weights()
    gptq_fx.save_pretrained(model, folder, max_shard_size="500MB")
    return count


def status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def load(args: argparse.Namespace) -> None:
    """In a fresh process: load, touch what is asked for, and print the peak."""
    import transformers.modeling_utils  # noqa: F401  # part of the baseline

    torch.set_num_threads(args.threads)
    seconds = first = 0.0
    if args.load != "baseline":
        start = time.perf_counter()
        model = gptq_fx.from_pretrained(args.folder)
        seconds = time.perf_counter() - start
        if args.load == "all pages":
            model.compile(backend="gptq")
            with torch.no_grad():
                model(torch.arange(3, 19)[None], use_cache=False)
            first = time.perf_counter() - start
    print(json.dumps({"peak": status("VmHWM"), "seconds": seconds, "first": first}))


def main() -> None:
    args = arguments()
    if args.load is not None:
        return load(args)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "checkpoint"
        count = random_checkpoint(folder, args.layers)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        found = {}
        for what in ("baseline", "mapped", "all pages"):
            command = [sys.executable, __file__, "--load", what, "--folder", str(folder)]
            done = subprocess.run(
                [*command, "--threads", str(args.threads)], check=True, capture_output=True, text=True
            )
            found[what] = json.loads(done.stdout.splitlines()[-1])
    base = found.pop("baseline")["peak"]
    rows = [
        [
            {"mapped": "from_pretrained", "all pages": "and compiled, to the first token"}[what],
            f"{(row['peak'] - base) / 1e6:.0f}",
            f"{(row['peak'] - base) / size:.2f}",
            f"{row['seconds']:.1f}",
            f"{row['first']:.1f}" if row["first"] else "",
        ]
        for what, row in found.items()
    ]
    head = ["step", "peak above the imports [MB]", "of the files", "load [s]", "first token [s]"]
    title = f"Loading {count / 1e9:.2f} billion parameters at 4 bits, files of {size / 1e6:.0f} MB"
    publish(f"{conditions(title)}\n\n{markdown(head, rows)}", args.out)
    return None


if __name__ == "__main__":
    main()
