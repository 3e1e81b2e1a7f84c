#!/usr/bin/env bash
# Everything that takes a GPU, in one call: builds the extension, runs the tests that need a GPU,
# compute-sanitizer, and the benchmarks with the limits of the device. No network; 9 minutes at most.
#
#   benchmarks/gpu_check.sh RESULTS     # a folder; what it gets is some hundred KB
#
# Needs nvcc, a C++ compiler, cmake, ninja, and for Python torch (a CUDA build), pybind11, numpy,
# psutil, pytest, pytest-benchmark, pytest-timeout, hypothesis, rich, safetensors and tqdm.
set -uo pipefail
results=$(mkdir -p "${1:?usage: gpu_check.sh RESULTS}" && realpath "$1")
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
failed=()

# step NAME SECONDS COMMAND...: its output goes to NAME.txt, the end of it here too
step() {
  local name=$1 limit=$2 begin=$SECONDS left=$((530 - SECONDS)) rc
  shift 2
  printf '\n== %s\n' "$name"
  limit=$((limit < left ? limit : left))
  if [ $limit -lt 5 ]; then
    failed+=("$name (no time left)")
    return 1
  fi
  timeout --signal=INT --kill-after=10 "$limit" "$@" >"$results/$name.txt" 2>&1
  rc=$?
  tail -n "${SHOW:-12}" "$results/$name.txt"
  [ $rc -eq 0 ] || failed+=("$name ($rc)")
  printf -- '-- %s: exit %d after %d s\n' "$name" $rc $((SECONDS - begin)) | tee -a "$results/machine.txt"
  return $rc
}

modules='torch, pybind11, numpy, psutil, pytest, pytest_benchmark, pytest_timeout, hypothesis, rich, safetensors, tqdm'
$python -c "import $modules; assert torch.cuda.is_available(), 'torch finds no GPU'" || exit 1

build() {
  cp -r greedyprune "$work/greedyprune" && rm -f "$work"/greedyprune/_C*.so
  cmake -G Ninja -S . -B "$work/build" -DGREEDYPRUNE_CUDA=1 \
    -DGREEDYPRUNE_VERSION=check -DPython_EXECUTABLE="$($python -c 'import sys; print(sys.executable)')" \
    -Dpybind11_DIR="$($python -c 'import pybind11; print(pybind11.get_cmake_dir())')" \
    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$work/greedyprune" && cmake --build "$work/build"
}
export -f build
export work python
export PYTHONPATH="$work"

{
  git log -1 --format='commit %H' 2>/dev/null
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader
  nvcc --version | tail -n 2
  $python -c 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__)'
} | tee "$results/machine.txt"

# -P: not the package of this folder, which has no extension.
bench="$python benchmarks/gpu_bench.py"
step build 240 bash -c build || exit 1
$python -P -c 'from greedyprune.kernels import backend; assert backend.has_cuda(), "not built"' || exit 1
step tests 200 $python -P -m pytest -q --tb=short --durations=10 -m cuda -p no:cacheprovider --maxfail=20 tests
SHOW=60 step benchmarks 200 $bench --out "$results"
step memcheck 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 $bench --small
step racecheck 60 compute-sanitizer --tool racecheck --error-exitcode 9 $bench --small

printf '\n%d s in all' "$SECONDS"
if [ ${#failed[@]} -gt 0 ]; then
  printf '; failed: %s\n' "${failed[*]}"
  exit 1
fi
printf '; everything passed\n'
