"""The steps of the GPU suite, each run in a process of its own: measures, and appends every record as it comes.

What a person should read in the end goes to stdout as a line that starts with ``note:``; everything else is the log.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastllama import LlamaConfig, LlamaForCausalLM
from fastllama.measure import BandwidthProbe

from ..compare import compare
from ..costs import reset_peak_memory
from ..environment import environment
from ..harness import Workload, reason
from ..kernels.measure import measure_kernels
from ..kernels.ops import Shapes
from ..ours import Engine
from ..peers import STATIC, Places, open_peers
from ..records import append, new_record
from .launches import Launches, host_seconds_per_step, profile_launches
from .plan import FULL, KERNELS, MACHINE, TINY, TINY_MODEL, Point, Scale, points

NOTE = "note: "
BANDWIDTH_PASSES = 30
NOT_LOOKED_INTO: dict[str, Any] = {
    "host_us_per_step": None,
    "kernels_per_step": None,
    "copies_per_step": None,
    "kernel_us_per_step": None,
    "top_kernels": [],
}
TINY_CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.3,
    dtype="bfloat16",
)


@dataclass
class Task:
    """What a step is to do.

    Attributes:
        step: its name.
        device: ``cuda`` or ``cpu``.
        is_tiny: tiny shapes.
        workspace: a folder that all steps share and that goes afterwards.
        records: file to append to.
        profile: file of the profiler's summaries, appended to.
        gpt_fast: a checkout of gpt-fast.
        is_rehearsal: only compile what the step will need, and measure nothing.
        failures: how many parts of the step have failed so far.
    """

    step: str
    device: torch.device
    is_tiny: bool
    workspace: Path
    records: Path
    profile: Path
    gpt_fast: Path | None = None
    is_rehearsal: bool = False
    failures: int = field(default=0, init=False)

    @property
    def scale(self) -> Scale:
        """The sizes."""
        return TINY if self.is_tiny else FULL

    def name_of(self, model: str) -> str:
        """What ``from_pretrained`` takes for a model of the scale."""
        return str(tiny_folder(self.workspace)) if model == TINY_MODEL else model


def run(task: Task) -> int:
    """Run a step; the exit status, 0 where all of it succeeded."""
    if task.step == MACHINE:
        look_at_machine(task)
    elif task.step == KERNELS:
        measure_operations(task)
    else:
        decode(task)
    return int(task.failures > 0)


def note(line: str) -> None:
    """Tell the suite's reader."""
    log(NOTE + line)


def log(line: str) -> None:
    """Tell the log, at once: a process that is killed has nothing left to flush."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def tiny_folder(workspace: Path) -> Path:
    """Where the tiny model lies, for all steps alike."""
    return workspace / TINY_MODEL


def write_tiny_model(workspace: Path) -> None:
    """A checkpoint of random weights that every step loads."""
    torch.manual_seed(0)
    LlamaForCausalLM(TINY_CONFIG).bfloat16().save_pretrained(tiny_folder(workspace))


@contextmanager
def told_in_one_line(task: Task, what: object) -> Iterator[None]:
    """What goes wrong inside is a note; the rest of the step goes on, unless the device is lost."""
    try:
        yield
    except Exception as error:
        task.failures += 1
        log(traceback.format_exc())
        note(f"{what}: {reason(error)}")
        if is_device_lost(error):
            raise SystemExit(1) from None


def is_device_lost(error: BaseException) -> bool:
    """Whether this error leaves CUDA unusable in this process: all but running out of memory do."""
    is_memory = isinstance(error, torch.OutOfMemoryError)
    return not is_memory and ("CUDA error" in str(error) or isinstance(error, torch.AcceleratorError))


# ---- the steps -------------------------------------------------------------------------------------------------------


def look_at_machine(task: Task) -> None:
    """The environment, to the log, and the bandwidth of the memory."""
    found = environment(task.device)
    log(json.dumps(found, indent=2))
    probe = BandwidthProbe(task.device)
    probe.sample(BANDWIDTH_PASSES)
    note(f"bandwidth {probe.best.bytes_per_second / 1e9:.0f} GB/s: {probe.best.method}, best of {BANDWIDTH_PASSES}")


def measure_operations(task: Task) -> None:
    """A kernel table of each shape, batch 1, at the short context, and of attention at the longest."""
    scale = task.scale
    everything = [(shape, model, scale.short, None) for shape, model in scale.models]
    (longest_shape, longest_model) = scale.models[-1]
    attention = (longest_shape, longest_model, scale.longest, ("attention",))  # whose cache no GPU's cache holds
    for shape, model, prompt_len, only in (*everything, attention):
        with told_in_one_line(task, f"kernels of {shape} at {prompt_len} tokens"):
            live, slots = prompt_len + scale.new_tokens // 2, scale.slots(prompt_len)
            shapes = Shapes.of(task.name_of(model), scale.dtype, task.device, live=live, capacity=slots)
            report = measure_kernels(shapes, scale.kernel_rounds, log, only)
            if task.is_rehearsal:
                continue
            if not report.parity:
                task.failures += 1
                note(f"kernels of {shape} not recorded: outputs are wrong; see the log")
                log(json.dumps(report.to_dict()))
                continue
            keep(task, "kernels", model, shapes.config, report.to_dict() | {"shape": shape, "quantize": None})


def decode(task: Task) -> None:
    """The step's decodes; one model at a time, one engine for those that share batch and capacity."""
    names = dict(task.scale.models)
    loaded: tuple[str, str | None] | None = None
    engine: tuple[int, int] | None = None
    model: Any = None
    absent: set[str] = set()
    for point in points(task.step, task.scale):
        if point.quantize in absent:
            continue
        with told_in_one_line(task, point):
            if loaded != (point.shape, point.quantize):
                model, loaded, engine = None, None, None
                clear(task.device)
                try:
                    model = load(task, names[point.shape], point.quantize)
                except NotImplementedError as error:
                    note(f"{point.quantize} is not there yet: {reason(error)}")
                    absent.add(str(point.quantize))
                    continue
                loaded = (point.shape, point.quantize)
            if engine != (point.batch, point.slots):
                model.release()
                clear(task.device)
                engine = (point.batch, point.slots)
            (rehearse if task.is_rehearsal else measure)(task, model, names[point.shape], point)


def load(task: Task, name: str, quantize: str | None) -> LlamaForCausalLM:
    """The model, its random weights made on the device."""
    log(f"loading {name}{f' in {quantize}' if quantize else ''}")
    return LlamaForCausalLM.from_pretrained(
        task.name_of(name), dtype=task.scale.dtype, device=task.device, quantize=quantize, progress=False
    )


def clear(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def rehearse(task: Task, model: LlamaForCausalLM, name: str, point: Point) -> None:
    """Compile what the point needs: prompts are short, for one chunk of a prefill is compiled like the others."""
    scale = task.scale
    workload = Workload.random(model.config.vocab_size, point.batch, scale.short, scale.new_tokens, point.slots)
    log(f"rehearsing {point}: fastllama")
    Engine(model).run(workload)
    if STATIC in point.peers:
        log(f"rehearsing {point}: {STATIC}")
        for peer in open_peers((STATIC,), model, workload, Places(), task.workspace)[0]:
            peer.run(workload)
            peer.close()


def measure(task: Task, model: LlamaForCausalLM, name: str, point: Point) -> None:
    """Compare, record, and look into the step."""
    workload = Workload.random(
        model.config.vocab_size, point.batch, point.prompt_len, task.scale.new_tokens, point.slots
    )
    reset_peak_memory(task.device)
    comparison = compare(
        model,
        workload,
        rounds=point.rounds,
        warmups=point.warmups,
        peers=point.peers,
        places=Places(gpt_fast=task.gpt_fast),
        say=lambda message: log(f"{point}: {message}"),
    )
    fields = {"shape": point.shape, "quantize": point.quantize} | comparison.to_dict()
    if not comparison.parity.passed:
        task.failures += 1
        note(f"{point} not recorded, parity FAILED: {comparison.parity.note}")
        return
    keep(task, "decode", name, model.config, fields)
    if point.prompt_len == task.scale.short:
        look_into(task, model, name, point, workload)


def look_into(task: Task, model: LlamaForCausalLM, name: str, point: Point, workload: Workload) -> None:
    """The host's time for a step, and what it launches. The comparison has checked the outputs."""
    sizes = {"batch": point.batch, "prompt_len": point.prompt_len, "capacity": point.slots}
    fields = {"shape": point.shape, "quantize": point.quantize, "parity": True} | sizes | NOT_LOOKED_INTO
    with told_in_one_line(task, f"{point}, host time"):
        log(f"{point}: host time")
        fields["host_us_per_step"] = 1e6 * host_seconds_per_step(model, workload)
    if point.is_profiled:
        with told_in_one_line(task, f"{point}, launches"):
            log(f"{point}: launches")
            launches = profile_launches(model, workload)
            fields |= launches.to_dict()
            with open(task.profile, "a", encoding="utf-8") as file:
                file.write(f"{point}\n{summary(launches)}\n\n")
    keep(task, "launches", name, model.config, fields)


def summary(launches: Launches) -> str:
    """The kernels that take longest, one a line."""
    rows = [f"{kernel.us:10.1f} {kernel.calls:8.3g}  {kernel.name[:150]}" for kernel in launches.top_kernels]
    total = (
        f"{launches.kernel_us_per_step:10.1f} {launches.kernels_per_step:8.4g}  all kernels "
        f"({launches.copies_per_step:.3g} copies and fills beside them)"
    )
    return "\n".join([f"{'us a step':>10} {'calls':>8}  kernel", *rows, total])


def keep(task: Task, kind: str, name: str, config: LlamaConfig, fields: dict[str, Any]) -> None:
    """Append a record."""
    described = {"model": name, "dtype": task.scale.dtype, "device": str(task.device), "config": config.to_dict()}
    append(new_record(kind, described | fields, environment(task.device)), task.records)
