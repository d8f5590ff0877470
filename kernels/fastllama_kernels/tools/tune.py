"""Measures tile sizes on the GPU that is here and writes the best of each shape to the table in ``tiles.json``.

Every candidate runs in a CUDA graph over as many copies of its weights (or caches) as overflow the L2 cache by far, so
that it is timed as it runs in a step: on memory that has been left alone for a while. Results must agree with torch's,
or the candidate is dropped. The table is written after every shape of a kernel, and what it has for this hardware is
not measured again: a run that is cut short loses nothing, the next one goes on.
"""

import functools
import itertools
import json
import logging
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from triton.errors import TritonError

from fastllama_kernels.attention import op as attention
from fastllama_kernels.attention import triton as decode_attention
from fastllama_kernels.common import activations, tiles
from fastllama_kernels.common.launch import Launch
from fastllama_kernels.common.shapes import Shape
from fastllama_kernels.linear import op as linear
from fastllama_kernels.linear import triton as gemv
from fastllama_kernels.tools.step import EPS, SHAPES

COLD_BYTES = 512 << 20  # several times any L2 cache
REPLAYS = 15
ROWS = (1, 8)  # one of each kind of code; see tiles.gemv_key
LIVE = 4096  # tokens in the cache
FILE = Path(tiles.__file__).with_name("tiles.json")

Make = Callable[[int], Launch]  # the launch on a numbered copy of the weights
Measure = Callable[[], tuple[Any, float, int]]  # the best tile, its seconds and the bytes it moves

logger = logging.getLogger(__name__)


def tune(names: Sequence[str], device: torch.device, file: Path = FILE) -> Iterator[str]:
    """Tune every kernel for the named shapes of ``SHAPES``; yields a line for each that it has written to the table.

    Args:
        names: of shapes.
        device: a CUDA device.
        file: the table, which keeps what it holds for other chips and shapes. What another model of GPU of the same
            compute capability, or another Triton, has measured is replaced.
    """
    chip = tiles.capability(device)
    where = f"sm_{chip[0]}{chip[1]}"
    measured_by = {"hardware": torch.cuda.get_device_name(device), "triton": triton.__version__}
    table = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name in names:
        for kernel, key, measure in _to_measure(SHAPES[name], device):
            entry: dict[str, Any] = table.setdefault(kernel, {}).get(where, {})
            if {field: entry.get(field) for field in measured_by} != measured_by:
                entry = {**measured_by, "tiles": {}}
            if key in entry["tiles"]:
                continue
            tile, seconds, moved = measure()
            entry["tiles"][key] = tile._asdict()
            table[kernel][where] = entry
            written = file.with_suffix(".new")
            written.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            written.replace(file)  # at once, so that there is never half a table
            yield f"{name}: {kernel} {key}: {tile}, {seconds * 1e6:.1f} us, {moved / seconds / 1e9:.0f} GB/s"


def _to_measure(shape: Shape, device: torch.device) -> Iterator[tuple[str, str, Measure]]:
    """Kernel, key in the table, and what finds the best tile."""
    matrices = {(n // (1 + (name == "gate_up")), k, name == "gate_up") for name, (n, k) in shape.matrices.items()}
    for (n, k, gated), rows in itertools.product(sorted(matrices), ROWS):
        key = tiles.gemv_key(rows, n, k, torch.bfloat16, gated)
        yield "gemv", key, functools.partial(_best_gemv, rows, n, k, gated, device)
    key = tiles.attention_key(shape.head_dim, torch.bfloat16, 16)
    yield "decode_attention", key, functools.partial(_best_attention, shape, device)


def _best_gemv(rows: int, n: int, k: int, gated: bool, device: torch.device) -> tuple[tiles.GemvTile, float, int]:
    weight_rows = 2 * n if gated else n
    x = torch.randn(rows, k, dtype=torch.bfloat16, device=device)
    copies = max(2, -(-COLD_BYTES // (weight_rows * k * 2)))
    weights = [torch.randn(weight_rows, k, dtype=torch.bfloat16, device=device) / k**0.5 for _ in range(copies)]
    silu = activations.SILU if gated else None
    if gated:
        expected = linear.gate_up_ref(x, weights[0], None, None, EPS, activations.SILU)
    else:
        expected = linear.linear_ref(x, weights[0], None, None, EPS, None)

    def candidate(tile: tiles.GemvTile) -> tuple[Make, torch.Tensor]:
        planned = [gemv.plan_launch(x, weight, None, None, EPS, None, silu, tile=tile) for weight in weights]
        return lambda copy: planned[copy][0], planned[0][1]

    if rows == 1:  # a row of the tile is one load of every thread; see tiles.gemv
        sizes = [(n, 256 * warps, warps) for n, warps in itertools.product((1, 2, 4, 8), (2, 4))]
    else:
        sizes = list(itertools.product((16, 32, 64), (128, 256, 512), (4,)))
    choices = (tiles.GemvTile(*size, stages) for size, stages in itertools.product(sizes, (3, 4, 5)))
    tile, seconds = _fastest(choices, candidate, expected, copies)
    return tile, seconds, weights[0].nbytes


def _best_attention(shape: Shape, device: torch.device) -> tuple[tiles.AttentionTile, float, int]:
    sizes = (1, shape.num_key_value_heads, LIVE, shape.head_dim)
    copies = max(2, -(-COLD_BYTES // (2 * LIVE * shape.num_key_value_heads * shape.head_dim * 2)))
    caches = [torch.randn(2, *sizes, dtype=torch.bfloat16, device=device) for _ in range(copies)]
    q = torch.randn(1, 1, shape.num_attention_heads, shape.head_dim, dtype=torch.bfloat16, device=device)
    position = torch.full((1, 1), LIVE - 1, device=device)
    out = attention.masked_attention(q.transpose(1, 2), position, *caches[0])
    arrived = torch.zeros(shape.num_attention_heads, dtype=torch.int32, device=device)

    def candidate(tile: tiles.AttentionTile) -> tuple[Make, torch.Tensor]:
        planned = [decode_attention.plan_launch(q, position, k, v, arrived=arrived, tile=tile) for k, v in caches]
        return lambda copy: planned[copy][0], planned[0][1]

    choices = itertools.starmap(tiles.AttentionTile, itertools.product((32, 64, 128), (2, 4, 8), (1, 2, 3, 4)))
    tile, seconds = _fastest(choices, candidate, out.transpose(1, 2), copies)
    return tile, seconds, caches[0].nbytes


def _fastest(
    choices: Iterator[Any],
    candidate: Callable[[Any], tuple[Make, torch.Tensor]],
    expected: torch.Tensor,
    copies: int,
) -> tuple[Any, float]:
    """The tile whose launches take the least time, and that time in seconds."""
    times: dict[Any, float] = {}
    for tile in choices:
        make, result = candidate(tile)
        try:
            seconds = _time(make, copies)
        except TritonError as error:
            logger.info("%s does not run: %s", tile, error)  # more shared memory than the chip has, for one
            continue
        if torch.allclose(result, expected, rtol=0.02, atol=0.05):
            times[tile] = seconds
    if not times:
        raise RuntimeError("no tile gives the result of torch: this is an error of the kernel")
    best = min(times, key=times.__getitem__)
    return best, times[best]


def _time(make: Make, copies: int) -> float:
    """Seconds of one launch: the median over replays of a graph with one launch on each copy."""
    make(0).run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in range(copies):
            make(copy).run()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / copies)
    return statistics.median(times[2:])
