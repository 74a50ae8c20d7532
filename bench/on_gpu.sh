#!/usr/bin/env bash
# Everything that needs a GPU, in parts of under eight minutes each:
#
#   bench/on_gpu.sh test     the GPU tests: parity in bf16, fp16 and fp32, races, CUDA graphs, memory checker
#   bench/on_gpu.sh tune     tile shapes of what is not tuned yet -> kernels/tuned/sm_*.json, bench/results/tiles-*.jsonl
#   bench/on_gpu.sh bench    the benchmark with all peers -> bench/results/
#
# A part that runs into its limit says so. When it is called again, tune and bench go on where they stopped; the tests begin
# again, with the kernels that are compiled already. It needs python3 with PyTorch (2.11 or newer), Triton, numpy, pytest,
# hypothesis, pytest-benchmark and matplotlib (pytest-xdist is used if it is there), and nothing else: no network, no
# installation. Results are also copied to the folder $OUT, if that is set.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=${PYTHON:-python3}
limit=${LIMIT:-440} # seconds

# The package as it is installed (kernels/ as glomo/kernels), made of links.
tree=$root/.build/tree
rm -rf "$tree" && mkdir -p "$tree/glomo"
ln -s "$root"/glomo/* "$tree/glomo/"
ln -s "$root/kernels" "$tree/glomo/kernels"
ln -s "$root/bench" "$root/tests" "$root/pyproject.toml" "$root/README.md" "$tree/"
cd "$tree"

"$python" - <<'PY'
import torch, triton
assert torch.cuda.is_available(), "there is no GPU here"
print(torch.cuda.get_device_name(), "torch", torch.__version__, "Triton", triton.__version__)
PY

ops=$(printf 'tests/kernels/test_%s.py ' relu2_attention relu2_affinity attention graph_mix varlen compile)
status=0
workers=()
if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n "${JOBS:-8}" --dist worksteal); fi
case "${1:-}" in
test)
    GLOMO_TEST_DEVICE=cuda timeout "$limit" "$python" -m pytest -q "${workers[@]}" \
        $ops tests/kernels/triton || status=$?
    if command -v compute-sanitizer >/dev/null; then
        echo "memory checker:"
        # a fixed set of small cases; 9 is the exit status for what the checker finds
        GLOMO_TEST_DEVICE=cuda PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "$((limit + 90 - SECONDS))" \
            compute-sanitizer --tool memcheck --error-exitcode 9 "$python" -m pytest -q \
            tests/kernels/test_relu2_attention.py -k "grouped_heads or zero_stride or broadcast_leading" ||
            { found=$?; [ $found -eq 9 ] && status=9 || echo "the memory checker did not finish (exit status $found)"; }
    else
        echo "memory checker: skipped, compute-sanitizer is not installed"
    fi
    ;;
tune)
    # a complaint about the shapes at hand is no reason not to choose better ones
    "$python" -m bench.codegen --quick --arch "$("$python" -c 'import torch; print("{}{}".format(*torch.cuda.get_device_capability()))')" || true
    timeout "$((limit + 30))" "$python" -m bench.tune --minutes "$((limit / 60 - 1))" || status=$?
    [ -z "${OUT:-}" ] || find "$root/kernels/tuned" "$root/bench/results" -newer "$tree" -type f -exec cp {} "$OUT/" \;
    ;;
bench)
    "$python" -m bench.overhead || status=$?
    timeout "$((limit + 30))" "$python" -m bench --grid gpu --minutes "$((limit / 60 - 1))" --save || status=$?
    if [ -n "${OUT:-}" ]; then
        find "$root/bench/results" -newer "$tree" -type f -exec cp {} "$OUT/" \;
        find "$root/.build/bench" -name '*.jsonl' -exec cp {} "$OUT/" \;
    fi
    ;;
*)
    echo "usage: bench/on_gpu.sh test|tune|bench" >&2
    exit 64
    ;;
esac
[ $status -ne 2 ] && [ $status -ne 124 ] || echo "Not finished: run the same command again."
exit $status
