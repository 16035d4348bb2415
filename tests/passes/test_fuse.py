"""fuse: linears on one input become one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graphs import after
from models import MLP, dequantized, llama, logits, output, quantized, relative
from torch import Tensor, nn

from gptq_fx import passes
from gptq_fx.kernels.cpu import BLOCK

X = torch.randn(2, 3, 64)


class Attention(nn.Module):
    """q, k and v on one input, k without a bias where they are mixed."""

    def __init__(self, outputs: tuple[int, int, int] = (64, 32, 32), bias: str = "none") -> None:
        super().__init__()
        q, k, v = outputs
        self.q = nn.Linear(64, q, bias != "none")
        self.k = nn.Linear(64, k, bias == "all")
        self.v = nn.Linear(64, v, bias != "none")
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x).relu(), self.k(x).tanh(), self.v(x)], -1)


@pytest.mark.parametrize("bias", ["none", "all", "mixed"])
def test_q_k_v_become_one(bias: str) -> None:
    model = Attention(bias=bias)
    stage = after("fuse", model, X)
    assert stage.before == ["gptq.linear", "relu", "gptq.linear", "tanh", "gptq.linear", "cat"]
    added = {"none": (0, 0, 0), "all": (1, 1, 1), "mixed": (1, 0, 1)}[bias]
    q, k, v = (["getitem", *["add"] * n] for n in added)
    assert stage.after == ["gptq.linear", "split_with_sizes", *q, "relu", *k, "tanh", *v, "cat"]
    assert stage.changes == 1
    assert [[s.name for s in o.sites] for o in stage.plan.operands] == [["q", "k", "v"]]
    assert relative(stage.run(), output(dequantized(model), {"x": X})) <= 1e-6


@pytest.mark.parametrize("bias", [False, True])
def test_gate_and_up_become_one(bias: bool) -> None:
    model = MLP(bias=bias).requires_grad_(False)
    stage = after("fuse", model, X)
    add = ["add"] * bias
    assert stage.after == [
        *["gptq.linear", "split_with_sizes", "getitem", *add, "silu", "getitem", *add, "mul", "gptq.linear"]
    ]
    assert stage.changes == 1
    assert [[s.name for s in o.sites] for o in stage.plan.operands] == [["down"], ["gate", "up"]]
    assert relative(stage.run(), output(dequantized(model), {"x": X})) <= 1e-6


def unfused(model: nn.Module, x: Tensor = X, **options: object) -> None:
    stage = after("fuse", model, x, **options)
    assert stage.changes == 0
    assert stage.before == stage.after
    assert all(len(operand.sites) == 1 for operand in stage.plan.operands)


def test_different_inputs_are_not_fused() -> None:
    class Apart(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.q(x), self.k(x.relu()), self.v(x.tanh())], -1)

    unfused(Apart())


def test_different_schemes_are_not_fused() -> None:
    unfused(MLP().requires_grad_(False), dynamic={"up": {"bits": 8}})
    torch._dynamo.reset()
    unfused(MLP().requires_grad_(False), dynamic={"up": {"sym": False}})


def test_a_dense_sibling_is_not_fused() -> None:
    unfused(MLP().requires_grad_(False), dynamic={"-:up": {}})


def test_one_weight_used_twice_is_not_fused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(64, 64).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x).relu() * self.one(x)

    unfused(Twice())


def test_int4_is_fused_only_where_its_layout_can_be_cut() -> None:
    x = X.bfloat16()
    unfused(Attention((BLOCK + 16, BLOCK, BLOCK)).bfloat16(), x)
    torch._dynamo.reset()
    model = Attention((2 * BLOCK, BLOCK, 16)).bfloat16()  # the last may end anywhere
    stage = after("lower", model, x)
    assert stage.after.count("gptq.cpu_int4_linear") == 1
    assert relative(stage.run(), output(dequantized(model), {"x": x})) <= 1e-2


@pytest.mark.parametrize("bits, step", [(4, 8), (3, 32)])
def test_packed_zero_points_are_cut_only_between_words(bits: int, step: int) -> None:
    unfused(Attention((64 + step // 2, 32, 32)), bits=bits, sym=False)
    torch._dynamo.reset()
    model = Attention((64 + step, 32, 40))
    stage = after("fuse", model, X, bits=bits, sym=False)
    assert stage.changes == 1
    assert relative(stage.run(), output(dequantized(model, bits=bits, sym=False), {"x": X})) <= 1e-6


def test_parts_of_a_merged_pack_keep_their_numbers_in_eager() -> None:
    model, _ = quantized(Attention().bfloat16())
    wanted = {n: p.quantized_weight().codes() for n, p in model.named_parameters()}
    x = X.bfloat16()
    before = output(model, {"x": x})
    after("lower", model, x)
    assert all(torch.equal(p.quantized_weight().codes(), wanted[n]) for n, p in model.named_parameters())
    assert relative(output(model, {"x": x}), before) <= 1e-2


def test_an_input_that_changes_in_place_between_siblings() -> None:
    """q sees x, k and v see x + 1: they are no siblings, though the graph gives one node to all."""

    class Changing(Attention):
        def forward(self, x: Tensor) -> Tensor:
            x = x * 1
            q = self.q(x)
            x.add_(1)
            return torch.cat([q, self.k(x), self.v(x)], -1)

    model = Changing()
    stage = after("fuse", model, X)
    assert relative(stage.run(), output(dequantized(model), {"x": X})) <= 1e-6


def test_the_pass_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[list[str]] = []
    compiled = nn.Module.__call__
    monkeypatch.setenv("GPTQ_FX_SKIP", "fuse")
    run = passes.run

    def recording(gm: torch.fx.GraphModule, plan: passes.Plan) -> None:
        run(gm, plan)
        names.append([s.name for o in plan.operands if len(o.sites) > 1 for s in o.sites])

    monkeypatch.setattr(passes, "run", recording)
    model = llama(1)
    assert compiled is not None
    found = logits(torch.compile(model, backend="gptq", options={"inner_backend": "eager"}))
    assert names == [[]]
    assert relative(found, logits(dequantized(model))) <= 1e-5


def test_a_weight_with_siblings_in_two_places_is_right() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(64, 64, False).requires_grad_(False) for _ in "abc")

        def forward(self, x: Tensor) -> Tensor:
            y = F.silu(self.a(x)) * self.b(x)
            return F.silu(self.a(y)) * self.c(y)

    model = Shared()
    found = output(torch.compile(model, backend="gptq", options={"inner_backend": "eager"}), {"x": X})
    assert relative(found, output(dequantized(model), {"x": X})) <= 1e-5
