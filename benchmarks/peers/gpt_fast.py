"""gpt-fast on the same weights, in a process of its own, from a checkout that the user names."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from fastllama import LlamaConfig, LlamaForCausalLM
from fastllama.loading.save import save_model

from ..harness import Unavailable, Workload
from ..remote import Remote, worker_environment
from .gpt_fast_worker import FILES, Task

NAME = "gpt-fast"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def open_gpt_fast(
    model: LlamaForCausalLM, folder: str | os.PathLike[str], workload: Workload, workspace: Path
) -> Remote:
    """Start a worker that decodes with gpt-fast's own network, loop and compiled step.

    The weights are handed over in files of about their size. gpt-fast of after 32971d3 (September 2024) attends
    through flex attention, which torch 2.13 does not compile for float32 on a CPU: there an older version is wanted.

    Args:
        model: lends weights, dtype and device.
        folder: the checkout of gpt-fast.
        workload: gives the batch and the slots of the KV cache; the worker takes none that needs others.
        workspace: folder for the weights.

    Raises:
        Unavailable: the folder holds no gpt-fast, or gpt-fast cannot compute this network. What only the worker can
            find out is raised by the first run.
    """
    folder = Path(folder).resolve()
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise Unavailable(f"{folder} is no checkout of gpt-fast: it has no {' and no '.join(missing)}")
    check_expressible(model.config, model.dtype)
    weights = workspace.resolve() / "gpt-fast"
    save_model(model, weights)
    slots = max(workload.capacity or 0, workload.prompt_len + workload.new_tokens)
    task = Task(str(folder), str(weights), str(model.device), torch.get_num_threads(), workload.batch, slots)
    return Remote(
        NAME,
        [sys.executable, "-m", f"{__package__}.gpt_fast_worker", json.dumps(asdict(task))],
        env=worker_environment(package_root()),
        cwd=weights,  # Python looks for modules there first, and it holds none
    )


def check_expressible(config: LlamaConfig, dtype: torch.dtype) -> None:
    """Raise :class:`Unavailable` if no version of gpt-fast can compute this network."""
    if dtype not in DTYPES:
        raise Unavailable(f"gpt-fast has no {str(dtype).removeprefix('torch.')}")
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        heads, size = config.num_attention_heads, config.hidden_size
        raise Unavailable(f"gpt-fast needs hidden_size = heads x head_dim, got {size} and {heads} x {config.head_dim}")
    if config.hidden_act not in ("silu", "swish"):
        raise Unavailable(f"gpt-fast has hidden_act silu, not {config.hidden_act}")
    if config.attention_bias or config.mlp_bias:
        raise Unavailable("gpt-fast has no biases")
    if config.rope.rope_type not in ("default", "llama3"):
        raise Unavailable(f"gpt-fast has rope_type default and llama3, not {config.rope.rope_type}")


def package_root() -> Path:
    """The folder from which this package is imported in a checkout."""
    assert __package__ is not None
    return Path(__file__).resolve().parents[len(__package__.split("."))]
