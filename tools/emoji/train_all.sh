#!/usr/bin/env bash
# Trains the emoji model from end to end: both small stages, the denoiser, the export and the evaluation.
#
# GPUS                 how many GPUs (default: all that torch sees; 0 trains on the CPU)
# CLIP_TIME, VAE_TIME, UNET_TIME   length of each stage, as arguments of tools.emoji.train
# TRAIN_OPTIONS, EVAL_OPTIONS      further arguments for every stage, and for the evaluation
# OUT, MODEL           folders for checkpoints and logs, and for the exported model
#
# Run it again after an interruption: every stage goes on where its newest checkpoint ends.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/emoji-train}
MODEL=${MODEL:-build/emoji-model}
GPUS=${GPUS:-$($PYTHON -c 'import torch; print(torch.cuda.device_count())')}
CLIP_TIME=${CLIP_TIME:---minutes 2.5}
VAE_TIME=${VAE_TIME:---minutes 4}
UNET_TIME=${UNET_TIME:---minutes 15}
TRAIN_OPTIONS=${TRAIN_OPTIONS:---compile}
EVAL_OPTIONS=${EVAL_OPTIONS:---guidance 2 3 4 6}
mkdir -p "$OUT"

# launch FIRST COUNT MODULE ARGUMENTS...: one process on each of COUNT GPUs, counted from FIRST.
launch() {
  local first=$1 count=$2
  shift 2
  if [ "$count" -gt 0 ]; then
    local visible
    visible=$(seq -s, "$first" $((first + count - 1)))
    export CUDA_VISIBLE_DEVICES=$visible
  fi
  if [ "$count" -gt 1 ]; then
    $PYTHON -m torch.distributed.run --nproc-per-node "$count" --master-port $((29500 + first)) -m "$@"
  else
    $PYTHON -m "$@"
  fi
}

clip() { (launch 0 $((GPUS > 0 ? 1 : 0)) tools.emoji.train clip $CLIP_TIME --out "$OUT" $TRAIN_OPTIONS) >>"$OUT/clip.log" 2>&1; }
vae() { (launch "$1" "$2" tools.emoji.train vae $VAE_TIME --out "$OUT" $TRAIN_OPTIONS) >>"$OUT/vae.log" 2>&1; }

if [ "$GPUS" -gt 1 ]; then
  clip & first=$!
  vae 1 $((GPUS - 1))
  wait "$first"
else
  clip
  vae 0 "$GPUS"
fi
(launch 0 "$GPUS" tools.emoji.train unet $UNET_TIME --out "$OUT" $TRAIN_OPTIONS) >>"$OUT/unet.log" 2>&1
$PYTHON -m tools.emoji.export --weights "$OUT/weights" --out "$MODEL" ${SIZE:+--size $SIZE} >>"$OUT/export.log" 2>&1
(launch 0 "$GPUS" tools.emoji.evaluate --model "$MODEL" --out "$OUT/evaluation" $EVAL_OPTIONS) >>"$OUT/evaluate.log" 2>&1
echo finished >>"$OUT/evaluate.log"
