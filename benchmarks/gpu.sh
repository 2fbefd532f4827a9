#!/bin/sh
# All that needs a GPU, in one call: the tests of tests/gpu, and every figure of docs/performance.md; training steps
# beside transformers in the same run.
#
#   benchmarks/gpu.sh [OUT] [JPEGS]
#
#   OUT     folder for the tables (gpu.txt) and the figures (a JSON file for each case); benchmarks/results/gpu
#   JPEGS   folder of image files, for the loading; without it that part is left out
#
# Environment: PYTHON (python3); PARTS, some of "tests base large tiny memory loop files" (all); TRY=1: tiny networks, on a
# processor too, to try this script. A case that fails (out of memory, say) is named, and the others go on. What
# DistributedDataParallel costs one rank is nothing: one rank is not wrapped (torchmae.training.parallel).
set -u
OUT=${1:-benchmarks/results/gpu}
JPEGS=${2:-}
PYTHON=${PYTHON:-python3}
PARTS=${PARTS:-tests base large tiny memory loop files}
LOG=$OUT/gpu.txt
SMALL=
BASE_BATCHES="64 128 256 512"
LARGE_BATCHES="64 128 256"
MEMORY="--cases vit_base vit_large --batch_size 128 --steps 20"
TINY_BATCHES="256 1024 4096"
COMPILED="false true"
IMAGES=100000
if [ -n "${TRY:-}" ]; then
    SMALL="--rounds 2 --threads 1 --batch_size 4 --model.depth 1 --model.embed_dim 48 --model.num_heads 3 --model.decoder_depth 1
        --model.decoder_embed_dim 32 --model.decoder_num_heads 2"
    BASE_BATCHES=4 LARGE_BATCHES=4 TINY_BATCHES=4 COMPILED=false IMAGES=100
    MEMORY="--cases vit_base --ways eager --rounds 1 --steps 1 --batch_size 4 --model.depth 1"
fi
mkdir -p "$OUT"

has() {
    case " $PARTS " in *" $1 "*) true ;; *) false ;; esac
}

# bench NAME WORDS: one case; its table goes to the screen and the log, its figures to NAME.json.
bench() {
    name=$1
    shift
    # shellcheck disable=SC2086 # several words
    { echo "== $name" && "$PYTHON" -m torchmae bench "$@" $SMALL --progress plain --json "$OUT/$name.json" 2>&1 ||
        echo "failed: torchmae bench $*"; } | tee -a "$LOG"
}

# steps NAME PRESET BATCHES: a training step on images that lie on the GPU; eager and compiled.
steps() {
    for batch in $3; do
        for compiled in $COMPILED; do
            bench "$1-$batch-compile-$compiled" step --model.preset "$2" --batch_size "$batch" --compile "$compiled" \
                --against transformers
        done
    done
}

if has tests; then
    { echo "== tests" && "$PYTHON" -m pytest -q "$(dirname "$0")/../tests/gpu" 2>&1 || echo "failed: tests/gpu"; } | tee -a "$LOG"
fi

if has base; then steps base vit_base "$BASE_BATCHES"; fi
if has large; then steps large vit_large "$LARGE_BATCHES"; fi
if has tiny; then steps tiny vit_tiny_32_p4 "$TINY_BATCHES"; fi

if has memory; then # what compiling takes and gives, as a whole, block by block, with fewer activations kept
    "$PYTHON" "$(dirname "$0")/compilation.py" $MEMORY 2>&1 | tee -a "$LOG"
fi

if has loop; then # the real loop, images of 32 x 32 from memory
    "$PYTHON" -c "import numpy, sys; numpy.save(sys.argv[1], numpy.random.default_rng(0).integers(
        0, 256, ($IMAGES, 32, 32, 3), numpy.uint8))" "$OUT/images.npy"
    for batch in $TINY_BATCHES; do
        bench "loop-$batch" train --recipe cifar10 --model.preset vit_tiny_32_p4 --batch_size "$batch" \
            --data "$OUT/images.npy"
    done
    rm -f "$OUT/images.npy"
fi

if has files; then
    if [ -n "$JPEGS" ]; then
        bench files-loading data --recipe images --data "$JPEGS" --data.cache none --against torchvision
        bench files-loop train --recipe images --data "$JPEGS" --data.cache none
    else
        echo "files: left out, no folder of image files was given" | tee -a "$LOG"
    fi
fi
