"""rewrites: every change of a graph has a number, so that the one that breaks a model can be found.

A pass asks `allowed` when it is about to make one. GPTQ_FX_STOP_AFTER=n stops after the n-th of the process:
whatever the passes have made of the graphs until then can be run, since a site that is not rewritten any
further keeps the form it has.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

from gptq_fx.errors import ConfigError

VARIABLE = "GPTQ_FX_STOP_AFTER"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rewrite:
    """number: from 1 on, in the order of the process. step: name of the pass. what: the sites."""

    number: int
    step: str
    what: str

    def __str__(self) -> str:
        return f"rewrite {self.number}, {self.step}: {self.what}"


@dataclass
class _Made:
    last: Rewrite | None = None
    refused: Rewrite | None = None


_made = _Made()


def allowed(step: str, what: str) -> bool:
    """Whether the pass `step` may make this rewrite, which counts then as made. Raises ConfigError."""
    limit = _limit()
    rewrite = Rewrite(1 + (_made.last.number if _made.last else 0), step, what)
    if limit is not None and rewrite.number > limit:
        if _made.refused is None:
            log.warning("%s=%d: the last was %s; without %s", VARIABLE, limit, _made.last, rewrite)
            _made.refused = rewrite
        return False
    _made.last = rewrite
    log.debug("%s", rewrite)
    return True


def last() -> Rewrite | None:
    """The last rewrite that was made since `reset`."""
    return _made.last


def reset() -> None:
    """Count from 1 again."""
    _made.last = _made.refused = None


def _limit() -> int | None:
    given = os.environ.get(VARIABLE, "")
    if given and not given.isdecimal():
        raise ConfigError(f"{VARIABLE}={given!r}. Legal: a number of rewrites, 0 or more")
    return int(given) if given else None
