"""Where a record was measured: commit, versions, device, clocks, threads."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy")
VARIABLES = ("OMP_", "MKL_", "KMP_", "GOMP_", "TORCH", "PYTORCH_", "CUDA_", "TRITON_", "LD_PRELOAD")
ROOT = Path(__file__).resolve().parent.parent


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Everything about machine and software that figures may depend on, as plain values."""
    device = torch.device(device)
    return {
        **commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_mhz": _cpu_mhz(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "gpu": _gpu(device) if device.type == "cuda" else None,
        "variables": {name: os.environ[name] for name in sorted(os.environ) if _matters(name)},
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def commit(root: Path = ROOT) -> dict[str, Any]:
    """The revision of a checkout and whether it has changes; None for both where it is none."""
    revision = _output(["git", "-C", str(root), "rev-parse", "HEAD"])
    if revision is None:
        return {"commit": os.environ.get("FASTLLAMA_COMMIT"), "dirty": None}
    # New records are no change of what is measured.
    changes = _output(["git", "-C", str(root), "status", "--porcelain", "--", ".", ":!benchmarks/records"])
    return {"commit": revision, "dirty": bool(changes)}


def _matters(variable: str) -> bool:
    """Whether figures may depend on a variable; where caches lie is nobody's business."""
    return variable.startswith(VARIABLES) and not variable.endswith(("_DIR", "_PATH", "_HOME"))


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")
    gpu = f"GPU-{properties.uuid}"  # torch's index is another one than nvidia-smi's under CUDA_VISIBLE_DEVICES
    told = _output(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", gpu])
    values = [value.strip() for value in told.split(",")] if told else [None] * len(fields)
    return {
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        **dict(zip(fields, values, strict=False)),
    }


def _cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpu_mhz() -> float | None:
    told = _cpuinfo("cpu MHz")
    return float(told) if told else None


def _cpuinfo(field: str) -> str | None:
    try:
        with open("/proc/cpuinfo") as lines:
            return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), None)
    except OSError:
        return None


def _output(command: Sequence[str]) -> str | None:
    """What a command prints; None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
