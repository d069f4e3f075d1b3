"""Triton kernels of the gradients of q, k, v and scale, for windows of more tokens than fit one block.

See triton_attention for the legend.
"""

from __future__ import annotations

from swinv2_train.models.kernels.triton_attention import (
    attention_scores,
    bias_of_head,
    jit,
    jit_inline,
    load_bias,
    load_bias_of_keys,
    load_rows,
    locate,
    store_rows,
    through_unit,
    tl,
    unit_rows,
    window_corner,
)


@jit_inline
def query_step(
    start, dq, q, do, row_lse, row_delta, n, qkv, bias, heads,
    first_frame, first_row, first_col, wrap_frame, wrap_row, wrap_col, frames, height, width,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SHIFTED: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr, STRIDE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dq, the gradient of the queries' scaled unit vectors, after BLOCK_K more keys, from `start` on."""
    k_n = start + tl.arange(0, BLOCK_K)
    k_token, k_real = locate(
        k_n, first_frame, first_row, first_col, wrap_frame, wrap_row, wrap_col, frames, height, width,
        FRAMES, ROWS, COLS, PADDED,
    )  # fmt: skip
    k, k_inverse = unit_rows(load_rows(qkv + heads * D, k_token, k_real, heads * (3 * D), D, DP))
    k = k.to(q.dtype)
    v = load_rows(qkv + heads * (2 * D), k_token, k_real, heads * (3 * D), D, DP)
    scores = load_bias(bias, n, k_n, FRAMES, ROWS, COLS, STRIDE)
    scores = attention_scores(q, k, scores, n, k_n, wrap_frame, wrap_row, wrap_col, FRAMES, ROWS, COLS, SHIFTED, MASKED)
    if PADDED or (STRIDE == 0 and FRAMES * ROWS * COLS % BLOCK_K != 0):
        scores = tl.where(k_real[None, :], scores, float("-inf"))
    p = tl.exp2(scores - row_lse[:, None])
    ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - row_delta[:, None])
    return tl.dot(ds.to(k.dtype), k, acc=dq, input_precision="ieee")


@jit_inline
def query_block(
    block, BLOCK: tl.constexpr, BLOCK_Q: tl.constexpr, window, head,
    grad, qkv, scale, bias, out, lse, delta, unit, grad_qkv, grad_scale,
    heads, height, width, grid_rows, grid_cols, shift_row, shift_col, frames, grid_frames, shift_frame,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SHIFTED: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK_K: tl.constexpr, TAIL_K: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK queries, from block * BLOCK_Q on."""
    N: tl.constexpr = FRAMES * ROWS * COLS
    WHOLE_BLOCKS: tl.constexpr = N // BLOCK_K * BLOCK_K
    first_token, first_frame, first_row, first_col, wrap_frame, wrap_row, wrap_col = window_corner(
        window, height, width, grid_rows, grid_cols, shift_row, shift_col, frames, grid_frames, shift_frame,
        FRAMES, ROWS, COLS,
    )  # fmt: skip
    stride = heads * (3 * D)
    qkv += first_token * stride + head * D
    bias = bias_of_head(bias, head, FRAMES, ROWS, COLS, STRIDE)
    scale1 = tl.load(scale + head)
    statistics = (window.to(tl.int64) * heads + head) * N
    n = block * BLOCK_Q + tl.arange(0, BLOCK)
    token, real = locate(
        n, first_frame, first_row, first_col, wrap_frame, wrap_row, wrap_col, frames, height, width,
        FRAMES, ROWS, COLS, PADDED,
    )  # fmt: skip
    q_unit, q_inverse = unit_rows(load_rows(qkv, token, real, stride, D, DP))
    q = (q_unit * (scale1 * 1.4426950408889634)).to(qkv.dtype.element_ty)
    store_rows(unit + first_token * (heads * 2 * D) + head * D, token, real, heads * 2 * D, q, D, DP)
    do = load_rows(grad + first_token * (heads * D) + head * D, token, real, heads * D, D, DP)
    o = load_rows(out + first_token * (heads * D) + head * D, token, real, heads * D, D, DP)
    row_delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + statistics + n, row_delta, mask=n < N)
    row_lse = tl.load(lse + statistics + n, mask=n < N, other=float("inf"))
    dq = tl.zeros((BLOCK, DP), tl.float32)
    for start in range(0, WHOLE_BLOCKS, BLOCK_K):
        dq = query_step(
            start, dq, q, do, row_lse, row_delta, n, qkv, bias, heads,
            first_frame, first_row, first_col, wrap_frame, wrap_row, wrap_col, frames, height, width,
            FRAMES, ROWS, COLS, D, DP, SHIFTED, PADDED, MASKED, STRIDE, BLOCK_K,
        )  # fmt: skip
    if WHOLE_BLOCKS < N:
        dq = query_step(
            WHOLE_BLOCKS, dq, q, do, row_lse, row_delta, n, qkv, bias, heads,
            first_frame, first_row, first_col, wrap_frame, wrap_row, wrap_col, frames, height, width,
            FRAMES, ROWS, COLS, D, DP, SHIFTED, PADDED, MASKED, STRIDE, TAIL_K,
        )  # fmt: skip
    q_unit, q_inverse = unit_rows(load_rows(qkv, token, real, stride, D, DP))  # again: it would fill registers
    dq, cosine = through_unit(dq, q_unit, q_inverse)
    store_rows(grad_qkv + first_token * stride + head * D, token, real, stride, dq * scale1, D, DP)
    tl.store(grad_scale + tl.program_id(0), tl.sum(cosine, 0))  # sum of ds cos(q, k); rows of padding have ds = 0


@jit
def query_gradient_kernel(
    grad, qkv, scale, bias, out, lse, delta, unit, grad_qkv, grad_scale,
    heads, height, width, grid_rows, grid_cols, shift_row, shift_col, frames, grid_frames, shift_frame,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SHIFTED: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr, TAIL_Q: tl.constexpr, BLOCK_K: tl.constexpr, TAIL_K: tl.constexpr,
):  # fmt: skip
    """The queries' part of grad_qkv, delta (B*nW, h, N) = out . grad, one summand of d scale per program, and
    scale log2(e) q / |q|, rounded, in the first half of unit (B, H, W, 2C)."""
    N: tl.constexpr = FRAMES * ROWS * COLS
    pid = tl.program_id(0)
    head = pid % heads
    block = (pid // heads) % tl.cdiv(N, BLOCK_Q)
    window = pid // heads // tl.cdiv(N, BLOCK_Q)
    if N % BLOCK_Q == 0 or TAIL_Q == BLOCK_Q or block < N // BLOCK_Q:
        query_block(
            block, BLOCK_Q, BLOCK_Q, window, head, grad, qkv, scale, bias, out, lse, delta, unit, grad_qkv, grad_scale,
            heads, height, width, grid_rows, grid_cols, shift_row, shift_col, frames, grid_frames, shift_frame,
            FRAMES, ROWS, COLS, D, DP, SHIFTED, PADDED, MASKED, STRIDE, BLOCK_K, TAIL_K,
        )  # fmt: skip
    elif TAIL_Q != BLOCK_Q:
        query_block(
            block, TAIL_Q, BLOCK_Q, window, head, grad, qkv, scale, bias, out, lse, delta, unit, grad_qkv, grad_scale,
            heads, height, width, grid_rows, grid_cols, shift_row, shift_col, frames, grid_frames, shift_frame,
            FRAMES, ROWS, COLS, D, DP, SHIFTED, PADDED, MASKED, STRIDE, BLOCK_K, TAIL_K,
        )  # fmt: skip


@jit_inline
def key_value_step(
    start, dk, dv, k, v, n, grad, lse, delta, unit, bias, heads,
    first_frame, first_row, first_col, wrap_frame, wrap_row, wrap_col, frames, height, width,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SHIFTED: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr, STRIDE: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """The gradients of the keys' unit vectors, times log2(e), and of the values after BLOCK_Q more queries.

    Scores are (keys, queries) here: rows of padded keys are wrong but not stored, so nothing masks them.
    """
    N: tl.constexpr = FRAMES * ROWS * COLS
    q_n = start + tl.arange(0, BLOCK_Q)
    q_token, q_real = locate(
        q_n, first_frame, first_row, first_col, wrap_frame, wrap_row, wrap_col, frames, height, width,
        FRAMES, ROWS, COLS, PADDED,
    )  # fmt: skip
    q = load_rows(unit, q_token, q_real, heads * 2 * D, D, DP)
    do = load_rows(grad, q_token, q_real, heads * D, D, DP)
    q_lse = tl.load(lse + q_n, mask=q_n < N, other=float("inf"))
    q_delta = tl.load(delta + q_n, mask=q_n < N, other=0.0)
    scores = load_bias_of_keys(bias, n, q_n, FRAMES, ROWS, COLS, STRIDE)
    scores = attention_scores(k, q, scores, n, q_n, wrap_frame, wrap_row, wrap_col, FRAMES, ROWS, COLS, SHIFTED, MASKED)
    p = tl.exp2(scores - q_lse[None, :])
    dv = tl.dot(p.to(do.dtype), do, acc=dv, input_precision="ieee")
    ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - q_delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, acc=dk, input_precision="ieee")
    return dk, dv


@jit_inline
def key_value_block(
    block, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, window, head,
    grad, qkv, bias, lse, delta, unit, grad_qkv,
    heads, height, width, grid_rows, grid_cols, shift_row, shift_col, frames, grid_frames, shift_frame,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SHIFTED: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr, TAIL_Q: tl.constexpr,
):  # fmt: skip
    """The gradients of BLOCK keys and values, from block * BLOCK_K on."""
    N: tl.constexpr = FRAMES * ROWS * COLS
    WHOLE_BLOCKS: tl.constexpr = N // BLOCK_Q * BLOCK_Q
    first_token, first_frame, first_row, first_col, wrap_frame, wrap_row, wrap_col = window_corner(
        window, height, width, grid_rows, grid_cols, shift_row, shift_col, frames, grid_frames, shift_frame,
        FRAMES, ROWS, COLS,
    )  # fmt: skip
    stride = heads * (3 * D)
    qkv += first_token * stride + head * D
    grad += first_token * (heads * D) + head * D
    grad_qkv += first_token * stride + head * D
    unit += first_token * (heads * 2 * D) + head * D
    bias = bias_of_head(bias, head, FRAMES, ROWS, COLS, STRIDE)
    lse += (window.to(tl.int64) * heads + head) * N
    delta += (window.to(tl.int64) * heads + head) * N
    n = block * BLOCK_K + tl.arange(0, BLOCK)
    token, real = locate(
        n, first_frame, first_row, first_col, wrap_frame, wrap_row, wrap_col, frames, height, width,
        FRAMES, ROWS, COLS, PADDED,
    )  # fmt: skip
    k_unit, k_inverse = unit_rows(load_rows(qkv + heads * D, token, real, stride, D, DP))
    k = k_unit.to(qkv.dtype.element_ty)
    store_rows(unit + heads * D, token, real, heads * 2 * D, k, D, DP)
    v = load_rows(qkv + heads * (2 * D), token, real, stride, D, DP)
    dk = tl.zeros((BLOCK, DP), tl.float32)
    dv = tl.zeros((BLOCK, DP), tl.float32)
    for start in range(0, WHOLE_BLOCKS, BLOCK_Q):
        dk, dv = key_value_step(
            start, dk, dv, k, v, n, grad, lse, delta, unit, bias, heads,
            first_frame, first_row, first_col, wrap_frame, wrap_row, wrap_col, frames, height, width,
            FRAMES, ROWS, COLS, D, DP, SHIFTED, PADDED, MASKED, STRIDE, BLOCK_Q,
        )  # fmt: skip
    if WHOLE_BLOCKS < N:
        dk, dv = key_value_step(
            WHOLE_BLOCKS, dk, dv, k, v, n, grad, lse, delta, unit, bias, heads,
            first_frame, first_row, first_col, wrap_frame, wrap_row, wrap_col, frames, height, width,
            FRAMES, ROWS, COLS, D, DP, SHIFTED, PADDED, MASKED, STRIDE, TAIL_Q,
        )  # fmt: skip
    k_unit, k_inverse = unit_rows(load_rows(qkv + heads * D, token, real, stride, D, DP))
    dk, k_cosine = through_unit(dk * 0.6931471805599453, k_unit, k_inverse)  # by log2(e)
    store_rows(grad_qkv + heads * D, token, real, stride, dk, D, DP)
    store_rows(grad_qkv + heads * (2 * D), token, real, stride, dv, D, DP)


@jit
def key_value_gradient_kernel(
    grad, qkv, bias, lse, delta, unit, grad_qkv,
    heads, height, width, grid_rows, grid_cols, shift_row, shift_col, frames, grid_frames, shift_frame,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SHIFTED: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr, TAIL_Q: tl.constexpr, BLOCK_K: tl.constexpr, TAIL_K: tl.constexpr,
):  # fmt: skip
    """The keys' and the values' part of grad_qkv, and k / |k|, rounded, in the second half of unit."""
    N: tl.constexpr = FRAMES * ROWS * COLS
    pid = tl.program_id(0)
    head = pid % heads
    block = (pid // heads) % tl.cdiv(N, BLOCK_K)
    window = pid // heads // tl.cdiv(N, BLOCK_K)
    if N % BLOCK_K == 0 or TAIL_K == BLOCK_K or block < N // BLOCK_K:
        key_value_block(
            block, BLOCK_K, BLOCK_K, window, head, grad, qkv, bias, lse, delta, unit, grad_qkv,
            heads, height, width, grid_rows, grid_cols, shift_row, shift_col, frames, grid_frames, shift_frame,
            FRAMES, ROWS, COLS, D, DP, SHIFTED, PADDED, MASKED, STRIDE, BLOCK_Q, TAIL_Q,
        )  # fmt: skip
    elif TAIL_K != BLOCK_K:
        key_value_block(
            block, TAIL_K, BLOCK_K, window, head, grad, qkv, bias, lse, delta, unit, grad_qkv,
            heads, height, width, grid_rows, grid_cols, shift_row, shift_col, frames, grid_frames, shift_frame,
            FRAMES, ROWS, COLS, D, DP, SHIFTED, PADDED, MASKED, STRIDE, BLOCK_Q, TAIL_Q,
        )  # fmt: skip
