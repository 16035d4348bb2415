"""Each CUDA kernel of ours once, on small inputs: for compute-sanitizer (tests/gpu.sh)."""

import torch
from test_marlin_cuda import LIMIT, make
from tolerances import relative_error

from gptq_fx.kernels.marlin import MARLIN, ops

torch.backends.cuda.matmul.allow_tf32 = False
for bits, size, sym, desc_act in ((4, 128, True, False), (4, 32, False, True), (8, 128, True, False)):
    spec, weight = make(1000, 2048, bits, size, sym, desc_act=desc_act)
    tensors, W = MARLIN.pack_all(weight, spec), weight.dequantize(torch.float32)
    for M in (1, 3, 16, 40, 130, 300):
        x = torch.randn(M, 2048, device="cuda").bfloat16()
        error = relative_error(ops.linear(x, *tensors, None, *MARLIN.op_args(spec)), x.float() @ W.T)
        assert error <= LIMIT, (spec, M, error)
E, H, inner, k = 16, 512, 256, 4
up_spec, up = make(2 * inner, H, experts=E)
down_spec, down = make(H, inner, experts=E)
packs = [MARLIN.pack_all(w, s) for w, s in ((up, up_spec), (down, down_spec))]
args = [list(MARLIN.op_args(s)) for s in (up_spec, down_spec)]
for T in (1, 2, 40):
    x, ids = torch.randn(T, H, device="cuda").bfloat16(), torch.rand(T, E, device="cuda").topk(k).indices
    y = ops.marlin_experts(x, ids, torch.rand(T, k, device="cuda"), *packs, None, None, "silu", *args)
    assert y.isfinite().all()
print("done")
