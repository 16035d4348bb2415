#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, on a machine that may have nothing but PyTorch for CUDA, and no network:
#
#   tests/gpu.sh wheels FOLDER       on a machine with a network: what to take along
#   tests/gpu.sh OUT [PART...]       on the one with the GPU; OUT: a folder for logs and tables
#
# WHEELS: the folder of wheels. LIMIT: seconds that one part may take (300). PYTHON: python3. A part that fails or is
# cut off costs no other; what it printed until then is in OUT.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

if [ "${1:-}" = wheels ]; then
    version=$($python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    exec $python -m pip download --no-deps --only-binary=:all: --python-version "${FOR_PYTHON:-$version}" -d "$2" \
        -c .ci/constraints.txt humming-kernels torchao expecttest hypothesis sortedcontainers pytest-xdist execnet peft
fi

out=$(realpath -m "${1:?a folder for logs and tables}")
shift
mkdir -p "$out"
parts=${*:-tests sanitizer marlin op moe decode gptq export}
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

if [ -n "${WHEELS:-}" ]; then
    $python -m pip install -q --no-index --no-deps --disable-pip-version-check "$WHEELS"/*.whl || exit 1
fi
# The backend's name is found by an entry point, so the package itself is installed.
$python -m pip install -q --no-index --no-deps --no-build-isolation --disable-pip-version-check -e . || exit 1
$python - <<'PYTHON' || exit 1
import torch

assert torch.cuda.is_available(), "PyTorch finds no NVIDIA GPU"
print(torch.__version__, torch.cuda.get_device_name(), flush=True)
PYTHON

run() {  # name, command
    local name=$1 begin=$SECONDS
    shift
    timeout "${LIMIT:-300}" "$@" >"$out/$name.log" 2>&1
    local status=$?
    echo "== $name: status $status, $((SECONDS - begin)) s: $(tail -n 1 "$out/$name.log" | cut -c1-200)"
}

bench() {  # name, script, arguments
    local name=$1 script=$2
    shift 2
    run "$name" $python "examples/benchmarks/$script" "$@" --out "$out/$name.md"
}

for part in $parts; do
    case $part in
        tests) run tests $python -m pytest -q -m cuda -n "$(nproc)" --tb=short -p no:cacheprovider ;;
        sanitizer)
            for tool in memcheck racecheck; do
                run "sanitizer-$tool" env PYTHONPATH=tests compute-sanitizer --error-exitcode 1 --tool $tool \
                    $python tests/kernels/sanitized.py
            done
            ;;
        marlin) bench marlin marlin.py ;;
        op) bench op gpu_op.py ;;
        moe) bench moe gpu_moe.py ;;
        decode)
            bench decode-llama gpu_decode.py --breakdown
            bench decode-qwen gpu_decode.py --model qwen3-30b-a3b --batch 1 --no-prefill \
                --only bf16 gptq_fx "gptq_fx, marlin"
            ;;
        gptq) bench gptq gptq_speed.py ;;
        export) run export $python -m pytest -q -m cuda tests/test_export.py ;;
        two) bench two two_gpus.py ;;
        *) echo "no part is called $part. Legal: tests sanitizer marlin op moe decode gptq export two" && exit 2 ;;
    esac
done
