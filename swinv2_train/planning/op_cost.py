"""What an operation costs: arithmetic, and bytes read and written."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
_PRODUCTS = {aten.mm.default: 0, aten.bmm.default: 0, aten.addmm.default: 1, aten.baddbmm.default: 1}
"""Matrix products, and the place of their first factor among the arguments."""
_CONVOLUTIONS = (aten.convolution.default, aten.convolution_backward.default)
_FUSED_ATTENTION = {"window_attention": 2, "window_attention_backward": 5}
"""The operations of models/kernels/, and their products of tokens x tokens x head dim for each window and head."""
_FUSED_ROWS = {"native_layer_norm", "native_layer_norm_backward", "_to_copy", "clone", "copy_"}
"""What a compiler fuses like elementwise operations: sums along a row, casts and copies."""


@dataclass(frozen=True)
class Operation:
    """What one operation costs."""

    flops: int
    nbytes: int
    """Read and written; views move nothing."""
    precision: str
    """bf16 or fp32."""


def cost_of(func: Any, args: Any, inputs: list[Tensor], outputs: list[Tensor]) -> Operation:
    """The cost of one call of an operation; inputs and outputs: the tensors among its arguments and results."""
    flops, nbytes = 0, _moved(func, inputs, outputs)
    if func in _PRODUCTS:
        flops = 2 * outputs[0].numel() * args[_PRODUCTS[func]].shape[-1]
    elif func in _CONVOLUTIONS:
        forward = func is _CONVOLUTIONS[0]
        weight, result = (inputs[1], outputs[0]) if forward else (inputs[2], inputs[0])
        flops = 2 * (1 if forward else sum(args[-1][:2])) * result.numel() * weight[0].numel()
    elif func.namespace == "swinv2_train":
        forward = func is not torch.ops.swinv2_train.window_attention_backward.default
        qkv, denominators = (inputs[0], outputs[1]) if forward else (inputs[1], inputs[5])  # (B*nW, h, N)
        windows_and_heads, tokens = denominators.shape[0] * denominators.shape[1], denominators.shape[2]
        head_dim = qkv.shape[-1] // 3 // denominators.shape[1]
        products = _FUSED_ATTENTION[func.overloadpacket.__name__]
        flops = 2 * products * windows_and_heads * tokens**2 * head_dim
    elif func is aten.avg_pool2d.default:  # every output reads its whole window, from the cache
        flops = 2 * outputs[0].numel() * args[1][0] * args[1][-1]
    precision = "bf16" if inputs and inputs[0].dtype in (torch.bfloat16, torch.float16) else "fp32"
    return Operation(flops, nbytes, precision)


def is_fused(func: Any) -> bool:
    """Whether torch.compile makes one kernel of this operation and others of its kind next to it."""
    return torch.Tag.pointwise in func.tags or func.overloadpacket.__name__ in _FUSED_ROWS


def fused(operations: list[Operation], fusable: list[bool]) -> list[Operation]:
    """The operations with each unbroken run of fusable ones as a single one, which moves what the largest of them does.

    Its intermediate results stay in registers; what of them is written for the backward pass is not counted, nor are
    reads of a second large input beside the largest operation's.
    """
    found: list[Operation] = []
    for is_run, run in itertools.groupby(zip(operations, fusable, strict=True), key=lambda pair: pair[1]):
        members = [operation for operation, _ in run]
        if is_run:
            flops, nbytes = sum(each.flops for each in members), max(each.nbytes for each in members)
            members = [Operation(flops, nbytes, members[0].precision)]
        found += members
    return found


def _moved(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Bytes that an operation reads and writes."""
    name = func.overloadpacket.__name__

    def size(tensor: Tensor) -> int:  # an expanded tensor is smaller than its shape
        return min(tensor.nbytes, tensor.untyped_storage().nbytes())

    if name.startswith(("empty", "new_empty")):
        return 0
    if name == "index":  # reads no more of its source than it returns
        return 2 * sum(map(size, outputs)) + sum(map(size, inputs[1:]))
    if name.startswith("index_put"):  # the values come last
        return 2 * size(inputs[-1]) + sum(map(size, inputs[1:]))
    if name == "copy_":
        return size(inputs[1]) + size(outputs[0])
    return sum(map(size, [*inputs, *outputs]))
