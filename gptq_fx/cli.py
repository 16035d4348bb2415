"""The command line: gptq-fx."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

import gptq_fx

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()
def about() -> None:
    """GPTQ as a compiler pass."""


@app.command()
def explain(
    model: Annotated[str, typer.Argument(help="a Hugging Face id, or a folder")],
    bits: int = 4,
    group_size: int = 128,
    sym: bool = True,
    lm_head: bool = False,
    dtype: str = "bfloat16",
) -> None:
    """Print what the backend would do with every weight of a causal language model."""
    from transformers import AutoModelForCausalLM

    config = gptq_fx.GPTQConfig(bits=bits, group_size=group_size, sym=sym, lm_head=lm_head)
    loaded: torch.nn.Module = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    loaded.eval()
    ids = torch.zeros(1, 8, dtype=torch.long)
    typer.echo(gptq_fx.explain(loaded, input_ids=ids, use_cache=False, config=config))


def main() -> None:
    """The entry point. A known error is one line, without a traceback."""
    try:
        app()
    except gptq_fx.GPTQError as error:
        raise SystemExit(f"gptq-fx: {error}") from None
