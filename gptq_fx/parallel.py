"""Tensor parallelism of transformers: what its DTensors say of the part of a weight that a rank holds.

transformers makes DTensors of the parameters that its plan names, and puts the collectives around the
forward of their modules. A linear on DTensors runs on their local tensors there, wherever it is not
trained. So a QuantizedParameter of the rank's own part takes the place of the DTensor, and neither it nor
a graph of it knows of other ranks: the collectives stay where transformers has them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from gptq_fx.errors import ConfigError, WeightError
from gptq_fx.shard import Part, Runs, chunk

# transformers runs a module that has this on local tensors, also where gradients are recorded.
LOCAL = "_hf_quantized_needs_local_tp"
# Fields of a DistributedConfig, of several releases, for what is no parallelism of tensors.
OTHER_KINDS = ("fsdp_size", "dp_replicate_size", "pp_size", "ep_size", "enable_expert_parallel")


def is_split(weight: Tensor) -> bool:
    """Whether it is a DTensor: no process without torch.distributed has any."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(weight, module.DTensor)


def gathered(weight: Tensor) -> Tensor:
    """The whole weight. Of a DTensor all its ranks must ask together."""
    weight = weight.detach()
    return weight.full_tensor() if is_split(weight) else weight  # type: ignore[attr-defined]


def part_of(weight: Tensor, transposed: bool, name: str) -> Part | None:
    """What this rank holds of a weight [*, N, K] ([*, K, N] if `transposed`); None: all of it.

    Raises WeightError where ranks hold different experts of a stack, and where the installed
    transformers would forget to add up what the experts of all ranks compute.
    """
    if not is_split(weight):
        return None
    runs: list[Runs] = [((0, size),) for size in weight.shape]
    whole = list(runs)
    dtensor: Any = weight
    mesh = dtensor.device_mesh
    for dim, placement in enumerate(dtensor.placements):
        if placement.is_replicate():
            continue
        at, split = placement.dim % weight.ndim, getattr(placement, "split_factor", 1)
        runs[at] = chunk(runs[at], mesh.get_local_rank(dim), mesh.size(dim), split)
    if runs[:-2] != whole[:-2]:
        raise WeightError(
            f"{name}: each rank holds some experts of {list(weight.shape)}. Legal: some of the outputs or "
            "inputs of every expert, as a tp_plan of transformers says"
        )
    if runs == whole:
        return None
    if weight.ndim == 3 and not _adds_up_experts():
        raise WeightError(f"{name}: experts that are split between ranks need transformers 5.23 or later")
    outputs, inputs = runs[-2:][:: -1 if transposed else 1]
    return Part(outputs, inputs)


def run_local(module: nn.Module) -> None:
    """Let transformers run a module whose weight was split on local tensors."""
    setattr(module, LOCAL, True)


def distribute(model: Any, config: Any) -> Any:
    """The model, its parameters on the meta device, split between the ranks as transformers does it.

    config: a DistributedConfig of transformers, or its fields. Joins the default process group.
    Raises ConfigError on other kinds of parallelism than that of tensors.
    """
    from transformers.distributed.configuration_utils import DistributedConfig

    if isinstance(config, Mapping):
        config = DistributedConfig.from_dict(dict(config))
    others = [n for n in OTHER_KINDS if getattr(config, n, None) not in (None, False, 1)]
    if others:
        found = ", ".join(f"{n}={getattr(config, n)}" for n in others)
        raise ConfigError(f"distributed_config: found {found}. Legal: tp_size and tp_plan")
    config, _, mesh = model.prepare_distribute_model(config)
    return model.maybe_distribute_model(model, config, mesh)


def _adds_up_experts() -> bool:
    """Before 5.23 it adds up the experts' outputs only as long as one of their parameters is a DTensor."""
    import transformers

    major, minor = map(int, transformers.__version__.split(".")[:2])
    return (major, minor) >= (5, 23)
