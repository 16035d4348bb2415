"""The path of a parameter, such as "model.layers.3.mlp.up_proj.weight"."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from torch import Tensor, fx, nn


def parameter_names(
    gm: fx.GraphModule, values: Sequence[Any], root: nn.Module | None
) -> Callable[[fx.Node], tuple[str, ...]]:
    """A function: placeholder -> the paths of its parameter, several where it is tied.

    A graph knows paths only from the root of its own frame, which is an inner module after a graph
    break or under `layer.compile()`. The full path is found from the parameter object, as the module
    `root` names it.
    """
    by_id = names_by_id(root)
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    value_of = dict(zip(placeholders, values, strict=True))

    def names(placeholder: fx.Node) -> tuple[str, ...]:
        if "gptq_path" in placeholder.meta:
            return (placeholder.meta["gptq_path"],)
        full = by_id.get(id(value_of.get(placeholder)))
        return full or (source_path(placeholder),)

    return names


def source_path(placeholder: fx.Node) -> str:
    """The path that Dynamo's source of a placeholder spells, from the root of the frame."""
    source = getattr(placeholder, "_dynamo_source", None)
    name = getattr(source, "name", "")
    text = name() if callable(name) else name  # a method before torch 2.13
    parts = re.findall(r"\._(?:modules|parameters|buffers)\['([^']+)'\]", text)
    return ".".join(parts) if parts else placeholder.name


def running_module() -> nn.Module | None:
    """The outermost nn.Module whose method is on the stack."""
    found = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        # Only methods are asked: before Python 3.13 f_locals leaves a copy behind in the frame, and a
        # function that has compiled a model would keep it, whatever it deletes, until it returns.
        if frame.f_code.co_varnames[:1] == ("self",):
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module):
                found = owner
        frame = frame.f_back
    return getattr(found, "_orig_mod", found)


def names_by_id(root: nn.Module | None) -> dict[int, tuple[str, ...]]:
    """id of each parameter -> its paths."""
    names: dict[int, tuple[str, ...]] = {}
    if root is not None:
        for name, parameter in root.named_parameters(remove_duplicate=False):
            names[id(parameter)] = (*names.get(id(parameter), ()), name)
    return names


def full_path(parameter: Tensor, default: str) -> str:
    """The path of a parameter in the module that is running, less ".weight"."""
    return names_by_id(running_module()).get(id(parameter), (default,))[0].removesuffix(".weight")
