#!/usr/bin/env bash
# Settles on a machine with a GPU what cannot be settled without one: build, tests, memory and race checks, benchmarks.
# Usage: bench/gpu_check.sh RESULTS_FOLDER, under 10 minutes. Every part runs even if one before it failed; the exit status
# tells.
set -uo pipefail
results=$(mkdir -p "${1:?usage: bench/gpu_check.sh RESULTS_FOLDER}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
failed=()

part() {  # part NAME SECONDS COMMAND…: its output goes to RESULTS/NAME.txt
  local name=$1 seconds=$2 start=$SECONDS
  shift 2
  if timeout "$seconds" "$@" >"$results/$name.txt" 2>&1; then
    echo "$name: passed in $((SECONDS - start)) s"
  else
    echo "$name: FAILED in $((SECONDS - start)) s"
    tail -n 15 "$results/$name.txt"
    failed+=("$name")
  fi
}

nvidia-smi >"$results/gpu.txt" 2>&1
# Only this machine's architecture: the other ones would only cost build time.
TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')}
export TORCH_CUDA_ARCH_LIST MSACORE_CUDA=1 MSACORE_REQUIRE_CUDA=1
part build 180 "$python" -m pip install --no-build-isolation --no-deps .
# The installed package is tested, not the sources beside the tests.
checkout=$(mktemp -d)
trap 'rm -rf "$checkout"' EXIT
cp -r tests bench pyproject.toml csrc setup.py "$checkout"
cd "$checkout"
part report 30 "$python" -m msacore
part tests 150 "$python" -m pytest -q -p no:cacheprovider tests/test_ops.py -k cuda
for tool in memcheck racecheck; do
  part "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 1 \
    "$python" -m pytest -q -p no:cacheprovider tests/test_ops.py -k "test_two_runs and cuda and odd"
done
part benchmarks 100 "$python" -m bench --device cuda --csv "$results/benchmarks.csv"

if ((${#failed[@]})); then
  echo "failed: ${failed[*]}" | tee "$results/summary.txt"
  exit 1
fi
echo "all parts passed" | tee "$results/summary.txt"
