#!/usr/bin/env bash
# usage: bench/gpu.sh [--out DIR] [--wheels DIR] [--python PYTHON] [--dry-run] [STAGE ...]
#
# Everything that needs a GPU machine, in stages of at most ten minutes.
# Stages, all of them unless some are named; a stage that fails does not stop the next:
#   build     compile and install the package with THROUGHTIME_BUILD=cuda into build/gpu/site
#   env       python -m throughtime env
#   latency   compile and run bench/gpu/latency.cu: the constants of the kernels' cost model
#   test      pytest -m gpu
#   sanitize  compute-sanitizer: memcheck, racecheck and synccheck of a few of these tests, and of repeats
#   bench     the LSTM beside cuDNN's nn.LSTM and a loop with a compiled step
#   tf32      the same shapes in float32 with TF32, beside cuDNN's
#   episodes  rows with resets beside TorchRL's backends, its Triton kernels among them
#   attention relevancy attention beside full attention (flash), T 2,048 to 16,384
#   nccl      training by as many processes as there are GPUs
#
# Options:
#   --out DIR        where gpu.log and the CSV files go (bench/results/<name of the GPU>)
#   --wheels DIR     wheels that the build installs first, on a machine without a network
#   --python PYTHON  the interpreter that has torch ($PYTHON, or python3)
#   --dry-run        print the commands, run nothing
#
# PYTEST_ARGS adds to the test stage, as in PYTEST_ARGS='-k capture' bench/gpu.sh test.
# Exit code: 0, 1 if a stage failed or there is no GPU, 2 for wrong arguments.
#
# shellcheck disable=SC2329  # stages are called by name
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly STAGES=(build env latency test sanitize bench tf32 episodes attention nccl)
readonly SITE=build/gpu/site                                  # the installed package
readonly SHAPES=("1024 16 128" "1024 64 256" "1024 16 768" "1024 64 1024" "1024 33 200" "2048 16 512")  # T B H
# Other files of tests need packages that a bare machine may lack.
readonly GPU_TESTS=(tests/gpu/test_gpu{,_modules,_relevancy,_runtime}.py)
readonly SKIPPED=64  # exit code of a stage that this machine cannot run

fail() {  # CODE MESSAGE
  printf 'gpu.sh: %s\n' "$2" >&2
  exit "$1"
}
wrong() { fail 2 "$1; see bench/gpu.sh --help"; }

# Prints a command as a shell would read it, and runs it unless this is a dry run.
run() {
  printf '+%s\n' "$(printf ' %q' "$@")"
  "$dry_run" || "$@"
}

# ---- Stages: each runs in a subshell, where the first command that fails ends it ----

stage_build() {
  if [[ -n $wheels ]]; then
    run "$python" -m pip install --quiet --no-index --no-deps --upgrade --target "$SITE" \
      "$wheels"/*.whl
  fi
  run env THROUGHTIME_BUILD=cuda "$python" -m pip install --no-build-isolation --no-deps \
    --upgrade --target "$SITE" .
}

stage_env() { run "$python" -m throughtime env; }

stage_latency() {
  run mkdir -p build/gpu
  run "${CUDA_HOME:+$CUDA_HOME/bin/}nvcc" -O3 -std=c++17 --expt-relaxed-constexpr -arch=native -Icsrc \
    bench/gpu/latency.cu -o build/gpu/latency
  # Its waits have no limit of their own.
  run timeout --kill-after=10 300 build/gpu/latency "$out/latency.csv"
  run cat "$out/latency.csv"
}

# TRITON_INTERPRET: else tests/conftest.py has Triton's kernels interpreted on the CPU.
stage_test() {
  local more=()
  mapfile -t more < <(xargs -r -n 1 <<< "${PYTEST_ARGS:-}")  # xargs knows quotes
  run env TRITON_INTERPRET=0 CUBLAS_WORKSPACE_CONFIG=:4096:8 timeout 580 "$python" -m pytest -m gpu \
    -p no:cacheprovider --durations=15 "${GPU_TESTS[@]}" "${more[@]}"
}

# Skipped where the sanitizer is missing or cannot watch this GPU.
stage_sanitize() {
  local tool failed=0 only answer
  if ! "$dry_run" && ! answer=$(compute-sanitizer --target-processes all --error-exitcode 1 \
    "$python" -c 'import torch; torch.ones(1, device="cuda").sum().item()' 2>&1); then
    printf 'skipped: compute-sanitizer cannot watch a GPU here: %s\n' "$(tail -n 1 <<< "$answer")"
    exit "$SKIPPED"
  fi
  for tool in memcheck racecheck synccheck; do
    only=()
    # Races in the kernels of a library are not ours.
    if [[ $tool == racecheck ]]; then only=(--kernel-name kns=lstm); fi
    # torch's caching allocator would hide writes past the end of a tensor.
    run env TRITON_INTERPRET=0 PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTEST_TIMEOUT=0 GPU_REPEATS=3 timeout 540 \
      compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 1 "${only[@]}" \
      "$python" -m pytest -m gpu -p no:cacheprovider \
      tests/gpu/test_gpu.py tests/gpu/test_gpu_runtime.py -k 'sanitizer or thousand' || failed=1
  done
  return "$failed"
}

# bench_lstm NAME OPTION ...: a process and a file for each shape, as an error of CUDA ends a process.
bench_lstm() {
  local name=$1 shape failed=0
  shift
  for shape in "${SHAPES[@]}"; do
    local steps batch hidden
    read -r steps batch hidden <<< "$shape"
    local rows=$out/$name-H$hidden-B$batch.csv
    run rm -f "$rows"
    run timeout 580 "$python" -m bench lstm --device cuda --T "$steps" --B "$batch" --H "$hidden" "$@" \
      --csv "$rows" || failed=1
  done
  return "$failed"
}

stage_bench() {
  bench_lstm lstm --dtype float16 bfloat16 float32 --p 0 0.5 --backends cuda triton \
    --peers torch compiled-loop
}

stage_tf32() { bench_lstm tf32 --dtype float32-high --p 0 --backends cuda --peers torch; }

stage_episodes() {
  run timeout 580 "$python" -m bench rl --device cuda --parts rows --csv "$out/episodes.csv"
}

# Flash attention takes 16 bits; screen_every has no Triton kernel.
stage_attention() {
  run timeout 580 "$python" -m bench relevancy --device cuda --T 2048 4096 8192 16384 \
    --dtype bfloat16 float32 --backends triton --peers sdpa --csv "$out/relevancy.csv"
}

# NCCL takes one process of a GPU.
stage_nccl() {
  run rm -rf build/gpu/nccl
  run timeout 580 "$python" -m torch.distributed.run --standalone --nproc-per-node gpu -m bench train \
    copying --preset quick --device cuda --epochs 1 --updates-per-epoch 50 --out build/gpu/nccl
}

# ---- Arguments, the GPU, and the loop over the stages ----

out='' wheels='' python=${PYTHON:-python3} dry_run=false chosen=()

parse() {
  while (($#)); do
    case $1 in
      -h | --help)
        sed -n '2,/^# Exit code/s/^# \{0,1\}//p' bench/gpu.sh
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
        [[ " ${STAGES[*]} " == *" $1 "* ]] || wrong "there is no stage '$1', only ${STAGES[*]}"
        chosen+=("$1")
        ;;
    esac
    shift
  done
  if ((${#chosen[@]} == 0)); then chosen=("${STAGES[@]}"); fi
  if [[ -n $wheels ]] && ! compgen -G "$wheels/*.whl" > /dev/null; then
    wrong "--wheels: there is no wheel in '$wheels'"
  fi
}

# Prints the name of the GPU, or exits with the reason why torch has none.
name_of_gpu() {
  local answer
  answer=$("$python" -c 'import torch; print(torch.cuda.get_device_name(0))' 2>&1) ||
    fail 1 "an NVIDIA GPU is needed, and the torch of $python finds none: \
$(tail -n 1 <<< "$answer"); --dry-run prints what would run"
  tail -n 1 <<< "$answer"
}

parse "$@"
gpu=GPU log=/dev/null
if ! "$dry_run"; then gpu=$(name_of_gpu); fi
if [[ -z $out ]]; then
  slug=$(tr -cs '[:alnum:]\n' - <<< "${gpu,,}")
  out=bench/results/${slug%-}
fi
if ! "$dry_run"; then
  mkdir -p "$out"
  log=$out/gpu.log
  {
    printf '\n==== bench/gpu.sh %s: %s, %s\n' "${chosen[*]}" "$gpu" "$(date -u +%FT%TZ)"
    git describe --always --dirty || true
    nvidia-smi || true
  } >> "$log" 2>&1
fi
export PYTHONPATH="$PWD/$SITE${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

summary=() code=0
for name in "${chosen[@]}"; do
  printf '\n== %s\n' "$name" | tee -a "$log"
  begin=$SECONDS
  set +e  # the script goes on after a stage that fails
  (
    set -e
    "stage_$name"
  ) 2>&1 | tee -a "$log"
  status=${PIPESTATUS[0]}
  set -e
  case $status in
    0) result=passed ;;
    "$SKIPPED") result=skipped ;;
    *) result="FAILED ($status)" code=1 ;;
  esac
  summary+=("$(printf '%-9s %-12s %4d s' "$name" "$result" $((SECONDS - begin)))")
done
"$dry_run" || printf '%s\n' '' "${summary[@]}" "all of it: $log" | tee -a "$log"
exit "$code"
