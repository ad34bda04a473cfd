#!/usr/bin/env bash
# Everything that needs a GPU, in parts that each end in time. benchmarks/GPU.md has the plan.
#
#   bash benchmarks/run_gpu.sh OUT [--seconds N] [part ...]
#
#   first     what is true, in at most 300 s: everything compiled, checked, and the headline timed
#   check     the tests on the device, on every core
#   sanitize  compute-sanitizer on maps of few padded windows, where it is installed
#   stress    1000 launches of each kernel, bit for bit the same
#   ipsa cpsa block model   the benchmarks
#   convergence   300 steps of training by each backend, in fp32 and bf16, curves side by side
#   tune      the candidates of the launch tables, and the rows to ship
#   profile   metrics of the main kernels by ncu, where it is installed
#
# Without parts, all of them in this order. Each but first takes N seconds, by default 150. OUT gets
# log.txt and one file for each part that measures; `python -m benchmarks.report FILE ...` then makes
# the tables and the figures. first, tune and the benchmarks go on with their files when they are run
# again: what is there is not done again.
# Nothing is installed or downloaded: the package is taken from this checkout. Where the checkout has
# a Triton cache that fits (`benchmarks.prebuild` makes .triton-cache), first starts with it.
#
# Where there is no GPU each part runs at a tiny size: it shows that the part works, and no figure
# in OUT means anything. The kernels then run in Triton's interpreter, but in ipsa, cpsa, block and
# model, which take what serves on a CPU.
set -euo pipefail

if (($# == 0)); then
    sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0"
    exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
part_seconds=150
if [[ ${1:-} == --seconds ]]; then
    part_seconds=$2
    shift 2
fi
benchmark_seconds=$((part_seconds * 4 / 5)) # by then a benchmark must have begun
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

# benchmarks NAME: a file of its own for each run, which leaves out what the files before it have
benchmarks() {
    local stored=("$out/$1"*.json) known=()
    [[ -e ${stored[0]} ]] || stored=()
    ((${#stored[@]})) && known=("${stored[@]/#/--stored=}")
    tests --benchmark "${trial[@]}" --time-limit "$benchmark_seconds" -rs "${known[@]}" \
        --benchmark-json "$out/$1${stored[0]:+-${#stored[@]}}.json" "benchmarks/bench_$1.py" ||
        (($? == 5)) # nothing was left to do
}

# unless_installed TOOL: say that a part is left out
unless_installed() {
    ! command -v "$1" || return 1
    echo "left out: $1 is not installed"
}

first() {
    local kept="${TMPDIR:-/tmp}/catkernels-triton-cache"
    if python3 -m benchmarks.prebuild --fits .triton-cache; then
        mkdir -p "$kept"
        cp -r .triton-cache/. "$kept"
    fi
    within 295 "${interpreted[@]}" env TRITON_CACHE_DIR="$kept" \
        python3 -m benchmarks.first "$out/first.jsonl" "${trial[@]}"
}

check() {
    if ((${#trial[@]})); then
        tests tests/test_benchmarks.py tests/test_tune.py tests/test_stress.py -k "few or wrong or work"
        return
    fi
    # most of their time these tests compile, each process on a core of its own
    local spread=()
    ! python3 -c 'import xdist' 2>/dev/null || spread=(-n auto)
    tests -rs "${spread[@]}" tests
}

sanitize() {
    unless_installed compute-sanitizer && return
    local tool failed=0
    for tool in memcheck racecheck; do
        echo "-- $tool"
        # every tensor its own allocation, so that what lies beside it is out of bounds
        within $((part_seconds / 2)) env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
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
block() { benchmarks block; }
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
        --kernel-name 'regex:ipsa|cpsa|mlp|norm|linear' --launch-count 48 \
        python3 -m pytest -p no:cacheprovider -q --benchmark --benchmark-disable "${trial[@]}" \
        benchmarks/bench_block.py -k 'small-stage1 and b256 and step and catkernels'
}

parts="first check sanitize stress ipsa cpsa block model convergence tune profile"
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
