#!/bin/sh
# An environment with GPTQModel and gptq_fx for examples/benchmarks/peers.py and `pytest -m peers`:
#     sh examples/benchmarks/install_peers.sh [FOLDER]        (default: .cache/peers)
# GPTQModel asks for a later torch than it needs, so that its dependencies are listed here by hand.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
folder=${1:-$root/.cache/peers}
python3 -m venv "$folder"
pip="$folder/bin/python -m pip install --disable-pip-version-check"
$pip torch==2.13.0
$pip "transformers==5.23.0" accelerate numpy safetensors threadpoolctl device-smi protobuf pillow requests \
    pypcre tokenicer logbar jinja2 ninja maturin datasets pyarrow dill torchao defuser filelock
$pip --no-deps gptqmodel==7.7.0
$pip -e "$root"
echo "ready: $folder/bin/python $root/examples/benchmarks/peers.py"
