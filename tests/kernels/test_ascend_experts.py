"""Stacks of experts by the ops of torch_npu, emulated: sorted rows, rows with ids, whole blocks."""

from dataclasses import replace

import pytest
import test_contract_experts as contract
import torch
from test_ascend import HERE, emulated, every_dtype, every_grid, every_width, make, make_spec, same
from tolerances import LINEAR, relative_error
from torch.fx.experimental.proxy_tensor import make_fx

from gptq_fx import QuantizedWeight
from gptq_fx.kernels import ascend, ascend_layout
from gptq_fx.kernels.ascend_experts import (
    ascend_experts,
    ascend_grouped_linear,
    ascend_indexed_linear,
)
from gptq_fx.kernels.block import ACTIVATIONS

__all__ = ["emulated"]  # the fixture, which pytest finds by its name

GRIDS = [(2, 64), (3, 32), (4, 32), (4, 64), (4, 128), (4, -1), (8, -1)]
every_stack = pytest.mark.parametrize(("bits", "size"), GRIDS)


@pytest.mark.parametrize(
    ("spec", "experts", "reason"),
    [
        (make_spec(bits=8), 4, "8-bit weights with one scale per output only, not with groups"),
        (make_spec(bits=8, size=-1), 4, None),
        (make_spec(act=True), 4, "act-order: each expert would need its own order of the features of x"),
        (make_spec(), 1024, None),
        (make_spec(), 1025, "1025 experts are more than 1024"),
        (make_spec(N=20), 4, "out_features 20 is not a multiple of 8"),
        (make_spec(dtype=torch.float32), 4, "x must be float16 or bfloat16"),
    ],
)
def test_what_it_refuses(spec, experts, reason):
    found = ascend.supports_stack(replace(spec, experts=experts))
    assert found is None if reason is None else reason in found


def test_what_it_refuses_of_blocks():
    up, down = replace(make_spec(64, 192), experts=4), replace(make_spec(96, 64, size=32), experts=4)
    assert ascend.supports_block(up, down, "silu") is None
    assert ascend.supports_block(up, down, "relu").startswith("activation 'relu' is none of silu")
    eight = replace(make_spec(96, 64, 8, 32), experts=4)
    assert ascend.supports_block(up, eight, "silu").startswith("down: npu_grouped_matmul takes 8-bit weights")
    assert ascend.supports_block(eight, down, "silu").startswith("gate_up: npu_grouped_matmul takes 8-bit")


# --- linears


ENDS = [[3, 3, 8, 12], [0, 0, 0, 12], [12, 12, 12, 12], [1, 2, 3, 7], [0, 0, 0, 0]]


@every_stack
@every_grid
@every_dtype
def test_rows_sorted_by_expert(bits, size, sym, dtype):
    spec = make_spec(bits=bits, size=size, sym=sym, dtype=dtype)
    weight = make(spec, experts=4)
    tensors = ascend_layout.pack(weight, spec)
    dense = weight.dequantize(torch.float64)
    for ends in ENDS:
        x = torch.randn(12, spec.in_features).to(dtype)
        y = ascend_grouped_linear(x, *tensors, torch.tensor(ends, dtype=torch.int32), ascend.op_group(spec))
        assert (y.shape, y.dtype) == ((12, spec.out_features), dtype)
        assert not y[ends[-1] :].any()
        starts = [0, *ends[:-1]]
        expected = torch.cat(
            [x[a:b].double() @ dense[e].mT for e, (a, b) in enumerate(zip(starts, ends, strict=True))]
        )
        if ends[-1]:
            assert relative_error(y[: ends[-1]], expected) <= LINEAR[dtype]


@every_stack
@every_grid
@every_dtype
def test_rows_with_ids(bits, size, sym, dtype):
    spec = make_spec(bits=bits, size=size, sym=sym, dtype=dtype)
    weight = make(spec, experts=4)
    tensors, dense = ascend_layout.pack(weight, spec), weight.dequantize(torch.float64)
    for ids in ([2], [3, 0, 0, 3, 1], [0] * 7):
        x, ids = torch.randn(len(ids), spec.in_features).to(dtype), torch.tensor(ids)
        y = ascend_indexed_linear(x, *tensors, ids, ascend.op_group(spec))
        assert (y.shape, y.dtype) == ((len(ids), spec.out_features), dtype)
        assert relative_error(y, torch.einsum("sk,snk->sn", x.double(), dense[ids])) <= LINEAR[dtype]


@pytest.mark.parametrize(("bits", "size"), [(4, 32), (4, -1), (8, 32), (8, -1)])
@every_dtype
def test_the_contract_of_every_kernel_for_stacks(bits, size, dtype):
    for sym in (True, False):
        contract.test_rows_sorted_by_expert(HERE, "cpu", bits, size, sym, dtype)
        contract.test_rows_with_ids(HERE, "cpu", bits, size, sym, dtype)
    for activation in ACTIVATIONS:
        contract.test_blocks(HERE, "cpu", bits, size, dtype, activation, True)


def test_no_rows():
    spec = make_spec()
    tensors = ascend_layout.pack(make(spec, experts=4), spec)
    x = torch.empty(0, spec.in_features, dtype=spec.dtype)
    for op, which in ((ascend_grouped_linear, torch.zeros(4)), (ascend_indexed_linear, torch.zeros(0))):
        y = op(x, *tensors, which.to(torch.int32), 64)
        assert y.shape == (0, spec.out_features)


@every_width
@every_grid
def test_the_pack_of_a_stack_is_the_stack_of_the_packs(bits, sym):
    spec = make_spec(bits=bits, sym=sym)
    stack = make(spec, experts=3)
    tensors = ascend_layout.pack(stack, spec)
    columns = slice(16, 40) if bits == 8 else slice(2, 5)
    assert same(ascend_layout.unpack(tensors, spec).tensors, stack.tensors)
    assert same(
        ascend_layout.cut(tensors, spec, 16, 40),
        (tensors[0][..., columns], tensors[1][..., 16:40], tensors[2][..., 16:40], None),
    )
    for e in range(3):
        qzeros = None if sym else stack.qzeros[e]
        one = QuantizedWeight(bits, 256, stack.qweight[e], stack.scales[e], qzeros)
        packed, scales, offsets, _ = ascend_layout.pack(one, spec)
        assert torch.equal(packed, tensors[0][e])
        assert torch.equal(scales, tensors[1][e])
        assert torch.equal(torch.zeros_like(scales) if sym else offsets, tensors[2][e])


# --- blocks


def activate(h, activation):
    """[*, 2 I] -> [*, I] in float64."""
    if activation == "gpt_oss":
        gate, up = h[..., ::2].clamp(max=7), h[..., 1::2].clamp(-7, 7)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    gate, up = h.chunk(2, -1)
    if activation == "silu":
        return gate * torch.sigmoid(gate) * up
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    return 0.5 * gate * (1 + torch.tanh(inner)) * up


class Block:
    """A block of E experts, packed, and what it should give. H features, `inner` between the two linears."""

    def __init__(self, E, bits=4, size=32, sym=False, dtype=torch.float16, bias=False, H=64, inner=96):
        self.up_spec = replace(make_spec(H, 2 * inner, bits, size, sym, dtype), experts=E)
        self.down_spec = replace(make_spec(inner, H, bits, size, sym, dtype), experts=E)
        self.up, self.down = make(self.up_spec, E), make(self.down_spec, E)
        self.biases = (
            (torch.randn(E, 2 * inner).to(dtype), torch.randn(E, H).to(dtype)) if bias else (None, None)
        )
        self.dtype, self.E = dtype, E

    def arguments(self, x, ids, weights, activation="silu"):
        up, down = ascend_layout.pack(self.up, self.up_spec), ascend_layout.pack(self.down, self.down_spec)
        groups = [ascend.op_group(self.up_spec)], [ascend.op_group(self.down_spec)]
        return (x, ids, weights, list(up), list(down), *self.biases, activation, *groups)

    def exact(self, x, ids, weights, activation="silu"):
        """Expert by expert, in float64."""
        result = torch.zeros(x.shape, dtype=torch.float64)
        up_bias, down_bias = (None if b is None else b.double() for b in self.biases)
        for e in range(self.E):
            t, j = (ids == e).nonzero(as_tuple=True)
            h = x[t].double() @ self.up.expert(e).dequantize(torch.float64).T
            h = activate(h if up_bias is None else h + up_bias[e], activation)
            y = h @ self.down.expert(e).dequantize(torch.float64).T
            y = y if down_bias is None else y + down_bias[e]
            result.index_add_(0, t, y * weights[t, j].double().unsqueeze(-1))
        return result

    def check(self, x, ids, weights, activation="silu"):
        y = ascend_experts(*self.arguments(x, ids, weights, activation))
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        # two linears, one behind the other, and the rounding of what lies between them
        assert relative_error(y, self.exact(x, ids, weights, activation)) <= 2 * LINEAR[self.dtype]


def routed(tokens, top, experts, dtype, H=64):
    ids = torch.rand(tokens, experts).topk(top).indices
    return torch.randn(tokens, H).to(dtype), ids, torch.rand(tokens, top)


@pytest.mark.parametrize(("tokens", "top"), [(1, 1), (1, 4), (7, 2), (300, 8), (4096, 2)])
@pytest.mark.parametrize("bits", [4, 8])
@every_grid
@every_dtype
def test_blocks(tokens, top, bits, sym, dtype):
    """As many tokens as a decode step and a prefill have; all experts; experts without tokens."""
    block = Block(8, bits, 32 if bits == 4 else -1, sym, dtype)
    x, ids, weights = routed(tokens, top, 8 if top > 4 else 5, dtype)
    block.check(x, ids, weights)
    block.check(x, ids.to(torch.int32), weights.to(dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@every_dtype
def test_activations_and_biases(activation, bias, dtype):
    Block(6, dtype=dtype, bias=bias).check(*routed(9, 3, 6, dtype), activation)


@every_dtype
def test_one_expert_and_all_tokens_to_one(dtype):
    Block(1, dtype=dtype, bias=True).check(*routed(5, 1, 1, dtype))
    x, ids, weights = routed(5, 1, 8, dtype)
    for e in (0, 7):
        Block(8, dtype=dtype).check(x, torch.full_like(ids, e), weights)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@every_dtype
def test_an_id_of_E_is_no_expert(bias, dtype):
    block = Block(4, dtype=dtype, bias=bias)
    x, ids, weights = routed(20, 2, 4, dtype)
    ids = torch.where(torch.rand(20, 2) < 0.5, 4, ids)
    ids[3] = 4
    block.check(x, ids, weights)
    y = ascend_experts(*block.arguments(x, ids, weights))
    assert not y[3].any()
    assert not ascend_experts(*block.arguments(x, torch.full_like(ids, 4), weights)).any()


def test_what_is_for_no_expert_may_overflow_in_the_last_one():
    block = Block(4)
    x, ids, weights = routed(6, 2, 4, torch.float16)
    x[2], ids[2] = 60000.0, 4
    y = ascend_experts(*block.arguments(x, ids, weights))
    assert not y[2].any()
    assert relative_error(y, block.exact(x, ids, weights)) <= 2 * LINEAR[torch.float16]


def test_no_tokens():
    x, ids, weights = routed(1, 2, 4, torch.float16)
    assert ascend_experts(*Block(4).arguments(x[:0], ids[:0], weights[:0])).shape == (0, 64)


# --- compilers


def npu_ops(graph):
    names = [str(n.target).removesuffix(".default") for n in graph.graph.nodes if n.op == "call_function"]
    return [name.removeprefix("npu.npu_") for name in names if name.startswith(("npu.", "gptq."))]


ROUTE, LINEAR_OP, BACK = "moe_init_routing_v2", "grouped_matmul", "moe_finalize_routing"


@pytest.mark.parametrize(
    ("activation", "between"), [("silu", ["swiglu"]), *((name, []) for name in ACTIVATIONS if name != "silu")]
)
def test_tracing_a_block_shows_the_ops_of_torch_npu(activation, between):
    """With any number of tokens in one graph."""
    block = Block(8, dtype=torch.bfloat16)
    arguments = block.arguments(*routed(7, 2, 8, torch.bfloat16), activation)

    def call(x, ids, weights):
        return ascend_experts(x, ids, weights, *arguments[3:])

    graph = make_fx(call, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*arguments[:3])
    assert npu_ops(graph) == [ROUTE, LINEAR_OP, *between, LINEAR_OP, BACK]
    for tokens in (2, 40):
        more = routed(tokens, 2, 8, torch.bfloat16)
        assert torch.equal(graph(*more), call(*more))


def test_tracing_linears_shows_the_ops_of_torch_npu():
    spec = make_spec(dtype=torch.bfloat16)
    tensors = ascend_layout.pack(make(spec, experts=4), spec)
    x, ends, ids = torch.randn(12, 256).bfloat16(), torch.tensor([3, 3, 8, 12]), torch.arange(12) % 4
    for op, which, expected in (
        (ascend_grouped_linear, ends, [LINEAR_OP]),
        (ascend_indexed_linear, ids, [ROUTE, LINEAR_OP]),
    ):

        def call(x, which):
            return op(x, *tensors, which, 64)  # noqa: B023

        graph = make_fx(call, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x, which)
        assert npu_ops(graph) == expected


def test_opcheck():
    spec = make_spec(sym=False)
    tensors = ascend_layout.pack(make(spec, experts=4), spec)
    x, ends = torch.randn(12, 256).half(), torch.tensor([3, 3, 8, 12], dtype=torch.int32)
    torch.library.opcheck(ascend_grouped_linear, (x, *tensors, ends, 64))
    torch.library.opcheck(ascend_indexed_linear, (x, *tensors, torch.arange(12) % 4, 64))
    for bias in (False, True):
        arguments = Block(6, bias=bias).arguments(*routed(9, 3, 6, torch.float16))
        torch.library.opcheck(ascend_experts, arguments)


# --- the emulation


def finalize(rows, places, weights, mode=2):
    back = torch.ops.npu.npu_moe_finalize_routing
    return back(rows, None, None, None, weights, places, None, drop_pad_mode=mode)


def test_indices_by_token_go_with_mode_2_only():
    """Those of npu_moe_init_routing_v2; mode 0, the default, takes those of v1, and would say nothing."""
    x, ids = torch.randn(3, 8).half(), torch.tensor([[0, 1], [1, 0], [1, 0]], dtype=torch.int32)
    rows, places, _, _ = torch.ops.npu.npu_moe_init_routing_v2(
        x,
        ids,
        expert_num=2,
        active_expert_range=[0, 2],
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
    )
    half = torch.full((3, 2), 0.5).half()
    assert torch.equal(finalize(rows, places, half), x)
    assert not torch.equal(finalize(rows, places, half, mode=0), x)


def test_rows_of_experts_out_of_range_are_not_written():
    """Why ascend_experts leaves no row out: what the op does not write is whatever was there."""
    x, ids = torch.randn(3, 8).half(), torch.tensor([[0, 2], [2, 1], [1, 0]], dtype=torch.int32)
    known = {"expert_tokens_num_type": 1, "expert_tokens_num_flag": True}
    rows, places, counts, _ = torch.ops.npu.npu_moe_init_routing_v2(
        x, ids, expert_num=3, active_expert_range=[0, 2], **known
    )
    assert (places.tolist(), counts.tolist()) == ([0, -1, -1, 2, 3, 1], [2, 2])
    assert torch.equal(rows[:4], x[[0, 2, 1, 2]])
    assert rows[4:].isnan().all()
    with pytest.raises(RuntimeError, match="leaves the rows"):
        finalize(rows, places, torch.ones(3, 2).half())


def test_what_the_emulation_refuses():
    x, ids = torch.randn(3, 8).half(), torch.zeros(3, 2, dtype=torch.int32)
    route, known = torch.ops.npu.npu_moe_init_routing_v2, {"expert_num": 2, "active_expert_range": [0, 2]}
    with pytest.raises(RuntimeError, match="counts only"):
        route(x, ids, **known)
    known |= {"expert_tokens_num_type": 1, "expert_tokens_num_flag": True}
    with pytest.raises(RuntimeError, match=r"expert_idx is torch\.int64"):
        route(x, ids.long(), **known)
    with pytest.raises(RuntimeError, match="does not exist"):
        route(x, ids + 2, **known)
    rows, places, _, _ = route(x, ids, **known)
    with pytest.raises(RuntimeError, match=r"scales is torch\.float32"):
        finalize(rows, places, torch.ones(3, 2))
    with pytest.raises(RuntimeError, match=r"expanded_src_to_dst_row is torch\.int64"):
        finalize(rows, places.long(), torch.ones(3, 2).half())
    with pytest.raises(RuntimeError, match="strided"):
        torch.ops.npu.npu_swiglu(torch.randn(4, 6).half().T)
