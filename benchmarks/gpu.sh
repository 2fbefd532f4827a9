#!/bin/sh
# What needs a GPU, in parts. benchmarks/GPU.md says what a machine needs, what each part prints, and what to do when one fails.
#
#   benchmarks/gpu.sh quick      tests, run, steps, loop: about 6 minutes on an H100
#   benchmarks/gpu.sh learn      CIFAR-10: 4 minutes of pre-training, 2 of fine-tuning: at most 7 minutes
#   benchmarks/gpu.sh profile    one trace of a ViT-L step: under a minute
#   benchmarks/gpu.sh PART ...   parts by name: those, and the long ones: base large tiny memory loop files (hours)
#
# Environment:
#   DATA     CIFAR-10 as torchmae reads it, for run and learn; without it they are left out
#   JPEGS    a folder of image files, for files; without it that part is left out
#   OUT      the folder for results; benchmarks/results/gpu
#   PYTHON   python3
#   TRY=1    tiny networks and noise for data, on a processor too: to try the script
# Each part has a time limit, adds what it prints to OUT/gpu.txt, and writes its figures as it goes. A part that fails is
# named, the others go on, and the exit status is 1.
set -u
HERE=$(dirname "$0")
OUT=${OUT:-benchmarks/results/gpu}
PYTHON=${PYTHON:-python3}
DATA=${DATA:-}
JPEGS=${JPEGS:-}
TINY_NET="--model.depth 1 --model.embed_dim 48 --model.num_heads 3 --model.decoder_depth 1
    --model.decoder_embed_dim 32 --model.decoder_num_heads 2"
TINY_BATCHES="256 1024 4096" BASE_BATCHES="64 128 256 512" LARGE_BATCHES="64 128 256" COMPILED="false true" IMAGES=100000
MEMORY="--cases vit_base vit_large --batch_size 128 --steps 20" SMALL= TRIED= SLOWER=1 LOOP= WITH=true LIMIT=1800
if [ -n "${TRY:-}" ]; then
    TRIED=--try SLOWER=5 WITH=false
    SMALL="--rounds 2 --threads 1 --batch_size 4 $TINY_NET"
    TINY_BATCHES=4 BASE_BATCHES=4 LARGE_BATCHES=4 COMPILED=false IMAGES=100
    MEMORY="--cases vit_base --ways eager --rounds 1 --steps 1 --batch_size 4 --model.depth 1"
fi
mkdir -p "$OUT"
FAILED=

# part NAME SECONDS COMMAND ...: runs a command under a time limit; what it prints goes to the screen and the log.
part() {
    name=$1 seconds=$2
    shift 2
    { echo "== $name" && timeout -k 10 $((seconds * SLOWER)) "$@" 2>&1; echo "$?" > "$OUT/.status"; } | tee -a "$OUT/gpu.txt"
    status=$(cat "$OUT/.status")
    rm -f "$OUT/.status"
    if [ "$status" != 0 ]; then
        [ "$status" = 124 ] && why="over its limit of $((seconds * SLOWER)) s" || why="exit status $status"
        echo "failed: $name, $why" | tee -a "$OUT/gpu.txt"
        FAILED="$FAILED $name"
    fi
}

# bench NAME WORDS: a case of `torchmae bench`, with its figures in NAME.json.
bench() {
    name=$1
    shift
    # shellcheck disable=SC2086 # several words
    part "$name" "$LIMIT" "$PYTHON" -m torchmae bench "$@" $SMALL --progress plain --json "$OUT/$name.json"
}

# batches NAME PRESET BATCHES: training steps of several sizes, eager and compiled, beside transformers.
batches() {
    for batch in $3; do
        for compiled in $COMPILED; do
            bench "$1-$batch-compile-$compiled" step --model.preset "$2" --batch_size "$batch" --compile "$compiled" \
                --against transformers
        done
    done
}

run_part() {
    # shellcheck disable=SC2086 # several words
    case $1 in
        quick)
            for each in tests run steps; do run_part $each; done
            all=$TINY_BATCHES TINY_BATCHES=${TINY_BATCHES##* } LOOP="--compile $WITH --rounds 3" LIMIT=90
            run_part loop
            TINY_BATCHES=$all LOOP= LIMIT=1800 ;;
        tests) part tests 100 "$PYTHON" -m pytest -q --durations 5 "$HERE/../tests/gpu" ;;
        run | learn)
            if [ -n "$DATA$TRIED" ]; then
                [ "$1" = run ] && limit=190 || limit=430
                part "$1" $limit "$PYTHON" "$HERE/gpu_$1.py" --data "$DATA" --out "$OUT/$1.json" $TRIED
            else
                echo "$1: left out, DATA is not set" | tee -a "$OUT/gpu.txt"
            fi ;;
        steps) part steps 160 "$PYTHON" "$HERE/gpu_steps.py" --out "$OUT/steps.json" $TRIED ;;
        profile) part profile 100 "$PYTHON" "$HERE/gpu_profile.py" --out "$OUT/profile.json" $TRIED ;;
        base) batches base vit_base "$BASE_BATCHES" ;;
        large) batches large vit_large "$LARGE_BATCHES" ;;
        tiny) batches tiny vit_tiny_32_p4 "$TINY_BATCHES" ;;
        memory) part memory 7200 "$PYTHON" "$HERE/compilation.py" $MEMORY ;;
        loop)
            "$PYTHON" -c "import numpy, sys; numpy.save(sys.argv[1], numpy.random.default_rng(0).integers(
                0, 256, ($IMAGES, 32, 32, 3), numpy.uint8))" "$OUT/images.npy"
            for batch in $TINY_BATCHES; do
                bench "loop-$batch" train --recipe cifar10 --model.preset vit_tiny_32_p4 --batch_size "$batch" \
                    --data "$OUT/images.npy" $LOOP
            done
            rm -f "$OUT/images.npy" ;;
        files)
            if [ -n "$JPEGS" ]; then
                bench files-loading data --recipe images --data "$JPEGS" --data.cache none --against torchvision
                bench files-loop train --recipe images --data "$JPEGS" --data.cache none
            else
                echo "files: left out, JPEGS is not set" | tee -a "$OUT/gpu.txt"
            fi ;;
        *) echo "gpu.sh: no part is called $1; see the head of $0" >&2 && exit 2 ;;
    esac
}

[ $# -gt 0 ] || { sed -n '2,/^set/{/^#/p;}' "$0" && exit 2; }
for each in "$@"; do run_part "$each"; done
[ -z "$FAILED" ] || { echo "failed:$FAILED" && exit 1; }
