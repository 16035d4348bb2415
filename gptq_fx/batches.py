"""Calibration batches: checked, and turned into runs of the graphs that Dynamo makes of the model."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from gptq_fx.errors import CalibrationError
from gptq_fx.experts import IMPLEMENTATION
from gptq_fx.observe import observe
from gptq_fx.passes.calibrate import Run, StagedGraph
from gptq_fx.passes.experts import expert_rows
from gptq_fx.passes.plan import ExpertsCall

Batch = Mapping[str, Any]
# The staged form of a graph, made at its first call.
Staged = Callable[[fx.GraphModule, tuple[Any, ...]], StagedGraph]


def check_batches(model: nn.Module, batches: Iterable[Batch]) -> list[Batch]:
    """The batches, each of which must be a mapping of arguments that the model's forward knows."""
    checked = _listed(batches)
    parameters = inspect.signature(model.forward).parameters.values()
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for i, batch in enumerate(checked):
        _check(i, batch, named, takes_any, _device(model))
    return checked


def _listed(batches: Iterable[Batch]) -> list[Batch]:
    if isinstance(batches, (Mapping, str, Tensor)) or not isinstance(batches, Iterable):
        raise CalibrationError(
            f"calibration: found one {type(batches).__name__}. Legal: a list, or another iterable, of "
            "dicts of model inputs"
        )
    checked = list(batches)
    if not checked:
        raise CalibrationError("calibration: found no batches. Legal: at least one, or calibration=None")
    return checked


def _check(i: int, batch: Any, named: list[str], takes_any: bool, device: torch.device | None) -> None:
    if not isinstance(batch, Mapping) or not batch:
        raise CalibrationError(f"batch {i}: found {type(batch).__name__}. Legal: a dict of model inputs")
    wrong = [key for key in batch if key not in named]
    if wrong and (not takes_any or len(wrong) == len(batch)):
        raise CalibrationError(
            f"batch {i}: the model's forward takes no {', '.join(map(repr, wrong))}. "
            f"Legal: {', '.join(named)}"
        )
    for key, value in batch.items():
        if isinstance(value, Tensor) and device is not None and value.device != device:
            raise CalibrationError(f"batch {i}: {key} is on {value.device}. Legal: {device}, as the model")


def _device(model: nn.Module) -> torch.device | None:
    """Where the model is, if that is one place."""
    devices = {p.device for p in model.parameters()}
    return devices.pop() if len(devices) == 1 else None


@contextlib.contextmanager
def for_calibration(model: nn.Module) -> Iterator[None]:
    """No dropout, no gradients, no caches of keys and values, and the experts of transformers' models in
    one grouped call, not in a loop; all as before afterwards."""
    training = [m for m in model.modules() if m.training]
    caching = [c for c in _configs(model) if getattr(c, "use_cache", False)]
    with contextlib.ExitStack() as stack:
        for module in training:
            stack.enter_context(mock.patch.object(module, "training", False))
        for config in caching:
            stack.enter_context(mock.patch.object(config, "use_cache", False))
        for config in _configs(model):
            if getattr(config, "_experts_implementation", None) in ("eager", "batched_mm", IMPLEMENTATION):
                stack.enter_context(
                    mock.patch.object(config, "_experts_implementation_internal", "grouped_mm")
                )
        stack.enter_context(torch.no_grad())
        yield


def _configs(model: nn.Module) -> list[Any]:
    """The transformers configs of a model and its parts."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    return list(configs.values())


def bind(
    program: ExportedProgram, batches: Iterable[Batch], values: Sequence[Any]
) -> list[tuple[Batch, list[Any]]]:
    """Each batch, a dict of a program's inputs by name, with a value for each of its placeholders.

    values: those of the placeholders for parameters and buffers. An input that is no tensor and not in the
    batch keeps the value that the program was exported with.
    Raises CalibrationError where the program does not take a batch.
    """
    places = [i for i, s in enumerate(program.graph_signature.input_specs) if s.kind is InputKind.USER_INPUT]
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    signature = program.module_call_graph[0].signature
    names = signature.forward_arg_names if signature is not None else None
    if signature is None or names is None:
        raise CalibrationError(
            "calibration: the program does not say the names of its arguments; export it anew"
        )
    args, kwargs = program.example_inputs or ((), {})
    examples = {**dict(zip(names, args, strict=False)), **kwargs}
    bound = []
    for i, batch in enumerate(_listed(batches)):
        _check(i, batch, names, False, None)
        given = {name: _argument(i, name, names, batch, examples) for name in names}
        positional = len(names) - len(kwargs)
        inputs = tuple(given[n] for n in names[:positional]), {n: given[n] for n in names[positional:]}
        flat, spec = pytree.tree_flatten(inputs)
        if spec != signature.in_spec:
            raise CalibrationError(f"batch {i}: found inputs of the form {spec}. Legal: {signature.in_spec}")
        for place, value in zip(places, flat, strict=True):
            _check_shape(i, nodes[place], value)
        found = list(values)
        for place, value in zip(places, flat, strict=True):
            found[place] = value
        bound.append((batch, found))
    return bound


def _argument(i: int, name: str, names: Sequence[str], batch: Batch, examples: Mapping[str, Any]) -> Any:
    if name in batch:
        return batch[name]
    leaves = pytree.tree_leaves(examples.get(name, torch.empty(0)))
    if any(isinstance(leaf, Tensor) for leaf in leaves):
        raise CalibrationError(f"batch {i}: found no {name!r}. Legal: {', '.join(names)}, all of them")
    return examples[name]


def _check_shape(i: int, node: fx.Node, value: Any) -> None:
    """Whether a program can be called with a value: fixed sizes as it was exported, free ones as they are."""
    wanted = node.meta["val"]
    if not isinstance(wanted, Tensor):
        return
    fits = isinstance(value, Tensor) and value.ndim == wanted.ndim and value.dtype == wanted.dtype
    if not fits or any(isinstance(w, int) and w != v for w, v in zip(wanted.shape, value.shape, strict=True)):
        found = f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise CalibrationError(
            f"batch {i}: {node.name} is {found}. Legal: {list(wanted.shape)} {wanted.dtype}, as exported"
        )


class _Recorded(Exception):
    """Thrown when a graph is called: the values of its placeholders are all that is wanted."""

    def __init__(self, gm: fx.GraphModule, values: tuple[Any, ...]) -> None:
        self.gm, self.values = gm, values


def record(model: nn.Module, batches: Sequence[Batch], staged: Staged) -> list[Run]:
    """One run for each batch, at its start; batches of one signature share a graph.

    Raises CalibrationError where the model is not one graph.
    """
    return [_record(model, batch, i, staged) for i, batch in enumerate(batches)]


def _record(model: nn.Module, batch: Batch, i: int, staged: Staged) -> Run:
    def stop(gm: fx.GraphModule, values: tuple[Any, ...]) -> Any:
        raise _Recorded(gm, values)

    try:
        observe(model, (), batch, stop, fullgraph=True)
    except _Recorded as call:
        return staged(call.gm, call.values).start(call.values, i)
    except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError) as error:
        raise CalibrationError(
            f"batch {i}: the model is not one graph, as calibration in sequence needs: "
            f"{_first_lines(error)}\nLegal: a model without the break; or GPTQConfig(sequential=False), "
            "which observes all of its graphs in one pass"
        ) from error
    except RuntimeError as error:  # Dynamo's, of a function that it has given up before
        if "no compiled frames" not in str(error):
            raise
    raise CalibrationError(
        f"batch {i}: Dynamo made no graph of the forward: it has no tensor code, or is not one graph. "
        "Legal: GPTQConfig(sequential=False), which observes whatever graphs there are"
    )


def _first_lines(error: Exception) -> str:
    lines = [line.rstrip() for line in str(error).splitlines() if line.strip()]
    return "\n".join(lines[:12])


def valid_rows(run: Run, x: fx.Node, batch: Batch) -> Tensor:
    """The inputs [tokens, K] at a node, without the positions that an attention mask pads.

    A mask counts where the input has its positions.
    """
    value = run.env[x]
    assert isinstance(value, Tensor)
    rows = value.reshape(-1, value.shape[-1])
    mask = _mask(run, x, batch)
    if mask is None or value.shape[:-1] not in (mask.shape, (mask.numel(),)):
        return rows
    return rows[mask.reshape(-1) != 0]


def valid_expert_rows(run: Run, call: ExpertsCall, experts: int, batch: Batch) -> list[Tensor]:
    """The inputs [rows, K] of each expert, without those of positions that an attention mask pads.

    A mask counts where it is known which position each row is.
    """
    x, which = run.env[call.x], None if call.which is None else run.env[call.which]
    rows = expert_rows(call.form, experts, x, which)
    mask = _mask(run, call.x, batch)
    if call.which is None:  # each expert has all positions, or it is not known which
        count, tokens = x.shape[1], torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    else:
        count, tokens = run.tokens.get(call.which, (0, x))
    if mask is None or count != mask.numel():
        return rows
    valid = (mask.reshape(-1) != 0)[tokens.long()].unsqueeze(-1)
    kept = expert_rows(call.form, experts, valid, which)
    return [part[keep[:, 0]] for part, keep in zip(rows, kept, strict=True)]


def _mask(run: Run, x: fx.Node, batch: Batch) -> Tensor | None:
    """The mask [B, T] of positions: `decoder_attention_mask` for what comes from the inputs of a decoder."""
    mask = batch.get("decoder_attention_mask" if x in _decoder(run, batch) else "attention_mask")
    return mask.to(run.env[x].device) if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _decoder(run: Run, batch: Batch) -> frozenset[fx.Node]:
    """The nodes that depend on the inputs of a decoder."""
    inputs = {id(v) for k, v in batch.items() if k.startswith("decoder_") or k == "labels"}
    return run.graph.descendants(tuple(n for n, v in run.inputs.items() if id(v) in inputs))
