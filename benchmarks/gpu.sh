#!/usr/bin/env bash
# What a GPU is to answer, in three calls of four minutes: `benchmarks/gpu.sh correctness`, `speed`, `training`.
# benchmarks/GPU_TODO.md says what each line is expected to give.
#   OUT=FOLDER     where results go; default: benchmarks/results/gpu
#   PYTHON=python  the interpreter
#   DATA=ROOT      photographs in COCO layout for the last line; default: drawn shapes of 480 px
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=.:kernels:profiling PYTHONUNBUFFERED=1
OUT=${OUT:-benchmarks/results/gpu} PYTHON=${PYTHON:-python3} DATA=${DATA:-shapes:480}
mkdir -p "$OUT"
export DETR_FAST_CACHE=${DETR_FAST_CACHE:-$PWD/runs/cache}

# line NAME SECONDS COMMAND...: at most so long; all that it prints goes to $OUT/NAME.txt, its end to the screen
line() {
    local name=$1 seconds=$2 began=$SECONDS code=0
    shift 2
    echo "== $name: $*"
    timeout --kill-after=10 "$seconds" "$@" >"$OUT/$name.txt" 2>&1 || code=$?
    tail -n 12 "$OUT/$name.txt"
    echo "== $name: exit code $code after $((SECONDS - began)) s"
}

tests() { line "$1" "$2" "$PYTHON" -m pytest -q -p no:cacheprovider "${@:3}"; }
profile() { line "$1" "$2" "$PYTHON" -m detr_profiling "${@:3}" --out "$OUT"; }

case ${1:-} in
correctness)
    tests cuda 90 tests/test_cuda.py tests/test_absent_gpu.py
    tests kernels 100 -n 8 --dist loadfile tests/test_{layer_norm,assignment,matching_cost,set_loss,pixels}.py \
        tests/test_{convolution,conv_bias_act,convolution_library,batch_norm,packing,packed_attention,xformers_attention}.py
    tests model 50 -n 8 --dist loadfile tests/test_{compile,golden,reference,step,graphed_step,cached,optimized}.py
    ;;
speed)
    profile tune_training 110 tune --model detr_r50 --minutes 1.3
    profile tune_inference 70 tune --model detr_r50 --mode inference --minutes 0.7
    profile ladder 60 ladder --no-compile --rounds 1 --runs 3 --no-leave-one-out --minutes 0.8
    ;;
training)
    line main_job 100 "$PYTHON" -m detr_fast.train --output runs/gpu_default
    line photographs 140 "$PYTHON" -m detr_fast.train --data "$DATA" --model detr_r50 --backbone-weights none \
        --epochs 1000 --log-every 5 --output runs/gpu_r50
    cp runs/gpu_default/metrics.csv "$OUT/metrics_default.csv"
    cp runs/gpu_r50/metrics.csv "$OUT/metrics_r50.csv"
    ;;
*)
    sed -n '2,6p' "$0" | sed 's/^# \?//'
    exit 2
    ;;
esac
