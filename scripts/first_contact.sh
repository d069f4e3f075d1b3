#!/usr/bin/env bash
# The first hours of a card in three parts of at most nine minutes: bash scripts/first_contact.sh a|b|c [--cpu|--plan]
#
# Needs this checkout, a Python with torch and triton, and the folder that scripts/pack_first_contact.py made (wheels of
# what else is missing, and shards).  No network, no virtual environment, nothing below $HOME is written.
#   PACK    that folder                                     (default: .first_contact in the checkout)
#   OUT     where results go: part_X.jsonl, part_X.log, ... (default: first_contact_out in the checkout)
#   PYTHON  the interpreter                                 (default: python3)
# --cpu runs every item at sizes of no meaning, the kernels in Triton's interpreter: it tries the script, not a card.
# --plan only prints the items and the seconds that each is given.
# One item that fails or hangs does not stop the others.  What the numbers mean: docs/first-contact.md.
PART=${1-}
SMALL= PLAN=
case $PART${2-} in a | b | c) ;;
  [abc]--cpu) SMALL=1 ;;
  [abc]--plan) PLAN=1 ;;
  *)
    echo "usage: bash scripts/first_contact.sh a|b|c [--cpu|--plan]" >&2
    exit 2
    ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
STARTED=$SECONDS
DUE=0 # seconds after the start by which all items so far must have ended; at most 530 in all
PACK=$(realpath -m "${PACK:-.first_contact}")
OUT=$(realpath -m "${OUT:-first_contact_out}")
PYTHON=${PYTHON:-python3}
WORK=$(mktemp -d) || exit 1
trap 'rm -rf "$WORK"' EXIT
LINES=$OUT/part_$PART.jsonl
LOG=$OUT/part_$PART.log
if [ -z "$PLAN" ]; then
  mkdir -p "$OUT" || exit 1
  : >"$LINES"
  : >"$LOG"
fi

export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 WANDB_MODE=disabled
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} TRITON_CACHE_DIR=$WORK/triton TORCHINDUCTOR_CACHE_DIR=$WORK/inductor
export TORCH_EXTENSIONS_DIR=$WORK/extensions XDG_CACHE_HOME=$WORK/cache MPLCONFIGDIR=$WORK/matplotlib
export PYTORCH_ALLOC_CONF=expandable_segments:True
if [ -n "$SMALL" ]; then
  export CUDA_VISIBLE_DEVICES= TRITON_INTERPRET=1 DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
fi

# item NAME SECONDS COMMAND...: run it, and write its line.  Its seconds come on top of what the items before it were
# given and did not take, so that all of a part end when the sum of their seconds is over, whatever happens.
item() {
  local name=$1 limit
  DUE=$((DUE + $2))
  limit=$((DUE - SECONDS + STARTED))
  if [ -n "$PLAN" ]; then
    echo "$name $2"
    return
  fi
  shift 2
  echo "== $name (at most $limit s): $*" | tee -a "$LOG"
  "$PYTHON" scripts/first_contact_lines.py item "$LINES" "$WORK/item.log" "$name" "$limit" "$@"
  cat "$WORK/item.log" >>"$LOG"
}

# a training on the shards, but for its run_dir and what differs
TRAIN="-m swinv2_train.train experiment=cifar10_simmim log.wandb=disabled log.progress=none
  data.shards=$PACK/shards/train-*.tar data.eval_shards=$PACK/shards/test-*.tar"
[ -n "$SMALL" ] && TRAIN="$TRAIN model.embed_dim=8 model.depths=[1,1] model.num_heads=[1,2] model.img_size=16
  model.window_size=2 train.global_batch_size=8 train.micro_batch_size=8 engine.precision=fp32 runtime.num_threads=1"
set -f # the patterns above are the trainer's to expand

item wheels 40 "$PYTHON" scripts/first_contact_wheels.py "$PACK/wheels" "$WORK/site"
export PYTHONPATH=$PWD:$WORK/site

part_a() {
  item environment 30 "$PYTHON" -m benchmarks.card ${SMALL:+--small}
  if [ -n "$SMALL" ]; then
    item kernels 30 "$PYTHON" -m benchmarks.attention_errors --windows 2 --dtypes float32 --head-dim 16
    item gpu_tests 60 "$PYTHON" -m pytest tests/gpu/test_fused.py -q -p no:cacheprovider -k length_zero \
      --junitxml "$OUT/gpu_tests.xml"
    item attention_4 30 "$PYTHON" benchmarks/attention_layer.py --device cpu --windows 4 --tokens 64 --dim 32 \
      --rounds 1 --variants eager stock fused
    return
  fi
  item kernels 85 "$PYTHON" -m benchmarks.attention_errors
  item gpu_tests 150 "$PYTHON" -m pytest tests/gpu -q -n 8 --timeout 120 -p no:cacheprovider \
    --junitxml "$OUT/gpu_tests.xml"
  local window
  for window in 12 16 24 32 8; do
    item "attention_$window" 35 "$PYTHON" benchmarks/attention_layer.py --windows $window
  done
  if [ -n "$PLAN" ] || command -v ncu >/dev/null; then
    item ncu 50 ncu --clock-control none --profile-from-start off --csv --log-file "$OUT/ncu.csv" --metrics \
gpu__time_duration.sum,launch__registers_per_thread,sm__warps_active.avg.pct_of_peak_sustained_active,\
smsp__issue_active.avg.pct_of_peak_sustained_active,smsp__inst_executed.sum,dram__bytes.sum,lts__t_sector_hit_rate.pct \
      "$PYTHON" benchmarks/attention_layer.py --profile --windows 12 16
  fi
}

speed() { # the training step of one case beside the others
  item "speed_$1" 115 "$PYTHON" scripts/benchmark.py --cases "$1" --precisions bf16 --rounds 2 --steps 10 \
    --only ours official timm "matrix products alone" --out "$OUT/speed_${1//\//_}"
}

profiled() { # STAGE SECONDS ...: three traced steps, what ran in them, and the trace
  local stage=$1 seconds=$2
  shift 2
  item "profile_zero$stage" "$seconds" "$PYTHON" $TRAIN run_dir="$WORK/profile_$stage" engine="zero$stage" "$@" \
    train.max_steps=7 runtime.profile=true
  item "idle_zero$stage" 12 "$PYTHON" -m benchmarks.trace_idle "$WORK/profile_$stage"
  item "trace_zero$stage" 5 bash -c 'cp -v "$1"/profile/*.json.gz "$2"' - "$WORK/profile_$stage" \
    "$OUT/trace_zero$stage.json.gz"
}

part_b() {
  local base="model=base model.img_size=192 model.window_size=12 task.mask_unit_px=32 data.num_workers=8
    train.global_batch_size=128 train.micro_batch_size=128"
  if [ -n "$SMALL" ]; then
    item speed 60 "$PYTHON" scripts/benchmark.py --cases demo/32/4 --batch-size 1 --precisions fp32 --only ours \
      --rounds 1 --steps 1 --quick --out "$OUT/speed_demo"
    item layer_norm 30 "$PYTHON" -m benchmarks.layer_norm --tokens 64 --channels 32 --rounds 1
    item launch_overhead 30 "$PYTHON" -m benchmarks.launch_overhead --calls 1
    profiled 3 60
    return
  fi
  speed base/192/12
  profiled 1 55 $base
  profiled 3 60 $base
  item layer_norm 20 "$PYTHON" -m benchmarks.layer_norm
  item launch_overhead 20 "$PYTHON" -m benchmarks.launch_overhead
  item norm_target 20 "$PYTHON" -m benchmarks.norm_target
  item patch_conv 20 "$PYTHON" -m benchmarks.patch_conv
  item optimizer 25 "$PYTHON" -m benchmarks.optimizer_step --size base --threads 4
  speed base/256/16
}

trained() { # SECONDS ...: a training under ZeRO-3, and what its own files say
  local seconds=$1
  shift
  item training "$seconds" "$PYTHON" $TRAIN run_dir="$WORK/training" engine=zero3 "$@"
  item training_metrics 5 "$PYTHON" scripts/first_contact_lines.py run "$WORK/training"
}

resumed() { # SECONDS STEPS ...: the same bits as a run that never stopped, as runs are and with runtime.deterministic
  local seconds=$1 steps=$2
  shift 2
  item resume "$seconds" "$PYTHON" scripts/resume_check.py --work "$WORK/resume" --steps "$steps" ${TRAIN#* * } "$@"
  item resume_deterministic "$seconds" "$PYTHON" scripts/resume_check.py --work "$WORK/resume_deterministic" \
    --steps "$steps" ${TRAIN#* * } "$@" runtime.deterministic=true
}

part_c() {
  local row
  if [ -n "$SMALL" ]; then
    item memory 30 "$PYTHON" scripts/benchmark_memory.py --img-size 64 --only "ours; recompute blocks; 24"
    trained 60 train.max_steps=3 train.log_every_steps=1
    resumed 60 2 engine=local
    item planner 30 "$PYTHON" benchmarks/planner_memory.py --case \
      "model=demo task=simmim engine=local model.img_size=32 model.window_size=4 train.micro_batch_size=2"
    return
  fi
  for row in "ours; recompute blocks; 32" "ours; recompute blocks; sequential stages 1, 2; 32" \
    "official; recompute blocks; 24" "ours; recompute blocks; 24"; do
    item "memory: $row" 45 "$PYTHON" scripts/benchmark_memory.py --only "$row"
  done
  trained 75 train.max_steps=200 data.num_workers=4
  resumed 75 20 engine=zero3 data.num_workers=2
  item planner 75 "$PYTHON" benchmarks/planner_memory.py \
    --case "model=base task=simmim engine=zero1 model.img_size=192 model.window_size=12 train.micro_batch_size=64" \
    --case "model=base task=simmim engine=zero3 model.img_size=192 model.window_size=12 train.micro_batch_size=64"
}

"part_$PART"
if [ -z "$PLAN" ]; then
  "$PYTHON" scripts/first_contact_lines.py summary "$LINES" "$OUT/part_$PART.md" $((SECONDS - STARTED))
fi
