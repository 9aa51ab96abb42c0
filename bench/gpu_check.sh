#!/usr/bin/env bash
# Checks on a machine with a GPU what cannot be checked without one, in under 9 minutes. Decisive parts come first:
# build, values and gradients, memory and race checks, GPU-sized shapes; then graphs, streams, a second device and more.
# Usage: bench/gpu_check.sh RESULTS_FOLDER. It writes three files there while it runs: summary.txt (every part, and the
# names of tests that fail, also where time ran out), log.txt (everything printed), benchmarks.csv (a row for each
# measurement). Every part runs even if one before it failed; the exit status says whether all of them passed.
set -uo pipefail
results=$(mkdir -p "${1:?usage: bench/gpu_check.sh RESULTS_FOLDER}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
log=$results/log.txt summary=$results/summary.txt
seconds_in_all=520
failed=0
: >"$log" >"$summary"

say() { echo "$*" | tee -a "$summary"; }

part() {  # part NAME SECONDS COMMAND…
  local name=$1 limit=$2 start=$SECONDS left=$((seconds_in_all - SECONDS)) from status
  shift 2
  if ((left < 5)); then
    say "$name: NOT RUN, no time left"
    failed=1
    return
  fi
  ((left < limit)) && limit=$left
  from=$(wc -l <"$log")
  printf '\n=== %s: %s\n' "$name" "$*" >>"$log"
  # When interrupted, pytest still says what has failed so far.
  timeout --signal=INT --kill-after=10 "$limit" "$@" >>"$log" 2>&1
  status=$?
  if ((status == 0)); then
    say "$name: passed in $((SECONDS - start)) s"
    return
  fi
  failed=1
  if ((status == 124 || status == 137)); then
    say "$name: NOT FINISHED in $limit s"
  else
    say "$name: FAILED in $((SECONDS - start)) s"
  fi
  tail -n +"$((from + 1))" "$log" | grep -E 'FAILED|ERROR|Error:|failed to run' | sort -u | head -n 40 | sed 's/^/  /' | tee -a "$summary"
}

benchmark() {  # benchmark NAME SECONDS ARGUMENTS…: its rows are added to benchmarks.csv
  local rows
  rows=$(mktemp)
  part "bench $1" "$2" "$python" -m bench --device cuda --csv "$rows" "${@:3}"
  tail -n +"$([ -s "$results/benchmarks.csv" ] && echo 2 || echo 1)" "$rows" >>"$results/benchmarks.csv"
  rm -f "$rows"
}

nvidia-smi >>"$log" 2>&1
# Only this machine's architecture: the others would only cost build time.
TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')}
export TORCH_CUDA_ARCH_LIST MSACORE_CUDA=1 MSACORE_REQUIRE_CUDA=1 PYTHONUNBUFFERED=1
part build 200 "$python" -m pip install --no-build-isolation --no-deps .
# The installed package is tested, not the sources beside the tests.
checkout=$(mktemp -d)
trap 'rm -rf "$checkout"' EXIT
cp -r tests bench pyproject.toml csrc setup.py "$checkout"
cd "$checkout" || exit 1
part report 30 "$python" -m msacore

pytest=("$python" -m pytest -v --tb=short -p no:cacheprovider)
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 4)
values="test_values_and_gradients and cuda"
part "values in float32 and bfloat16" 90 "${pytest[@]}" "${workers[@]}" tests/test_ops.py -k "$values and (float32 or bfloat16)"
part "k-centre" 40 "${pytest[@]}" tests/test_cuda_device.py -k "kcenter or selections"

# Without torch's caching allocator every tensor is an allocation of its own, so an access beyond its end is seen.
for tool in memcheck racecheck; do
  part "$tool" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
    "${pytest[@]}" tests/test_cuda_device.py -k "one_sample"
done

# GPU-sized shapes, then shapes whose time depends on the number of launches.
benchmark info_nce_symmetric 30 info_nce_symmetric --large --rounds 5
benchmark propagate 30 propagate --large --rounds 5
benchmark matrix_fusion 20 matrix_fusion --large --rounds 5
benchmark kcenter 40 kcenter --large --rounds 3 --without "torch, cdist per pick (DISTIL)" \
  --without "torch, pairwise_distance per pick (anomalib)" --without "scikit-learn, euclidean_distances per pick"
benchmark hierarchical_contrastive_loss 40 hierarchical_contrastive_loss --all --rounds 11

# Two thresholds choose between two ways of a computation, and are estimates so far: time both on the same shapes.
for few in 0 100000; do
  export MSACORE_CUDA_FEW_SAMPLES=$few
  benchmark "hierarchical, few samples up to $few" 15 hierarchical_contrastive_loss --rounds 11 --shape "N=64" --shape "N=128" \
    --without "reference" --without "torch, nine terms"
done
unset MSACORE_CUDA_FEW_SAMPLES
for pairwise in 0 1000000000; do
  export MSACORE_CUDA_PAIRWISE_ROWS=$pairwise
  benchmark "info_nce, pairs of labels up to $pairwise rows" 15 info_nce --rounds 11 --shape "N=1024" --shape "N=32768" \
    --without "reference" --without "torch, class sums" --without "torch, mask of positives" \
    --without "pytorch-metric-learning SupConLoss"
done
unset MSACORE_CUDA_PAIRWISE_ROWS

part "graphs, streams, devices" 40 "${pytest[@]}" tests/test_cuda_device.py -k "captured or queued or second or somebody"
part "the rest of the tests" 120 "${pytest[@]}" "${workers[@]}" tests/test_ops.py -k "cuda and not ($values and (float32 or bfloat16))"
benchmark "everything else" 120 --all --rounds 5

if ((failed)); then
  say "not all parts passed"
  exit 1
fi
say "all parts passed"
