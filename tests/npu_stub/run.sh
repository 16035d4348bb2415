#!/usr/bin/env bash
# The Ascend tests on the real torch_npu, without an NPU: its schemas and meta kernels, our emulation.
# usage: run.sh FOLDER    FOLDER gets an environment of its own: torch does not start where torch_npu is
#                         installed and CANN is not. Needs Linux, Python 3.10 to 3.13, cc, nm, readelf,
#                         and a CPU build of torch: PIP_EXTRA_INDEX_URL tells pip where one is.
# Exit status: 77 where the machine lacks one of these, else that of the tests.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:?usage: run.sh FOLDER}
python=${PYTHON:-python3}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
export TORCH_DEVICE_BACKEND_AUTOLOAD=0  # torch would import torch_npu by itself
export CUDA_VISIBLE_DEVICES=

cannot() {
    echo "cannot run here: $1"
    exit 77
}
[ "$(uname -s)" = Linux ] || cannot "torch_npu is for Linux"
for tool in cc nm readelf; do
    command -v "$tool" > /dev/null || cannot "no $tool"
done
"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' ||
    cannot "torch_npu 2.13 is for Python 3.10 to 3.13, PYTHON names another"

fresh() {  # made by these very lines, from these versions
    for source in tests/npu_stub/*.{sh,py} .ci/constraints.txt pyproject.toml; do
        [ "$folder/.ready" -nt "$source" ] || return 1
    done
}
if ! fresh; then
    "$python" -m venv "$folder/venv"
    pip="$folder/venv/bin/python -m pip install --disable-pip-version-check --no-compile -q -c .ci/constraints.txt"
    $pip numpy torch==2.13.0  # first: nothing after it may pull in another one
    "$folder/venv/bin/python" -c 'import sys, torch; sys.exit(bool(torch.version.cuda))' ||
        cannot "pip found a CUDA build of torch, which torch_npu does not start beside: see PIP_EXTRA_INDEX_URL"
    $pip torch-npu==2.13.0 pyyaml expecttest pytest -e ".[hf]"
    "$folder/venv/bin/python" tests/npu_stub/make_stubs.py "$folder/stubs"
    touch "$folder/.ready"
fi
export LD_LIBRARY_PATH=$folder/stubs${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
# The tests skip where torch_npu cannot be imported; here that is an error.
"$folder/venv/bin/python" -c "import torch, torch_npu"
exec "$folder/venv/bin/python" -m pytest tests/npu_stub tests/kernels/test_ascend*.py
