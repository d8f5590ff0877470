"""``fastllama info``: what would run, without loading weights."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastllama.cli import options
from fastllama.cli.console import errors_in_one_line, progress, stdout, versions, write_json

if TYPE_CHECKING:
    import torch

    from fastllama.config import LlamaConfig

# Fields of the config that are shown, and the label of every key of the JSON record that the table shows otherwise.
SHAPE_FIELDS = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden size",
    "intermediate_size": "FFN size",
    "num_attention_heads": "query heads",
    "num_key_value_heads": "key/value heads",
    "head_dim": "head dimension",
    "vocab_size": "vocabulary",
    "max_position_embeddings": "maximum context",
    "tie_word_embeddings": "tied embeddings",
}
LABELS = SHAPE_FIELDS | {
    "generate": "generate() by its settings",
    "weight_bytes": "weights",
    "weight_bytes_per_step": "weights read per token",
    "kv_cache_bytes": "KV cache, full context",
    "memory_bandwidth_gb_s": "memory bandwidth, GB/s",
    "memory_bandwidth_method": "bandwidth measured by",
    "kernels_per_step": "kernel launches per token",
    "floor_ms_empty_cache": "bandwidth bound per token, empty cache, ms",
    "floor_ms_full_cache": "bandwidth bound per token, full cache, ms",
    "torch_threads": "torch threads",
    "vector_instructions": "vector instructions of torch",
    "kernel_instructions": "vector instructions of the C++ kernels",
    "free_memory_bytes": "free memory",
    "free_gpu_memory_bytes": "free GPU memory",
}
SECTIONS = {"ops": "kernels"}


def info(
    model: options.Model = "demo",
    dtype: options.Dtype = None,
    device: options.Device = None,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Context length to assume, in tokens.", show_default="the model's maximum"),
    ] = None,
    json_file: options.JsonFile = None,
    strict: options.Strict = False,
    debug: options.Debug = False,
) -> None:
    """Show what would run without loading weights: device, sizes, bandwidth bound, kernels and why.

    Measures the memory bandwidth, which takes about a second.
    """
    with errors_in_one_line(debug):
        facts = gather(model, dtype, options.pick_device(device), context, json_file == "-", strict)
        if json_file != "-":
            show(facts)
        if json_file:
            write_json(facts, json_file)


def gather(
    model: str, dtype: str | None, device: str, context: int | None, quiet: bool = False, strict: bool = False
) -> dict[str, Any]:
    """Everything that ``info`` reports, in sections of plain values."""
    import torch

    from fastllama import ops
    from fastllama.config.settings import said
    from fastllama.generation.request import outside_the_step
    from fastllama.loading.names import resolve

    source = resolve(model, strict)
    config = source.config.replace(dtype=source.dtype(dtype))
    where = torch.device(device)
    kernels = (config.torch_dtype, config.head_dim, 1, 1, config.quantization is not None)
    with progress(quiet) as say:
        say("measuring memory bandwidth")
        decoding = _decoding(config, where, context or config.max_position_embeddings)
    outside = outside_the_step(source.generation_config, {}, where.type)
    way = f"transformers' loop, for {said(outside)}" if outside else "the compiled step"
    return {
        "model": {"name": model} | {field: getattr(config, field) for field in SHAPE_FIELDS} | {"generate": way},
        "decoding": decoding,
        "ops": [choice._asdict() for choice in ops.report(where, *kernels)],
        "machine": _machine(where),
        "versions": versions(),
    }


def _machine(device: torch.device) -> dict[str, Any]:
    import torch

    from fastllama import ops
    from fastllama.model.cache import free_memory

    machine = {
        "device": str(device),
        "processor": platform.machine(),
        "system": platform.system(),
        "torch_threads": torch.get_num_threads(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "free_memory_bytes": free_memory(),
    }
    if device.type == "cpu":
        machine["kernel_instructions"] = ops.cpu_level() or "none"
    if device.type == "cuda":
        machine |= {
            "gpu": torch.cuda.get_device_name(device),
            "free_gpu_memory_bytes": torch.cuda.mem_get_info(device)[0],
            "cuda": torch.version.cuda,
        }
    return machine


def _decoding(config: LlamaConfig, device: torch.device, context: int) -> dict[str, Any]:
    """Sizes, and the bandwidth bound of the time per token."""
    from fastllama import LlamaForCausalLM, ops
    from fastllama.loading.load import on_meta
    from fastllama.measure import kv_cache_bytes, memory_bandwidth, parameter_count, weight_bytes_per_step

    skeleton = on_meta(LlamaForCausalLM, config)
    weights = weight_bytes_per_step(skeleton)
    cache = kv_cache_bytes(config, context, itemsize=config.torch_dtype.itemsize)
    bandwidth = memory_bandwidth(device)
    return {
        "dtype": config.dtype,
        "parameters": parameter_count(skeleton),
        "weight_bytes": sum(tensor.nbytes for tensor in (*skeleton.parameters(), *skeleton.buffers())),
        "weight_bytes_per_step": weights,
        "context": context,
        "kv_cache_bytes": cache,
        "memory_bandwidth_gb_s": bandwidth.bytes_per_second / 1e9,
        "memory_bandwidth_method": bandwidth.method,
        "kernels_per_step": ops.kernels_per_step(device, config.torch_dtype, config.num_hidden_layers, config.head_dim),
        "floor_ms_empty_cache": 1e3 * weights / bandwidth.bytes_per_second,
        "floor_ms_full_cache": 1e3 * (weights + cache) / bandwidth.bytes_per_second,
    }


def show(facts: Mapping[str, Any]) -> None:
    """Print the facts, a block for each section, under labels for people."""
    from rich.table import Table

    console = stdout()
    for section, content in facts.items():
        console.print(SECTIONS.get(section, section), style="bold")
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        for row in [choice.values() for choice in content] if section == "ops" else content.items():
            name, *values = row
            table.add_row("", LABELS.get(name, name), *(readable(name, value) for value in values))
        console.print(table)


def readable(name: str, value: object) -> str:
    """A value as text: bytes in a unit that fits, integers in groups of three digits, yes or no, floats rounded."""
    from rich.filesize import decimal

    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return decimal(value, separator=" ") if "bytes" in name else f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return str(value)
