"""Reads the machine code of the kernels, for chips that need not be there.

Every kernel of a decode step, in every shipped configuration, is compiled by Triton and the ptxas it brings. What the
machine code shows is held against what a kernel limited by memory must have: nothing spilled, weights loaded 16 bytes
at a time, shared memory that the chip has, and on chips that know it, programmatic dependent launch.
"""

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from fastllama_kernels.attention import rotary
from fastllama_kernels.attention import triton as decode_attention
from fastllama_kernels.common import activations, pdl
from fastllama_kernels.common.calls import STEP
from fastllama_kernels.common.launch import Launch
from fastllama_kernels.common.shapes import Shape
from fastllama_kernels.linear import packed_triton, rms_norm, silu_mul
from fastllama_kernels.linear import triton as gemv
from fastllama_kernels.linear.packed import LINE, PANEL
from fastllama_kernels.sampling import ngrams
from fastllama_kernels.tools import step

WIDE = 16  # bytes
BATCHES = (1, 8, 16)


class Chip(NamedTuple):
    """Limits of a multiprocessor (CUDA C++ programming guide, compute capabilities)."""

    threads: int
    programs: int
    shared_bytes: int
    shared_bytes_of_program: int
    registers: int = 65536


CHIPS = {
    80: Chip(2048, 32, 164 << 10, 163 << 10),
    86: Chip(1536, 16, 100 << 10, 99 << 10),
    89: Chip(1536, 24, 100 << 10, 99 << 10),
    90: Chip(2048, 32, 228 << 10, 227 << 10),
    100: Chip(2048, 32, 228 << 10, 227 << 10),
    120: Chip(1536, 24, 100 << 10, 99 << 10),
}


@dataclass(frozen=True)
class Finding:
    """What the machine code of one kernel shows.

    Attributes:
        name: of the kernel and the launches it serves.
        arch: compute capability, 90 for 9.0.
        registers: of a thread.
        spills: local loads and stores, and stack in bytes.
        shared_bytes: of a program.
        programs: that fit on a multiprocessor.
        widest_load, widest_store: from and to global memory, bytes at once.
        narrowest_weight_load: bytes at once; None for kernels that read no weights.
        matrix_instructions: how many stand in the code.
        pdl_instructions: likewise, of the two kinds.
        is_dependent: whether it is launched as a programmatic dependent.
        wants_pdl: whether it should be, on this chip.
        writes_early: whether it writes before it waits for the kernel before it.
        reads_early: whether it reads what need not be there yet before that: anything but weights.
        weights_are_late: whether it streams weights, and fetches none before that.
    """

    name: str
    arch: int
    registers: int
    spills: int
    shared_bytes: int
    programs: int
    widest_load: int
    widest_store: int
    narrowest_weight_load: int | None
    matrix_instructions: int
    pdl_instructions: int
    is_dependent: bool
    wants_pdl: bool
    writes_early: bool
    reads_early: bool
    weights_are_late: bool

    @property
    def faults(self) -> list[str]:
        found = []
        if self.spills:
            found.append(f"spills ({self.spills})")
        if self.shared_bytes > CHIPS[self.arch].shared_bytes_of_program:
            found.append(f"{self.shared_bytes} bytes of shared memory, the chip has fewer")
        if self.narrowest_weight_load is not None and self.narrowest_weight_load < WIDE:
            found.append(f"weights are loaded {self.narrowest_weight_load} bytes at a time")
        if self.wants_pdl and (self.pdl_instructions < 2 or not self.is_dependent):
            found.append("no programmatic dependent launch")
        if self.writes_early or self.reads_early:
            found.append("memory is touched before the kernel waits for the one before it")
        if self.weights_are_late:
            found.append("no weights are on their way when the kernel waits")
        return found


def launches(arch: int) -> dict[str, Launch]:
    """Every distinct kernel that models of the published shapes run on a chip, by the name of its first use."""
    chip = divmod(arch, 10)
    found: dict[Any, tuple[str, Launch]] = {}
    for name, launch in _all_launches(chip):
        key = (
            launch.kernel,
            tuple(sorted(launch.constants.items())),
            launch.signature,
            launch.warps,
            launch.stages,
            launch.max_registers,
        )
        found.setdefault(key, (name, launch))
    return dict(found.values())


def _all_launches(chip: tuple[int, int]) -> Iterator[tuple[str, Launch]]:
    def tensor(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    for name, shape in step.SHAPES.items():
        for dtype in (torch.bfloat16, torch.float16):
            for batch in BATCHES:
                where = f"{name}, batch {batch}, {str(dtype).removeprefix('torch.')}"
                for part in step.parts(shape, chip, dtype, batch):
                    yield f"{part.name} ({where})", part.launch
        yield from _attention_launches(name, shape, chip)
        yield from _packed_launches(name, shape, chip)
        m, f, d = shape.hidden_size, shape.intermediate_size, shape.head_dim
        x = tensor(512, m)
        yield f"rms_norm ({name})", rms_norm.plan_launch(x, tensor(m), step.EPS, chip)[0]
        yield f"silu_mul ({name})", silu_mul.plan_launch(tensor(512, 2 * f), activations.SILU, chip)[0]
        cache, position = tensor(1, shape.num_key_value_heads, 512, d), tensor(1, 512, dtype=torch.int64)
        packed, table = tensor(1, 512, shape.packed), tensor(512, d, dtype=torch.float32)
        tokens, sizes = tensor(8, 131072, dtype=torch.int64), tensor(8, dtype=torch.int64)
        logits = tensor(8, shape.vocab_size, dtype=torch.float32)
        yield f"ban_ngrams ({name})", ngrams.plan_launch(logits, tokens, sizes, sizes, chip)
        yield f"rotary_write ({name})", rotary.plan_launch(packed, table, table, position, cache, cache, chip)[0]


def _packed_launches(name: str, shape: Shape, chip: tuple[int, int]) -> Iterator[tuple[str, Launch]]:
    """Matrices of 8 bits with a scale a row, and of 4 bits with scales and offsets of 32 columns."""
    for bits, batch in itertools.product((8, 4), BATCHES):
        for call in STEP:
            if call.matrix is None:
                continue
            n, k = shape.matrices[call.matrix]
            x = torch.empty(batch, k, dtype=torch.bfloat16, device="meta")
            codes = torch.empty(n // PANEL, k * bits // 32, LINE, dtype=torch.uint8, device="meta")
            scales = torch.empty(n // PANEL, k // 32 if bits == 4 else 1, PANEL, dtype=torch.float16, device="meta")
            launch, _ = packed_triton.plan_launch(
                x, codes, scales, scales if bits == 4 else None, None, x[0] if call.has_norm else None, step.EPS,
                x.new_empty(batch, n) if call.has_residual else None,
                activations.SILU if call.op == "gate_up" else None, chip,
            )  # fmt: skip
            yield f"{call.name}, {bits} bits ({name}, batch {batch})", launch


def _attention_launches(name: str, shape: Shape, chip: tuple[int, int]) -> Iterator[tuple[str, Launch]]:
    """Attention of several query tokens, as speculation needs it, and of one from a start, in every dtype."""
    for dtype, tokens in itertools.product((torch.bfloat16, torch.float16, torch.float32), (1, 2, 4, 8)):
        k, d = shape.num_key_value_heads, shape.head_dim
        cache = torch.empty(1, k, 4096, d, dtype=dtype, device="meta")
        table = torch.empty(4096, d, device="meta")
        position, start = (torch.empty(sizes, dtype=torch.int64, device="meta") for sizes in ((1, tokens), (1,)))
        where = f"{name}, {tokens} tokens, {str(dtype).removeprefix('torch.')}"
        packed = cache.new_empty(1, tokens, shape.packed)
        launch, _ = decode_attention.plan_launch(packed, position, cache, cache, tables=(table, table), chip=chip)
        yield f"rotary, KV write, attention ({where})", launch
        q = cache.new_empty(1, tokens, shape.num_attention_heads, d)
        yield f"attention ({where})", decode_attention.plan_launch(q, position, cache, cache, start, chip=chip)[0]


def audit(archs: Iterable[int], workers: int = 2) -> Iterator[Finding]:
    """Compile and read every kernel for these compute capabilities (90 for 9.0), in several processes."""
    work = [(arch, name) for arch in archs for name in launches(arch)]
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(_examine_named, work)


def _examine_named(work: tuple[int, str]) -> Finding:
    arch, name = work
    return examine(name, launches(arch)[name], arch)


def examine(name: str, launch: Launch, arch: int) -> Finding:
    """Compile one launch and read its machine code."""
    compiled = launch.compile(arch)
    ptx, (resources, sass) = compiled.asm["ptx"], _disassembled(compiled.asm["cubin"])
    stores = re.findall(r"\bst\.global\S*", ptx)
    loads = re.findall(r"\bld\.global\S*", ptx)
    copies = [int(size, 0) for size in re.findall(r"\bcp\.async\.c[ag]\.shared\.global\s+[^;]*?,\s*(0x\w+|\d+)", ptx)]
    early, waits, _ = ptx.partition("griddepcontrol.wait")
    is_packed = launch.kernel is packed_triton._packed_kernel
    is_gemv, is_norm = is_packed or launch.kernel is gemv._gemv_kernel, launch.kernel is rms_norm._rms_norm_kernel
    registers, stack = (int(re.search(rf"{field}:(\d+)", resources)[1]) for field in ("REG", "STACK"))  # type: ignore
    shared = compiled.metadata.shared
    return Finding(
        name=name,
        arch=arch,
        registers=registers,
        spills=stack + len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        shared_bytes=shared,
        programs=programs_per_multiprocessor(CHIPS[arch], registers, launch.warps, shared),
        widest_load=max([*map(width, loads), *copies], default=0),
        widest_store=max(map(width, stores), default=0),
        narrowest_weight_load=_narrowest_weight_load(launch, loads, copies) if is_gemv else None,
        matrix_instructions=len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA|IMMA)\b", sass)),
        pdl_instructions=len(set(re.findall(r"griddepcontrol\.\w+", ptx))),
        is_dependent=compiled.metadata.launch_pdl,
        wants_pdl=divmod(arch, 10) >= pdl.MIN_CAPABILITY,
        writes_early=bool(waits) and bool(re.search(r"\b(st|atom|red)\.global", early)),
        reads_early=bool(waits) and not is_norm and bool(re.search(r"\b(ld\.global|cp\.async)", early)),
        weights_are_late=bool(waits) and is_gemv and "prefetch.global" not in early,
    )


def _narrowest_weight_load(launch: Launch, loads: list[str], copies: list[int]) -> int:
    """Bytes at once of a GEMV's loads of weights; 0 where none is to be found."""
    if straight := [width(load) for load in loads if "evict_first" in load]:
        return min(straight)
    # Asynchronous copies do not show what they copy, but wide ones must be as many as the weights' tiles need.
    if launch.kernel is packed_triton._packed_kernel:
        tile = PANEL * launch.constants["BLOCK_K"] * launch.constants["BITS"] // 8
    else:
        tile = launch.constants["BLOCK_N"] * launch.constants["BLOCK_K"] * launch.arguments["w_ptr"].itemsize
    needed = launch.stages * tile * (1 + launch.constants["GATED"])
    wide = WIDE * 32 * launch.warps * sum(size >= WIDE for size in copies)
    return WIDE if wide >= needed else min(copies, default=0)


def width(instruction: str) -> int:
    """Bytes that a PTX load or store moves for a thread: ``ld.global.v4.b32`` 16."""
    vector = re.search(r"\.v(\d)", instruction)
    bits = re.search(r"\.[bfsu](8|16|32|64|128)\b", instruction)
    return (int(vector[1]) if vector else 1) * (int(bits[1]) if bits else 0) // 8


def programs_per_multiprocessor(chip: Chip, registers: int, warps: int, shared_bytes: int) -> int:
    """How many programs of a kernel a multiprocessor holds at once."""
    by_registers = chip.registers // (-(-registers // 8) * 8 * 32 * warps)
    by_shared = chip.shared_bytes // (shared_bytes + 1024)  # the system keeps a KiB for each
    return min(by_registers, by_shared, chip.threads // (32 * warps), chip.programs)


def _disassembled(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code, as NVIDIA's cuobjdump prints them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        outputs = (
            subprocess.run([str(tool), option, str(file)], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
        resources, sass = outputs
    return resources, sass
