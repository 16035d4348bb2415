"""Calibration of a model that transformers has split: the integers of one process with the whole, cut."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from models import EXPERTS, MODELS, ids, logits, relative
from ranks import needs_transformers_5_23, on_ranks, run
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.placement_types import Shard
from transformers.distributed import DistributedConfig

import gptq_fx
from gptq_fx.job import Job
from gptq_fx.parallel import LOCAL
from gptq_fx.ranks import Ranks
from gptq_fx.shard import Part, Runs
from gptq_fx.split import Split

TINY = {"num_hidden_layers": 1, "num_key_value_heads": 4, "intermediate_size": 256}
# Groups of 128 inputs are cut by the borders between ranks.
CUT = {"group_size": 128, "lm_head": True}
ACT_ORDER = {"group_size": 32, "sym": False, "desc_act": True}
AT_ONCE = {"group_size": 32, "sequential": False, "gptaq": 0.0}


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    """Of 24 tokens, the first ones padding; four ranks have not one each."""
    mask = [(torch.arange(24) >= i).long().expand(2, 24) for i in range(count)]
    tokens = ids(count, 2, 24)
    return [{"input_ids": tokens[i], "attention_mask": mask[i]} for i in range(count)]


def split(folder: Path, **degrees: int) -> nn.Module:
    config = DistributedConfig(**degrees or {"tp_size": dist.get_world_size()})
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "dense", distributed_config=config)


def quantized(model: nn.Module) -> dict[str, gptq_fx.QuantizedParameter]:
    return {n: p for n, p in model.named_parameters() if isinstance(p, gptq_fx.QuantizedParameter)}


def measured(report: gptq_fx.Report) -> list[tuple[str, float, int]]:
    return [(s.name, s.loss, s.tokens) for s in report.sites if s.loss is not None and s.tokens is not None]


def calibrated(folder: Path, settings: dict[str, Any]) -> tuple[float, bool, Tensor, Any]:
    """The share of codes that are not those of the checkpoint's part, in the worst weight; whether all else
    of the layout is the same; logits, and what the report has."""
    model = split(folder)
    report = gptq_fx.quantize(model, gptq_fx.GPTQConfig(**settings), batches(), progress=False)
    found = quantized(model)
    loaded = gptq_fx.from_pretrained(folder / "gptq", distributed_config={"tp_size": dist.get_world_size()})
    wanted = quantized(loaded)
    moved, same = [], found.keys() == wanted.keys()
    for name, parameter in found.items():
        one, other = parameter.quantized_weight(), wanted[name].quantized_weight()
        moved.append(float((one.codes() != other.codes()).float().mean()))
        same = same and one.scales.shape == other.scales.shape
        same = same and parameter.scheme == wanted[name].scheme
    return max(moved), same, logits(model), measured(report)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", CUT),
        ("llama", ACT_ORDER),
        ("llama", AT_ONCE),
        pytest.param("qwen3", CUT, marks=needs_transformers_5_23),
        pytest.param("mixtral", CUT, marks=needs_transformers_5_23),
        pytest.param("mixtral", ACT_ORDER, marks=needs_transformers_5_23),
    ],
    ids=["llama", "llama in act-order", "llama all at once", "tied", "mixtral", "mixtral in act-order"],
)
def test_the_integers_are_those_of_one_process(
    tmp_path: Path, name: str, settings: dict[str, Any], ranks: int
) -> None:
    model = MODELS[name].build(**TINY)  # qwen3 ties its head to the table, which is split too
    model.save_pretrained(tmp_path / "dense")
    report = gptq_fx.quantize(model, gptq_fx.GPTQConfig(**settings), batches(), progress=False)
    gptq_fx.save_pretrained(model, tmp_path / "gptq")
    for moved, same, found, sites in on_ranks(ranks, calibrated, tmp_path, settings):
        assert same
        assert moved < 0.01  # sums in another order move a code that was near the middle of two
        assert relative(found, logits(model)) < 0.02
        assert [(n, t) for n, _, t in sites] == [(n, t) for n, _, t in measured(report)]
        losses = [loss for _, loss, _ in measured(report)]
        assert [loss for _, loss, _ in sites] == pytest.approx(losses, rel=0.02)


def in_16_bits(folder: Path) -> Tensor:
    model = split(folder)
    gptq_fx.quantize(model, gptq_fx.GPTQConfig(group_size=32), batches(), progress=False)
    return logits(model)


def test_in_16_bits_the_error_is_that_of_one_process(tmp_path: Path) -> None:
    """Codes are not: they follow the last bit of the sums that transformers makes over the ranks."""
    model = MODELS["llama"].build(torch.bfloat16, **TINY)
    model.save_pretrained(tmp_path / "dense")
    dense = logits(model)
    gptq_fx.quantize(model, gptq_fx.GPTQConfig(group_size=32), batches(), progress=False)
    for found in on_ranks(2, in_16_bits, tmp_path):
        assert relative(found, dense) == pytest.approx(relative(logits(model), dense), rel=0.1)


def pieces(inputs: tuple[Runs, ...]) -> list[list[Tensor]]:
    rank, x = dist.get_rank(), torch.arange(30.0).view(3, 10)
    part = torch.cat([x[:, start:stop] for start, stop in inputs[rank]], 1)
    found = Split(x, Part(((0, 1),), inputs[rank]), inputs)
    return [found.whole([part[:1], part[1:]], Ranks(dist.group.WORLD, parts=True), to) for to in (0, 1)]


@pytest.mark.parametrize("inputs", [(((0, 6),), ((6, 10),)), (((0, 2), (5, 7)), ((2, 5), (7, 10)))])
def test_inputs_are_put_together_in_order(inputs: tuple[Runs, ...]) -> None:
    x = torch.arange(30.0).view(3, 10)
    for rank, found in enumerate(on_ranks(2, pieces, inputs)):
        one, two = found[rank]
        assert torch.equal(one, x[:1]) and torch.equal(two, x[1:])


def refused(folder: Path) -> list[str]:
    """What is said of each call; none of them changes the model."""
    model, errors = split(folder), []
    before = dict(model.named_parameters())
    local = {n for n, m in model.named_modules() if LOCAL in m.__dict__}

    def attempt(error: type[Exception], found: Any, config: Any = None, **settings: Any) -> None:
        with pytest.raises(error) as caught:
            gptq_fx.quantize(model, config, found, progress=False, **settings)
        errors.append(str(caught.value))
        after = dict(model.named_parameters())
        assert after.keys() == before.keys() and all(after[n] is p for n, p in before.items())
        assert {n for n, m in model.named_modules() if LOCAL in m.__dict__} == local

    attempt(gptq_fx.ConfigError, batches(), resume_dir=str(folder / "stages"))
    other = batches()
    other[1]["input_ids"] = other[1]["input_ids"] + dist.get_rank()
    attempt(gptq_fx.CalibrationError, other)
    attempt(gptq_fx.WeightError, batches(), gptq_fx.GPTQConfig(group_size=8))
    norm = model.model.norm.weight
    norm.data[0] = torch.inf
    attempt(gptq_fx.CalibrationError, batches(), gptq_fx.GPTQConfig(lm_head=True))
    experts = split(folder, tp_size=2, ep_size=2)
    with pytest.raises(gptq_fx.CalibrationError) as error:
        gptq_fx.quantize(experts, None, batches(), progress=False)
    errors.append(str(error.value))
    owned = MODELS["llama"].build(**TINY)  # split by its user
    mesh = dist.init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    owned.lm_head.weight = nn.Parameter(distribute_tensor(owned.lm_head.weight, mesh, [Shard(0)]))
    with pytest.raises(gptq_fx.CalibrationError) as error:
        gptq_fx.quantize(owned, None, batches(), progress=False)
    errors.append(str(error.value))
    assert any(isinstance(p, DTensor) for p in model.parameters())
    return errors


@needs_transformers_5_23
def test_what_is_refused_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    MODELS["mixtral"].build(**{**TINY, "intermediate_size": 136}).save_pretrained(tmp_path / "dense")
    for resumed, other, cut, inf, experts, owned in on_ranks(2, refused, tmp_path):
        assert "resume_dir: the model is split between ranks" in resumed
        assert "rank 1 has other batches than rank 0" in other
        assert "experts.down_proj: the borders between ranks cut groups of 8 inputs into pieces of 4" in cut
        assert "lm_head: Inf among the activations" in inf
        assert "experts.gate_up_proj is split over DeviceMesh((ep=2)" in experts
        assert "lm_head.weight is split over" in owned and "Legal: by a tp_plan" in owned


def left(folder: Path) -> dict[str, str]:
    """What is left dense of a split model, and why."""
    config = gptq_fx.GPTQConfig(group_size=32)
    report = gptq_fx.quantize(split(folder), config, batches(), progress=False)
    return {site.name: site.reason for site in report.sites if site.scheme is None}


def test_stacks_whose_module_does_not_say_how_they_lie_stay_dense(tmp_path: Path) -> None:
    EXPERTS["llama4"].build(**TINY).save_pretrained(tmp_path / "dense")
    for reasons in on_ranks(2, left, tmp_path):
        for leaf in ("gate_up_proj", "down_proj"):
            reason = reasons[f"model.layers.0.feed_forward.experts.{leaf}"]
            assert re.search(r"used by (prim_)?to_local", reason)


def failing(folder: Path) -> None:
    """Rank 1 fails between two collectives of the model, of which the others know nothing."""
    add = Job.add

    def fail(self: Job, *args: Any) -> None:
        add(self, *args)
        if dist.get_rank() == 1:
            raise RuntimeError("the power is out")

    Job.add = fail  # type: ignore[method-assign]  # in this process only
    gptq_fx.quantize(split(folder), None, batches(), progress=False)


def test_a_rank_that_fails_alone_does_not_wait_for_the_others(tmp_path: Path) -> None:
    MODELS["llama"].build(**TINY).save_pretrained(tmp_path / "dense")
    (zero, _), (one, said) = run(2, failing, tmp_path)
    assert zero != 0 and one == 1
    assert "RuntimeError: the power is out" in said
