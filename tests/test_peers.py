"""GPTQModel reads our checkpoints, and we read its own: `pytest -m peers`, after install_peers.sh."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "benchmarks" / "peers.py"
PYTHON = Path(os.environ.get("GPTQ_FX_PEERS", ROOT / ".cache" / "peers" / "bin" / "python"))
# fp16 keeps 11 bits and bf16 8, over two layers; the rest is headroom
LIMITS = {"fp16": 2e-3, "bf16": 1e-2}


@pytest.mark.peers
def test_checkpoints_both_ways(tmp_path: Path) -> None:
    if not PYTHON.exists():
        pytest.skip(f"no {PYTHON}: sh examples/benchmarks/install_peers.sh")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "GPTQMODEL_CPU_WORKERS": "2"}
    done = subprocess.run(
        [PYTHON, SCRIPT, "--json"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert {name.split(":")[0] for name in results} == {"gptq_fx", "GPTQModel"}
    for name, found in results.items():
        for reader, error in found.items():
            assert error <= LIMITS[reader.rpartition(" ")[2]], (name, reader, error)
