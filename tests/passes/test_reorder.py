"""reorder: act-order becomes one gather for each input and order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from graphs import after
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    EXPERTS,
    MLP,
    CountingBackend,
    Stack,
    act_ordered,
    decoder_text,
    dense_twin,
    llama,
    logits,
    output,
    quantized,
    relative,
)
from test_fuse import Attention
from tolerances import LINEAR
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import gptq_fx
from gptq_fx import GPTQConfig, QuantizedParameter, Scheme, SchemeMismatchError, experts, order
from gptq_fx.kernels import cpu, get_kernel
from gptq_fx.kernels.cpu import BLOCK
from gptq_fx.packed import PackedWeight
from gptq_fx.parameter import as_parameter

BF16 = torch.bfloat16
pytestmark = pytest.mark.skipif(cpu.available() is not None, reason="no kernel here is without act-order")


def x_of(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(BF16)


def attention(seeds: dict[str, int] | None = None) -> nn.Module:
    return act_ordered(Attention((BLOCK, BLOCK, 32)).to(BF16), seeds)


def close(found: Tensor, model: nn.Module, x: Tensor) -> None:
    wanted = output(dense_twin(model, torch.float64), {"x": x})
    assert relative(found, wanted) <= 2 * LINEAR[BF16]


def test_q_k_v_of_one_order_share_one_gather() -> None:
    model, x = attention(), x_of(2, 3, 64)
    stage = after("reorder", model, x)
    assert stage.before == ["gptq.linear", "relu", "gptq.linear", "tanh", "gptq.linear", "cat"]
    assert stage.after == ["index_select", *stage.before]
    assert stage.changes == 1
    assert [[s.name for s in o.sites] for o in stage.plan.orders] == [["q", "k", "v"]]
    close(stage.run(), model, x)


def test_they_still_become_one_linear() -> None:
    model, x = attention(), x_of(2, 3, 64)
    stage = after("lower", model, x)
    parts = ["getitem", "relu", "getitem", "tanh", "getitem", "cat"]
    assert stage.after == ["index_select", "gptq.cpu_int4_linear", "split_with_sizes", *parts]
    close(stage.run(), model, x)
    assert model.q.weight.packed.merged is model.v.weight.packed.merged is not None  # type: ignore[union-attr]
    close(output(model, {"x": x}), model, x)  # in eager code, on parts of the merged pack


def test_each_order_has_its_gather() -> None:
    model, x = attention({"k": 1}), x_of(2, 3, 64)
    stage = after("reorder", model, x)
    assert stage.after == [
        *["index_select", "gptq.linear", "relu", "index_select", "gptq.linear", "tanh", "gptq.linear", "cat"]
    ]
    assert stage.changes == 2
    assert [[s.name for s in o.sites] for o in stage.plan.orders] == [["q", "v"], ["k"]]
    close(stage.run(), model, x)


def test_one_order_on_two_inputs() -> None:
    model, x = act_ordered(MLP(64, 64).to(BF16)), x_of(5, 64)
    stage = after("reorder", model, x)
    assert stage.after == [
        *["index_select", "gptq.linear", "silu", "gptq.linear", "mul", "index_select", "gptq.linear"]
    ]
    assert (stage.changes, len(stage.plan.orders)) == (2, 1)
    close(stage.run(), model, x)


def test_an_input_that_changes_in_place_is_gathered_again() -> None:
    class Changing(Attention):
        def forward(self, x: Tensor) -> Tensor:
            x = x * 1
            q = self.q(x)
            x.add_(1)
            return torch.cat([q, self.k(x), self.v(x)], -1)

    model, x = act_ordered(Changing().to(BF16)), x_of(3, 64)
    stage = after("reorder", model, x)
    assert stage.changes == 2
    close(stage.run(), model, x)


def make_uneven(linear: nn.Module | Tensor) -> None:
    """One input moves from one group to another."""
    weight = linear.weight.packed.unpacked()  # type: ignore[union-attr]
    weight.g_idx[weight.g_idx.argmax()] = 0
    packed = PackedWeight(weight, Scheme(4, 32, desc_act=True), None)
    assert packed.order is None
    linear.weight = as_parameter(QuantizedParameter(packed, linear.weight.fqn))  # type: ignore[union-attr]


def nothing(model: nn.Module, x: Tensor) -> None:
    stage = after("reorder", model, x)
    assert stage.before == stage.after
    assert (stage.changes, stage.plan.orders) == (0, [])
    wanted = output(dense_twin(model, torch.float64), {"x": x})
    assert relative(stage.run(), wanted) <= 2 * LINEAR[x.dtype]


def test_no_gather_without_act_order_nor_for_a_kernel_that_reads_g_idx() -> None:
    nothing(quantized(Attention().to(BF16), group_size=32)[0], x_of(3, 64))
    torch._dynamo.reset()
    nothing(act_ordered(Attention()), x_of(3, 64).float())


def test_groups_of_different_sizes_stay_with_the_kernel_that_reads_g_idx() -> None:
    model, x = attention(), x_of(3, 64)
    for linear in (model.q, model.k, model.v):
        make_uneven(linear)
    nothing(model, x)
    report = gptq_fx.explain(model, x)
    assert {site.kernel for site in report.sites} == {"reference"}
    assert all("groups of different sizes" in site.reason for site in report.sites)


def test_the_report_says_so() -> None:
    report = gptq_fx.explain(attention(), x_of(3, 64))
    assert [(s.kernel, s.reason) for s in report.sites] == [
        ("cpu_int4", "act-order: one gather for each input")
    ] * 3


# --- experts


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_experts_each_in_its_own_order(name: str, implementation: str) -> None:
    block = EXPERTS[name].build(BF16, num_hidden_layers=1).model.layers[0].mlp  # type: ignore[union-attr,index]
    block.experts = act_ordered(block.experts)
    block.experts.config._experts_implementation = implementation
    x = x_of(1, 5, 64)
    stage = after("lower", block, x)
    gather = {"grouped_mm": "gptq.gather_grouped", "batched_mm": "gptq.gather_indexed"}[implementation]
    assert stage.after.count(gather) == 2
    kernels = {o.kernel.name for o in stage.plan.operands if o.sites[0].experts is not None}
    assert kernels == {"cpu_int4"}
    wanted = output(dense_twin(block), {"hidden_states": x})
    assert relative(stage.run(), wanted) <= 3 * LINEAR[BF16]
    assert relative(output(block, {"hidden_states": x}), wanted) <= 3 * LINEAR[BF16]  # eager code


def test_each_routing_has_its_gather() -> None:
    """Two stacks of one order on one input, whose rows meet other experts of either."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.randn(4, BLOCK, 64)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            one, other = (torch.tensor(e, dtype=torch.int32) for e in ([1, 2, 3, 6], [3, 4, 5, 6]))
            a, b = self.a.transpose(1, 2), self.b.transpose(1, 2)
            return torch._grouped_mm(x, a, one) + torch._grouped_mm(x, b, other)

    model, x = act_ordered(Twice().to(BF16)), x_of(6, 64)
    stage = after("reorder", model, x)
    assert (stage.changes, len(stage.plan.orders)) == (2, 1)
    assert relative(stage.run(), output(dense_twin(model), {"x": x})) <= 3 * LINEAR[BF16]


def test_a_block_has_no_place_for_a_gather() -> None:
    """So transformers' experts in act-order keep the grouped form, and a block in one call its g_idx."""
    block = EXPERTS["qwen3_moe"].build(BF16, num_hidden_layers=1).model.layers[0].mlp  # type: ignore[union-attr,index]
    ordered = act_ordered(block.experts)
    experts.install(ordered)
    assert not hasattr(ordered, experts.ACTIVATION)
    experts.install(other := quantized(block, group_size=32)[0].experts)  # type: ignore[arg-type]
    assert hasattr(other, experts.ACTIVATION)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = ordered

        def forward(self, x: Tensor) -> Tensor:
            ids = torch.arange(2 * len(x)).view(-1, 2) % 4
            weights = torch.full(ids.shape, 0.5, dtype=x.dtype)
            stacks = self.experts.gate_up_proj, self.experts.down_proj
            return experts.quantized_experts(x, ids, weights, *stacks, None, None, "silu")

    model, x = Block(), x_of(6, 64)
    wanted = output(dense_twin(model), {"x": x})
    for stack in (ordered.gate_up_proj, ordered.down_proj):
        stack.packed.lower(get_kernel("cpu_int4"))  # type: ignore[union-attr]
        assert stack.packed.sorted  # type: ignore[union-attr]
    assert relative(output(model, {"x": x}), wanted) <= 3 * LINEAR[BF16]
    stage = after("lower", model, x)
    assert {o.kernel.name for o in stage.plan.operands} == {"reference"}
    assert not stage.plan.orders
    assert relative(stage.run(), wanted) <= 3 * LINEAR[BF16]


@settings(max_examples=20, deadline=None)
@given(
    counts=st.lists(st.integers(0, 7), min_size=1, max_size=5),
    spare=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_rows_are_gathered_by_the_order_of_their_expert(counts: list[int], spare: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    orders = torch.stack([torch.randperm(8, generator=generator) for _ in counts])
    ends = torch.tensor(counts).cumsum(0)
    x = torch.randn(int(ends[-1]) + spare, 8, generator=generator)
    ids = [e for e, count in enumerate(counts) for _ in range(count)]
    found = order.gather_grouped(x, orders, ends.to(torch.int32))
    assert found.shape == x.shape
    for row, e in enumerate(ids):
        assert torch.equal(found[row], x[row][orders[e]])
    which = torch.tensor(ids, dtype=torch.int64)
    assert torch.equal(order.gather_indexed(x[: len(ids)], orders, which), found[: len(ids)])


# --- the bytes


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("stacked", [False, True])
def test_sorted_and_back_is_the_identity(bits: int, sym: bool, stacked: bool) -> None:
    shape = (3, 32, 64) if stacked else (32, 64)
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(shape).to(BF16), requires_grad=False)
    weight = act_ordered(model, bits=bits, sym=sym).weight.packed.unpacked()  # type: ignore[union-attr]
    packed = PackedWeight(weight, Scheme(bits, 32, sym, True), None)
    for kernel in ("reference", "cpu_int4") if bits <= 4 else ("reference",):
        packed.lower(get_kernel(kernel), sorted=True)
        assert not packed.layout.scheme.desc_act and packed.spec.scheme.desc_act
        for a, b in zip(packed.unpacked().tensors, weight.tensors, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)


def test_equal_orders_are_one_object_and_others_are_not() -> None:
    model = attention({"k": 1})
    q, k, v = (getattr(model, n).weight.packed for n in "qkv")
    assert q.order is v.order is not k.order
    assert v.to(None, torch.float32).order is q.order


def test_static_groups_are_in_no_order() -> None:
    """act-order decides only the order of quantization there: groups lie in place."""
    model = llama(1, BF16)
    config = GPTQConfig(desc_act=True, group_size=32, static_groups=True)
    gptq_fx.quantize(model, config, [decoder_text()], progress=False)
    assert not any(p.scheme.desc_act for p in model.parameters() if isinstance(p, QuantizedParameter))
    eager = logits(model)
    model.compile(backend="gptq", options={"inner_backend": "eager"})
    assert relative(logits(model), eager) <= 1e-2


# --- graphs that serve many layers


def stack(*down: int) -> nn.Module:
    """Layers that have one order for gate and up, whatever it is."""
    model = Stack(len(down), broken=True).to(BF16)
    for i, layer in enumerate(model.layers):
        model.layers[i] = act_ordered(layer, {"gate": i, "up": i if down[i] == 0 else i + 10, "down": i + 20})
    return model


def test_one_graph_gathers_for_every_layer_in_its_own_order() -> None:
    model, x = stack(0, 0, 0), x_of(4, 64)
    counting = CountingBackend()
    found = output(torch.compile(model, backend=counting), {"x": x})
    assert counting.calls < 6  # layers share graphs
    close(found, model, x)


def test_a_layer_whose_orders_differ_cannot_take_the_graph_of_one_where_they_agree() -> None:
    model, x = stack(0, 1), x_of(4, 64)
    with pytest.raises(
        SchemeMismatchError, match=r"layers\.1\.gate and layers\.1\.up differ in their act-order"
    ):
        output(torch.compile(model, backend="gptq", options={"inner_backend": "eager"}), {"x": x})
    torch._dynamo.reset()
    reference = {"inner_backend": "eager", "kernel": "reference"}
    close(output(torch.compile(model, backend="gptq", options=reference), {"x": x}), model, x)


def test_a_layer_that_cannot_be_sorted_gets_a_graph_of_its_own() -> None:
    model, x = stack(0, 0), x_of(4, 64)
    make_uneven(model.layers[1].down)  # type: ignore[union-attr,index]
    found = output(torch.compile(model, backend="gptq", options={"inner_backend": "eager"}), {"x": x})
    close(found, model, x)


def test_calibrated_saved_loaded_and_compiled(tmp_path: Path) -> None:
    model = llama(2, BF16)
    gptq_fx.quantize(model, GPTQConfig(desc_act=True, group_size=32), [decoder_text()], progress=False)
    wanted = logits(dense_twin(model, torch.float64))
    gptq_fx.save_pretrained(model, tmp_path / "out")
    loaded = gptq_fx.from_pretrained(tmp_path / "out")
    loaded.compile(backend="gptq", options={"inner_backend": "eager"})
    assert relative(logits(loaded), wanted) <= 5e-2
    layer = loaded.model.layers[1]
    kernels = {p.packed.kernel.name for p in loaded.parameters() if isinstance(p, QuantizedParameter)}
    assert kernels == {"cpu_int4"}
    assert layer.self_attn.q_proj.weight.packed.order is layer.self_attn.k_proj.weight.packed.order
    gptq_fx.save_pretrained(loaded, tmp_path / "again")
    for name, parameter in gptq_fx.from_pretrained(tmp_path / "again").named_parameters():
        if isinstance(parameter, QuantizedParameter):
            one, other = parameter.quantized_weight(), loaded.get_parameter(name).quantized_weight()  # type: ignore[attr-defined]
            assert all(
                a is b is None or torch.equal(a, b) for a, b in zip(one.tensors, other.tensors, strict=True)
            )


def test_inductor_makes_the_gather_part_of_what_computes_the_input() -> None:
    """Behind a norm and behind an activation: as many kernels as without act-order."""

    class Block(nn.Module):
        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.norm, self.mlp = nn.RMSNorm(64, dtype=BF16).requires_grad_(False), mlp

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(self.norm(x))

    mlp, counts = MLP().to(BF16).requires_grad_(False), []
    for model in (quantized(mlp, group_size=32)[0], act_ordered(mlp, {"down": 1})):
        torch._dynamo.reset()
        with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
            found, (code,) = run_and_get_code(torch.compile(Block(model), backend="gptq"), x_of(4, 64))
        counts.append(code.count("= async_compile."))
        assert relative(found, output(dense_twin(Block(model)), {"x": x_of(4, 64)})) <= 2 * LINEAR[BF16]
        assert ("index_select" in code) == (len(counts) == 2)
    assert counts[0] == counts[1] > 0


def test_a_state_dict_cannot_make_a_weight_unsortable() -> None:
    """Graphs are guarded by whether it can be sorted."""
    model, other = attention(), attention()
    make_uneven(other.q)
    with pytest.raises(RuntimeError, match=r"found .* in groups of different sizes .* in the state dict"):
        model.load_state_dict(other.state_dict())
    model.load_state_dict(attention({"q": 5}).state_dict())
    x = x_of(3, 64)
    close(
        output(torch.compile(model, backend="gptq", options={"inner_backend": "eager"}), {"x": x}), model, x
    )
