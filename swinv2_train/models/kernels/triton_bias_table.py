"""Triton kernels of the position bias table's gradient: sums of the scores' gradient by offset, without atomics.

Windows whose bias is dense (STRIDE > 0) have their scores' gradients summed pair by pair, and these by offset; for
larger windows, where that is too much memory, the sums by offset are taken in the kernel.  See triton_attention for
the legend.
"""

from __future__ import annotations

from swinv2_train.models.kernels.triton_attention import (
    attention_scores,
    bias_of_head,
    jit,
    jit_inline,
    load_bias,
    load_rows,
    locate,
    place_of,
    store_rows,
    through_unit,
    tl,
    unit_rows,
    window_corner,
)


@jit_inline
def tile_gradient(
    first, k_first, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, head,
    grad, qkv, scale, bias, lse, delta, unit, grad_qkv, grad_scale, partial,
    windows, heads, height, width, grid_rows, grid_cols, shift_row, shift_col, frames, grid_frames, shift_frame,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SHIFTED: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr, STRIDE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The sum, over the windows of the split program_id(1), of the gradients of BLOCK x BLOCK_K scores."""
    N: tl.constexpr = FRAMES * ROWS * COLS
    per_split = tl.cdiv(windows, tl.num_programs(1))
    first_window = tl.program_id(1) * per_split
    count = tl.minimum(per_split, windows - first_window)
    stride = heads * (3 * D)
    scale1 = tl.load(scale + head)
    n = first + tl.arange(0, BLOCK)
    k_n = k_first + tl.arange(0, BLOCK_K)
    tile_bias = load_bias(bias_of_head(bias, head, FRAMES, ROWS, COLS, STRIDE), n, k_n, FRAMES, ROWS, COLS, STRIDE)
    tile = tl.zeros((BLOCK, BLOCK_K), tl.float32)
    scale_sum = 0.0
    for step in range(count):
        window = first_window + step
        first_token, first_frame, first_row, first_col, wrap_frame, wrap_row, wrap_col = window_corner(
            window, height, width, grid_rows, grid_cols, shift_row, shift_col, frames, grid_frames, shift_frame,
            FRAMES, ROWS, COLS,
        )  # fmt: skip
        token, real = locate(
            n, first_frame, first_row, first_col, wrap_frame, wrap_row, wrap_col, frames, height, width,
            FRAMES, ROWS, COLS, PADDED,
        )  # fmt: skip
        k_token, k_real = locate(
            k_n, first_frame, first_row, first_col, wrap_frame, wrap_row, wrap_col, frames, height, width,
            FRAMES, ROWS, COLS, PADDED,
        )  # fmt: skip
        in_qkv = first_token * stride + head * D
        in_out = first_token * (heads * D) + head * D
        statistics = (window.to(tl.int64) * heads + head) * N
        v = load_rows(qkv + in_qkv + heads * (2 * D), k_token, k_real, stride, D, DP)
        do = load_rows(grad + in_out, token, real, heads * D, D, DP)
        row_lse = tl.load(lse + statistics + n, mask=n < N, other=float("inf"))
        if WHOLE:
            q_unit, q_inverse = unit_rows(load_rows(qkv + in_qkv, token, real, stride, D, DP))
            k_unit, k_inverse = unit_rows(load_rows(qkv + in_qkv + heads * D, k_token, k_real, stride, D, DP))
            q, k = (q_unit * (scale1 * 1.4426950408889634)).to(v.dtype), k_unit.to(v.dtype)
        else:
            in_unit = first_token * (heads * 2 * D) + head * D
            q = load_rows(unit + in_unit, token, real, heads * 2 * D, D, DP)
            k = load_rows(unit + in_unit + heads * D, k_token, k_real, heads * 2 * D, D, DP)
            row_delta = tl.load(delta + statistics + n, mask=n < N, other=0.0)
        scores = attention_scores(
            q, k, tile_bias, n, k_n, wrap_frame, wrap_row, wrap_col, FRAMES, ROWS, COLS, SHIFTED, MASKED
        )
        p = tl.exp2(scores - row_lse[:, None])
        if PADDED:
            p = tl.where(k_real[None, :], p, 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        if WHOLE:
            row_delta = tl.sum(p * dp, 1)
        ds = p * (dp - row_delta[:, None])
        tile += ds
        if WHOLE:
            ds = ds.to(v.dtype)
            dv = tl.dot(tl.trans(p.to(v.dtype)), do, input_precision="ieee")
            store_rows(grad_qkv + in_qkv + heads * (2 * D), k_token, k_real, stride, dv, D, DP)
            dq = tl.dot(ds, k, input_precision="ieee")
            if DP > 32:  # again, behind a store: wide unit vectors in float32 would fill registers until here
                q_unit, q_inverse = unit_rows(load_rows(qkv + in_qkv, token, real, stride, D, DP))
            dq, cosine = through_unit(dq, q_unit, q_inverse)
            store_rows(grad_qkv + in_qkv, token, real, stride, dq * scale1, D, DP)
            dk = tl.dot(tl.trans(ds), q, input_precision="ieee") * 0.6931471805599453  # by log2(e)
            if DP > 32:
                k_unit, k_inverse = unit_rows(load_rows(qkv + in_qkv + heads * D, k_token, k_real, stride, D, DP))
            dk, k_cosine = through_unit(dk, k_unit, k_inverse)
            store_rows(grad_qkv + in_qkv + heads * D, k_token, k_real, stride, dk, D, DP)
            scale_sum += tl.sum(cosine, 0)
    if WHOLE:
        tl.store(grad_scale + tl.program_id(1) * heads + head, scale_sum)
    partial += (tl.program_id(1) * heads + head).to(tl.int64) * (STRIDE * STRIDE)
    tl.store(partial + (n * STRIDE)[:, None] + k_n[None, :], tile)


@jit
def table_gradient_kernel(
    grad, qkv, scale, bias, lse, delta, unit, grad_qkv, grad_scale, partial,
    windows, heads, height, width, grid_rows, grid_cols, shift_row, shift_col, frames, grid_frames, shift_frame,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SHIFTED: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK: tl.constexpr, TAIL: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Sums over windows of every pair's score gradient into partial (splits, h, STRIDE, STRIDE) float32.

    A program owns a head, a tile of BLOCK x BLOCK pairs (TAIL at the window's end), and a split of the windows.
    WHOLE: the window is one tile; then the tile has all that the gradients of q, k, v and scale need, and the other
    two kernels are not launched, which otherwise give delta and unit.
    """
    N: tl.constexpr = FRAMES * ROWS * COLS
    ONE: tl.constexpr = N % BLOCK == 0 or TAIL == BLOCK  # all tiles are alike
    head = tl.program_id(0) % heads
    q_block = tl.program_id(0) // heads // tl.cdiv(N, BLOCK)
    k_block = tl.program_id(0) // heads % tl.cdiv(N, BLOCK)
    if ONE or (q_block < N // BLOCK and k_block < N // BLOCK):
        tile_gradient(
            q_block * BLOCK, k_block * BLOCK, BLOCK, BLOCK, head,
            grad, qkv, scale, bias, lse, delta, unit, grad_qkv, grad_scale, partial,
            windows, heads, height, width, grid_rows, grid_cols, shift_row, shift_col, frames, grid_frames, shift_frame,
            FRAMES, ROWS, COLS, D, DP, SHIFTED, PADDED, MASKED, STRIDE, WHOLE,
        )  # fmt: skip
    elif not ONE:
        if q_block < N // BLOCK:
            tile_gradient(
                q_block * BLOCK, k_block * BLOCK, BLOCK, TAIL, head,
                grad, qkv, scale, bias, lse, delta, unit, grad_qkv, grad_scale, partial,
                windows, heads, height, width, grid_rows, grid_cols, shift_row, shift_col,
                frames, grid_frames, shift_frame,
                FRAMES, ROWS, COLS, D, DP, SHIFTED, PADDED, MASKED, STRIDE, WHOLE,
            )  # fmt: skip
        elif k_block < N // BLOCK:
            tile_gradient(
                q_block * BLOCK, k_block * BLOCK, TAIL, BLOCK, head,
                grad, qkv, scale, bias, lse, delta, unit, grad_qkv, grad_scale, partial,
                windows, heads, height, width, grid_rows, grid_cols, shift_row, shift_col,
                frames, grid_frames, shift_frame,
                FRAMES, ROWS, COLS, D, DP, SHIFTED, PADDED, MASKED, STRIDE, WHOLE,
            )  # fmt: skip
        else:
            tile_gradient(
                q_block * BLOCK, k_block * BLOCK, TAIL, TAIL, head,
                grad, qkv, scale, bias, lse, delta, unit, grad_qkv, grad_scale, partial,
                windows, heads, height, width, grid_rows, grid_cols, shift_row, shift_col,
                frames, grid_frames, shift_frame,
                FRAMES, ROWS, COLS, D, DP, SHIFTED, PADDED, MASKED, STRIDE, WHOLE,
            )  # fmt: skip


@jit
def table_reduction_kernel(
    pairs, grad_table, heads,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    STRIDE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """grad_table ((2 FRAMES - 1)(2 ROWS - 1)(2 COLS - 1), h) from pairs (h, STRIDE, STRIDE): sums over the queries by
    offset."""
    N: tl.constexpr = FRAMES * ROWS * COLS
    WIDTH: tl.constexpr = 2 * COLS - 1
    AREA: tl.constexpr = (2 * ROWS - 1) * WIDTH
    ENTRIES: tl.constexpr = (2 * FRAMES - 1) * AREA
    head = tl.program_id(0) % heads
    t = tl.program_id(0) // heads * BLOCK + tl.arange(0, BLOCK)
    pairs += head * (STRIDE * STRIDE)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK_Q):
        n = start + tl.arange(0, BLOCK_Q)
        # The key whose place lies t - the zero offset before the query's, if there is one.
        u = place_of(n, FRAMES, ROWS, COLS)[:, None] + ENTRIES // 2 - t[None, :]
        if FRAMES > 1:
            frame, of_frame = u // AREA, u % AREA
            there = (u >= 0) & (frame < FRAMES) & (of_frame // WIDTH < ROWS) & (u % WIDTH < COLS) & (n < N)[:, None]
            key = (frame * ROWS + of_frame // WIDTH) * COLS + u % WIDTH
            at = (n * STRIDE)[:, None] + key
        else:
            there = (u >= 0) & (u // WIDTH < ROWS) & (u % WIDTH < COLS) & (n < N)[:, None]
            at = (n * STRIDE)[:, None] + u // WIDTH * COLS + u % WIDTH
        total += tl.sum(tl.load(pairs + at, mask=there, other=0.0), 0)
    tl.store(grad_table + t * heads + head, total, mask=t < ENTRIES)


@jit_inline
def token_of_group(
    frame, group, local, GROUP: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """The tokens `local` of a group of GROUP rows of a frame; N for those past its end."""
    row = group * GROUP + local // COLS
    inside = (local < GROUP * COLS) & (row < ROWS)
    return tl.where(inside, (frame * ROWS + row) * COLS + local % COLS, N)


@jit
def offset_gradient_kernel(
    grad, qkv, bias, lse, delta, unit, partial,
    windows, heads, height, width, grid_rows, grid_cols, shift_row, shift_col, frames, grid_frames, shift_frame,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SHIFTED: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Sums of the scores' gradient by offset, in a fixed order, into partial (splits, diagonals, h, BINS) float32.

    A frame's rows are taken in groups of GROUP rows, at most BLOCK tokens.  A program owns a head, a distance between
    the query's and the key's frame and group (a diagonal: there are (2 FRAMES - 1)(2 GROUPS - 1)), and the split
    program_id(1) of the windows: it adds up the (BLOCK, BLOCK) tiles of all its windows and group pairs, whose entries
    have the same offsets, and at the end sums the tile along these.
    """
    N: tl.constexpr = FRAMES * ROWS * COLS
    GROUPS: tl.constexpr = (ROWS + GROUP - 1) // GROUP
    WIDTH: tl.constexpr = 2 * COLS - 1
    AREA: tl.constexpr = (2 * ROWS - 1) * WIDTH
    ENTRIES: tl.constexpr = (2 * FRAMES - 1) * AREA
    head = tl.program_id(0) % heads
    diagonal = tl.program_id(0) // heads
    if FRAMES > 1:
        distance = diagonal % (2 * GROUPS - 1) - (GROUPS - 1)
        frame_distance = diagonal // (2 * GROUPS - 1) - (FRAMES - 1)
        group_pairs = GROUPS - tl.abs(distance)
        pairs = (FRAMES - tl.abs(frame_distance)) * group_pairs
    else:
        distance = diagonal - (GROUPS - 1)
        pairs = GROUPS - tl.abs(distance)
    per_split = tl.cdiv(windows, tl.num_programs(1))
    first_window = tl.program_id(1) * per_split
    count = tl.minimum(per_split, windows - first_window)
    stride = heads * (3 * D)
    bias += head * ENTRIES
    local = tl.arange(0, BLOCK)
    in_group = local < GROUP * COLS

    # All tiles have the same bias.  Tokens past the end of a group could point past the table's ends.
    local_place = (local // COLS) * WIDTH + local % COLS
    offset = distance * GROUP * WIDTH + local_place[:, None] - local_place[None, :] + ENTRIES // 2
    if FRAMES > 1:
        offset += frame_distance * AREA
    tile_bias = tl.load(bias + tl.minimum(tl.maximum(offset, 0), ENTRIES - 1))

    tile = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in range(count * pairs):
        window = first_window + step // pairs
        if FRAMES > 1:
            q_frame = step % pairs // group_pairs + tl.maximum(frame_distance, 0)
            q_group = step % pairs % group_pairs + tl.maximum(distance, 0)
            n = token_of_group(q_frame, q_group, local, GROUP, N, ROWS, COLS)
            k_n = token_of_group(q_frame - frame_distance, q_group - distance, local, GROUP, N, ROWS, COLS)
        else:
            q_group = step % pairs + tl.maximum(distance, 0)
            n = tl.where(in_group, q_group * (GROUP * COLS) + local, N)
            k_n = tl.where(in_group, (q_group - distance) * (GROUP * COLS) + local, N)
        first_token, first_frame, first_row, first_col, wrap_frame, wrap_row, wrap_col = window_corner(
            window, height, width, grid_rows, grid_cols, shift_row, shift_col, frames, grid_frames, shift_frame,
            FRAMES, ROWS, COLS,
        )  # fmt: skip
        token, real = locate(
            n, first_frame, first_row, first_col, wrap_frame, wrap_row, wrap_col, frames, height, width,
            FRAMES, ROWS, COLS, PADDED,
        )  # fmt: skip
        k_token, k_real = locate(
            k_n, first_frame, first_row, first_col, wrap_frame, wrap_row, wrap_col, frames, height, width,
            FRAMES, ROWS, COLS, PADDED,
        )  # fmt: skip
        in_qkv = first_token * stride + head * D
        in_out = first_token * (heads * D) + head * D
        statistics = (window.to(tl.int64) * heads + head) * N
        v = load_rows(qkv + in_qkv + heads * (2 * D), k_token, k_real, stride, D, DP)
        do = load_rows(grad + in_out, token, real, heads * D, D, DP)
        row_lse = tl.load(lse + statistics + n, mask=n < N, other=float("inf"))
        in_unit = first_token * (heads * 2 * D) + head * D
        q = load_rows(unit + in_unit, token, real, heads * 2 * D, D, DP)
        k = load_rows(unit + in_unit + heads * D, k_token, k_real, heads * 2 * D, D, DP)
        row_delta = tl.load(delta + statistics + n, mask=n < N, other=0.0)
        scores = attention_scores(
            q, k, tile_bias, n, k_n, wrap_frame, wrap_row, wrap_col, FRAMES, ROWS, COLS, SHIFTED, MASKED
        )
        p = tl.exp2(scores - row_lse[:, None])
        if PADDED or GROUP * COLS != BLOCK or ROWS % GROUP != 0:
            p = tl.where(k_real[None, :], p, 0.0)
        tile += p * (tl.dot(do, tl.trans(v), input_precision="ieee") - row_delta[:, None])

    # Of row i of the tile, the key at place u = place_i - (t - the zero offset) belongs to offset t, if there is one.
    DIAGONALS: tl.constexpr = (2 * FRAMES - 1) * (2 * GROUPS - 1)
    partial += ((tl.program_id(1) * DIAGONALS + diagonal) * heads + head) * BINS
    for start in tl.static_range(0, BINS, BLOCK):
        t = start + tl.arange(0, BLOCK)
        u = local_place[:, None] + (GROUP - 1) * WIDTH + COLS - 1 - t[None, :]
        row, col = u // WIDTH, u % WIDTH
        there = (u >= 0) & (row < GROUP) & (col < COLS) & in_group[:, None]
        key = tl.where(there, row * COLS + col, 0)
        summand = tl.where(there, tl.gather(tile, key, 1), 0.0)
        tl.store(partial + t, tl.sum(summand, 0))


@jit
def offset_reduction_kernel(
    partial, grad_table, splits, heads,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr, BINS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """grad_table ((2 FRAMES - 1)(2 ROWS - 1)(2 COLS - 1), h) from partial: an offset lies in at most two neighbouring
    diagonals of its distance between frames."""
    GROUPS: tl.constexpr = (ROWS + GROUP - 1) // GROUP
    WIDTH: tl.constexpr = 2 * COLS - 1
    ENTRIES: tl.constexpr = (2 * FRAMES - 1) * (2 * ROWS - 1) * WIDTH
    OF_FRAMES: tl.constexpr = 2 * GROUPS - 1  # diagonals of one distance between frames
    DIAGONALS: tl.constexpr = (2 * FRAMES - 1) * OF_FRAMES
    head = tl.program_id(0) % heads
    t = tl.program_id(0) // heads * BLOCK + tl.arange(0, BLOCK)
    row = t // WIDTH
    if FRAMES > 1:
        frame_distance, row = row // (2 * ROWS - 1), row % (2 * ROWS - 1)
    row = row + GROUPS * GROUP - ROWS  # counted from the first row of the first diagonal
    diagonal, row = row // GROUP, row % GROUP
    inside = t < ENTRIES
    low = inside & (diagonal < OF_FRAMES)
    high = inside & (diagonal > 0) & (row + GROUP < 2 * GROUP - 1)
    if FRAMES > 1:
        diagonal += frame_distance * OF_FRAMES
    low_at = (diagonal * heads + head) * BINS + row * WIDTH + t % WIDTH
    high_at = low_at + GROUP * WIDTH - heads * BINS
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, splits, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        base = partial + (split * (DIAGONALS * heads * BINS))[:, None]
        there = (split < splits)[:, None]
        one = tl.load(base + low_at[None, :], mask=there & low[None, :], other=0.0)
        two = tl.load(base + high_at[None, :], mask=there & high[None, :], other=0.0)
        total += tl.sum(one + two, 0)
    tl.store(grad_table + t * heads + head, total, mask=inside)
