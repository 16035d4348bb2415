"""One progress bar for all that may take longer than two seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Sequence[T], what: str, *, show: bool = True) -> Sequence[T]:
    """The items, with a bar on stderr once two seconds have gone by."""
    bar: Sequence[T] = tqdm(items, what, delay=2, disable=not show, leave=False)
    return bar


def bar(total: int, what: str, *, show: bool = True) -> tqdm[None]:
    """A bar with the time left for steps that are no items of a sequence."""
    return tqdm(total=total, desc=what, delay=2, disable=not show, leave=False)
