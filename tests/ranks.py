"""Processes of one group on this machine, over gloo: forked, so that nothing is imported again."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers

SECONDS = 120  # after which a job that hangs is killed; a collective would wait longer

# Before, it forgets to add up split experts, and its hooks on split tables break the graph of a calibration.
needs_transformers_5_23 = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23),
    reason="transformers is older than 5.23",
)


def on_ranks(ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What function(*args) returns on each rank. Raises AssertionError with the first traceback."""
    ended = run(ranks, function, *args)
    wrong = [
        f"rank {rank}, exit code {code}:\n{text}" for rank, (code, text) in enumerate(ended) if code != 0
    ]
    assert not wrong, "\n".join(wrong)
    return [value for _, value in ended]


def run(ranks: int, function: Callable[..., Any], *args: Any) -> list[tuple[int, Any]]:
    """(exit code, what function(*args) returned or its traceback) of each rank.

    All have ended by then; those that would go on are killed after SECONDS: exit code -SIGKILL.
    """
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            fork.Process(target=_rank, args=(rank, ranks, folder, function, args)) for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + SECONDS
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        files = [Path(folder, str(rank)) for rank in range(ranks)]
        values = [torch.load(f, weights_only=False) if f.exists() else None for f in files]
        return [(p.exitcode or 0, value) for p, value in zip(processes, values, strict=True)]


def _rank(rank: int, ranks: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=2 * SECONDS),
    )
    code = 0
    try:
        value = function(*args)
    except BaseException:
        code, value = 1, traceback.format_exc()
    torch.save(value, Path(folder, str(rank)))
    os._exit(code)  # no exit handlers of pytest's process


def kill_this_rank() -> None:
    """As the system does with a process that takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)
