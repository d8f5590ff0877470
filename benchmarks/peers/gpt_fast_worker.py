"""The process in which gpt-fast runs: its modules are called ``model`` and ``generate``, and it configures torch.

What is timed is gpt-fast's code: its ``Transformer``, its ``prefill``, and its ``decode_n_tokens`` around the
``decode_one_token`` that its ``main`` compiles; so arguments that differ between its versions are its own affair. Here
is what ``main`` would take from files: the network's constants and its weights.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open

from fastllama import LlamaConfig
from fastllama.loading.gguf import interleaved

from ..harness import CUDA_CHUNK, Marks, Run, Unavailable, Workload
from ..remote import serve

FILES = ("model.py", "generate.py")
GREEDY = {"temperature": 1.0, "top_k": 1}  # ties are drawn by lot


@dataclasses.dataclass(frozen=True)
class Task:
    """What a worker is started for.

    Attributes:
        folder: the checkout of gpt-fast.
        weights: folder of a checkpoint in the Hugging Face layout.
        device: as torch names it.
        threads: of torch.
        batch: rows of each workload.
        slots: of the KV cache; gpt-fast attends over all of them.
    """

    folder: str
    weights: str
    device: str
    threads: int
    batch: int
    slots: int


def main() -> None:
    """Serve workloads; the task is the only argument, as JSON."""
    task = Task(**json.loads(sys.argv[1]))
    try:
        serve(partial(open_gpt_fast, task))
    except Unavailable as error:
        sys.exit(str(error))


def open_gpt_fast(task: Task) -> tuple[dict[str, Any], Callable[[Workload], Run]]:
    """Load gpt-fast and the weights, allocate the caches, have the step compiled at its first use."""
    torch.set_num_threads(task.threads)
    if task.device.startswith("cuda"):
        torch.cuda.set_device(task.device)
    gpt_fast = import_generate(task.folder)
    if task.batch > 1 and "batch_size" not in inspect.signature(gpt_fast.generate).parameters:
        raise Unavailable(f"this version of gpt-fast decodes one sequence at a time, not {task.batch}")
    model = load(importlib.import_module("model"), task)
    with torch.device(task.device):
        model.setup_caches(max_batch_size=task.batch, max_seq_length=task.slots)
    vars(gpt_fast)["decode_one_token"] = torch.compile(
        gpt_fast.decode_one_token, mode="reduce-overhead", fullgraph=True
    )
    info = {"commit": _commit(task.folder), "torch": torch.__version__, "threads": torch.get_num_threads()}
    return info, partial(decode, gpt_fast, model, task)


def import_generate(folder: str) -> ModuleType:
    """gpt-fast's ``generate``, without the libraries that its tokenizer wants: only token ids pass here."""
    sys.path.insert(0, folder)
    tokenizer = ModuleType("tokenizer")
    vars(tokenizer)["get_tokenizer"] = None
    sys.modules["tokenizer"] = tokenizer
    return importlib.import_module("generate")


def load(gpt_fast_model: ModuleType, task: Task) -> Any:
    """gpt-fast's network on the device, with a copy of the task's weights: a CPU reads mapped ones more slowly."""
    config = LlamaConfig.from_pretrained(task.weights)
    with torch.device("meta"):
        model = gpt_fast_model.Transformer(model_args(gpt_fast_model.ModelArgs, config, task.slots))
    model.to(getattr(torch, config.dtype)).to_empty(device=task.device)
    model.load_state_dict(convert(_stored(Path(task.weights)), config))
    return model.eval()


def model_args(args_class: Any, config: LlamaConfig, slots: int) -> Any:
    """gpt-fast's ``ModelArgs`` of a config; ``block_size`` bounds the positions."""
    args = {
        "block_size": max(config.max_position_embeddings, slots),
        "vocab_size": config.vocab_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "dim": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "n_local_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rope_base": config.rope.rope_theta,
        "norm_eps": config.rms_norm_eps,
    }
    if config.rope.rope_type == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        args["rope_scaling"] = {name: getattr(config.rope, name) for name in names}
    known = {field.name for field in dataclasses.fields(args_class)}
    if unknown := sorted(set(args) - known):
        raise Unavailable(f"this version of gpt-fast has no {', '.join(unknown)}")
    return args_class(**args)


def convert(weights: Mapping[str, torch.Tensor], config: LlamaConfig) -> dict[str, torch.Tensor]:
    """Hugging Face's tensors under gpt-fast's names: q, k and v in one matrix, for a rotary that turns neighbours."""
    embedding = weights["model.embed_tokens.weight"]
    converted = {
        "tok_embeddings.weight": embedding,
        "norm.weight": weights["model.norm.weight"],
        "output.weight": weights.get("lm_head.weight", embedding),
    }
    names = {
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}", f"layers.{layer}"
        for name, hf_name in names.items():
            converted[f"{theirs}.{name}.weight"] = weights[f"{ours}.{hf_name}.weight"]
        q, k, v = (weights[f"{ours}.self_attn.{name}_proj.weight"] for name in "qkv")
        q, k = interleaved(q, config.num_attention_heads), interleaved(k, config.num_key_value_heads)
        converted[f"{theirs}.attention.wqkv.weight"] = torch.cat([q, k, v])
    return converted


@torch.no_grad()
def decode(gpt_fast: Any, model: Any, task: Task, workload: Workload) -> Run:
    """Decode once, timing each step on the host; on CUDA, groups of steps by events."""
    if workload.batch != task.batch or workload.prompt_len + workload.new_tokens > task.slots:
        raise Unavailable(f"opened for {task.batch} rows and {task.slots} slots, got another workload")
    device = torch.device(task.device)
    ids_bt = workload.input_ids(device).int()
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    first_b1 = gpt_fast.prefill(model, ids_bt, torch.arange(workload.prompt_len, device=device), **GREEDY).clone()
    synchronize()
    ttft = time.perf_counter() - start
    first_b1 = first_b1.view(task.batch, 1)
    position = torch.tensor([workload.prompt_len], dtype=torch.int, device=device)
    clock = StepClock(device)
    rest, _ = gpt_fast.decode_n_tokens(model, first_b1, position, workload.new_tokens - 1, callback=clock, **GREEDY)
    tokens_bn = torch.cat([first_b1, *(token.view(task.batch, 1) for token in rest)], dim=1)
    return Run(tuple(map(tuple, tokens_bn.tolist())), ttft, clock.seconds_per_step())


class StepClock:
    """gpt-fast's callback after each decode step: marks the steps' ends, on CUDA of every ``CUDA_CHUNK``-th."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._marks = Marks(device)
        self._steps = 0
        if not self._is_cuda:
            self._marks.mark()

    def __call__(self, token: torch.Tensor) -> None:
        if not self._is_cuda or self._steps % CUDA_CHUNK == 0:
            self._marks.mark()
        self._steps += 1

    def seconds_per_step(self) -> tuple[float, ...]:
        """Of each step, on CUDA of each full group of steps after the first step."""
        gaps = self._marks.gaps()
        if self._steps and not gaps:
            raise Unavailable(f"on CUDA at least {CUDA_CHUNK + 2} new tokens are needed")
        return tuple(gap / (CUDA_CHUNK if self._is_cuda else 1) for gap in gaps)


def _stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, mapped."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            tensors |= {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118  # not a dict
    return tensors


def _commit(folder: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:  # no git
        return None
    return done.stdout.strip() or None


if __name__ == "__main__":
    main()
