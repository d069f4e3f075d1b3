"""Windowed cosine attention in one pass over the unpartitioned map, forward and backward: Triton kernels on CUDA, and
one written in C++ on a CPU (cpu_attention.py).

Legend: B batch, H W tokens per side, C channels, nW windows per image, N tokens per window, h heads, d head dim.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import swinv2_train.models.kernels.cpu_attention as cpu
from swinv2_train.models.cosine import window_attention
from swinv2_train.models.kernels import failures, trial
from swinv2_train.models.kernels.failures import Case, case_of
from swinv2_train.models.kernels.traced import traced
from swinv2_train.models.precision import without_autocast
from swinv2_train.models.windows import MASKED_LOGIT, WindowGrid, num_offsets

HAS_TRITON = importlib.util.find_spec("triton") is not None
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_WINDOW = 64
MAX_OFFSETS = 2**16  # rows of the bias table, all of which a program holds: 33,135 where a clip's window is 8x24x24
HEAD_DIMS = (16, 128)  # the smallest and the largest
MIN_CAPABILITY = 8  # major: the first with bfloat16 matrix units
DENSE_TOKENS = 576  # windows of up to 24 x 24 have the bias of every pair in memory
BIAS_BLOCK = 1024
MAX_REACH = 96.0
"""Scores whose head reaches no further go into 2^x as they are: a row's largest weight is at least 2^-96 and one of
2^-24 of it still a normal number; the largest weight possible, times ten thousand tokens and values of 1e5, is below
2^127."""
TABLE_PROGRAMS = 2048  # of the table's gradient; a constant, because its sums must not depend on the card


def fused_problem(device: torch.device) -> str | None:
    """Why nothing is fused on this device, whatever the sizes, in a few words; None where something is.

    Triton's interpreter, which serves tests, does not count.  Nothing is tried here: trial.py does that.
    """
    if device.type == "cpu":
        return cpu.problem()
    if device.type != "cuda" or torch.version.hip is not None:
        return f"there are no kernels for {device.type if torch.version.hip is None else 'ROCm'}"
    if not HAS_TRITON:
        return "the package triton is missing"
    capability = torch.cuda.get_device_capability(device)
    return None if capability[0] >= MIN_CAPABILITY else f"the GPU is too old ({capability}, 8.0 is needed)"


def unknown(device: torch.device, dtype: torch.dtype, grid: WindowGrid, num_heads: int, head_dim: int) -> str | None:
    """What of these sizes the kernels of a device do not know, in a few words; None where they know them."""
    tokens, limits = math.prod(grid.window), {"cpu": (cpu.DTYPES, 1)}.get(device.type, (DTYPES, HEAD_DIMS[0]))
    if dtype not in limits[0]:
        return f"there are no kernels for {str(dtype).removeprefix('torch.')} on {device.type}"
    if not limits[1] <= head_dim <= HEAD_DIMS[1]:
        return f"head dim {head_dim} is not within {limits[1]} to {HEAD_DIMS[1]}"
    if device.type == "cpu":
        return f"windows of {tokens} tokens are more than {cpu.MAX_TOKENS}" if tokens > cpu.MAX_TOKENS else None
    if max(grid.window) > MAX_WINDOW:
        return f"windows of {'x'.join(map(str, grid.window))} are larger than {MAX_WINDOW}"
    if num_offsets(grid.window) > MAX_OFFSETS:
        offsets = num_offsets(grid.window)
        return f"windows of {'x'.join(map(str, grid.window))} have {offsets} offsets, more than {MAX_OFFSETS}"
    if math.prod(grid.size) * 3 * num_heads * head_dim >= 2**31:
        return "offsets inside an image or clip are 32-bit"
    return None


def tried(cases: Iterable[Case], device: torch.device) -> dict[Case, str]:
    """What is wrong with the kernels, by case, each tried where it was not yet (trial.py); nothing of good ones."""
    return trial.problems_of(cases, device, fused_window_attention)


@functools.lru_cache(maxsize=1024)  # a layer asks in every forward pass
def _asked(
    device: torch.device, dtype: torch.dtype, grid: WindowGrid, num_heads: int, head_dim: int
) -> tuple[bool, Case]:
    """Whether the kernels know these sizes, and which case they are."""
    return unknown(device, dtype, grid, num_heads, head_dim) is None, case_of(dtype, grid, head_dim)


def fused_available(qkv: Tensor, grid: WindowGrid, num_heads: int) -> bool:
    """Whether :func:`fused_window_attention` is to be used for this qkv (B, H, W, 3C): the kernels of its device know
    its dtype and sizes, :func:`fused_problem` has nothing against it, and they have agreed with the reference.

    Where a compiler traces this, what was tried before counts: a run tries what it will use at its start.
    """
    dim = qkv.shape[-1] // (3 * num_heads)
    if traced(qkv):
        return fused_problem(qkv.device) is None and unknown(qkv.device, qkv.dtype, grid, num_heads, dim) is None
    known, case = _asked(qkv.device, qkv.dtype, grid, num_heads, dim)
    if not known or fused_problem(qkv.device) is not None or failures.failed(case):
        return False
    if trial.is_good(case, qkv.device):
        return True
    for problem in tried([case], qkv.device).values():
        warnings.warn(f"fused attention is not used on {qkv.device} ({case}): {problem}", stacklevel=2)
        return False
    return True


def fused_window_attention(
    qkv: Tensor, scale: Tensor, table: Tensor, grid: WindowGrid, num_heads: int, bias: Tensor | None = None
) -> Tensor:
    """Cosine attention inside the windows of a map, N x N scores never in memory (arXiv:2111.09883 section 3.2).

    softmax(cos(q, k) scale + bias + mask) v, as :mod:`swinv2_train.models.attention` computes it on cut windows.
    qkv: (B, H, W, 3C), the projection of the map itself, channels ordered (3, h, d); float32, bfloat16 or, on CUDA,
    float16.
    scale: (h, 1, 1) float32, exp(logit_scale).  table: ((2rows-1)(2cols-1), h) float32, the bias of every offset,
    between 0 and 16 as 16 sigmoid makes it: beside bfloat16 it is read in float16 on CUDA.
    bias: (3C,) in qkv's dtype, added to qkv before; on a CPU by the kernel as it reads, in float32.
    Returns (B, H, W, C) in qkv's dtype.  Beside its arguments and the result it keeps the softmax's denominators for
    the backward pass, (B*nW, h, N) float32.  All gradients are the same bit for bit in every run: no sum is atomic.
    """
    if bias is not None and (traced(qkv) or not _compiled(qkv)):
        qkv, bias = qkv + bias, None
    bias = None if bias is None else bias.float()
    sizes = (grid.size, grid.window, grid.shift, num_heads)
    if traced(qkv):  # otherwise without torch.library, which takes the host several times as long
        out: Tensor = _forward(qkv, scale, table, *sizes)[0]  # (benchmarks/launch_overhead_cpu_202611.md)
    elif torch.is_grad_enabled():
        out = _WindowAttention.apply(qkv, scale, table, bias, *sizes)
    else:
        out = _forward_surviving(qkv, scale, table, *sizes, bias=bias)[0]
    return out


class Tiles(NamedTuple):
    """How a launch cuts windows up, in tokens: a program owns a block of queries (or keys) and goes over the others in
    blocks; what a window has beyond its whole blocks is a smaller block (:func:`tail`)."""

    owned: int
    streamed: int
    streamed_queries: int  # by the programs that own keys
    warps: int
    forward_owned: int
    forward_streamed: int
    forward_warps: int
    side: int  # of the tiles whose sum over all windows gives the table's gradient
    side_warps: int


def tail(tokens: int, block: int) -> int:
    """The block for the tokens that blocks of this size leave over: a power of two, at least 16."""
    return max(16, _power_of_two(tokens % block))


def tiles_for(tokens: int, cols: int, head_dim: int, dtype: torch.dtype, capability: int) -> Tiles:
    """Tiles for windows of this many tokens in rows of cols on a card of this (major) capability.

    No search, which would cost every start seconds. Chosen by what the compiled kernels take (scripts/compile_fused.py)
    in bfloat16: at most 64 bytes spilled, few instructions, and 8 to 20 warps at a time on a multiprocessor.
    """
    whole = max(16, _power_of_two(tokens))
    exact, wide = dtype == torch.float32, head_dim > 64  # float32 has no matrix units and twice the bytes
    owned = min(whole, 32 if exact else 64)
    warps = 8 if wide and owned == 64 else 4 if owned >= 32 else 2
    dense = tokens <= DENSE_TOKENS
    large = tokens >= 256 and not exact and not wide  # then twice as many queries share the work on a block of keys
    uneven = tokens % 32 > 0  # then blocks of 16 of a wide head need no smaller last one
    small = wide and not exact and whole > 64 and not (uneven and capability >= 9)
    side = min(whole, 32 if exact or small else 64)
    if not dense:
        side = max(side, _power_of_two(cols))  # a row of the window at least
    streamed = min(whole, 16 if exact and wide else 32 if exact or wide or not dense else 64)
    backward = min(streamed, 16) if wide and uneven else streamed
    large_side = side == 64 and (wide or exact or (whole == 64 and head_dim > 32))
    return Tiles(
        owned=owned,
        streamed=backward,
        streamed_queries=min(backward, 32) if head_dim > 32 and capability < 9 else backward,
        warps=warps,
        forward_owned=128 if large else owned,
        forward_streamed=streamed,
        forward_warps=8 if large else warps,
        side=side,
        side_warps=8 if large_side or (small and not uneven) else 4,
    )


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _covered(tokens: int, block: int) -> int:
    """Tokens that whole blocks and the smaller last one take."""
    return tokens // block * block + (tail(tokens, block) if tokens % block else 0)


def _rounded(tokens: int, block: int) -> int:
    return math.ceil(tokens / block) * block


class _Launch:
    """What all kernels of one call share: the grid's numbers, and the constants they are compiled for."""

    def __init__(self, qkv: Tensor, grid: WindowGrid, heads: int) -> None:
        self.grid, self.heads = grid, heads
        self.dim = qkv.shape[-1] // (3 * heads)
        self.tokens = math.prod(grid.window)
        counts = [p // w for p, w in zip(grid.padded, grid.window, strict=True)]
        self.windows = qkv.shape[0] * math.prod(counts)
        frames, height, width = (1, *grid.size)[-3:]
        grid_frames, grid_rows, grid_cols = (1, *counts)[-3:]
        shift_frame, shift_row, shift_col = (0, *grid.shift)[-3:]
        of_image = (heads, height, width, grid_rows, grid_cols, shift_row, shift_col)
        self.sizes = (*of_image, frames, grid_frames, shift_frame)
        self.window = dict(zip(("FRAMES", "ROWS", "COLS"), (1, *grid.window)[-3:], strict=True))
        """Windows of one frame are those of so many images, and have the kernels of images."""
        self.tiles = tiles_for(self.tokens, grid.window[-1], self.dim, qkv.dtype, _capability(qkv.device))
        self.dense = self.tokens <= DENSE_TOKENS
        blocks = {*self.tiles[:3], self.tiles.forward_owned, self.tiles.forward_streamed, self.tiles.side}
        self.stride = max(_covered(self.tokens, block) for block in blocks) if self.dense else 0
        self.constants: dict[str, Any] = {
            **self.window,
            "D": self.dim,
            "DP": max(16, _power_of_two(self.dim)),
            "num_stages": 1,  # the pipeliner would copy the bias through shared memory, two instructions more a score
            "SHIFTED": grid.shifted,
            "PADDED": grid.padded != grid.size,
            "MASKED": MASKED_LOGIT * math.log2(math.e),
        }

    def programs(self, owned: int) -> tuple[int]:
        return (self.windows * math.ceil(self.tokens / owned) * self.heads,)

    def table_programs(self) -> tuple[int, int, int, int]:
        """Rows per group, programs per head and split, splits of the windows and bins per program of the table's
        gradient.

        A group is a tile's side of tokens where the bias is dense, a program's part a pair of groups, and no bins are
        needed: the partial sums take splits * h * N^2 * 4 bytes, with several splits at most 34 MB.  In larger windows
        it is a number of a frame's rows, a program's part a distance between groups and between frames, and they take
        splits * programs * h * bins * 4 bytes.  bins is at most 256, so that with several splits that is at most 8 MiB
        (4 of images); with a single one 64 KiB per head of images, 105 of windows of 8x16x16, whatever the batch.
        """
        frames, rows, cols = self.window.values()
        side = self.tiles.side
        group = min(rows, side // cols)
        if self.dense:
            programs = tiles = math.ceil(self.tokens / side) ** 2
        else:
            groups = math.ceil(rows / group)
            programs, tiles = (2 * frames - 1) * (2 * groups - 1), frames * groups
        splits = min(self.windows, max(1, TABLE_PROGRAMS // (self.heads * tiles)))
        return group, programs, splits, 0 if self.dense else _rounded((2 * group - 1) * (2 * cols - 1), side)

    def bias(self, scale: Tensor, table: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The bias as the kernels read it, and how far scores can be from 0, (h,) float32.

        Beside bfloat16 operands a bias between -8 and 8 is exact enough in float16, which halves what is read.
        """
        entries = table.shape[0]
        if self.dense:
            narrow = torch.float16 if dtype == torch.bfloat16 else torch.float32
            bias = table.new_empty(self.heads, self.stride, self.stride, dtype=narrow)
        else:
            bias = table.new_empty(self.heads, entries)
        reach = table.new_empty(self.heads)
        blocks = math.ceil(bias[0].numel() / BIAS_BLOCK)
        _kernels()[0].bias_kernel[(self.heads * blocks,)](
            table, scale, bias, reach, self.heads, **self.window, STRIDE=self.stride, BLOCK=BIAS_BLOCK,
            OFFSETS=_power_of_two(entries), num_warps=max(4, _power_of_two(entries) // 4096),
        )  # fmt: skip
        return bias, reach


def _capability(device: torch.device) -> int:
    """The major number of the card's capability; of a CPU, whose tensors the interpreter takes, the newest."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def _compiled(qkv: Tensor) -> bool:
    """Whether C++ computes this, and not Triton, whose interpreter takes the CPU's tensors too."""
    return qkv.device.type == "cpu"


def _kernels() -> tuple[ModuleType, ModuleType, ModuleType]:
    assert HAS_TRITON, "the package triton is missing: ask fused_available() before fused_window_attention()"
    from swinv2_train.models.kernels import triton_attention, triton_bias_table, triton_gradients  # they import Triton

    return triton_attention, triton_gradients, triton_bias_table


def _check(qkv: Tensor, scale: Tensor, table: Tensor, grid: WindowGrid, heads: int) -> None:
    assert qkv.shape[1:-1] == grid.size and qkv.shape[-1] % (3 * heads) == 0, (qkv.shape, grid, heads)
    assert scale.numel() == heads and table.shape == (num_offsets(grid.window), heads), (scale.shape, table.shape)
    assert scale.dtype == table.dtype == torch.float32 and qkv.dtype in DTYPES, (scale.dtype, table.dtype, qkv.dtype)


def _forward_fake(
    qkv: Tensor,
    scale: Tensor,
    table: Tensor,
    size: Sequence[int],
    window: Sequence[int],
    shift: Sequence[int],
    heads: int,
) -> tuple[Tensor, Tensor]:
    windows = qkv.shape[0] * math.prod(math.ceil(n / w) for n, w in zip(size, window, strict=True))
    out = qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3)
    return out, qkv.new_empty(windows, heads, math.prod(window), dtype=torch.float32)


def _attend(
    qkv: Tensor,
    scale: Tensor,
    table: Tensor,
    size: Sequence[int],
    window: Sequence[int],
    shift: Sequence[int],
    heads: int,
    *,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    grid = WindowGrid(tuple(size), tuple(window), tuple(shift))
    _check(qkv, scale, table, grid, heads)
    assert bias is None or (_compiled(qkv) and bias.shape == qkv.shape[-1:] and bias.is_contiguous()), bias
    qkv, scale = qkv.contiguous(), scale.contiguous()
    out, lse = _forward_fake(qkv, scale, table, size, window, shift, heads)
    if _compiled(qkv):
        cpu.forward(qkv, scale, table, bias, out, lse, grid, heads)
        return out, lse
    launch = _Launch(qkv, grid, heads)
    tiles, tokens = launch.tiles, launch.tokens
    with torch.cuda.device(qkv.get_device()):  # -1 on the CPU: nothing to select
        bias, reach = launch.bias(scale, table.contiguous(), qkv.dtype)
        _kernels()[0].forward_kernel[launch.programs(tiles.forward_owned)](
            qkv, scale, bias, reach, out, lse, *launch.sizes, **launch.constants, STRIDE=launch.stride,
            BLOCK_Q=tiles.forward_owned, TAIL_Q=tail(tokens, tiles.forward_owned),
            BLOCK_K=tiles.forward_streamed, TAIL_K=tail(tokens, tiles.forward_streamed),
            MAX_REACH=-1.0 if qkv.dtype == torch.float16 else MAX_REACH, num_warps=tiles.forward_warps,
        )  # fmt: skip
    return out, lse


def _backward_fake(
    grad: Tensor, qkv: Tensor, scale: Tensor, table: Tensor, out: Tensor, lse: Tensor,
    size: Sequence[int], window: Sequence[int], shift: Sequence[int], heads: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    contiguous = torch.contiguous_format
    return tuple(torch.empty_like(x, memory_format=contiguous) for x in (qkv, scale, table))  # type: ignore[return-value]


def _attend_backward(
    grad: Tensor, qkv: Tensor, scale: Tensor, table: Tensor, out: Tensor, lse: Tensor,
    size: Sequence[int], window: Sequence[int], shift: Sequence[int], heads: int, *, bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    grid = WindowGrid(tuple(size), tuple(window), tuple(shift))
    grad, qkv, scale = grad.contiguous(), qkv.contiguous(), scale.contiguous()
    grad_qkv, grad_scale, grad_table = _backward_fake(grad, qkv, scale, table, out, lse, size, window, shift, heads)
    if _compiled(qkv):
        scale_grad, grad_table, grad_bias = cpu.backward(grad, qkv, scale, table, bias, lse, grad_qkv, grid, heads)
        return grad_qkv, scale_grad.view_as(scale), grad_table, grad_bias
    _, kernels, table_kernels = _kernels()
    launch = _Launch(qkv, grid, heads)
    tiles, tokens, stride = launch.tiles, launch.tokens, launch.stride
    group, parts, splits, bins = launch.table_programs()
    whole = launch.dense and parts == 1
    delta = lse.new_empty(0 if whole else lse.shape)
    unit = qkv.new_empty(0 if whole else (*qkv.shape[:-1], qkv.shape[-1] // 3 * 2))
    programs = launch.programs(tiles.owned)
    scale_summands = lse.new_empty(splits * heads if whole else programs[0])
    common = {**launch.constants, "STRIDE": stride, "num_warps": tiles.warps}
    blocks = (tiles.owned, tiles.streamed, tiles.streamed_queries)
    owned, streamed, queries = ((block, tail(tokens, block)) for block in blocks)
    with torch.cuda.device(qkv.get_device()):  # -1 on the CPU: nothing to select
        bias, _ = launch.bias(scale, table.contiguous(), qkv.dtype)
        if not whole:
            # In this order: the first makes delta and the queries' unit vectors, the second those of the keys.
            kernels.query_gradient_kernel[programs](
                grad, qkv, scale, bias, out, lse, delta, unit, grad_qkv, scale_summands, *launch.sizes, **common,
                BLOCK_Q=owned[0], TAIL_Q=owned[1], BLOCK_K=streamed[0], TAIL_K=streamed[1],
            )  # fmt: skip
            kernels.key_value_gradient_kernel[programs](
                grad, qkv, bias, lse, delta, unit, grad_qkv, *launch.sizes, **common,
                BLOCK_Q=queries[0], TAIL_Q=queries[1], BLOCK_K=owned[0], TAIL_K=owned[1],
            )  # fmt: skip
        if launch.dense:
            partial = lse.new_empty(splits, heads, stride, stride)
            table_kernels.table_gradient_kernel[(heads * parts, splits)](
                grad, qkv, scale, bias, lse, delta, unit, grad_qkv, scale_summands, partial,
                launch.windows, *launch.sizes, **launch.constants, STRIDE=stride,
                BLOCK=tiles.side, TAIL=tail(tokens, tiles.side), WHOLE=whole, num_warps=tiles.side_warps,
            )  # fmt: skip
            table_kernels.table_reduction_kernel[(heads * math.ceil(table.shape[0] / 64),)](
                partial[0] if splits == 1 else partial.sum(0), grad_table, heads, **launch.window, STRIDE=stride,
                BLOCK=64, BLOCK_Q=32, num_warps=4,
            )  # fmt: skip
        else:
            partial = lse.new_empty(splits, parts, heads, bins)
            table_kernels.offset_gradient_kernel[(heads * parts, splits)](
                grad, qkv, bias, lse, delta, unit, partial, launch.windows, *launch.sizes, **launch.constants,
                GROUP=group, BLOCK=tiles.side, BINS=bins, num_warps=tiles.side_warps,
            )  # fmt: skip
            table_kernels.offset_reduction_kernel[(heads * math.ceil(table.shape[0] / 64),)](
                partial, grad_table, splits, heads, **launch.window, GROUP=group, BINS=bins,
                BLOCK=64, BLOCK_SPLITS=32, num_warps=4,
            )  # fmt: skip
    torch.sum(scale_summands.view(-1, heads), 0, out=grad_scale.view(-1))
    return grad_qkv, grad_scale, grad_table, None


def _case(qkv: Tensor, sizes: tuple[Any, ...]) -> Case:
    size, window, shift, heads = sizes
    grid = WindowGrid(tuple(size), tuple(window), tuple(shift))
    return case_of(qkv.dtype, grid, qkv.shape[-1] // (3 * heads))


def _forward_surviving(
    qkv: Tensor, scale: Tensor, table: Tensor, *sizes: Any, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """_attend; where it fails and that is got over, the reference's result without denominators (failures.py)."""
    try:
        return _attend(qkv, scale, table, *sizes, bias=bias)
    except Exception as error:  # noqa: BLE001  whatever a compiler or driver raises
        failures.got_over(_case(qkv, sizes), error, qkv.device)
    size, window, shift, heads = sizes
    with without_autocast(qkv.device):
        qkv = qkv if bias is None else (qkv + bias).to(qkv.dtype)
        out = window_attention(qkv, scale, table, WindowGrid(tuple(size), tuple(window), tuple(shift)), heads)
    return out.contiguous(), _forward_fake(qkv, scale, table, *sizes)[1].fill_(math.nan)


def _backward_surviving(
    grad: Tensor, qkv: Tensor, scale: Tensor, table: Tensor, out: Tensor, lse: Tensor, *sizes: Any,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """_attend_backward; where it fails and that is got over, gradients that no step is taken with (failures.py)."""
    try:
        return _attend_backward(grad, qkv, scale, table, out, lse, *sizes, bias=bias)
    except Exception as error:  # noqa: BLE001  whatever a compiler or driver raises
        failures.got_over(_case(qkv, sizes), error, qkv.device)
    gradients = _backward_fake(grad, qkv, scale, table, out, lse, *sizes)
    return *(each.fill_(math.nan) for each in gradients), None if bias is None else torch.full_like(bias, math.nan)  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, scale, table, *ctx.sizes = inputs
    ctx.save_for_backward(qkv, scale, table, *output)
    ctx.mark_non_differentiable(output[1])


class _WindowAttention(torch.autograd.Function):
    """The kernels without torch.library around them; the bits are the same."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, scale: Tensor, table: Tensor, bias: Tensor | None, *sizes: Any) -> Tensor:
        output = _forward_surviving(qkv, scale, table, *sizes, bias=bias)
        ctx.save_for_backward(qkv, scale, table, *output, bias)
        ctx.sizes = sizes
        return output[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, bias = ctx.saved_tensors
        return (*_backward_surviving(grad, *saved, *ctx.sizes, bias=bias), None, None, None, None)


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(grad, *ctx.saved_tensors, *ctx.sizes), None, None, None, None)


def _three_gradients(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _backward_surviving(*arguments)[:3]


_forward = torch.library.custom_op(
    "swinv2_train::window_attention",
    _forward_surviving,
    mutates_args=(),
    schema="(Tensor qkv, Tensor scale, Tensor table, int[] size, int[] window, int[] shift, int heads) "
    "-> (Tensor, Tensor)",
)
_backward = torch.library.custom_op(
    "swinv2_train::window_attention_backward",
    _three_gradients,
    mutates_args=(),
    schema="(Tensor grad, Tensor qkv, Tensor scale, Tensor table, Tensor out, Tensor lse, "
    "int[] size, int[] window, int[] shift, int heads) -> (Tensor, Tensor, Tensor)",
)
_forward.register_fake(_forward_fake)
_backward.register_fake(_backward_fake)
_forward.register_autograd(_gradients, setup_context=_save)
