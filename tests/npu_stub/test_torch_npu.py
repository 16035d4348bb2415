"""What only the real torch_npu can tell, without an NPU: `make test-ascend`. Skipped where it is not."""

from dataclasses import replace

import npu_emulation
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from gptq_fx import Scheme
from gptq_fx.kernels import LinearSpec, ascend, choose_kernel, default_inner_backend
from gptq_fx.kernels.ascend_experts import ascend_experts, ascend_grouped_linear, ascend_indexed_linear
from gptq_fx.kernels.block import ACTIVATIONS
from gptq_fx.options import Options

pytestmark = [
    pytest.mark.npu_stub,
    pytest.mark.skipif(not npu_emulation.is_real(), reason="torch_npu cannot be imported"),
]
DTYPES = [torch.float16, torch.bfloat16]
STACKS = [(2, 64), (3, 64), (4, 64), (4, -1), (8, -1)]
GRIDS = [(bits, size, sym) for bits in (2, 3, 4, 8) for size in (-1, 32, 128) for sym in (True, False)]


def npu_spec(bits=4, size=64, sym=True, dtype=torch.float16, N=64, act=False):
    return LinearSpec(256, N, Scheme(bits, size, sym, act), dtype, "npu")


def fake_pack(spec, *lead):
    """Tensors on the NPU that look like those of `pack`; in a FakeTensorMode."""
    K, N, G = spec.in_features, spec.out_features, spec.groups
    packed = (torch.int8, N) if spec.scheme.bits == 8 else (torch.int32, N // 8)
    grid = torch.empty(*lead, G, N, dtype=spec.dtype, device="npu")
    return (
        torch.empty(*lead, K, packed[1], dtype=packed[0], device="npu"),
        grid,
        None if spec.scheme.sym and not lead else torch.empty_like(grid),
        torch.empty(K, dtype=torch.int32, device="npu") if spec.scheme.desc_act else None,
    )


@pytest.mark.parametrize("name", npu_emulation.SCHEMAS)
def test_the_schema_is_the_one_we_test_with(name):
    schema = getattr(torch.ops.npu, name).default._schema
    assert str(schema) == f"npu::{name}{npu_emulation.SCHEMAS[name]}"


def test_the_kernel_is_available_and_chosen():
    assert ascend.available() is None
    assert choose_kernel(npu_spec()) == (ascend.ASCEND, "")
    kernel, why = choose_kernel(npu_spec(N=60))
    assert kernel.name == "reference"
    assert "ascend: out_features 60 is not a multiple of 8" in why


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "size", "sym"), GRIDS)
def test_its_meta_kernel_takes_our_call_on_the_npu(bits, size, sym, dtype):
    for act in (False, True):
        spec = npu_spec(bits, size, sym, dtype, act=act)
        with FakeTensorMode():
            tensors = fake_pack(spec)
            for rows in ((1,), (70,), (2, 3), (2, 2, 2)):
                for bias in (None, torch.empty(64, dtype=dtype, device="npu")):
                    x = torch.empty(*rows, 256, dtype=dtype, device="npu")
                    y = ascend.ASCEND.call(x, tensors, bias, spec)
                    assert (y.shape, y.dtype, y.device.type) == ((*rows, 64), dtype, "npu")


def empty(*shape, dtype=torch.float16):
    return torch.empty(*shape, dtype=dtype, device="npu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "size"), STACKS)
def test_its_meta_kernels_take_our_calls_for_experts(bits, size, dtype):
    spec = npu_spec(bits, size, False, dtype)
    assert ascend.supports_stack(replace(spec, experts=4)) is None
    with FakeTensorMode():
        tensors, x = fake_pack(spec, 4), empty(12, 256, dtype=dtype)
        for y in (
            ascend_grouped_linear(x, *tensors, empty(4, dtype=torch.int32), ascend.op_group(spec)),
            ascend_indexed_linear(x, *tensors, empty(12, dtype=torch.int64), ascend.op_group(spec)),
        ):
            assert (y.shape, y.dtype, y.device.type) == ((12, 64), dtype, "npu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "size"), STACKS)
# gpt_oss's indexes a tensor, for which Python's binding sets the device: that ends the process without one
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS.keys() - {"gpt_oss"}))
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_its_meta_kernels_take_our_calls_for_a_block(bits, size, dtype, activation, bias):
    up = npu_spec(bits, size, False, dtype, N=512)
    down = replace(up, out_features=256)
    with FakeTensorMode():
        stacks = list(fake_pack(up, 4)), list(fake_pack(down, 4))
        biases = (empty(4, 512, dtype=dtype), empty(4, 256, dtype=dtype)) if bias else (None, None)
        groups = [ascend.op_group(up)], [ascend.op_group(down)]
        for tokens in (1, 4096):
            x = empty(tokens, 256, dtype=dtype)
            routed = empty(tokens, 2, dtype=torch.int64), empty(tokens, 2, dtype=torch.float32)
            y = ascend_experts(x, *routed, *stacks, *biases, activation, *groups)
            assert (y.shape, y.dtype, y.device.type) == ((tokens, 256), dtype, "npu")


def test_tracing_a_block_on_the_npu_with_any_number_of_tokens():
    up = npu_spec(sym=False, N=512, dtype=torch.bfloat16)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        stacks = list(fake_pack(up, 4)), list(fake_pack(replace(up, out_features=256), 4))
        with mode.shape_env.ignore_fresh_unbacked_symbols():
            tokens = mode.shape_env.create_unbacked_symint()
        inputs = (
            empty(tokens, 256, dtype=torch.bfloat16),
            empty(tokens, 2, dtype=torch.int64),
            empty(tokens, 2, dtype=torch.bfloat16),
        )
        graph = make_fx(lambda *inputs: ascend_experts(*inputs, *stacks, None, None, "silu", [64], [64]))(
            *inputs
        )
    names = [str(node.target) for node in graph.graph.nodes if str(node.target).startswith("npu.")]
    ops = "moe_init_routing_v2", "grouped_matmul", "swiglu", "grouped_matmul", "moe_finalize_routing"
    assert names == [f"npu.npu_{op}.default" for op in ops]
    (result,) = [node for node in graph.graph.nodes if "finalize" in str(node.target)]
    assert result.meta["val"].device.type == "npu"
    assert not isinstance(result.meta["val"].shape[0], int)
    assert result.meta["val"].shape[1] == 256


def test_the_shape_of_a_batch_is_why_x_is_flattened():
    """Its meta kernel gives a wrong shape for batches of x: if that changes, ascend_linear gets simpler."""
    spec = npu_spec()
    with FakeTensorMode():
        packed, scales, _, _ = fake_pack(spec)
        x = torch.empty(2, 3, 256, dtype=torch.float16, device="npu")
        y = torch.ops.npu.npu_weight_quant_batchmatmul(x, packed, scales, antiquant_group_size=64)
    assert y.shape != (2, 3, 64)


def test_tracing_on_the_npu_with_any_number_of_rows():
    spec = npu_spec(sym=False, act=True)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        tensors = fake_pack(spec)
        with mode.shape_env.ignore_fresh_unbacked_symbols():
            rows = mode.shape_env.create_unbacked_symint()
        x = torch.empty(rows, 256, dtype=torch.float16, device="npu")
        graph = make_fx(lambda x, *t: ascend.ASCEND.call(x, t, None, spec))(x, *tensors)
    op = torch.ops.npu.npu_weight_quant_batchmatmul.default
    (call,) = [node for node in graph.graph.nodes if node.target is op]
    value = call.meta["val"]
    assert value.device.type == "npu"
    assert value.shape == (rows, 64)
    assert not isinstance(value.shape[0], int)


def test_a_call_that_the_schema_does_not_know_raises():
    with FakeTensorMode(), pytest.raises(RuntimeError, match="group_size"):
        packed, scales, _, _ = fake_pack(npu_spec())
        x = torch.empty(5, 256, dtype=torch.float16, device="npu")
        torch.ops.npu.npu_weight_quant_batchmatmul(x, packed, scales, group_size=64)


@pytest.mark.parametrize("name", ["npu", "npugraph_ex", "npugraphs"])
def test_its_compilers_can_be_the_inner_backend(name):
    assert Options.parse({"inner_backend": name}, None).inner_backend == name


def test_npugraph_ex_is_the_default_on_the_npu():
    assert default_inner_backend(["npu"]) == "npugraph_ex"
    assert default_inner_backend(["cpu"]) == "inductor"


def test_where_its_part_of_inductor_is_set_up():
    """In the class that the backend calls for "inductor"."""
    assert torch._TorchCompileInductorWrapper.__call__.__module__.startswith("torch_npu.")
