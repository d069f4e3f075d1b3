#!/usr/bin/env bash
# Sourced on every node, by torchrun.sh and by each task that srun starts.  What is set is left as it is.

# Compiled kernels go to the node's own disk.  A home is often on NFS, where a start of many ranks is slow, or read-only.
# A folder that another user has made is not used.
caches="${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/swinv2-$UID"
if mkdir -p -m 700 "$caches" 2>/dev/null && [[ -O "$caches" && ! -L "$caches" ]]; then
    export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$caches/triton}"
    export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$caches/inductor}"
fi
# Blocks of a card's memory that grow leave fewer holes, and more of it to ZeRO-3's gathers.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}}"
