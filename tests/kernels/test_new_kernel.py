"""The example of a kernel in one file: short, registered, chosen and right."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import test_contract as contract
import torch

from gptq_fx import KernelError
from gptq_fx.kernels import choose_kernel, get_kernel, register, registry
from gptq_fx.scheme import BITS

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def new_kernel(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example; what it registers is gone behind the test."""
    monkeypatch.setattr(registry, "_KERNELS", dict(registry._KERNELS))
    sys.path.insert(0, str(EXAMPLES))
    try:
        import new_kernel
    finally:
        sys.path.remove(str(EXAMPLES))
    return new_kernel


def test_it_is_one_file_of_under_80_lines() -> None:
    assert len((EXAMPLES / "new_kernel.py").read_text().splitlines()) < 80


def test_main_registers_it_and_the_model_runs_by_it(
    new_kernel: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    new_kernel.main([])
    *table, last = capsys.readouterr().out.splitlines()
    assert sum("  bytewise  " in line for line in table) == 2
    assert float(last.rpartition(" ")[2]) < 1e-5
    with pytest.raises(KernelError, match="registered already"):
        new_kernel.main([])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_its_numbers_and_its_packs_are_right(new_kernel: ModuleType, bits: int, dtype: torch.dtype) -> None:
    spec = contract.make_spec("cpu", 208, 384, dtype, bits, 64, True)
    kernel = register(new_kernel.KERNEL)
    assert choose_kernel(spec) == (kernel, "")
    contract.check_numbers(kernel, spec)
    weight = contract.random_weight(spec)
    tensors = kernel.pack(weight, spec)
    assert torch.equal(kernel.unpack(tensors, spec).codes(), weight.codes())
    part = kernel.unpack(kernel.cut(tensors, spec, 16, 48), spec)
    assert torch.equal(part.codes(), weight.codes()[:, 16:48])


def test_what_it_refuses_goes_to_another_with_its_reason(new_kernel: ModuleType) -> None:
    register(new_kernel.KERNEL)
    spec = contract.make_spec("cpu", 208, 384, torch.float32, 8, 64, False)
    kernel, why = choose_kernel(spec)
    assert kernel is get_kernel("reference")
    assert "bytewise: no zero points" in why
