"""How many instructions a compiled kernel issues, read from its disassembly: no GPU is needed.

A program's path through the code is found by its matrix products: of all ways from the first instruction to the exit
(loops may be taken any number of times) that multiply as much as the program's tiles need, the one with the fewest
instructions.  That is the interior's: what only windows at the map's edge execute, and slower forms that a branch
chooses, are not on it.
"""

from __future__ import annotations

import heapq
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

LABEL = re.compile(r"^\s*(\.L\w+):")
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*);")


class Block(NamedTuple):
    """A piece of code without a jump: instructions, multiply-accumulates of one warp, and what may follow it."""

    instructions: int
    macs: int
    following: tuple[int, ...]


def disassembly(cubin: bytes) -> str:
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(tool), "-c", file.name], check=True, capture_output=True, text=True).stdout


def macs_of(name: str, operands: str) -> int:
    """Multiply-accumulates of one warp: HMMA is a warp's, HGMMA four warps'; 0 for everything else."""
    if name.startswith("HMMA.16816"):
        return 16 * 8 * 16
    if name.startswith("HMMA.1688"):
        return 16 * 8 * 8
    if name.startswith("HGMMA."):
        rows, cols, depth = (int(x) for x in re.findall(r"(\d+)x(\d+)x(\d+)", name)[0])
        return rows * cols * depth // 4
    return 0


def blocks_of(text: str) -> list[Block]:
    """The code's pieces in order; -1 stands for the exit."""
    pieces: list[list[tuple[str, str, str]]] = [[]]
    starts: dict[str, int] = {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            if pieces[-1]:
                pieces.append([])
            starts[label[1]] = len(pieces) - 1
        elif found := INSTRUCTION.match(line):
            if found[3] == "NOP":
                continue
            pieces[-1].append((found[2] or "", found[3], found[4]))
            if found[3].startswith(("BRA", "EXIT", "RET", "CALL")):
                pieces.append([])
    blocks = []
    for i, piece in enumerate(pieces):
        following: list[int] = [i + 1] if i + 1 < len(pieces) else [-1]
        if piece:
            condition, name, operands = piece[-1]
            conditional = bool(condition) or "P" in operands.split("`")[0]
            target = re.findall(r"`\((\.L\w+)\)", operands)
            if name.startswith(("BRA", "CALL")) and target:  # a CALL that never returns leaves a loop
                following = [starts[target[0]], *following] if conditional else [starts[target[0]]]
            elif name.startswith("EXIT"):
                following = [-1, *following] if conditional else [-1]
        macs = sum(macs_of(name, operands) for _, name, operands in piece)
        blocks.append(Block(len(piece), macs, tuple(following)))
    return blocks


def fewest_instructions(blocks: list[Block], macs: int) -> int:
    """Instructions of one warp on the shortest way from the start to the exit with this many products, or where there
    is none with exactly as many (a small tile's work is done twice by warps that have none of their own), with more.

    Raises ValueError where there is neither.
    """
    for exactly in (True, False):
        queue, done = [(0, 0, 0)], set()
        while queue:
            cost, at, products = heapq.heappop(queue)
            if at == -1 and products == macs:
                return cost
            if at == -1 or (at, products) in done:
                continue
            done.add((at, products))
            products += blocks[at].macs
            if products > macs and exactly:
                continue
            for following in blocks[at].following:
                heapq.heappush(queue, (cost + blocks[at].instructions, following, min(products, macs)))
    raise ValueError(f"no way through the code has {macs} products a warp")


def marginal_instructions(blocks: list[Block], macs: int) -> float | None:
    """What `macs` products more cost a program that has a loop for them; None where the code has none."""
    try:
        return (fewest_instructions(blocks, 33 * macs) - fewest_instructions(blocks, macs)) / 32
    except ValueError:
        return None
