"""The kernels, one file per hardware or library: the only place that names a device.

To add one, write its file and import it here.
"""

from gptq_fx.kernels import ascend, block, cpu, grouped, humming, marlin, reference, triton, triton_gptq
from gptq_fx.kernels.registry import (
    ExpertOps,
    Kernel,
    LinearSpec,
    Tensors,
    choose_kernel,
    default_inner_backend,
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
    "default_inner_backend",
    "get_kernel",
    "grouped",
    "humming",
    "kernels",
    "marlin",
    "reference",
    "register",
    "triton",
    "triton_gptq",
]
