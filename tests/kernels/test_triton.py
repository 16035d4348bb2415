"""Our Triton kernels without a GPU: the layout, the contract by Triton's interpreter, and the compilers."""

import collections
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import test_contract as contract
import torch
from tolerances import LINEAR

from gptq_fx.kernels import choose_kernel, get_kernel
from gptq_fx.kernels.triton import TRITON
from gptq_fx.scheme import BITS

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("triton") is None, reason="triton is not installed"
)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sym", [True, False])
def test_the_layout_is_exact(bits, sym):
    for N, K, size in ((40, 384, 48), (7, 24, -1), (16, 512, 128)):
        spec = contract.make_spec("cpu", N, K, torch.bfloat16, bits, size, sym)
        weight = contract.random_weight(spec)
        tensors = TRITON.pack(weight, spec)
        for before, after in zip(weight.tensors, TRITON.unpack(tensors, spec).tensors, strict=True):
            assert (before is None and after is None) or torch.equal(before, after)
        w = tensors[0]
        assert w.shape == (-(-K * min(bits, 2 if bits == 3 else bits) // 512), N, 16)
        start, stop = N // 3, N - 1
        part = contract.make_spec("cpu", stop - start, K, torch.bfloat16, bits, size, sym)
        found = TRITON.cut(tensors, spec, start, stop)
        again = TRITON.unpack(tuple(None if t is None else t.contiguous() for t in found), part)
        assert torch.equal(again.codes(), weight.codes()[:, start:stop])
        if bits == 3:
            assert tensors[1].element_size() * tensors[1].numel() == w.element_size() * w.numel() // 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_another_kernel_runs():
    spec = contract.make_spec("cpu", 48, 64, torch.bfloat16, 4, 32, True)
    assert TRITON.refuses(spec) == "runs on cuda, the weight is on cpu"
    assert TRITON.available() is not None
    kernel, _ = choose_kernel(spec)
    assert kernel.name != "triton"
    assert get_kernel("triton_xpu").available() is not None
    assert not torch.cuda.is_initialized()


@needs_triton
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_interpreter_agrees_with_float64(which):
    """interpreted_triton.py, in a process where Triton interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", which]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("interpreted_triton.py"))],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout)


# --- the compilers need no GPU

POINTERS = ("x", "w", "scales", "out")
SIZES = ("rows", "N", "K", "G", "KB", "group_size", "experts")
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def compiled(kernel, target, warps, stages, dtype, optional=(), **constants):
    """The kernel compiled as its launch would, for sizes that 16 divides."""
    import triton
    from triton.compiler import ASTSource

    types = dict.fromkeys(POINTERS, f"*{NAMES[dtype]}") | dict.fromkeys(SIZES, "i32") | {"w": "*i32"}
    types |= {"high": "*i16", "zeros": "*u8", "bias": types["x"], "ids": "*i64", "gates": "*fp32"}
    types |= {"ends": "*i32", "order": "*i32"}
    names = kernel.arg_names
    for name in ("high", "zeros", "bias", "ids", "gates", "ends", "order"):
        if name in names and name not in optional:
            constants[name] = None
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = [name for name in names if name not in constants and name not in ("rows", "G", "KB", "experts")]
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, attrs)
    return triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})


def resources(binary, tmp_path):
    """(registers, bytes of stack: spilled registers, names of instructions in order) of a cubin."""
    import triton

    path = tmp_path / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])

    def tool(name, *args):
        command = [getattr(triton.knobs.nvidia, name).path, *args, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = re.search(r"REG:(\d+) STACK:(\d+)", tool("cuobjdump", "-res-usage"))
    code = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", tool("nvdisasm", "-c"), re.M)
    return int(usage[1]), int(usage[2]), code


def gemv_constants(bits, slabs, run, rows, ptx, act=""):
    return dict(
        BITS=bits, SLABS=slabs, RUN=run, ACT=act, TOPK=1, SHARE=1, PTX=ptx, ROWS=rows,
        BN=64 if rows == 1 else 32, BB=8,
    )  # fmt: skip


def matmul_constants(bits, slabs, run, BM, BN, ptx, act="", EP=1):
    return dict(
        BITS=bits, SLABS=slabs, RUN=run, ACT=act, SHARE=1, EP=EP, SPLIT=1, EVEN=True, PTX=ptx, BM=BM, BN=BN
    )


def nvidia(capability):
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", capability, 32)


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("rows", [1, 2])
def test_gemv_spills_nothing_and_stays_out_of_shared_memory(capability, rows, tmp_path):
    from gptq_fx.kernels.triton.gemv import gemv_kernel

    constants = gemv_constants(4, 8, 8, rows, True)
    binary = compiled(gemv_kernel, nvidia(capability), 8, 3, torch.bfloat16, **constants)
    registers, stack, names = resources(binary, tmp_path)
    code = collections.Counter(names)
    assert stack == 0
    assert registers <= 128  # two programs of 256 threads fit a multiprocessor
    assert code["I2F"] <= 2, "codes become floats by their bits; a division by the group size converts"
    # one and, or: 256 or 128 codes a thread; the rest is addresses
    assert code["LOP3"] < 1.3 * constants["BN"] * 4
    assert code["LDSM"] == 0


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("BM", "BN", "warps"), [(16, 64, 4), (64, 128, 8), (128, 128, 8)])
def test_matmul_spills_nothing_and_feeds_weights_from_registers(capability, BM, BN, warps, tmp_path):
    from gptq_fx.kernels.triton.matmul import matmul_kernel

    constants = matmul_constants(4, 8, 8, BM, BN, True)
    binary = compiled(matmul_kernel, nvidia(capability), warps, 3, torch.bfloat16, **constants)
    _, stack, code = resources(binary, tmp_path)
    assert stack == 0
    product = "HGMMA" if capability == 90 else "HMMA"
    assert "LDGSTS" in code, "x and words are fetched ahead"
    loop = code[: len(code) - code[::-1].index(product)]
    assert "STS" not in loop, "weights go through shared memory"
    assert binary.metadata.shared <= 163 * 1024  # an A100


@needs_triton
def test_blocks_of_experts_spill_nothing(tmp_path):
    from gptq_fx.kernels.triton.gemv import gemv_kernel
    from gptq_fx.kernels.triton.matmul import matmul_kernel

    optional = ("ends", "order", "gates", "bias", "zeros")
    constants = matmul_constants(4, 8, 8, 16, 64, True, "silu", 256)
    binary = compiled(matmul_kernel, nvidia(90), 4, 4, torch.bfloat16, optional, **constants)
    assert resources(binary, tmp_path)[1] == 0
    constants = gemv_constants(4, 8, 8, 1, True, "gpt_oss")
    optional = ("ids", "gates", "bias", "zeros")
    binary = compiled(gemv_kernel, nvidia(90), 8, 3, torch.bfloat16, optional, **constants)
    assert resources(binary, tmp_path)[1] == 0


@needs_triton
@pytest.mark.parametrize("dtype", list(LINEAR), ids=str)
def test_an_amd_gpu_has_code_too(dtype):
    from triton.backends.compiler import GPUTarget

    from gptq_fx.kernels.triton.gemv import gemv_kernel
    from gptq_fx.kernels.triton.matmul import matmul_kernel

    mi300 = GPUTarget("hip", "gfx942", 64)
    BM, BN = (16, 32) if dtype == torch.float32 else (16, 64)
    constants = matmul_constants(4, 8, 8, BM, BN, False)
    assert "hsaco" in compiled(matmul_kernel, mi300, 4, 2, dtype, **constants).asm
    constants = gemv_constants(4, 8, 8, 1, False)
    assert "hsaco" in compiled(gemv_kernel, mi300, 8, 2, dtype, **constants).asm
