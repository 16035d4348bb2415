"""Call a model so that each graph Dynamo makes of it is handed to a function in place of a compiler."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any
from unittest import mock

import torch
from torch import fx, nn

from gptq_fx.passes.capture import capture

# handler(graph, args): what a call of a graph is to do; the same graph comes again and again.
Handler = Callable[[fx.GraphModule, tuple[Any, ...]], Any]
_handler: ContextVar[Handler] = ContextVar("gptq_fx_handler")

RECOMPILE_LIMIT = 64  # graphs of one function; those of the user's own compiling count too


def observe(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    handler: Handler,
    *,
    fullgraph: bool = False,
) -> Any:
    """model(*args, **kwargs), with every graph run by `handler`.

    There is one backend for all handlers, so that Dynamo makes a graph once, whoever observes it.
    """
    token = _handler.set(handler)
    try:
        # The model as it is, not as the user had it compiled before.
        with (
            mock.patch.object(model, "_compiled_call_impl", None),
            torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT),
        ):
            return torch.compile(model, backend=_backend, fullgraph=fullgraph)(*args, **kwargs)
    finally:
        _handler.reset(token)


def _backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    graph, _ = capture(gm, example_inputs)  # without the example inputs, which hold the parameters
    return lambda *args: _handler.get()(graph, args)
