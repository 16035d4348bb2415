"""The column loop as Triton kernels, by Triton's interpreter on the CPU; test_triton_gptq.py runs this file.

By hand: TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted_triton_gptq.py
"""

import os

import pytest
import torch
from test_triton_gptq import check_columns

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET is not 1", allow_module_level=True)


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(
    ("bits", "K", "group_size", "dtype", "norm"),
    [
        (4, 64, 32, torch.float16, 2.0),  # not bf16, which the interpreter cuts off, not rounds
        (3, 96, 48, torch.float32, None),
        (2, 160, 160, torch.float32, 2.0),
        (8, 64, 16, torch.float32, 2.4),
    ],
)
def test_the_kernels_round_as_the_loop_does(bits, K, group_size, dtype, norm, sym):
    check_columns("cpu", bits, sym, K, group_size, dtype, norm)


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_static_grids(sym):
    check_columns("cpu", 4, sym, 160, 32, torch.float32, 2.0, static=True)
