"""What every kernel with ops for stacks of experts must do, against float64 on the dequantized weights.

Those of a GPU or NPU run under its marker, as in test_contract.py.
"""

import itertools
import zlib
from dataclasses import replace

import pytest
import torch
from test_contract import MARKED, can_run, normal, one_thread
from tolerances import LINEAR, relative_error

from gptq_fx import QuantizedWeight, Scheme
from gptq_fx.kernels import LinearSpec, kernels
from gptq_fx.kernels.block import ACTIVATIONS
from gptq_fx.scheme import BITS

__all__ = ["one_thread"]  # the fixture, which pytest finds by its name


def _places():
    """(kernel, device type) for each kernel that runs stacks, marked by the device."""
    for kernel in kernels():
        for device in (kernel.device,) if kernel.device else ("cpu", *MARKED):
            if kernel.experts is not None:
                marks = [getattr(pytest.mark, device)] if device in MARKED else []
                yield pytest.param(kernel, device, id=f"{kernel.name}-{device}", marks=marks)


every_place = pytest.mark.parametrize(("kernel", "device"), list(_places()))
every_scheme = pytest.mark.parametrize(
    ("bits", "size", "sym"), list(itertools.product(BITS, (-1, 32, 128), (True, False)))
)
every_dtype = pytest.mark.parametrize("dtype", list(LINEAR), ids=str)


def make_spec(device, N, K, dtype, bits, size, sym, experts):
    return LinearSpec(K, N, Scheme(bits, size, sym), dtype, device, experts)


def runs(kernel, spec):
    """Whether the kernel runs the stack in one call; a refusal must have a reason."""
    if not can_run(kernel, spec):
        return False
    reason = kernel.experts.supports(spec)
    assert reason is None or len(reason) > 5
    return reason is None


def random_stack(spec):
    rng = torch.Generator().manual_seed(zlib.crc32(repr(spec).encode()))
    E, N, K = spec.shape
    G, bits = spec.groups, spec.scheme.bits
    codes = torch.randint(2**bits, (E, K, N), generator=rng)
    scales = ((torch.rand(E, G, N, generator=rng) + 0.1) / 2**bits / K**0.5).to(spec.dtype)
    zeros = None if spec.scheme.sym else torch.randint(2**bits, (E, G, N), generator=rng)
    return QuantizedWeight.from_codes(codes, scales, zeros, bits).to(spec.device)


def numbers(weight):
    return weight.to("cpu").dequantize(torch.float64)


@every_place
@every_scheme
@every_dtype
def test_rows_sorted_by_expert(kernel, device, bits, size, sym, dtype):
    spec = make_spec(device, 64, 256, dtype, bits, size, sym, 4)
    if not runs(kernel, spec):
        return
    weight = random_stack(spec)
    tensors, W, args = kernel.pack_all(weight, spec), numbers(weight), kernel.op_args(spec)
    for ends in ([3, 3, 8, 12], [0, 0, 0, 12], [12, 12, 12, 12], [1, 2, 3, 7], [0, 0, 0, 0], [0, 70, 90, 90]):
        x = normal(max(ends[-1], 12), 256, like=spec)
        y = kernel.experts.grouped(x, *tensors, torch.tensor(ends, dtype=torch.int32, device=device), *args)
        assert (y.shape, y.dtype) == ((len(x), 64), dtype)
        assert not y[ends[-1] :].any()
        spans = list(enumerate(itertools.pairwise([0, *ends])))
        expected = torch.cat([x[a:b].cpu().double() @ W[e].T for e, (a, b) in spans])
        if ends[-1]:
            assert relative_error(y[: ends[-1]].cpu(), expected) <= LINEAR[dtype], ends


@every_place
@every_scheme
@every_dtype
def test_rows_with_ids(kernel, device, bits, size, sym, dtype):
    spec = make_spec(device, 64, 256, dtype, bits, size, sym, 4)
    if not runs(kernel, spec):
        return
    weight = random_stack(spec)
    tensors, W, args = kernel.pack_all(weight, spec), numbers(weight), kernel.op_args(spec)
    for ids in ([2], [3, 0, 0, 3, 1], [0] * 7, [1, 3] * 35):
        x = normal(len(ids), 256, like=spec)
        y = kernel.experts.indexed(x, *tensors, torch.tensor(ids, device=device), *args)
        assert (y.shape, y.dtype) == ((len(ids), 64), dtype)
        expected = torch.einsum("sk,snk->sn", x.cpu().double(), W[torch.tensor(ids)])
        assert relative_error(y.cpu(), expected) <= LINEAR[dtype], ids


def block_expected(x, ids, weights, W1, W2, biases, activation):
    """Expert by expert, in float64, on the CPU."""
    x, ids, weights = x.cpu().double(), ids.cpu(), weights.cpu().double()
    up_bias, down_bias = (None if b is None else b.cpu().double() for b in biases)
    result = torch.zeros_like(x)
    for e in range(len(W1)):
        t, j = (ids == e).nonzero(as_tuple=True)
        h = x[t] @ W1[e].T
        h = ACTIVATIONS[activation](h if up_bias is None else h + up_bias[e])
        y = h @ W2[e].T
        y = y if down_bias is None else y + down_bias[e]
        result.index_add_(0, t, y * weights[t, j].unsqueeze(-1))
    return result


# tokens, experts of each, experts: decode, prefill, all of them, one, ids of nobody among them
ROUTES = ((1, 2, 8), (7, 2, 8), (300, 2, 8), (5, 4, 4), (3, 1, 1))


@every_place
@pytest.mark.parametrize(("bits", "size"), [(4, 32), (4, -1), (8, 32), (8, -1)])
@every_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_blocks(kernel, device, bits, size, dtype, activation, bias):
    if kernel.experts.block is None:
        return
    for tokens, top, E in ROUTES:
        up = make_spec(device, 256, 128, dtype, bits, size, False, E)
        down = replace(up, in_features=128, out_features=128)
        if not (runs(kernel, up) and runs(kernel, down)):
            return
        if kernel.experts.block_supports(up, down, activation) is not None:
            return
        stacks = random_stack(up), random_stack(down)
        packs = [list(kernel.pack_all(w, s)) for w, s in zip(stacks, (up, down), strict=True)]
        args = [list(kernel.op_args(s)) for s in (up, down)]
        biases = (normal(E, 256, like=up), normal(E, 128, like=up)) if bias else (None, None)
        rng = torch.Generator().manual_seed(tokens)
        for nobody in (False, True):
            x = normal(tokens, 128, like=up)
            ids = torch.rand(tokens, E, generator=rng).topk(top).indices
            if nobody:
                ids = torch.where(torch.rand(ids.shape, generator=rng) < 0.3, E, ids)
            weights = torch.rand(tokens, top, generator=rng).to(device)
            y = kernel.experts.block(x, ids.to(device), weights, *packs, *biases, activation, *args)
            assert (y.shape, y.dtype) == (x.shape, dtype)
            wanted = block_expected(x, ids, weights, *map(numbers, stacks), biases, activation)
            # two linears, one behind the other, and the rounding of what lies between them
            assert (y.cpu().double() - wanted).norm() <= 2.5 * LINEAR[dtype] * wanted.norm(), (tokens, nobody)
