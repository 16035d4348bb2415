"""bisect: which rewrite of a graph breaks a model."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from gptq_fx.errors import GPTQError
from gptq_fx.kernels import get_kernel
from gptq_fx.packed import living
from gptq_fx.passes import rewrites
from gptq_fx.passes.rewrites import VARIABLE, Rewrite


def bisect(check: Callable[[], object]) -> Rewrite:
    """The first rewrite with which `check` fails, found by halving: some log2 of the rewrites calls of it.

    check: compiles with backend="gptq", runs, and compares. It fails by raising an exception, or by returning
        False.
    Before each call Dynamo is reset, and every quantized weight goes back to its canonical form; no other
    thread should compile meanwhile. Raises GPTQError where `check` fails without any rewrite, or holds with
    all.
    """
    before = os.environ.get(VARIABLE)
    try:
        failed = _failure(check, 0)
        if failed is not None:
            raise GPTQError(f"the check fails without any rewrite, too: {failed}")
        failed = _failure(check, None)
        found = rewrites.last()
        if failed is None or found is None:
            raise GPTQError(f"the check holds with all rewrites; the last was {found}")
        good = 0
        while found.number - good > 1:
            middle = (good + found.number) // 2
            if _failure(check, middle) is None:
                good = middle
            else:
                last = rewrites.last()
                assert last is not None and last.number == middle, (
                    "the check does not always compile the same"
                )
                found = last
        return found
    finally:
        _limit(before)
        _start_again()


def _failure(check: Callable[[], object], limit: int | None) -> str | None:
    _limit(None if limit is None else str(limit))
    _start_again()
    try:
        return "it returned False" if check() is False else None
    except Exception as error:  # whatever a check may raise
        return f"{type(error).__name__}: {error}"


def _limit(value: str | None) -> None:
    if value is None:
        os.environ.pop(VARIABLE, None)
    else:
        os.environ[VARIABLE] = value


def _start_again() -> None:
    torch._dynamo.reset()
    rewrites.reset()
    for weight in living():
        weight.lower(get_kernel("reference"))
