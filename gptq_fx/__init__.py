"""GPTQ as a compiler pass: torch.compile(model, backend="gptq")."""

from gptq_fx.backend import backend
from gptq_fx.bisect import bisect
from gptq_fx.checkpoint import SaveReport, from_pretrained, save_pretrained
from gptq_fx.config import GPTQConfig
from gptq_fx.errors import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    DenseUseError,
    GPTQError,
    KernelError,
    OutOfMemoryError,
    SchemeMismatchError,
    WeightError,
)
from gptq_fx.explain import explain
from gptq_fx.exported import quantize_exported
from gptq_fx.hf import HFConfig
from gptq_fx.parameter import QuantizedParameter
from gptq_fx.quantize import quantize
from gptq_fx.report import Report, SiteRecord
from gptq_fx.scheme import W4A16, W8A16, Rule, Scheme
from gptq_fx.weight import QuantizedWeight

__version__ = "0.1.0"

__all__ = [
    "W4A16",
    "W8A16",
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "DenseUseError",
    "GPTQConfig",
    "GPTQError",
    "HFConfig",
    "KernelError",
    "OutOfMemoryError",
    "QuantizedParameter",
    "QuantizedWeight",
    "Report",
    "Rule",
    "SaveReport",
    "Scheme",
    "SchemeMismatchError",
    "SiteRecord",
    "WeightError",
    "backend",
    "bisect",
    "explain",
    "from_pretrained",
    "quantize",
    "quantize_exported",
    "save_pretrained",
]
