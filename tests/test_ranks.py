"""Calibration shared by ranks: the integers of one process, and no rank that waits for a dead one."""

from __future__ import annotations

import signal
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import EXPERTS, MODELS, ids, logits, relative
from ranks import kill_this_rank, on_ranks, run
from torch import Tensor, nn

import gptq_fx
from gptq_fx.job import Job
from gptq_fx.ranks import Ranks


def batches(count: int = 4, length: int = 24) -> list[dict[str, Tensor]]:
    return [{"input_ids": ids(count, 2, length)[i]} for i in range(count)]


def calibrated(
    name: str, group: Any = None, max_memory: str | None = None, **settings: Any
) -> tuple[nn.Module, gptq_fx.Report]:
    model = {**MODELS, **EXPERTS}[name].build(num_hidden_layers=1)
    config = gptq_fx.GPTQConfig(group_size=32, **settings)
    where = {"device": "cpu", "max_memory": max_memory} if max_memory else {}
    report = gptq_fx.quantize(model, config, batches(), progress=False, process_group=group, **where)
    return model, report


def held(name: str, settings: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor, list[Any]]:
    """Codes, logits, and (loss, tokens) of every site, on this rank of the world, or in this process."""
    group = dist.group.WORLD if dist.is_initialized() else None
    model, report = calibrated(name, group, **settings)
    codes = {
        n: p.quantized_weight().codes()
        for n, p in model.named_parameters()
        if isinstance(p, gptq_fx.QuantizedParameter)
    }
    return codes, logits(model), [(site.loss, site.tokens) for site in report.sites if site.loss is not None]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"sym": False}),
        ("mixtral", {"min_tokens": 8}),
        ("llama", {"sequential": False, "gptaq": 0.0}),
        ("llama", {"max_memory": "100MB"}),
        ("mixtral", {"min_tokens": 8, "max_memory": "100MB"}),
    ],
    ids=["llama", "mixtral", "all at once", "llama streamed", "mixtral streamed"],
)
def test_ranks_end_with_the_same_integers_which_are_those_of_one(name: str, settings: dict[str, Any]) -> None:
    codes, wanted, measured = held(name, settings)
    first, second = on_ranks(2, held, name, settings)
    assert codes.keys() == first[0].keys() == second[0].keys() and codes
    assert all(torch.equal(found, second[0][n]) for n, found in first[0].items())
    # Sums of Hessians in another order move a few codes that were near the middle of two.
    moved = [float((found != codes[n]).float().mean()) for n, found in first[0].items()]
    assert max(moved) < 0.01
    assert relative(first[1], wanted) < 0.02
    assert [tokens for _, tokens in first[2]] == [tokens for _, tokens in measured]
    assert [loss for loss, _ in first[2]] == pytest.approx([loss for loss, _ in measured], rel=0.02)


def pieces() -> list[Any]:
    ranks = Ranks(dist.group.WORLD)
    rows = torch.arange(14.0).view(7, 2)
    joined = ranks.join(rows[ranks.part(7)], 0, 7)
    turned = ranks.join(rows.T[:, ranks.part(7)], 1, 7)
    alone = ranks.join(rows[:1][ranks.part(1)], 0, 1)
    return [torch.equal(joined, rows), torch.equal(turned, rows.T), torch.equal(alone, rows[:1])]


def test_parts_are_joined_in_order_whether_or_not_they_are_equal() -> None:
    assert on_ranks(2, pieces) == [[True] * 3] * 2


def with_a_bad_batch() -> str:
    found = batches()
    if dist.get_rank() == 1:
        found[1]["input_ids"] = found[1]["input_ids"].clone().fill_(5)
    with pytest.raises(gptq_fx.CalibrationError) as other:
        gptq_fx.quantize(MODELS["llama"].build(), None, found, progress=False, process_group=dist.group.WORLD)
    with pytest.raises(gptq_fx.CalibrationError) as few:
        gptq_fx.quantize(
            MODELS["llama"].build(), None, batches(1), progress=False, process_group=dist.group.WORLD
        )
    return f"{other.value}\n{few.value}"


def test_ranks_that_do_not_agree_are_told_so() -> None:
    for said in on_ranks(2, with_a_bad_batch):
        assert "rank 1 has other batches than rank 0" in said and "found 1 batches" in said


def failing(how: str) -> None:
    """Rank 1 fails in the middle of the calibration."""
    add = Job.add

    def fail(self: Job, *args: Any) -> None:
        add(self, *args)
        if dist.get_rank() == 1 and len(self.hessians) and how == "killed":
            kill_this_rank()
        if dist.get_rank() == 1 and how == "raises":
            raise RuntimeError("the power is out")

    Job.add = fail  # type: ignore[method-assign]  # in this process only
    calibrated("llama", dist.group.WORLD)


@pytest.mark.parametrize("how", ["raises", "killed"])
def test_a_rank_that_fails_ends_the_job(how: str) -> None:
    (one, said), (other, _) = run(2, failing, how)
    assert one == 1 and other == (1 if how == "raises" else -signal.SIGKILL)
    if how == "raises":
        assert "CalibrationError: rank 1 failed: RuntimeError: the power is out" in said
    else:
        assert "Error" in said and "gloo" in said
