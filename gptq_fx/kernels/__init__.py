"""The kernels, one file per hardware or library: the only place that names a device.

To add one, write its file and import it here.
"""

from gptq_fx.kernels import ascend, block, cpu, grouped, reference
from gptq_fx.kernels.registry import (
    ExpertOps,
    Kernel,
    LinearSpec,
    Tensors,
    choose_kernel,
    get_kernel,
    kernels,
    register,
)

__all__ = [
    "ExpertOps",
    "Kernel",
    "LinearSpec",
    "Tensors",
    "ascend",
    "block",
    "choose_kernel",
    "cpu",
    "get_kernel",
    "grouped",
    "kernels",
    "reference",
    "register",
]
