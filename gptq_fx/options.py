"""The options of the backend: torch.compile(..., backend="gptq", options={...})."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gptq_fx.config import GPTQConfig
from gptq_fx.errors import ConfigError, unknown
from gptq_fx.kernels import get_kernel
from gptq_fx.passes import checked_skip

CONFIG_KEYS = ("bits", "group_size", "sym", "desc_act", "lm_head", "dynamic", "rules")
OWN_KEYS = ("kernel", "inner_backend", "mode", "skip", "dump")


@dataclass(frozen=True)
class Options:
    """config: for weights that are still dense. explicit: the user gave some of it.

    kernel: "auto", or the name every site must take. inner_backend: what compiles the rewritten
    graph, None: what suits the device. mode: Inductor's mode, or None. skip: passes that do not run.
    dump: a folder to write the graph before and behind each pass to, or None.
    """

    config: GPTQConfig
    explicit: bool
    kernel: str
    inner_backend: str | None
    mode: str | None
    skip: frozenset[str] = frozenset()
    dump: str | None = None

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None, mode: str | None) -> Options:
        """Raises ConfigError on an unknown key, and on any value that is not legal."""
        given = dict(options or {})
        for key in given:
            if key not in CONFIG_KEYS + OWN_KEYS:
                raise unknown("option", key, CONFIG_KEYS + OWN_KEYS)
        kernel = given.pop("kernel", "auto")
        if kernel != "auto":
            get_kernel(kernel)
        inner = given.pop("inner_backend", None)
        legal = torch._dynamo.list_backends(exclude_tags=())
        if inner is not None and (inner == "gptq" or inner not in legal):
            raise unknown("inner_backend", inner, set(legal) - {"gptq"})
        mode = given.pop("mode", mode)
        if mode is not None:
            modes = torch._inductor.list_mode_options()
            if mode not in modes:
                raise unknown("mode", mode, modes)
            inner = inner or "inductor"
            if inner != "inductor":
                raise ConfigError(f"mode={mode!r} is Inductor's; inner_backend is {inner!r}")
        skip = given.pop("skip", ())
        if isinstance(skip, str) or not all(isinstance(name, str) for name in skip):
            raise ConfigError(f"skip={skip!r}. Legal: a list of names of passes")
        dump = given.pop("dump", None)
        if not isinstance(dump, (str, os.PathLike, type(None))):
            raise ConfigError(f"dump={dump!r}. Legal: the path of a folder")
        folder = None if dump is None else os.fspath(dump)
        config = GPTQConfig(**given)
        return cls(config, bool(given), kernel, inner, mode, checked_skip(skip), folder)
