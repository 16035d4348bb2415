"""The errors users can meet. Each message says where, what was found, and what is legal."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GPTQError(Exception):
    """Base of every error that gptq_fx raises on purpose."""


class ConfigError(GPTQError, ValueError):
    """A scheme, rule or option that is not legal."""


class WeightError(GPTQError, ValueError):
    """A weight that cannot be quantized as it is (NaN, Inf, wrong shape or dtype)."""


class CalibrationError(GPTQError, ValueError):
    """Calibration inputs that the model cannot take, or that no weight can be quantized by."""


class OutOfMemoryError(GPTQError, MemoryError):
    """The device is too small for a stage of calibration as it is set; says which, and what helps."""


class CheckpointError(GPTQError, ValueError):
    """A checkpoint that is damaged, or that says what cannot be; names the file and the tensor."""


class KernelError(GPTQError, RuntimeError):
    """No registered kernel, or not the demanded one, can run a site."""


class SchemeMismatchError(GPTQError, RuntimeError):
    """A compiled graph met a weight that its rules treat otherwise than the weight it was compiled for."""


class DenseUseError(GPTQError, RuntimeError):
    """A dense operation was asked of a weight that exists only in quantized form."""


def unknown(what: str, found: object, legal: Iterable[str]) -> ConfigError:
    """An error for a name that does not exist, with the legal ones and the nearest match."""
    names = sorted(legal)
    near = difflib.get_close_matches(str(found), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"unknown {what} {found!r}.{hint} Legal: {', '.join(names)}")
