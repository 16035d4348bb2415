"""Lowered graphs traced on device "npu", by the real meta kernels of torch_npu: `make test-ascend`."""

import npu_emulation
import pytest
import test_ascend_models as models
import torch
from graphs import after
from test_ascend_models import here
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

__all__ = ["here"]  # the fixture, which pytest finds by its name

pytestmark = [
    pytest.mark.npu_stub,
    pytest.mark.skipif(not npu_emulation.is_real(), reason="torch_npu cannot be imported"),
]


def traced_on_the_npu(model, *inputs):
    """The ops of torch_npu in the lowered graph of model(*inputs), and the output, both on device "npu"."""
    graph = after("lower", model, *inputs, group_size=32, sym=False, kernel="ascend").graph
    graph.recompile()
    with FakeTensorMode(), torch.no_grad():
        inputs = [
            torch.empty(value.shape, dtype=value.dtype, device="npu")
            for value in (n.meta["example_value"] for n in graph.graph.nodes if n.op == "placeholder")
        ]
        traced = make_fx(graph)(*inputs)
    nodes = [node for node in traced.graph.nodes if str(node.target).startswith("npu.")]
    found = [node.meta["val"] for node in nodes]
    assert all(t.device.type == "npu" for value in found for t in torch.utils._pytree.tree_leaves(value))
    (output,) = torch.utils._pytree.tree_leaves(next(iter(reversed(traced.graph.nodes))).args)
    names = [str(node.target).removeprefix("npu.npu_").removesuffix(".default") for node in nodes]
    return names, output.meta["val"]


@pytest.mark.parametrize("dtype", models.DTYPES, ids=str)
def test_a_dense_block(dtype):
    names, y = traced_on_the_npu(models.make(dtype), torch.randn(2, 3, 128).to(dtype))
    assert names == ["weight_quant_batchmatmul"] * 4
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 128), dtype, "npu")


BLOCK = ["moe_init_routing_v2", "grouped_matmul", "swiglu", "grouped_matmul", "moe_finalize_routing"]


@pytest.mark.parametrize("dtype", models.DTYPES, ids=str)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_block_of_experts(name, dtype):
    """Without its router, whose indexing sets the device: that ends the process where there is none."""
    experts = models.sparse(name, dtype, top=2)[0].model.layers[0].mlp.experts
    ids, weights = torch.tensor([[0, 1], [3, 1], [2, 0]]), torch.rand(3, 2).to(dtype)
    names, y = traced_on_the_npu(experts, torch.randn(3, 64).to(dtype), ids, weights)
    assert names == BLOCK
    assert (y.shape, y.dtype, y.device.type) == ((3, 64), dtype, "npu")
