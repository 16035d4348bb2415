#!/usr/bin/env bash
# The Ascend tests on the real torch_npu, without an NPU: its schemas and meta kernels, our emulation.
# usage: run.sh FOLDER    FOLDER gets an environment of its own: torch does not start where torch_npu is
#                         installed and CANN is not. Needs Linux, Python 3.10 to 3.13, cc, nm, readelf,
#                         and a CPU build of torch: PIP_EXTRA_INDEX_URL tells pip where one is.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:?usage: run.sh FOLDER}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
export TORCH_DEVICE_BACKEND_AUTOLOAD=0  # torch would import torch_npu by itself
fresh() {  # made by these very lines, from these versions
    for source in tests/npu_stub/*.{sh,py} .ci/constraints.txt pyproject.toml; do
        [ "$folder/.ready" -nt "$source" ] || return 1
    done
}
if ! fresh; then
    "${PYTHON:-python3}" -m venv "$folder/venv"
    pip="$folder/venv/bin/python -m pip install --disable-pip-version-check -q -c .ci/constraints.txt"
    $pip torch==2.13.0
    "$folder/venv/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda and
        "torch_npu does not start beside a CUDA build of torch: point PIP_EXTRA_INDEX_URL at CPU builds")'
    $pip torch-npu==2.13.0 numpy pyyaml expecttest pytest -e ".[hf]"
    "$folder/venv/bin/python" tests/npu_stub/make_stubs.py "$folder/stubs"
    touch "$folder/.ready"
fi
export LD_LIBRARY_PATH=$folder/stubs${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
# The tests skip where torch_npu cannot be imported; here that is an error.
"$folder/venv/bin/python" -c "import torch, torch_npu"
exec "$folder/venv/bin/python" -m pytest tests/npu_stub tests/kernels/test_ascend*.py
