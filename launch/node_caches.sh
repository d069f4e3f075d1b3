#!/usr/bin/env bash
# Sourced on every node: compiled kernels go to its own disk.  A home is often on NFS, where a start of many ranks is slow,
# or read-only.  Folders that are set are left as they are; one that another user has made is not used.
caches="${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/swinv2-$UID"
if mkdir -p -m 700 "$caches" 2>/dev/null && [[ -O "$caches" && ! -L "$caches" ]]; then
    export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$caches/triton}"
    export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$caches/inductor}"
fi
