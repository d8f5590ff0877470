"""Where a record was measured: commit, versions, processor, device, clocks, threads, bandwidth."""

import functools
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from fastllama.cli.console import installed_version
from fastllama.measure import BandwidthProbe

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy")
VARIABLES = ("OMP_", "MKL_", "KMP_", "GOMP_", "TORCH", "PYTORCH_", "CUDA_", "TRITON_", "LD_PRELOAD")
INSTRUCTION_SETS = "amx_tile amx_bf16 amx_int8 avx512f avx512_bf16 avx512_vnni avx_vnni avx2 fma sve bf16 i8mm"
PLACES = ("_DIR", "_PATH", "_HOME")  # where caches lie is irrelevant
ROOT = Path(__file__).resolve().parent.parent


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Everything about machine and software that figures may depend on, as plain values."""
    device = torch.device(device)
    frequency = psutil.cpu_freq()
    return {
        **commit(),
        "python": platform.python_version(),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "system": platform.platform(),
        **processor(),
        "cpu_mhz": frequency.current if frequency else None,
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "threads": torch.get_num_threads(),
        "device": str(device),
        "gpu": _gpu(device) if device.type == "cuda" else None,
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(VARIABLES) and not name.endswith(PLACES)
        },
        "argv": [Path(word).name if Path(word).is_absolute() or word is sys.argv[0] else word for word in sys.argv],
    }


@functools.cache
def processor() -> dict[str, Any]:
    """The processor's brand, and which of the instruction sets that matter to a decode it has."""
    from cpuinfo import get_cpu_info  # asks the system through processes of its own: 0.2 s

    found = get_cpu_info()
    brand = found.get("brand_raw") or platform.processor() or platform.machine()
    names = {"avx512bf16": "avx512_bf16", "avx512vnni": "avx512_vnni"}  # as cpuid has them
    flags = {names.get(flag, flag) for flag in found.get("flags", ())}
    return {"cpu": brand, "cpu_instruction_sets": [name for name in INSTRUCTION_SETS.split() if name in flags]}


STEADY = 1.15  # largest over smallest reading of the bandwidth in a run that was not disturbed


def bandwidth(probe: BandwidthProbe) -> dict[str, Any]:
    """The fields of every record that say how fast the memory was during the run, and whether it was steady."""
    best, readings = probe.best, [reading / 1e9 for reading in probe.readings]
    low, high = min(readings), max(readings)
    unsteady = f"the memory bandwidth was between {low:.1f} and {high:.1f} GB/s within the run"
    return {
        "memory_bandwidth_gb_s": best.bytes_per_second / 1e9,
        "memory_bandwidth_method": best.method,
        "memory_bandwidth_readings_gb_s": readings,
        "disturbed": [unsteady] * (high > STEADY * low),
    }


def commit(root: Path = ROOT) -> dict[str, Any]:
    """The revision of a checkout and whether it has changes; None for both where it is none."""
    revision = _output(["git", "-C", str(root), "rev-parse", "HEAD"])
    if revision is None:
        return {"commit": os.environ.get("FASTLLAMA_COMMIT"), "dirty": None}
    # New records are no change of what is measured.
    changes = _output(["git", "-C", str(root), "status", "--porcelain", "--", ".", ":!benchmarks/records"])
    return {"commit": revision, "dirty": bool(changes)}


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")
    gpu = f"GPU-{properties.uuid}"  # torch's index is another one than nvidia-smi's under CUDA_VISIBLE_DEVICES
    printed = _output(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", gpu])
    values = [value.strip() for value in printed.split(",")] if printed else [None] * len(fields)
    return {
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        **dict(zip(fields, values, strict=False)),
    }


def _output(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
