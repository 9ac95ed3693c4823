#!/usr/bin/env bash
# Proves and measures attnforge on the GPU of this machine, in stages that can be resumed:
#
#   bench/gpu_validate.sh OUTDIR                 # all stages that OUTDIR does not hold yet
#   bench/gpu_validate.sh OUTDIR suite bench     # these, again
#
#   build      native libraries in place (nvcc too, where the project has CUDA sources)
#   suite      the tests of the GPU kernels on the GPU, then the rest of the suite on the CPU
#   sanitizer  compute-sanitizer memcheck and racecheck over small shapes of every kernel
#   bench      ratios against torch (flash, cuDNN), flex and installed peers: JSON, table, plots
#
# Leaves OUTDIR/<stage>.log, and <stage>.ok once it has passed, beside environment.json, flash.json
# and the plots, and ends with one line per stage; the exit status is the number of stages that
# failed. Uses the python3 of PATH (PYTHON overrides) with torch, triton, pytest and hypothesis in
# it; installs nothing. About 8 minutes on an H100; a stage that outruns its limit fails.
set -uo pipefail

if [ $# -lt 1 ]; then
  sed -n '2,16p' "$0" >&2
  exit 64
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}

# A source tree has triton_kernels at the top; an installed package has it inside.
inside=python/attnforge/triton_kernels
if [ ! -e "$inside" ]; then
  ln -s ../../triton_kernels "$inside"
  trap 'rm -f "$inside"' EXIT
fi

build() { "$python" setup.py -q build_ext --inplace; }

suite() {
  "$python" -m pytest -q tests/triton -m "not slow" &&
    "$python" -m pytest -q -n "$(($(nproc) / 2 + 1))" --dist worksteal --ignore tests/triton \
      --ignore tests/packaging --ignore tests/native --ignore tests/bench tests
}

sanitizer() {
  local tool
  for tool in memcheck racecheck; do
    echo "== $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
      "$python" -m attnforge.testing.gpu_smoke || return
  done
}

bench() {
  "$python" -m attnforge bench flash --device cuda --json "$out/flash.json" --plot "$out/plots"
}

declare -A limit=([build]=150 [suite]=210 [sanitizer]=90 [bench]=210)
stages=(build suite sanitizer bench)
wanted=("$@")
if [ ${#wanted[@]} -eq 0 ]; then
  for stage in "${stages[@]}"; do [ -e "$out/$stage.ok" ] || wanted+=("$stage"); done
fi

"$python" -m attnforge.testing.machine --device cuda >"$out/environment.json" || exit 65
failed=0
summary=()
for stage in "${wanted[@]}"; do
  [ -n "${limit[$stage]:-}" ] || { echo "unknown stage: $stage (${stages[*]})" >&2; exit 64; }
  rm -f "$out/$stage.ok"
  echo "=== $stage"
  begin=$SECONDS
  # A shell of its own, so that the limit holds for all that the stage starts.
  export -f "$stage"
  if out=$out python=$python timeout --kill-after=10 "${limit[$stage]}" \
    bash -c "set -o pipefail; $stage" 2>&1 | tee "$out/$stage.log"; then
    touch "$out/$stage.ok"
    summary+=("$stage ok $((SECONDS - begin)) s")
  else
    failed=$((failed + 1))
    summary+=("$stage FAILED $((SECONDS - begin)) s, see $out/$stage.log")
  fi
done
printf '%s\n' "=== stages" "${summary[@]:-nothing to do: remove the .ok files or name stages}"
exit "$failed"
