"""retarget: a graph that was traced on one device, to be run on another."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx


def retarget(gm: fx.GraphModule, source: torch.device, target: torch.device) -> None:
    """Name `target` wherever a call names `source`, and put the constants of the graph there.

    Its placeholders must be given on `target` from then on. The example values stay those of `source`.
    """

    def moved(value: Any) -> Any:
        if isinstance(value, torch.device) and value.type == source.type:
            return target
        return value

    for node in gm.graph.nodes:
        if node.op == "get_attr":
            constant = operator.attrgetter(node.target)(gm)
            if isinstance(constant, Tensor):
                owner, _, leaf = node.target.rpartition(".")
                setattr(gm.get_submodule(owner), leaf, constant.to(target))
        elif node.op in ("call_function", "call_method"):
            node.args = tuple(_named(node, fx.node.map_aggregate(node.args, moved), source, target))
            node.kwargs = fx.node.map_aggregate(node.kwargs, moved)
            if node.kwargs.get("device") == source.type:
                node.kwargs = {**node.kwargs, "device": str(target)}
    gm.recompile()


def _named(node: fx.Node, args: Any, source: torch.device, target: torch.device) -> Any:
    """The arguments, with devices named by strings: autocast takes the type alone."""
    if node.target is torch.amp.autocast_mode._enter_autocast:
        return (target.type if a == source.type else a for a in args)
    if node.op == "call_method" and node.target == "to":
        return (str(target) if isinstance(a, str) and a == source.type else a for a in args)
    return args
