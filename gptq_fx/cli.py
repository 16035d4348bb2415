"""The command line: gptq-fx. Results go to stdout, progress to stderr; exit code 1 is one line of error."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

import gptq_fx
from gptq_fx import measure
from gptq_fx.checkpoint.inspect import Inspection
from gptq_fx.checkpoint.inspect import inspect as inspect_checkpoint
from gptq_fx.checkpoint.publish import check_target
from gptq_fx.errors import ConfigError, GPTQError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

Model = Annotated[str, typer.Argument(help="a Hugging Face id, or a folder; dense or GPTQ")]
AsJson = Annotated[bool, typer.Option("--json", help="plain data instead of tables")]
Dtype = Annotated[str | None, typer.Option(help=f"{', '.join(DTYPES)}; default: the model's own")]
Device = Annotated[str | None, typer.Option(help="where to compute; default: an accelerator, else the CPU")]
Compile = Annotated[bool, typer.Option(help="run compiled, as an application would")]
Source = Annotated[str, typer.Option("--text", help="a file, or a data set NAME[:CONFIG[:SPLIT]]")]
Length = Annotated[int, typer.Option(min=8, help="tokens of a window")]
Page = Annotated[Path | None, typer.Option("--html", help="a file to write the report to, as a page")]


@app.callback()
def about() -> None:
    """GPTQ as a compiler pass."""


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command whose known errors are one line and exit code 1."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except (GPTQError, OSError, ImportError) as error:
            text = " ".join(str(error).split())
            typer.echo(f"gptq-fx: {text}", err=True)
            raise typer.Exit(1) from None

    return app.command()(run)


@command
def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(help="the folder to write")],
    bits: int = 4,
    group_size: int = 128,
    sym: Annotated[bool, typer.Option("--sym/--asym")] = True,
    desc_act: bool = False,
    lm_head: bool = False,
    dynamic: Annotated[str | None, typer.Option(help="rules as JSON, in the syntax of GPTQModel")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="a file or data set; without one, weights are rounded to nearest")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="windows of calibration text")] = 128,
    length: Length = 512,
    max_memory: Annotated[
        str | None, typer.Option(help="of the device, which the dense model need not fit then: 8GB")
    ] = None,
    max_shard_size: str = "5GB",
    overwrite: Annotated[bool, typer.Option(help="replace a quantized checkpoint at OUT")] = False,
    dtype: Dtype = None,
    device: Device = None,
    html: Page = None,
    as_json: AsJson = False,
) -> None:
    """Quantize a dense model, and write it as a GPTQ checkpoint."""
    config = gptq_fx.GPTQConfig(
        bits=bits, group_size=group_size, sym=sym, desc_act=desc_act, lm_head=lm_head, dynamic=_json(dynamic)
    )
    check_target(out, overwrite)  # before the long work
    loaded = _load(model, dtype, device if max_memory is None else "cpu")
    tokenizer = _tokenizer(model, needed=calibration is not None)
    batches = None
    if calibration is not None:
        text = measure.read_text(calibration)
        found = measure.windows(tokenizer, text, samples, length, calibration)
        batches = [{"input_ids": ids[None].to(loaded.device)} for ids in found]
    where = None if max_memory is None else _device(device)
    report = gptq_fx.quantize(loaded, config, batches, device=where, max_memory=max_memory)
    if html is not None:
        report.to_html(html, f"{model}, quantized")
    saved = gptq_fx.save_pretrained(
        loaded, out, tokenizer=tokenizer, max_shard_size=max_shard_size, overwrite=overwrite
    )
    _show({"quantized": report.to_dict(), "saved": saved.to_dict()}, f"{report}\n{saved}", as_json)


@command
def explain(
    model: Model,
    bits: int = 4,
    group_size: int = 128,
    sym: Annotated[bool, typer.Option("--sym/--asym")] = True,
    lm_head: bool = False,
    dynamic: Annotated[str | None, typer.Option(help="rules as JSON, in the syntax of GPTQModel")] = None,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    html: Page = None,
    as_json: AsJson = False,
) -> None:
    """Print what the backend would do with every weight of a causal language model."""
    config = gptq_fx.GPTQConfig(
        bits=bits, group_size=group_size, sym=sym, lm_head=lm_head, dynamic=_json(dynamic)
    )
    loaded = _load(model, dtype, device)
    ids = torch.zeros(1, 8, dtype=torch.long, device=loaded.device)
    report = gptq_fx.explain(loaded, input_ids=ids, use_cache=False, config=config)
    if html is not None:
        report.to_html(html, model)
    _show(report.to_dict(), str(report), as_json)


@command
def eval(
    model: Model,
    text: Source = "wikitext2",
    windows: Annotated[int, typer.Option(min=1, help="how many windows of the text")] = 40,
    length: Length = 512,
    tasks: Annotated[str | None, typer.Option(help="tasks of lm-eval, separated by commas")] = None,
    compile: Compile = False,
    dtype: Dtype = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity on a text, or tasks of lm-eval if that is installed."""
    loaded, tokenizer = _load(model, dtype, device, compile), _tokenizer(model)
    if tasks is not None:
        result = _lm_eval(loaded, tokenizer, tasks.split(","))
        _show(result, json.dumps(result, indent=2, default=str), as_json)
        return
    held_out = measure.windows(tokenizer, measure.read_text(text), windows, length, text)
    value = measure.perplexity(loaded, held_out)
    found = {"perplexity": value, "windows": len(held_out), "length": length, "text": text}
    _show(found, f"perplexity {value:.4f} on {len(held_out)} windows of {length} tokens of {text}", as_json)


@command
def generate(
    model: Model,
    prompt: str,
    new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    compile: Compile = True,
    dtype: Dtype = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt, greedily."""
    loaded, tokenizer = _load(model, dtype, device, compile), _tokenizer(model)
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(loaded.device)
    with Console(stderr=True).status("generating"):
        tokens = measure.generate(loaded, ids, new_tokens)
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    _show({"prompt": prompt, "text": text, "tokens": tokens.tolist()}, text, as_json)


@command
def bench(
    model: Model,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(min=2)] = 32,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    compile: Compile = True,
    dtype: Dtype = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure the speed of prefill and decode, and the bytes of the weights."""
    loaded = _load(model, dtype, device, compile)
    prompt = measure.random_prompt(loaded, prompt_tokens)
    found = asdict(measure.speed(loaded, prompt, new_tokens, repeats, exactly=True)[0])
    text = (
        f"prefill {found['prefill']:.1f} tokens/s, decode {found['decode']:.1f} tokens/s, first token after "
        f"{found['first_token_seconds']:.3f} s, compiling {found['compile_seconds']:.1f} s, "
        f"weights {found['weight_bytes'] / 1e6:.1f} MB"
    )
    _show(found, text, as_json)


@command
def inspect(checkpoint: Model, as_json: AsJson = False) -> None:
    """Print what a GPTQ checkpoint holds, who can read it, and its problems; exit code 1 if it has any."""
    found = inspect_checkpoint(checkpoint)
    _show(found.to_dict(), _inspected(found), as_json)
    if found.problems:
        raise typer.Exit(1)


def _inspected(found: Inspection) -> str:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("module", "inputs", "outputs", "scheme", "MB"):
        table.add_column(column, overflow="fold")
    for m in found.modules:
        row = (m.name, str(m.in_features), str(m.out_features), str(m.scheme), f"{m.nbytes / 1e6:.2f}")
        table.add_row(*row)
    console = Console(width=110, file=sys.stderr)
    with console.capture() as capture:
        console.print(table)
    quantized = sum(m.nbytes for m in found.modules)
    lines = [
        capture.get().rstrip(),
        f"{found.path}: {len(found.modules)} quantized modules",
        f"  {quantized / 1e6:.1f} MB quantized, {found.dense_bytes / 1e6:.1f} MB dense",
        *(f"  {count} x {scheme}" for scheme, count in found.schemes.most_common()),
        "read by",
        *(f"  {reader}" for reader in found.readers),
        *(f"problem: {problem}" for problem in found.problems),
    ]
    return "\n".join(lines)


def _show(data: object, text: str, as_json: bool) -> None:
    typer.echo(json.dumps(data, default=str) if as_json else text)


def _json(text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--dynamic: no JSON: {error}") from None


def _load(model: str, dtype: str | None, device: str | None, compile: bool = False) -> Any:
    """The model, dense or from a GPTQ checkpoint; compiled if asked, once it is called."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}. Legal: {', '.join(DTYPES)}")
    where = _device(device)
    wanted = DTYPES[dtype] if dtype else None
    loaded: Any
    if _is_gptq(model, AutoConfig):
        loaded = gptq_fx.from_pretrained(model, where, wanted)
    else:
        try:
            loaded = AutoModelForCausalLM.from_pretrained(model, dtype=wanted or "auto")
            loaded = loaded.to(where).eval()
        except ValueError as error:  # an architecture that transformers does not know, and the like
            raise ConfigError(f"{model}: {error}") from error
    if compile:
        loaded.compile(backend="gptq")
    return loaded


def _device(device: str | None) -> torch.device:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device(device) if device else accelerator or torch.device("cpu")


def _is_gptq(model: str, configs: Any) -> bool:
    folder = Path(model)
    if (folder / "quantize_config.json").is_file():
        return True
    try:
        return getattr(configs.from_pretrained(model), "quantization_config", None) is not None
    except ValueError as error:
        raise ConfigError(f"{model}: {error}") from error


def _tokenizer(model: str, *, needed: bool = True) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, TypeError) as error:
        if needed:
            raise ConfigError(f"{model}: has no tokenizer: {error}") from error
        return None


def _lm_eval(model: Any, tokenizer: Any, tasks: list[str]) -> dict[str, Any]:
    try:
        import lm_eval  # type: ignore[import-not-found,unused-ignore]
        from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise ConfigError("--tasks needs the package lm-eval: pip install lm-eval") from None
    found = lm_eval.simple_evaluate(HFLM(pretrained=model, tokenizer=tokenizer), tasks=tasks)
    results: dict[str, Any] = found["results"]
    return results


def main() -> None:
    """The entry point."""
    app()
