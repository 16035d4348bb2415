"""The kernels, one file per hardware or library: the only place that names a device.

To add one, write its file and import it here.
"""

from gptq_fx.kernels import ascend, cpu, grouped, reference
from gptq_fx.kernels.registry import (
    Kernel,
    LinearSpec,
    Tensors,
    choose_kernel,
    get_kernel,
    kernels,
    register,
)

__all__ = [
    "Kernel",
    "LinearSpec",
    "Tensors",
    "ascend",
    "choose_kernel",
    "cpu",
    "get_kernel",
    "grouped",
    "kernels",
    "reference",
    "register",
]
