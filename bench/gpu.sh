#!/usr/bin/env bash
# Everything that wants a GPU machine, in stages that fit slots of ten minutes; see usage().
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly STAGES=(build env latency test sanitize bench)
readonly SITE=build/gpu/site  # what is installed, apart from the machine's Python packages
readonly SHAPES=("128 16" "256 64" "768 16" "1024 64" "200 33")  # H B, at T = 1024
readonly SKIPPED=64           # how a stage says that this machine cannot run it

usage() {
  cat <<'END'
usage: bench/gpu.sh [--out DIR] [--wheels DIR] [--python PYTHON] [--dry-run] [STAGE ...]

Stages, all of them unless some are named; a stage that fails does not stop the next:
  build     compile and install the package with THROUGHTIME_BUILD=cuda into build/gpu/site
  env       python -m throughtime env
  latency   compile and run bench/gpu/latency.cu: barriers, exchanges, rates
  test      pytest -m gpu
  sanitize  compute-sanitizer: memcheck, racecheck and synccheck of a few of these tests
  bench     the LSTM beside cuDNN's nn.LSTM, and FlashRNN and haste where they are installed

Options:
  --out DIR        where gpu.log, latency.csv and lstm.csv go (bench/results/<name of the GPU>)
  --wheels DIR     wheels that the build installs first, on a machine without a network
  --python PYTHON  the interpreter that has torch ($PYTHON, or python3)
  --dry-run        print the commands, run nothing

PYTEST_ARGS adds to the test stage, as in PYTEST_ARGS='-k capture' bench/gpu.sh test.
Exit code: 0, 1 if a stage failed or there is no GPU, 2 for wrong arguments.
END
}

wrong() {
  printf 'gpu.sh: %s; see bench/gpu.sh --help\n' "$1" >&2
  exit 2
}

# The arguments, as a shell would read them.
words() {
  local text
  printf -v text '%q ' "$@"
  printf '%s' "${text% }"
}
run() {
  printf '+ %s\n' "$(words "$@")"
  "$dry_run" || "$@"
}
# run, with what the command prints in a file.
capture() {
  local file=$1
  shift
  printf '+ %s > %q\n' "$(words "$@")" "$file"
  "$dry_run" || "$@" > "$file"
}

# ---- Stages: each runs in a subshell, where the first command that fails ends it. ----

stage() {
  case $1 in
    build) stage_build ;;
    env) stage_env ;;
    latency) stage_latency ;;
    test) stage_test ;;
    sanitize) stage_sanitize ;;
    bench) stage_bench ;;
  esac
}

stage_build() {
  run mkdir -p "$SITE"
  if [[ -n $wheels ]]; then
    run "$python" -m pip install --quiet --no-index --no-deps --upgrade --target "$SITE" \
      "$wheels"/*.whl
  fi
  run env THROUGHTIME_BUILD=cuda "$python" -m pip install --no-build-isolation --no-deps \
    --upgrade --target "$SITE" .
}

need_build() {
  "$dry_run" && return
  "$python" -c 'import throughtime' && return
  echo 'throughtime is not installed: run bench/gpu.sh build first'
  return 1
}

stage_env() {
  need_build
  run "$python" -m throughtime env
}

stage_latency() {
  local nvcc=nvcc
  if [[ -n ${CUDA_HOME:-} ]]; then nvcc=$CUDA_HOME/bin/nvcc; fi
  run mkdir -p build/gpu
  run "$nvcc" -O3 -std=c++17 --expt-relaxed-constexpr -arch=native -Icsrc bench/gpu/latency.cu \
    -o build/gpu/latency
  # Its waits have no limit of their own.
  capture "$out/latency.csv" timeout --kill-after=10 300 build/gpu/latency
  "$dry_run" || cat "$out/latency.csv"
}

# Only these files: others need packages that a bare machine may lack.
readonly GPU_TESTS=(tests/gpu/test_gpu.py tests/gpu/test_gpu_modules.py tests/gpu/test_gpu_relevancy.py
  tests/gpu/test_gpu_runtime.py)

need_pytest() {
  "$dry_run" && return
  "$python" -c 'import pytest, pytest_timeout' && return
  echo 'pytest and pytest-timeout are not installed: download their wheels elsewhere (pip' \
    'download), then bench/gpu.sh --wheels DIR build'
  return 1
}

stage_test() {
  need_build
  need_pytest
  local more=()
  mapfile -t more < <(xargs -r -n 1 <<< "${PYTEST_ARGS:-}")  # xargs knows quotes
  # tests/conftest.py turns Triton's interpreter on where nothing is said about it.
  run env TRITON_INTERPRET=0 CUBLAS_WORKSPACE_CONFIG=:4096:8 timeout 580 "$python" -m pytest -m gpu \
    -p no:cacheprovider --durations=15 "${GPU_TESTS[@]}" "${more[@]}"
}

stage_sanitize() {
  need_build
  need_pytest
  if ! "$dry_run"; then
    local answer
    if ! command -v compute-sanitizer > /dev/null; then
      echo 'skipped: compute-sanitizer is not on PATH (it comes with the CUDA toolkit)'
      exit "$SKIPPED"
    fi
    if ! answer=$(compute-sanitizer --target-processes all --error-exitcode 1 "$python" -c \
      'import torch; torch.ones(1, device="cuda").sum().item()' 2>&1); then
      printf 'skipped: compute-sanitizer cannot watch a GPU here: %s\n' \
        "$(grep -m 1 -iE 'not supported|error' <<< "$answer" || tail -n 1 <<< "$answer")"
      exit "$SKIPPED"
    fi
  fi
  local tool failed=0 filter
  for tool in memcheck racecheck synccheck; do
    # Races inside of a library's kernels are not ours to find.
    filter=()
    if [[ $tool == racecheck ]]; then filter=(--kernel-name kns=lstm); fi
    # torch's caching allocator would hide what is written past the end of a tensor.
    run env TRITON_INTERPRET=0 PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTEST_TIMEOUT=0 timeout 540 \
      compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 1 "${filter[@]}" \
      "$python" -m pytest -m gpu -p no:cacheprovider tests/gpu/test_gpu.py \
      -k sanitizer || failed=1
  done
  return "$failed"
}

stage_bench() {
  need_build
  local peers=(torch) parts=() shape failed=0
  if ! "$dry_run"; then
    add_peer flashrnn flashrnn
    add_peer haste haste_pytorch
  fi
  run mkdir -p build/gpu/parts
  for shape in "${SHAPES[@]}"; do
    local hidden=${shape% *} batch=${shape#* }
    local part=build/gpu/parts/lstm-H$hidden-B$batch.csv
    run rm -f "$part"
    run "$python" -m bench lstm --device cuda --T 1024 --B "$batch" --H "$hidden" \
      --dtype float16 bfloat16 float32 --p 0 0.5 --backends cuda triton --peers "${peers[@]}" \
      --csv "$part" || failed=1
    parts+=("$part")
  done
  merge "$out/lstm.csv" "${parts[@]}" || failed=1
  return "$failed"
}

# Adds a peer whose Python package is here.
add_peer() {
  if "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$2') is None)"; then
    peers+=("$1")
  else
    echo "$1: Python package $2 is not installed"
  fi
}

# The parts that there are, under one header.
merge() {
  local file=$1 part there=()
  shift
  if "$dry_run"; then
    printf '+ merge %s > %q\n' "$(words "$@")" "$file"
    return
  fi
  for part in "$@"; do
    if [[ -s $part ]]; then there+=("$part"); fi
  done
  if ((${#there[@]} == 0)); then
    echo 'no shape could be measured'
    return 1
  fi
  awk 'NR == 1 || FNR > 1' "${there[@]}" > "$file"
}

# ---- Arguments ----

out='' wheels='' python=${PYTHON:-python3} dry_run=false
chosen=()
while (($#)); do
  case $1 in
    -h | --help)
      usage
      exit 0
      ;;
    --dry-run) dry_run=true ;;
    --out | --wheels | --python)
      if (($# < 2)) || [[ -z $2 || $2 == -* ]]; then wrong "$1 wants a value"; fi
      printf -v "${1#--}" '%s' "$2"
      shift
      ;;
    -*) wrong "there is no option $1" ;;
    *)
      if [[ " ${STAGES[*]} " != *" $1 "* ]]; then
        wrong "there is no stage '$1', only ${STAGES[*]}"
      fi
      chosen+=("$1")
      ;;
  esac
  shift
done
if ((${#chosen[@]} == 0)); then chosen=("${STAGES[@]}"); fi
if [[ -n $wheels ]] && ! compgen -G "$wheels/*.whl" > /dev/null; then
  wrong "--wheels: there is no wheel in '$wheels'"
fi

# ---- The GPU ----

if "$dry_run"; then
  gpu=GPU
else
  if ! gpu=$("$python" -c '
import sys
try:
    import torch
except ImportError:
    sys.exit("it has no torch")
if torch.version.cuda is None:
    sys.exit(f"torch {torch.__version__} is built without CUDA")
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no GPU and driver that it can use")
print(torch.cuda.get_device_name(0))
' 2>&1); then
    printf 'gpu.sh: an NVIDIA GPU is needed, and %s finds none: %s; --dry-run prints what would run\n' \
      "$python" "$(tail -n 1 <<< "$gpu")" >&2
    exit 1
  fi
  gpu=$(tail -n 1 <<< "$gpu")
fi
if [[ -z $out ]]; then
  slug=$(tr -cs '[:alnum:]\n' - <<< "${gpu,,}")
  out=bench/results/${slug%-}
fi

root=$PWD
export PYTHONPATH="$root/$SITE${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

# ---- Run ----

log=/dev/null
if ! "$dry_run"; then
  mkdir -p "$out"
  log=$out/gpu.log
  {
    printf '\n==== bench/gpu.sh %s: %s, %s\n' "${chosen[*]}" "$gpu" "$(date -u +%FT%TZ)"
    git describe --always --dirty 2> /dev/null || true
    nvidia-smi || true
  } >> "$log" 2>&1
fi

summary=() code=0
for name in "${chosen[@]}"; do
  printf '\n== %s\n' "$name" | tee -a "$log"
  begin=$SECONDS
  set +e
  (
    set -e
    stage "$name"
  ) 2>&1 | tee -a "$log"
  status=${PIPESTATUS[0]}
  set -e
  case $status in
    0) result=passed ;;
    "$SKIPPED") result=skipped ;;
    *) result="FAILED ($status)" code=1 ;;
  esac
  summary+=("$(printf '%-8s %-12s %4d s' "$name" "$result" $((SECONDS - begin)))")
  "$dry_run" || printf '== %s\n' "${summary[-1]}" | tee -a "$log"
done
if ! "$dry_run"; then
  printf '%s\n' '' "${summary[@]}" "all of it: $log" | tee -a "$log"
fi
exit "$code"
