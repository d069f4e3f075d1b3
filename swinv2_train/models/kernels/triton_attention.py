"""Triton kernels of windowed cosine attention: the output, and the gradients of q, k and v.

:mod:`swinv2_train.models.kernels.dispatch` launches them; the bias table's gradient is in triton_bias_table.

Legend: B batch, H W tokens per side, C channels, h heads, d head dim (D padded to a power of two: DP), N = ROWS x COLS
tokens per window.  A program owns a block of one window's tokens and one head; it finds them in the unpartitioned map
by arithmetic.  Scores are kept times log2(e), because the hardware's exponential is 2^x: `table` holds the bias times
log2(e), transposed to (h, (2 ROWS - 1)(2 COLS - 1)), and `lse` the base-2 logarithm of the softmax's denominator.

The place of token (r, c) is r (2 COLS - 1) + c: the difference of two places, plus that of the zero offset, is the
row of the bias table, so that a score's bias costs one subtraction and one load from a table that stays in L1.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl

    SIZES = ["heads", "height", "width", "grid_rows", "grid_cols", "shift_row", "shift_col", "windows", "splits"]
    jit = triton.jit(do_not_specialize=SIZES)  # or every other image size would compile anew
    jit_inline = triton.jit
except ImportError:  # builds of torch for the CPU come without Triton; nothing below is called then
    tl = None

    def jit(function):
        return function

    jit_inline = jit


@jit_inline
def window_frame(
    window, height, width, grid_rows, grid_cols, shift_row, shift_col, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Where a window lies: number of its image's first token; row and col of the map where it begins; the window's row
    and col from which on its tokens come from the other end of the map (ROWS and COLS where none do)."""
    cell = window % (grid_rows * grid_cols)
    cell_row = cell // grid_cols
    cell_col = cell - cell_row * grid_cols
    wrap_row = tl.where(cell_row == grid_rows - 1, ROWS - shift_row, ROWS)
    wrap_col = tl.where(cell_col == grid_cols - 1, COLS - shift_col, COLS)
    first_token = (window // (grid_rows * grid_cols)).to(tl.int64) * height * width
    return first_token, cell_row * ROWS + shift_row, cell_col * COLS + shift_col, wrap_row, wrap_col


@jit_inline
def locate(
    n,
    first_row,
    first_col,
    wrap_row,
    wrap_col,
    height,
    width,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Tokens n of a window in the map (row * width + col), and whether they exist: padding and n >= N do not."""
    row, col = n // COLS, n % COLS
    map_row = tl.where(row < wrap_row, row + first_row, row - wrap_row)
    map_col = tl.where(col < wrap_col, col + first_col, col - wrap_col)
    real = n < ROWS * COLS
    if PADDED:
        real = real & (map_row < height) & (map_col < width)
    return map_row * width + map_col, real


@jit_inline
def place_of(n, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The place of tokens n; those past the window's end count as its last one, so that all places lie in the table."""
    n = tl.minimum(n, ROWS * COLS - 1)
    return (n // COLS) * (2 * COLS - 1) + n % COLS


@jit_inline
def load_rows(base, token, real, stride, D: tl.constexpr, DP: tl.constexpr):
    """(rows, DP): the d values of each token from `base`, zeros where the token is not real."""
    d = tl.arange(0, DP)
    mask = real[:, None] if D == DP else real[:, None] & (d < D)[None, :]
    return tl.load(base + token[:, None] * stride + d[None, :], mask=mask, other=0.0)


@jit_inline
def store_rows(base, token, real, stride, values, D: tl.constexpr, DP: tl.constexpr):
    d = tl.arange(0, DP)
    mask = real[:, None] if D == DP else real[:, None] & (d < D)[None, :]
    tl.store(base + token[:, None] * stride + d[None, :], values.to(base.dtype.element_ty), mask=mask)


@jit_inline
def unit_rows(x):
    """x / max(|x|, 1e-12) by row in float32, and 1 / max(|x|, 1e-12)."""
    x = x.to(tl.float32)
    inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12)
    return x * inverse[:, None], inverse


@jit_inline
def through_unit(grad, unit, inverse):
    """The gradient of x from that of unit = x / max(|x|, 1e-12), and the products grad . unit by row."""
    along = tl.sum(grad * unit, 1)
    radial = tl.where(inverse < 1e12, along, 0.0)  # below the bound only the values of x count, not their length
    return (grad - unit * radial[:, None]) * inverse[:, None], along


@jit_inline
def load_bias(table, place, k_place):
    """The bias of every pair; table points to that of the zero offset."""
    return tl.load((table + place)[:, None] + (-k_place)[None, :])


@jit_inline
def attention_scores(
    a, b, bias, scale2, n, b_n, wrap_row, wrap_col,
    ROWS: tl.constexpr, COLS: tl.constexpr, SHIFTED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Scores times log2(e) of the rows of a, the window's tokens n, with those of b, its tokens b_n.

    MASKED is added between the regions that the shift brought together, which only the last windows of an axis have:
    the others skip that, and the arithmetic for it.
    """
    scores = tl.dot(a, tl.trans(b), input_precision="ieee") * scale2 + bias
    if SHIFTED:  # noqa: SIM102 (a constant, which the compiler decides)
        if (wrap_row < ROWS) | (wrap_col < COLS):
            region = (n // COLS >= wrap_row).to(tl.int32) * 2 + (n % COLS >= wrap_col).to(tl.int32)
            b_region = (b_n // COLS >= wrap_row).to(tl.int32) * 2 + (b_n % COLS >= wrap_col).to(tl.int32)
            scores = tl.where(region[:, None] == b_region[None, :], scores, scores + MASKED)
    return scores


@jit
def forward_kernel(
    qkv, scale, table, out, lse,
    heads, height, width, grid_rows, grid_cols, shift_row, shift_col,
    ROWS: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SHIFTED: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (B, H, W, C) and lse (B*nW, h, N) float32 of a block of queries; padding has an lse too, but no gradient."""
    N: tl.constexpr = ROWS * COLS
    pid = tl.program_id(0)
    head = pid % heads
    block = (pid // heads) % tl.cdiv(N, BLOCK_Q)
    window = pid // heads // tl.cdiv(N, BLOCK_Q)
    first_token, first_row, first_col, wrap_row, wrap_col = window_frame(
        window, height, width, grid_rows, grid_cols, shift_row, shift_col, ROWS, COLS
    )
    stride = heads * (3 * D)
    qkv += first_token * stride + head * D
    scale2 = tl.load(scale + head) * 1.4426950408889634  # times log2(e)
    table += head * ((2 * ROWS - 1) * (2 * COLS - 1)) + (ROWS - 1) * (2 * COLS - 1) + COLS - 1

    n = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    token, real = locate(n, first_row, first_col, wrap_row, wrap_col, height, width, ROWS, COLS, PADDED)
    place = place_of(n, ROWS, COLS)
    q, q_inverse = unit_rows(load_rows(qkv, token, real, stride, D, DP))
    q = q.to(qkv.dtype.element_ty)
    top = tl.full((BLOCK_Q,), -1e30, tl.float32)  # not -inf: the first keys may all be padding
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, DP), tl.float32)
    for start in range(0, N, BLOCK_K):
        k_n = start + tl.arange(0, BLOCK_K)
        k_token, k_real = locate(k_n, first_row, first_col, wrap_row, wrap_col, height, width, ROWS, COLS, PADDED)
        k, k_inverse = unit_rows(load_rows(qkv + heads * D, k_token, k_real, stride, D, DP))
        v = load_rows(qkv + heads * (2 * D), k_token, k_real, stride, D, DP)
        bias = load_bias(table, place, place_of(k_n, ROWS, COLS))
        scores = attention_scores(
            q, k.to(q.dtype), bias, scale2, n, k_n, wrap_row, wrap_col, ROWS, COLS, SHIFTED, MASKED
        )
        if PADDED or N % BLOCK_K != 0:
            scores = tl.where(k_real[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - new_top)
        p = tl.exp2(scores - new_top[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc=acc * shrink[:, None], input_precision="ieee")
        top = new_top
    store_rows(out + first_token * (heads * D) + head * D, token, real, heads * D, acc / total[:, None], D, DP)
    lse += (window.to(tl.int64) * heads + head) * N
    tl.store(lse + n, top + tl.log2(total), mask=n < N)


@jit
def query_gradient_kernel(
    grad, qkv, scale, table, out, lse, delta, unit, grad_qkv, grad_scale,
    heads, height, width, grid_rows, grid_cols, shift_row, shift_col,
    ROWS: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SHIFTED: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The queries' part of grad_qkv, delta (B*nW, h, N) = out . grad, one summand of d scale per program, and q / |q|,
    rounded, in the first half of unit (B, H, W, 2C)."""
    N: tl.constexpr = ROWS * COLS
    pid = tl.program_id(0)
    head = pid % heads
    block = (pid // heads) % tl.cdiv(N, BLOCK_Q)
    window = pid // heads // tl.cdiv(N, BLOCK_Q)
    first_token, first_row, first_col, wrap_row, wrap_col = window_frame(
        window, height, width, grid_rows, grid_cols, shift_row, shift_col, ROWS, COLS
    )
    stride = heads * (3 * D)
    qkv += first_token * stride + head * D
    scale1 = tl.load(scale + head)
    scale2 = scale1 * 1.4426950408889634
    table += head * ((2 * ROWS - 1) * (2 * COLS - 1)) + (ROWS - 1) * (2 * COLS - 1) + COLS - 1
    statistics = (window.to(tl.int64) * heads + head) * N

    n = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    token, real = locate(n, first_row, first_col, wrap_row, wrap_col, height, width, ROWS, COLS, PADDED)
    place = place_of(n, ROWS, COLS)
    q_unit, q_inverse = unit_rows(load_rows(qkv, token, real, stride, D, DP))
    q = q_unit.to(qkv.dtype.element_ty)
    store_rows(unit + first_token * (heads * 2 * D) + head * D, token, real, heads * 2 * D, q, D, DP)
    do = load_rows(grad + first_token * (heads * D) + head * D, token, real, heads * D, D, DP)
    o = load_rows(out + first_token * (heads * D) + head * D, token, real, heads * D, D, DP)
    row_delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + statistics + n, row_delta, mask=n < N)
    row_lse = tl.load(lse + statistics + n, mask=n < N, other=float("inf"))
    dq = tl.zeros((BLOCK_Q, DP), tl.float32)
    for start in range(0, N, BLOCK_K):
        k_n = start + tl.arange(0, BLOCK_K)
        k_token, k_real = locate(k_n, first_row, first_col, wrap_row, wrap_col, height, width, ROWS, COLS, PADDED)
        k, k_inverse = unit_rows(load_rows(qkv + heads * D, k_token, k_real, stride, D, DP))
        k = k.to(q.dtype)
        v = load_rows(qkv + heads * (2 * D), k_token, k_real, stride, D, DP)
        bias = load_bias(table, place, place_of(k_n, ROWS, COLS))
        scores = attention_scores(q, k, bias, scale2, n, k_n, wrap_row, wrap_col, ROWS, COLS, SHIFTED, MASKED)
        if PADDED or N % BLOCK_K != 0:
            scores = tl.where(k_real[None, :], scores, float("-inf"))
        p = tl.exp2(scores - row_lse[:, None])
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - row_delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, acc=dq, input_precision="ieee")
    dq, cosine = through_unit(dq, q_unit, q_inverse)
    store_rows(grad_qkv + first_token * stride + head * D, token, real, stride, dq * scale1, D, DP)
    tl.store(grad_scale + pid, tl.sum(cosine, 0))  # sum of ds cos(q, k); rows of padding have ds = 0


@jit
def key_value_gradient_kernel(
    grad, qkv, scale, table, lse, delta, unit, grad_qkv,
    heads, height, width, grid_rows, grid_cols, shift_row, shift_col,
    ROWS: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SHIFTED: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The keys' and the values' part of grad_qkv of a block of keys, and k / |k|, rounded, in the second half of unit.

    Scores are (keys, queries) here: rows of padded keys are wrong but not stored, so nothing masks them.
    """
    N: tl.constexpr = ROWS * COLS
    pid = tl.program_id(0)
    head = pid % heads
    block = (pid // heads) % tl.cdiv(N, BLOCK_K)
    window = pid // heads // tl.cdiv(N, BLOCK_K)
    first_token, first_row, first_col, wrap_row, wrap_col = window_frame(
        window, height, width, grid_rows, grid_cols, shift_row, shift_col, ROWS, COLS
    )
    stride = heads * (3 * D)
    qkv += first_token * stride + head * D
    grad += first_token * (heads * D) + head * D
    grad_qkv += first_token * stride + head * D
    unit += first_token * (heads * 2 * D) + head * D
    scale1 = tl.load(scale + head)
    scale2 = scale1 * 1.4426950408889634
    table += head * ((2 * ROWS - 1) * (2 * COLS - 1)) + (ROWS - 1) * (2 * COLS - 1) + COLS - 1
    lse += (window.to(tl.int64) * heads + head) * N
    delta += (window.to(tl.int64) * heads + head) * N

    n = block * BLOCK_K + tl.arange(0, BLOCK_K)
    token, real = locate(n, first_row, first_col, wrap_row, wrap_col, height, width, ROWS, COLS, PADDED)
    place = place_of(n, ROWS, COLS)
    k_unit, k_inverse = unit_rows(load_rows(qkv + heads * D, token, real, stride, D, DP))
    k = k_unit.to(qkv.dtype.element_ty)
    store_rows(unit + heads * D, token, real, heads * 2 * D, k, D, DP)
    v = load_rows(qkv + heads * (2 * D), token, real, stride, D, DP)
    dk = tl.zeros((BLOCK_K, DP), tl.float32)
    dv = tl.zeros((BLOCK_K, DP), tl.float32)
    for start in range(0, N, BLOCK_Q):
        q_n = start + tl.arange(0, BLOCK_Q)
        q_token, q_real = locate(q_n, first_row, first_col, wrap_row, wrap_col, height, width, ROWS, COLS, PADDED)
        q = load_rows(unit, q_token, q_real, heads * 2 * D, D, DP)
        do = load_rows(grad, q_token, q_real, heads * D, D, DP)
        q_lse = tl.load(lse + q_n, mask=q_n < N, other=float("inf"))
        q_delta = tl.load(delta + q_n, mask=q_n < N, other=0.0)
        bias = load_bias(table, -place, -place_of(q_n, ROWS, COLS))
        scores = attention_scores(k, q, bias, scale2, n, q_n, wrap_row, wrap_col, ROWS, COLS, SHIFTED, MASKED)
        p = tl.exp2(scores - q_lse[None, :])
        dv = tl.dot(p.to(do.dtype), do, acc=dv, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - q_delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, acc=dk, input_precision="ieee")
    dk, k_cosine = through_unit(dk, k_unit, k_inverse)
    store_rows(grad_qkv + heads * D, token, real, stride, dk * scale1, D, DP)
    store_rows(grad_qkv + heads * (2 * D), token, real, stride, dv, D, DP)
