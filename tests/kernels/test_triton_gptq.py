"""GPTQ's column loop as Triton kernels, against the loop in plain torch."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gptq_fx import columns
from gptq_fx.gptq import inverse_factor
from gptq_fx.grid import PARTS, Search, Static
from gptq_fx.kernels import triton_gptq

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("triton") is None, reason="triton is not installed"
)


def problem(device, K, E=2, N=21):
    """W [E, N, K], and U and diag(H) of inputs with correlated features."""
    generator = torch.Generator().manual_seed(K)
    mix = torch.randn(E, K, K, generator=generator) / K**0.5 + 0.5 * torch.eye(K)
    x = torch.randn(E, 4 * K, K, generator=generator) @ mix
    H = (x.mT @ x / (4 * K)).to(device)
    W = torch.randn(E, N, K, generator=generator).to(device)
    return W, inverse_factor(H, 0.05)[0], H.diagonal(dim1=1, dim2=2)


def check_columns(device, bits, sym, K, group_size, dtype, norm, static=False, N=21, agree=0.99):
    """The share of codes that are the same: a tie may fall either way, and the rest of its row follows.

    Compared are the groups of a row up to the first with such a tie; and losses where a row has the same
    integers on the same grids, but for the last bits of fp32.
    """
    W, U, importance = problem(device, K, N=N)
    search, given = Search(bits, sym, dtype, norm), None
    if static:
        order = torch.stack([torch.randperm(K) for _ in W]).to(device)
        groups, weights = (t.unflatten(1, (-1, group_size)) for t in (W.mT, importance))
        given = Static(*search(groups, weights), order // group_size)
    wanted, found = (
        run(W.clone(), U, importance, search, group_size, given)
        for run in (columns.columns, triton_gptq.columns)
    )
    assert found.codes.shape == wanted.codes.shape
    same = found.codes == wanted.codes
    scales = torch.isclose(found.scales, wanted.scales, rtol=1e-5, atol=0)
    groups = same.unflatten(1, (-1, group_size)).all(2)
    alike = torch.cat([torch.ones_like(groups[:, :1]), groups[:, :-1].cumprod(1).bool()], 1)
    assert same[alike.repeat_interleave(group_size, 1)].float().mean() > agree
    assert scales[alike].float().mean() > agree
    if not sym:
        assert (found.zeros == wanted.zeros)[alike].float().mean() > agree
    rows = same.all(1) & scales.all(1)
    if not sym:
        rows &= (found.zeros == wanted.zeros).all(1)
    assert rows.float().mean() > 0.8
    torch.testing.assert_close(found.loss[rows], wanted.loss[rows], rtol=1e-4, atol=0)
    return same.float().mean()


def test_a_tie_is_no_difference(monkeypatch):
    """Two of 32 rows part in the last bits of fp32, and have other scales from there on: 3.5 % of all."""

    def almost(W, U, *rest):
        noise = torch.Generator().manual_seed(9)
        W, U = (t * (1 + 3e-7 * torch.randn(t.shape, generator=noise)) for t in (W, U))
        return columns.columns(W, U, *rest)

    monkeypatch.setattr(triton_gptq, "columns", almost)
    check_columns("cpu", 4, True, 256, 32, torch.float32, None, N=16, agree=0.97)


@needs_triton
def test_the_interpreter_agrees_with_the_loop():
    """interpreted_triton_gptq.py, in a process where Triton interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("interpreted_triton_gptq.py"))],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout)


@needs_triton
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(
    ("what", "bits", "capability"),
    [
        ("search", 4, 80),
        ("search", 4, 90),
        ("search, no norm", 2, 90),
        ("search, norm 2.4", 3, 90),
        ("columns", 4, 80),
        ("columns", 4, 90),
        ("columns, static", 8, 90),
    ],
)
def test_they_compile_and_spill_nothing(what, bits, capability, sym, tmp_path):
    from test_triton import nvidia, resources
    from triton import compile
    from triton.compiler import ASTSource

    from gptq_fx.kernels import triton_gptq_code

    kernel = getattr(triton_gptq_code, what.partition(",")[0])
    constants = {"BITS": bits, "ROWS": triton_gptq.ROWS}
    if kernel is triton_gptq_code.search:
        parts = 0 if what == "search, no norm" else len(PARTS) + 1
        square = what != "search, norm 2.4"
        constants |= {"DTYPE": "bf16", "SQUARE": square, "PARTS": parts, "CHUNK": triton_gptq.CHUNK}
    else:
        constants |= {"WIDTH": 128} | ({} if what == "columns, static" else {"group_of": None})
    constants |= {"zeros": None} if sym else {}
    types = dict.fromkeys(kernel.arg_names, "i32") | {"norm": "fp32", "codes": "*u8", "group_of": "*i64"}
    types |= dict.fromkeys(("W", "U", "importance", "parts", "scales", "zeros", "Err", "loss"), "*fp32")
    signature = {n: "constexpr" if n in constants else types[n] for n in kernel.arg_names}
    places = {n: (kernel.arg_names.index(n),) for n in kernel.arg_names}
    attrs = {places[n]: [["tt.divisibility", 16]] for n in signature if n not in (*constants, "G", "norm")}
    source = ASTSource(kernel, signature, {places[n]: v for n, v in constants.items()}, attrs)
    binary = compile(source, target=nvidia(capability), options={"num_warps": 4})
    registers, stack, _ = resources(binary, tmp_path)
    assert stack == 0
    assert registers <= 128
