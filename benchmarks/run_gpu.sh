#!/usr/bin/env bash
# Everything that needs a GPU, in parts that each end within nine minutes.
#
#   bash benchmarks/run_gpu.sh OUT [part ...]
#
#   check     the tests on the device
#   sanitize  compute-sanitizer's four tools on maps of few windows, where it is installed
#   stress    1000 launches of each kernel, bit for bit the same
#   ipsa cpsa model   the benchmarks
#   convergence   300 steps of training by each backend, in fp32 and bf16, curves side by side
#   tune      the candidates of the launch tables, and the rows to ship
#   profile   metrics of the main kernels by ncu, where it is installed
#
# Without parts, all of them in this order. OUT gets log.txt and one file for each part that
# measures; `python -m benchmarks.report OUT/{ipsa,cpsa,model}.json` then makes the tables of
# benchmarks/README.md and the figures. A part that runs out of time keeps what it has; tune goes
# on with its file when it is run again.
# Nothing is installed or downloaded: the package is taken from this checkout.
#
# Where there is no GPU each part runs at a tiny size: it shows that the part works, and no figure
# in OUT means anything. The kernels then run in Triton's interpreter, but in ipsa, cpsa and model,
# which take what serves on a CPU.
set -euo pipefail

part_seconds=530      # what a part may take
benchmark_seconds=460 # by then a benchmark must have begun

if (($# == 0)); then
    sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0"
    exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."

trial=()
interpreted=()
if ! python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    trial=(--trial)
    interpreted=(env TRITON_INTERPRET=1)
fi

# within SECONDS COMMAND...: interrupted then, so that pytest still tells what has failed so far
within() {
    local seconds=$1
    shift
    timeout --signal=INT --kill-after=10 "$seconds" "$@"
}

timed() {
    within "$part_seconds" "$@"
}

# tests SELECTION...: pytest without the files it would leave in the checkout
tests() {
    timed python3 -m pytest -p no:cacheprovider --show-capture=no --tb=short -q "$@"
}

benchmarks() {
    tests --benchmark "${trial[@]}" --time-limit "$benchmark_seconds" -rs \
        --benchmark-json "$out/$1.json" "benchmarks/bench_$1.py"
}

# unless_installed TOOL: say that a part is left out
unless_installed() {
    ! command -v "$1" || return 1
    echo "left out: $1 is not installed"
}

check() {
    if ((${#trial[@]})); then
        tests tests/test_benchmarks.py tests/test_stress.py -k "few or wrong or work"
        return
    fi
    # Most of their time these tests compile, each process on a core of its own. Without job control
    # what is in the background would not hear the interrupt.
    set -m
    local apart=(tests/test_ipsa_kernels.py tests/test_cpsa_kernels.py)
    local file pid pids=() failed=0
    for file in "${apart[@]}"; do
        tests -rs "$file" >"$out/$(basename "$file" .py).txt" 2>&1 &
        pids+=($!)
    done
    tests -rs tests "${apart[@]/#/--ignore=}" || failed=1
    for pid in "${pids[@]}"; do
        wait "$pid" || failed=1
    done
    for file in "${apart[@]}"; do
        echo "-- $file"
        cat "$out/$(basename "$file" .py).txt"
        rm "$out/$(basename "$file" .py).txt"
    done
    return "$failed"
}

sanitize() {
    unless_installed compute-sanitizer && return
    local tool failed=0
    for tool in memcheck racecheck initcheck synccheck; do
        echo "-- $tool"
        # every tensor its own allocation, so that what lies beside it is out of bounds
        within $((part_seconds / 4)) env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool "$tool" --error-exitcode 1 \
            python3 -m pytest -p no:cacheprovider -q -rs tests/test_stress.py -k few-padded ||
            failed=1
    done
    return "$failed"
}

stress() {
    if ((${#trial[@]})); then
        tests -rs tests/test_stress.py -k few
    else
        tests -rs --full tests/test_stress.py
    fi
}

ipsa() { benchmarks ipsa; }
cpsa() { benchmarks cpsa; }
model() { benchmarks model; }

convergence() {
    local steps=300
    ((${#trial[@]})) && steps=1
    timed "${interpreted[@]}" python3 -m benchmarks.convergence --steps "$steps" \
        --save "$out/convergence.png"
}

tune() {
    timed "${interpreted[@]}" python3 -m benchmarks.tune "$out/tune.json" "${trial[@]}" \
        --time-limit "$benchmark_seconds"
}

profile() {
    unless_installed ncu && return
    timed ncu --set full --page details --csv --log-file "$out/profile.csv" \
        --kernel-name 'regex:ipsa|cpsa' --launch-count 24 \
        python3 -m pytest -p no:cacheprovider -q --benchmark --benchmark-disable "${trial[@]}" \
        benchmarks -k 'stages and stage1 and b256 and step and catkernels'
}

parts="check sanitize stress ipsa cpsa model convergence tune profile"
if (($# == 0)); then
    # shellcheck disable=SC2086
    set -- $parts
fi
for part in "$@"; do
    if [[ " $parts " != *" $part "* ]]; then
        echo "no part is called $part; the parts are $parts" >&2
        exit 2
    fi
done
failed=()
for part in "$@"; do
    SECONDS=0
    echo "== $part, $(date -u +%FT%TZ)" | tee -a "$out/log.txt"
    if ("$part") 2>&1 | tee -a "$out/log.txt"; then
        verdict=passed
    else
        verdict=FAILED
        failed+=("$part")
    fi
    echo "== $part $verdict after $SECONDS s" | tee -a "$out/log.txt"
done
if ((${#failed[@]})); then
    echo "FAILED: ${failed[*]}" | tee -a "$out/log.txt" >&2
    exit 1
fi
