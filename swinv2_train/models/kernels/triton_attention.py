"""Triton kernels of windowed cosine attention: the output, and the gradients of q, k and v.

:mod:`swinv2_train.models.kernels.dispatch` launches them; the bias table's gradient is in triton_bias_table.

Legend: B batch, H W tokens per side, C channels, h heads, d head dim (D padded to a power of two: DP), N = FRAMES x
ROWS x COLS tokens per window; FRAMES is 1 for images.  A program owns a block of one window's tokens and one head; it
finds them in the unpartitioned map by arithmetic.  Scores are kept times log2(e), because the hardware's exponential is
2^x: `bias` holds the bias so, less the middle of its head's range (softmax does not see it), and `lse` the base-2
logarithm of the softmax's denominator.
`bias` is (h, STRIDE, STRIDE), a score's own for every pair of tokens, where that stays in the L2 cache; with STRIDE = 0
it is (h, (2 FRAMES - 1)(2 ROWS - 1)(2 COLS - 1)), one for every offset.

The place of token (f, r, c) is (f (2 ROWS - 1) + r)(2 COLS - 1) + c: the difference of two places, plus that of the
zero offset, is the row of the bias table.

Tokens are taken in blocks of BLOCK_Q or BLOCK_K, and what a window has beyond its last whole block in one of TAIL_Q or
TAIL_K: a window of 144 tokens is 64 + 64 + 16, not 192.
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
def window_corner(
    window, height, width, grid_rows, grid_cols, shift_row, shift_col, frames, grid_frames, shift_frame,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Where a window lies: number of its map's first token; frame, row and col of the map where it begins; the window's
    frame, row and col from which on its tokens come from the other end of the map (FRAMES, ROWS and COLS where none
    do)."""
    cell = window % (grid_rows * grid_cols)
    cell_row = cell // grid_cols
    cell_col = cell - cell_row * grid_cols
    wrap_row = tl.where(cell_row == grid_rows - 1, ROWS - shift_row, ROWS)
    wrap_col = tl.where(cell_col == grid_cols - 1, COLS - shift_col, COLS)
    first_frame, wrap_frame = 0, FRAMES
    sheet = window // (grid_rows * grid_cols)  # an image, or the windows of a clip that begin at the same frame
    if FRAMES > 1:
        cell_frame = sheet % grid_frames
        wrap_frame = tl.where(cell_frame == grid_frames - 1, FRAMES - shift_frame, FRAMES)
        first_frame = cell_frame * FRAMES + shift_frame
        first_token = (sheet // grid_frames).to(tl.int64) * frames * height * width
    else:
        first_token = sheet.to(tl.int64) * height * width
    first_row, first_col = cell_row * ROWS + shift_row, cell_col * COLS + shift_col
    return first_token, first_frame, first_row, first_col, wrap_frame, wrap_row, wrap_col


@jit_inline
def locate(
    n, first_frame, first_row, first_col, wrap_frame, wrap_row, wrap_col, frames, height, width,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Tokens n of a window in the map ((frame * height + row) * width + col), and whether they exist: padding and
    n >= N do not."""
    row, col = n // COLS, n % COLS
    if FRAMES > 1:
        frame, row = row // ROWS, row % ROWS
        map_frame = tl.where(frame < wrap_frame, frame + first_frame, frame - wrap_frame)
    map_row = tl.where(row < wrap_row, row + first_row, row - wrap_row)
    map_col = tl.where(col < wrap_col, col + first_col, col - wrap_col)
    real = n < FRAMES * ROWS * COLS
    if PADDED:
        real = real & (map_row < height) & (map_col < width)
    if FRAMES > 1:
        if PADDED:
            real = real & (map_frame < frames)
        map_row += map_frame * height
    return map_row * width + map_col, real


@jit_inline
def place_of(n, FRAMES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The place of tokens n; those past the window's end count as its last one, so that all places lie in the table."""
    n = tl.minimum(n, FRAMES * ROWS * COLS - 1)
    place = (n // COLS) * (2 * COLS - 1) + n % COLS  # of ROWS rows a frame, where the table has 2 ROWS - 1
    if FRAMES > 1:
        place += (n // (ROWS * COLS)) * ((ROWS - 1) * (2 * COLS - 1))
    return place


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
    """x / max(|x|, 1e-12) by row in float32, and 1 / max(|x|, 1e-12).

    The hardware's reciprocal square root is off by 2^-22; a step of Newton's makes it as exact as a division.
    Where the squared length is beyond float32, |x| is infinite and the row becomes 0, as torch's normalize has it.
    """
    x = x.to(tl.float32)
    square = tl.maximum(tl.sum(x * x, 1), 1e-24)
    inverse = tl.rsqrt(square)
    exact = inverse * (1.5 - 0.5 * (square * inverse) * inverse)
    inverse = tl.where(square == float("inf"), 0.0, exact)
    return x * inverse[:, None], inverse


@jit_inline
def through_unit(grad, unit, inverse):
    """The gradient of x from that of unit = x / max(|x|, 1e-12), and the products grad . unit by row."""
    along = tl.sum(grad * unit, 1)
    radial = tl.where(inverse < 0.99999e12, along, 0.0)  # below the bound only the values of x count, not their length
    return (grad - unit * radial[:, None]) * inverse[:, None], along


@jit
def bias_kernel(
    table, scale, bias, reach, heads,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    STRIDE: tl.constexpr, BLOCK: tl.constexpr, OFFSETS: tl.constexpr,
):  # fmt: skip
    """bias, from table ((2 FRAMES - 1)(2 ROWS - 1)(2 COLS - 1), h), and reach (h,) float32, which no score is beyond.

    Scores with keys past the window's end are -inf where there is one for every pair.  OFFSETS: the table's rows,
    rounded up to a power of two.
    """
    AREA: tl.constexpr = (2 * ROWS - 1) * (2 * COLS - 1)
    ENTRIES: tl.constexpr = (2 * FRAMES - 1) * AREA
    ZERO: tl.constexpr = ENTRIES // 2  # the zero offset
    head = tl.program_id(0) % heads
    block = tl.program_id(0) // heads
    entry = tl.arange(0, OFFSETS)
    column = tl.load(table + entry * heads + head, mask=entry < ENTRIES, other=0.0)
    high = tl.max(tl.where(entry < ENTRIES, column, float("-inf")), 0)
    low = tl.min(tl.where(entry < ENTRIES, column, float("inf")), 0)
    if block == 0:
        tl.store(reach + head, (tl.load(scale + head) + 0.5 * (high - low)) * 1.4426950408889634)
    at = block * BLOCK + tl.arange(0, BLOCK)
    if STRIDE > 0:
        n, k_n = at // STRIDE, at % STRIDE
        offset = place_of(n, FRAMES, ROWS, COLS) - place_of(k_n, FRAMES, ROWS, COLS) + ZERO
        values = (tl.load(table + offset * heads + head) - 0.5 * (high + low)) * 1.4426950408889634
        values = tl.where(k_n < FRAMES * ROWS * COLS, values, float("-inf"))
        bias += head * (STRIDE * STRIDE)
        tl.store(bias + at, values.to(bias.dtype.element_ty), mask=at < STRIDE * STRIDE)
    else:
        values = tl.load(table + at * heads + head, mask=at < ENTRIES, other=0.0)
        values = (values - 0.5 * (high + low)) * 1.4426950408889634
        tl.store(bias + head * ENTRIES + at, values, mask=at < ENTRIES)


@jit_inline
def bias_of_head(bias, head, FRAMES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, STRIDE: tl.constexpr):
    """Where a head's bias begins: that of the first pair, or of the zero offset."""
    if STRIDE > 0:
        bias += head * (STRIDE * STRIDE)
    else:
        ENTRIES: tl.constexpr = (2 * FRAMES - 1) * (2 * ROWS - 1) * (2 * COLS - 1)
        bias += head * ENTRIES + ENTRIES // 2
    return bias


@jit_inline
def load_bias(bias, n, k_n, FRAMES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, STRIDE: tl.constexpr):
    """The bias of queries n with keys k_n, in float32."""
    if STRIDE > 0:
        values = tl.load(bias + (n * STRIDE)[:, None] + k_n[None, :]).to(tl.float32)
    else:
        place, k_place = place_of(n, FRAMES, ROWS, COLS), place_of(k_n, FRAMES, ROWS, COLS)
        values = tl.load((bias + place)[:, None] + (-k_place)[None, :])
    return values


@jit_inline
def load_bias_of_keys(bias, k_n, n, FRAMES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, STRIDE: tl.constexpr):
    """The same, transposed: a row per key."""
    if STRIDE > 0:
        values = tl.load(bias + k_n[:, None] + (n * STRIDE)[None, :]).to(tl.float32)
    else:
        values = tl.load((bias - place_of(k_n, FRAMES, ROWS, COLS))[:, None] + place_of(n, FRAMES, ROWS, COLS)[None, :])
    return values


@jit_inline
def attention_scores(
    a, b, bias, n, b_n, wrap_frame, wrap_row, wrap_col,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SHIFTED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """a b^T + bias: scores times log2(e) of the window's tokens n with its tokens b_n; a or b has the scale in it.

    MASKED is added between the regions that the shift brought together, -inf between the two ends of a clip.  Only the
    last windows of an axis have that: the others skip it, and the arithmetic for it.
    """
    scores = tl.dot(a, tl.trans(b), acc=bias, input_precision="ieee")
    if SHIFTED:  # noqa: SIM102 (a constant, which the compiler decides)
        apart = (wrap_row < ROWS) | (wrap_col < COLS)
        if FRAMES > 1:
            apart = apart | (wrap_frame < FRAMES)
        if apart:
            zero = tl.minimum(wrap_row, 0)  # the compiler does not know, and so keeps the divisions in here
            n, b_n = n + zero, b_n + zero
            if FRAMES > 1:
                end, b_end = n // (ROWS * COLS) >= wrap_frame, b_n // (ROWS * COLS) >= wrap_frame
                scores = tl.where(end[:, None] == b_end[None, :], scores, float("-inf"))
                n, b_n = n % (ROWS * COLS), b_n % (ROWS * COLS)
            region = (n // COLS >= wrap_row).to(tl.int32) * 2 + (n % COLS >= wrap_col).to(tl.int32)
            b_region = (b_n // COLS >= wrap_row).to(tl.int32) * 2 + (b_n % COLS >= wrap_col).to(tl.int32)
            scores = tl.where(region[:, None] == b_region[None, :], scores, scores + MASKED)
    return scores


@jit_inline
def forward_step(
    start, acc, total, top, q, n, qkv, bias, heads, first_frame, first_row, first_col, wrap_frame, wrap_row, wrap_col,
    frames, height, width,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SHIFTED: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK_K: tl.constexpr, ONLINE: tl.constexpr,
):  # fmt: skip
    """acc, total and top, the queries' sums of weighted values and of weights and their largest score (0 unless
    ONLINE), after BLOCK_K more keys, from `start` on."""
    stride = heads * (3 * D)
    k_n = start + tl.arange(0, BLOCK_K)
    k_token, k_real = locate(
        k_n, first_frame, first_row, first_col, wrap_frame, wrap_row, wrap_col, frames, height, width,
        FRAMES, ROWS, COLS, PADDED,
    )  # fmt: skip
    k, k_inverse = unit_rows(load_rows(qkv + heads * D, k_token, k_real, stride, D, DP))
    v = load_rows(qkv + heads * (2 * D), k_token, k_real, stride, D, DP)
    scores = load_bias(bias, n, k_n, FRAMES, ROWS, COLS, STRIDE)
    scores = attention_scores(
        q, k.to(q.dtype), scores, n, k_n, wrap_frame, wrap_row, wrap_col, FRAMES, ROWS, COLS, SHIFTED, MASKED
    )
    if PADDED or (STRIDE == 0 and FRAMES * ROWS * COLS % BLOCK_K != 0):
        scores = tl.where(k_real[None, :], scores, float("-inf"))
    if ONLINE:
        new_top = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - new_top)
        p = tl.exp2(scores - new_top[:, None])
        total = total * shrink
        acc = acc * shrink[:, None]
        top = new_top
    else:
        p = tl.exp2(scores)
    total += tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc=acc, input_precision="ieee")
    return acc, total, top


@jit_inline
def forward_keys(
    q, n, qkv, bias, heads, first_frame, first_row, first_col, wrap_frame, wrap_row, wrap_col, frames, height, width,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SHIFTED: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, TAIL_K: tl.constexpr, ONLINE: tl.constexpr,
):  # fmt: skip
    """acc, total and top of forward_step after all of a window's keys."""
    WHOLE_BLOCKS: tl.constexpr = FRAMES * ROWS * COLS // BLOCK_K * BLOCK_K
    acc = tl.zeros((BLOCK, DP), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    top = tl.full((BLOCK,), -1e30 if ONLINE else 0.0, tl.float32)  # not -inf: the first keys may all be padding
    for start in range(0, WHOLE_BLOCKS, BLOCK_K):
        acc, total, top = forward_step(
            start, acc, total, top, q, n, qkv, bias, heads, first_frame, first_row, first_col,
            wrap_frame, wrap_row, wrap_col, frames, height, width,
            FRAMES, ROWS, COLS, D, DP, SHIFTED, PADDED, MASKED, STRIDE, BLOCK_K, ONLINE,
        )  # fmt: skip
    if WHOLE_BLOCKS < FRAMES * ROWS * COLS:
        acc, total, top = forward_step(
            WHOLE_BLOCKS, acc, total, top, q, n, qkv, bias, heads, first_frame, first_row, first_col,
            wrap_frame, wrap_row, wrap_col, frames, height, width,
            FRAMES, ROWS, COLS, D, DP, SHIFTED, PADDED, MASKED, STRIDE, TAIL_K, ONLINE,
        )  # fmt: skip
    return acc, total, top


@jit_inline
def forward_block(
    block, BLOCK: tl.constexpr, BLOCK_Q: tl.constexpr, window, head, qkv, scale, bias, reach, out, lse,
    heads, height, width, grid_rows, grid_cols, shift_row, shift_col, frames, grid_frames, shift_frame,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SHIFTED: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK_K: tl.constexpr, TAIL_K: tl.constexpr, MAX_REACH: tl.constexpr,
):  # fmt: skip
    """The forward pass of BLOCK queries, from block * BLOCK_Q on."""
    N: tl.constexpr = FRAMES * ROWS * COLS
    first_token, first_frame, first_row, first_col, wrap_frame, wrap_row, wrap_col = window_corner(
        window, height, width, grid_rows, grid_cols, shift_row, shift_col, frames, grid_frames, shift_frame,
        FRAMES, ROWS, COLS,
    )  # fmt: skip
    qkv += first_token * (heads * 3 * D) + head * D
    bias = bias_of_head(bias, head, FRAMES, ROWS, COLS, STRIDE)
    n = block * BLOCK_Q + tl.arange(0, BLOCK)
    token, real = locate(
        n, first_frame, first_row, first_col, wrap_frame, wrap_row, wrap_col, frames, height, width,
        FRAMES, ROWS, COLS, PADDED,
    )  # fmt: skip
    q, q_inverse = unit_rows(load_rows(qkv, token, real, heads * (3 * D), D, DP))
    q = (q * (tl.load(scale + head) * 1.4426950408889634)).to(qkv.dtype.element_ty)  # times log2(e)
    if tl.load(reach + head) <= MAX_REACH:
        acc, total, top = forward_keys(
            q, n, qkv, bias, heads, first_frame, first_row, first_col, wrap_frame, wrap_row, wrap_col,
            frames, height, width,
            FRAMES, ROWS, COLS, D, DP, SHIFTED, PADDED, MASKED, STRIDE, BLOCK, BLOCK_K, TAIL_K, False,
        )  # fmt: skip
    else:
        acc, total, top = forward_keys(
            q, n, qkv, bias, heads, first_frame, first_row, first_col, wrap_frame, wrap_row, wrap_col,
            frames, height, width,
            FRAMES, ROWS, COLS, D, DP, SHIFTED, PADDED, MASKED, STRIDE, BLOCK, BLOCK_K, TAIL_K, True,
        )  # fmt: skip
    acc = acc * (1.0 / total)[:, None]
    store_rows(out + first_token * (heads * D) + head * D, token, real, heads * D, acc, D, DP)
    lse += (window.to(tl.int64) * heads + head) * N
    # A row of padding all of whose keys are masked may have no weight left; inf makes it none in the backward pass too.
    tl.store(lse + n, tl.where(total > 0, top + tl.log2(total), float("inf")), mask=n < N)


@jit
def forward_kernel(
    qkv, scale, bias, reach, out, lse,
    heads, height, width, grid_rows, grid_cols, shift_row, shift_col, frames, grid_frames, shift_frame,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SHIFTED: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr, TAIL_Q: tl.constexpr, BLOCK_K: tl.constexpr, TAIL_K: tl.constexpr, MAX_REACH: tl.constexpr,
):  # fmt: skip
    """out (B, H, W, C) and lse (B*nW, h, N) float32 of a block of queries; padding has an lse too, but no gradient.

    Scores of heads with a reach of at most MAX_REACH go into the exponential as they are, which neither overflows nor
    loses a row's largest weight; with others every row's largest score so far is subtracted.
    """
    N: tl.constexpr = FRAMES * ROWS * COLS
    pid = tl.program_id(0)
    head = pid % heads
    block = (pid // heads) % tl.cdiv(N, BLOCK_Q)
    window = pid // heads // tl.cdiv(N, BLOCK_Q)
    if N % BLOCK_Q == 0 or TAIL_Q == BLOCK_Q or block < N // BLOCK_Q:
        forward_block(
            block, BLOCK_Q, BLOCK_Q, window, head, qkv, scale, bias, reach, out, lse,
            heads, height, width, grid_rows, grid_cols, shift_row, shift_col, frames, grid_frames, shift_frame,
            FRAMES, ROWS, COLS, D, DP, SHIFTED, PADDED, MASKED, STRIDE, BLOCK_K, TAIL_K, MAX_REACH,
        )  # fmt: skip
    elif TAIL_Q != BLOCK_Q:
        forward_block(
            block, TAIL_Q, BLOCK_Q, window, head, qkv, scale, bias, reach, out, lse,
            heads, height, width, grid_rows, grid_cols, shift_row, shift_col, frames, grid_frames, shift_frame,
            FRAMES, ROWS, COLS, D, DP, SHIFTED, PADDED, MASKED, STRIDE, BLOCK_K, TAIL_K, MAX_REACH,
        )  # fmt: skip
