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
# It looks for its own names of Mixtral's experts, not for those that the Hub, vLLM and SGLang have.
REFUSED = {
    ("gptq_fx: mixtral, 4 bits, g32", "GPTQModel, fp16"): "Missing required quantized weights in checkpoint"
}


@pytest.mark.peers
def test_checkpoints_both_ways(tmp_path: Path) -> None:
    if not PYTHON.exists():
        pytest.skip(f"no {PYTHON}: sh examples/benchmarks/install_peers.sh")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "GPTQMODEL_CPU_WORKERS": "2"}
    done = subprocess.run(
        [PYTHON, SCRIPT, "--json"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=3000
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert {name.split(":")[0] for name in results} == {"gptq_fx", "GPTQModel"}
    for name, found in results.items():
        # A router that is near a tie flips in 16 bits, for the dense model and for ours.
        flips = found.pop("dense, bf16") > LIMITS["bf16"]
        for reader, error in found.items():
            if (name, reader) in REFUSED:
                assert error == REFUSED[name, reader]
                continue
            limit = 10 * LIMITS["bf16"] if flips else LIMITS[reader.rpartition(" ")[2]]
            assert error <= limit, (name, reader, error)
