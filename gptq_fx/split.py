"""Calibration of a model that transformers has split: what each rank runs, and what is whole.

All ranks run all batches, each with its own part of the weights, in place of the DTensors; the collectives
are where transformers has them. The input of a weight that is split along its outputs is whole on every
rank. That of one split along its inputs is put together again from all ranks, and so is a weight, when it is
solved: as of one process, but for the sums of transformers' own collectives. Each rank keeps its part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptq_fx.errors import CalibrationError, ConfigError, WeightError
from gptq_fx.parallel import LOCAL, is_split, part_of, run_local
from gptq_fx.ranks import Ranks
from gptq_fx.shard import Part, Runs, length


@dataclass(frozen=True)
class Split:
    """weight: a DTensor [*, N, K] ([*, K, N] where its linear is transposed). part: what this rank holds.

    inputs: what each rank holds of the K inputs; none where all hold all of them.
    """

    weight: Tensor
    part: Part
    inputs: tuple[Runs, ...] = ()

    def whole(self, rows: Sequence[Tensor], ranks: Ranks, to: int) -> list[Tensor]:
        """x [tokens, K], several for experts, on rank `to`, of parts [tokens, *] of all; elsewhere the parts.

        Raises CalibrationError where ranks send other tokens to an expert.
        """
        counts = [len(x) for x in rows]
        if len(rows) > 1:
            ranks.check_same("tokens for the experts", counts)
        parts = ranks.collect(torch.cat(list(rows)), [length(runs) for runs in self.inputs], to)
        if not parts:
            return list(rows)
        places = [i for runs in self.inputs for start, stop in runs for i in range(start, stop)]
        x = torch.cat(parts, -1)
        if places != sorted(places):
            x = x[:, torch.tensor(places, device=x.device).argsort()]
        return list(x.split(counts))


def ranks_of(model: nn.Module, process_group: Any = None, **settings: object) -> Ranks:
    """The ranks that hold the parts of a model; those of `process_group`, or one alone, where it is whole.

    settings: what is not legal for parts, but None.
    Raises ConfigError, and CalibrationError where something else than a tp_plan has split the model.
    """
    meshes: list[Any] = []
    for name, weight in model.named_parameters():
        if is_split(weight):
            mesh = weight.device_mesh  # type: ignore[attr-defined]
            owner = model.get_submodule(name.rpartition(".")[0])
            planned = mesh.mesh_dim_names in (("tp",), None) and mesh.ndim == 1  # 5.17 gives no name
            if not planned or not getattr(owner, "_is_hooked", False):
                raise CalibrationError(
                    f"calibration: {name} is split over {mesh}. Legal: by a tp_plan of transformers alone, "
                    "from_pretrained(..., distributed_config=DistributedConfig(tp_size=...))"
                )
            meshes.append(mesh)
    if not meshes:
        return Ranks(process_group)
    settings["process_group"] = process_group
    found = ", ".join(sorted(name for name, value in settings.items() if value is not None))
    if found:
        raise ConfigError(
            f"{found}: the model is split between ranks, and these share its calibration. Legal: without; or "
            "calibrate the whole model, save it, and load it with from_pretrained(distributed_config=...)"
        )
    return Ranks(meshes[0].get_group(), parts=True)


@contextmanager
def local_parts(model: nn.Module, ranks: Ranks) -> Iterator[dict[int, Split]]:
    """The model with plain parameters of this rank's parts in place of the DTensors of its linears and
    experts. Gives what each is a part of, by its id. All as before afterwards.

    Raises WeightError on every rank where one would hold nothing.
    """
    places = _places(model)
    with ranks.together():
        parts = {name: _part(getattr(module, leaf), turned, name) for name, module, leaf, turned in places}
    everyone = ranks.gather(parts)
    splits: dict[int, Split] = {}
    locals_: dict[int, nn.Parameter] = {}  # by the id of a DTensor, which several modules may share
    before: list[tuple[nn.Module, str, Any, bool]] = []
    try:
        for name, module, leaf, turned in places:
            weight = getattr(module, leaf)
            if id(weight) not in locals_:
                locals_[id(weight)] = nn.Parameter(weight.detach().to_local(), requires_grad=False)
                K = weight.shape[-2 if turned else -1]
                inputs = tuple(found[name].inputs for found in everyone)
                cut = any(runs != ((0, K),) for runs in inputs)
                splits[id(locals_[id(weight)])] = Split(weight, parts[name], inputs if cut else ())
            before.append((module, leaf, weight, LOCAL in module.__dict__))
            module._parameters[leaf] = locals_[id(weight)]
            run_local(module)
        yield splits
    finally:
        for module, leaf, weight, was_local in reversed(before):
            module._parameters[leaf] = weight
            if not was_local:
                delattr(module, LOCAL)


def _places(model: nn.Module) -> list[tuple[str, nn.Module, str, bool]]:
    """(path, module, name in it, transposed) of the DTensors of linears, and of stacks of experts.

    A plan splits no Conv1D, whose in_features and out_features it would ask for.
    """
    found: list[tuple[str, nn.Module, str, bool]] = []
    for path, module in model.named_modules():
        stacks = getattr(module, "is_transposed", None)
        for leaf, weight in module.named_parameters(recurse=False):
            if not is_split(weight):
                continue
            if isinstance(module, nn.Linear) and leaf == "weight":
                found.append((f"{path}.{leaf}", module, leaf, False))
            elif stacks is not None and weight.ndim == 3:
                found.append((f"{path}.{leaf}", module, leaf, bool(stacks)))
    return found


def _part(weight: Tensor, transposed: bool, name: str) -> Part:
    part = part_of(weight, transposed, name)
    if part is None:  # a replica
        N, K = list(weight.shape)[-2:][:: -1 if transposed else 1]
        part = Part(((0, N),), ((0, K),))
    if 0 in part.shape:
        raise WeightError(f"{name}: a rank holds nothing of {list(weight.shape)}. Legal: fewer ranks")
    return part
