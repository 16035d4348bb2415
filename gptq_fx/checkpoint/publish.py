"""A folder that appears under its final name whole, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from gptq_fx.errors import CheckpointError


def check_target(target: Path, overwrite: bool) -> None:
    """Raise CheckpointError where save_pretrained would refuse the folder."""
    if not (target.exists() or target.is_symlink()) or (target.is_dir() and not any(target.iterdir())):
        return
    ours = target.is_dir() and not target.is_symlink() and (target / "quantize_config.json").is_file()
    if not ours:
        raise CheckpointError(f"{target}: exists, and is no quantized checkpoint. Legal: a new folder")
    if not overwrite:
        raise CheckpointError(f"{target}: exists. Legal: a new folder, or overwrite=True")


def sync(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def publish(partial: Path, target: Path) -> None:
    """Give the folder its final name. A checkpoint that was there steps aside first, and is then removed.

    No system call known everywhere swaps two folders: a crash between the two renames leaves nothing
    under the final name, and both checkpoints whole beside it.
    """
    old = None
    if target.is_dir() and any(target.iterdir()):
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
        target.rename(old)
    elif target.is_dir():
        target.rmdir()
    try:
        partial.rename(target)
    except BaseException:
        if old is not None:
            old.rename(target)
        raise
    number = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
