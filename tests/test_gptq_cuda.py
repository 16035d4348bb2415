"""GPTQ on an NVIDIA GPU: `pytest -m cuda tests/test_gptq_cuda.py`."""

import sys
from pathlib import Path

import pytest
import torch
from models import MODELS
from test_calibration import batches, codes
from transformers import LlamaConfig, LlamaForCausalLM

import gptq_fx
from gptq_fx import GPTQConfig
from gptq_fx.gptq import Settings, gptq
from gptq_fx.hessian import Hessian, check
from gptq_fx.kernels import triton, triton_gptq
from gptq_fx.kernels.solver import solver_for
from gptq_fx.scheme import BITS, Scheme

sys.path.insert(0, str(Path(__file__).parent / "kernels"))
from test_triton_gptq import check_columns

pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module", autouse=True)
def here():
    if reason := triton.available():
        pytest.skip(reason)


def test_the_kernels_are_what_runs():
    solver = solver_for(torch.device("cuda"))
    assert solver is not None and solver.columns is triton_gptq.columns


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("norm", [None, 2.0, 2.4])
def test_kernels_round_as_the_loop_does(bits, sym, norm):
    dtype = (torch.bfloat16, torch.float16, torch.float32)[(bits + sym) % 3]
    for K, group_size, N in ((512, 128, 300), (384, 48, 33), (640, 640, 64), (256, 32, 16)):
        same = check_columns("cuda", bits, sym, K, group_size, dtype, norm, N=N, agree=0.97)
        print(f"{bits} bits, sym {sym}, norm {norm}, K {K}, g{group_size}: {same:.5f} of codes are the same")


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_static_grids(sym):
    check_columns("cuda", 4, sym, 512, 64, torch.bfloat16, 2.0, static=True, N=300, agree=0.97)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_products_of_16_bits_are_summed_in_fp32(dtype):
    x = torch.randn(3, 4096, 384, device="cuda", dtype=dtype)
    x[:, :, 7] *= 30
    original = x + (0.1 * torch.randn_like(x))
    found = Hessian(384, "cuda")
    for i in range(3):
        found.add(x[i], original[i], i)
    check([found])
    wide, drift = x.double().flatten(0, 1), (original.double() - x.double()).flatten(0, 1)
    for got, wanted, bound in ((found.matrix, wide.T @ wide, 1e-4), (found.drift, wide.T @ drift, 2e-3)):
        assert (got.double() - wanted).norm() <= bound * wanted.norm()


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("how", [Settings(), Settings(scale_search=False, gptaq=0.0, act_group_aware=False)])
def test_one_weight_as_on_the_cpu(desc_act, how):
    x = torch.randn(4096, 512) @ (torch.randn(512, 512) / 22 + 0.5 * torch.eye(512))
    original = x + 0.05 * torch.randn_like(x)
    W, results = torch.randn(256, 512), {}
    for device in ("cpu", "cuda"):
        hessian = Hessian(512, device)
        hessian.add(x.to(device), original.to(device))
        results[device] = gptq(W.to(device), hessian, Scheme(4, 128, desc_act=desc_act), how, torch.bfloat16)
    ours, theirs = results["cuda"], results["cpu"]
    assert (ours.codes.cpu() == theirs.codes).float().mean() > 0.97
    for name in ("error", "energy"):
        torch.testing.assert_close(
            getattr(ours, name).sum().cpu(), getattr(theirs, name).sum(), rtol=5e-3, atol=0
        )


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_model_as_on_the_cpu(name):
    tiny = MODELS[name]
    data = batches() if name == "llama" else [tiny.inputs()] * 2
    found, losses = [], []
    for device in ("cpu", "cuda"):
        model = tiny.build().to(device)
        moved = [
            {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            for batch in data
        ]
        report = gptq_fx.quantize(model, GPTQConfig(group_size=32), moved, progress=False)
        found.append(codes(model))
        losses.append(sum(site.loss for site in report.sites if site.loss is not None))
    shares = [float((found[0][n] == found[1][n].cpu()).float().mean()) for n in found[0]]
    print(f"{name}: {1 - sum(shares) / len(shares):.5f} of the integers differ")
    assert sum(shares) / len(shares) > 0.95
    assert abs(losses[1] / losses[0] - 1) < 0.02
    assert report.seconds["forward"] > 0


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_streamed_as_whole(name):
    tiny = MODELS[name]
    data = batches() if name == "llama" else [tiny.inputs()] * 2
    moved = [{k: v.to("cuda") if isinstance(v, torch.Tensor) else v for k, v in b.items()} for b in data]
    whole, streamed, config = tiny.build().to("cuda"), tiny.build(), GPTQConfig(group_size=32)
    gptq_fx.quantize(whole, config, moved, progress=False)
    report = gptq_fx.quantize(streamed, config, data, device="cuda", max_memory="1GB", progress=False)
    assert {p.device.type for p in streamed.parameters()} == {"cpu"}
    ours, theirs = codes(streamed), codes(whole)
    same = sum(int((ours[n] == theirs[n].cpu()).sum()) for n in ours) / sum(c.numel() for c in ours.values())
    print(f"{name}, streamed: {1 - same:.5f} of the integers differ")
    assert ours.keys() == theirs.keys()
    assert same > 0.99
    assert report.seconds["transfer"] > 0


def test_streaming_keeps_to_its_memory():
    """A model of 1.4 GB in 1 GB."""
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=4096, num_hidden_layers=20, num_attention_heads=16,
        num_key_value_heads=4, vocab_size=512,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16().eval()
    data = [{"input_ids": torch.randint(512, (2, 512))} for _ in range(8)]
    assert sum(p.nbytes for p in model.parameters()) > 1.3e9
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gptq_fx.quantize(model, GPTQConfig(), data, device="cuda", max_memory="1GB", progress=False)
    peak = torch.cuda.max_memory_allocated() - before
    print(f"peak {peak / 1e9:.3f} GB")
    assert peak < 1e9
