"""Tile sizes of the kernels, by chip: a table in ``tiles.json``, and rules for what it does not list.

Nothing is tuned at a user's first call. An entry of the table was measured by ``python -m fastllama_kernels tune`` on
the hardware it names; the rules are reasoned, not measured.
"""

import functools
import json
from importlib import resources
from typing import Any, NamedTuple

import torch

from fastllama_kernels.common.launch import next_power_of_2

WITHOUT_A_GPU = (9, 0)  # what launches are made for in the interpreter
MULTIPROCESSORS = {(8, 0): 108, (8, 9): 128, (9, 0): 132, (10, 0): 148}  # where there is no device to ask
LOAD = 16  # bytes a thread loads at once


class GemvTile(NamedTuple):
    """What a program of the GEMV owns: ``block_n`` rows of the matrix, in tiles of ``block_k`` columns.

    While one tile is multiplied, ``stages - 1`` others are on their way.
    """

    block_n: int
    block_k: int
    warps: int
    stages: int


class AttentionTile(NamedTuple):
    """Cache slots that a program of decode attention takes at once."""

    block_s: int
    warps: int
    stages: int


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a device; that of WITHOUT_A_GPU for devices that are none."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else WITHOUT_A_GPU


@functools.cache
def multiprocessors(device: torch.device, chip: tuple[int, int]) -> int:
    """Multiprocessors of a device, or the most that chips of this capability have."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return MULTIPROCESSORS.get(chip, MULTIPROCESSORS[WITHOUT_A_GPU])


@functools.cache
def table() -> dict[str, Any]:
    """The measured entries: by kernel, chip and shape."""
    return json.loads(resources.files("fastllama_kernels.common").joinpath("tiles.json").read_text(encoding="utf-8"))


def gemv(chip: tuple[int, int], rows: int, n_out: int, k_in: int, dtype: torch.dtype, gated: bool) -> GemvTile:
    """The tile for a matrix of ``n_out`` rows (of each of gate and up, if gated) and ``k_in`` columns."""
    if found := _measured("gemv", chip, gemv_key(rows, n_out, k_in, dtype, gated)):
        return GemvTile(**found)
    wide = LOAD // dtype.itemsize
    if rows == 1:
        # One load of every thread for a row of the tile: only then have x and the matrix one layout in registers.
        warps = max(1, min(4, next_power_of_2(k_in) // (32 * wide)))
        is_small = gated or chip >= (10, 0)  # where ptxas would spill some registers of larger tiles
        return GemvTile(block_n=2 if is_small else 4, block_k=32 * wide * warps, warps=warps, stages=4)
    block_k = max(16, min(256, next_power_of_2(k_in)) // (2 if gated else 1))
    if dtype == torch.float32:  # whose products take more registers
        return GemvTile(block_n=16, block_k=min(32, block_k), warps=4, stages=3)
    return GemvTile(block_n=16, block_k=block_k, warps=4, stages=4)


def decode_attention(chip: tuple[int, int], head_dim: int, dtype: torch.dtype, block_m: int) -> AttentionTile:
    """The tile for ``block_m`` queries of heads of ``head_dim``."""
    if found := _measured("decode_attention", chip, attention_key(head_dim, dtype, block_m)):
        return AttentionTile(**found)
    padded = next_power_of_2(head_dim)
    block_s = min(128, max(16, 16384 // (padded * dtype.itemsize)))  # 16 KiB of keys at once
    needs_registers = dtype == torch.float32 or block_m * padded > 4096
    return AttentionTile(block_s, warps=8 if needs_registers else 4, stages=2 if padded == 256 else 3)


def gemv_key(rows: int, n_out: int, k_in: int, dtype: torch.dtype, gated: bool) -> str:
    """The key of a GEMV's entry, which all numbers of rows share that run the same code: one, and more."""
    return f"{'one' if rows == 1 else 'many'} {n_out}x{k_in} {8 * dtype.itemsize} bit{' gated' if gated else ''}"


def attention_key(head_dim: int, dtype: torch.dtype, block_m: int) -> str:
    """The key of decode attention's entry."""
    return f"{block_m} queries of {head_dim} {8 * dtype.itemsize} bit"


def _measured(kernel: str, chip: tuple[int, int], key: str) -> dict[str, int] | None:
    entries = table().get(kernel, {}).get(f"sm_{chip[0]}{chip[1]}", {})
    return entries.get("tiles", {}).get(key)
