#!/usr/bin/env bash
# Training under torchrun: all GPUs of this machine, or of several.  Launch lines only: every value comes from conf/.
#
#   launch/torchrun.sh experiment=NAME run_dir=DIR [KEY=VALUE ...]
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=HOST launch/torchrun.sh ...    the same on every machine, NODE_RANK 0 to 3
#
# NPROC_PER_NODE (default: its GPUs, or 1), MASTER_PORT (29500), MAX_RESTARTS (0), PYTHON (python).  As a task of srun,
# one on each node, it reads the nodes from SLURM.  SIGUSR1 reaches the ranks too, and a save may take as long as it does.
# It ends with the exit code of the rank that ended first, or 128 + N after signal N, and without torchrun's report.
set -euo pipefail

python="${PYTHON:-python}"
if [[ -n "${SLURM_STEP_NODELIST:-}" && -z "${NNODES:-}" ]]; then
    variables="$("$python" "$(dirname "${BASH_SOURCE[0]}")/../swinv2_train/distributed/slurm.py")"
    eval "$variables"
fi
if [[ "${NNODES:-1}" == 1 && -z "${MASTER_ADDR:-}" ]]; then
    where=(--standalone)
else
    where=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
fi
if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then # those that are shown, before the first that is none
    gpus="$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | sed -n '/^ *\(-.*\|NoDevFiles\|\)$/q;p' | wc -l)"
else
    gpus="$( (nvidia-smi --list-gpus 2>/dev/null || true) | grep -c ^GPU || true)"
fi
processes="${NPROC_PER_NODE:-$gpus}"
source "$(dirname "${BASH_SOURCE[0]}")/node_environment.sh"
exec "$python" -m swinv2_train.monitoring.torchrun "${where[@]}" --nproc-per-node "$((processes > 0 ? processes : 1))" \
    --max-restarts "${MAX_RESTARTS:-0}" --shutdown-timeout "${SHUTDOWN_TIMEOUT_SEC:-600}" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 -m swinv2_train.train "$@"
