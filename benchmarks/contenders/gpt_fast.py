"""gpt-fast from a checkout that the user names, on the same weights, in a process of its own.

What is timed is gpt-fast's code: its ``Transformer``, its ``prefill``, and its ``decode_n_tokens`` around the
``decode_one_token`` that its ``main`` compiles. What ``main`` would take from files, :func:`prepare` writes in
gpt-fast's layout, as its users do once. gpt-fast of after 32971d3 (September 2024) does not compile for float32 on a
CPU.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from ..workload import Contender, Decode, Task, Unavailable, Workload, timed_by_difference
from . import GPT_FAST

if TYPE_CHECKING:
    from fastllama import LlamaConfig

FILES = ("model.py", "generate.py")
DTYPES, ROPES = ("float32", "float16", "bfloat16"), ("default", "llama3")
GREEDY = {"temperature": 1.0, "top_k": 1}  # ties are broken at random
ARGUMENTS, WEIGHTS = "arguments.json", "model.safetensors"
ARGUMENTS_OF = {
    "block_size": "max_position_embeddings", "vocab_size": "vocab_size", "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_local_heads": "num_key_value_heads", "head_dim": "head_dim",
    "dim": "hidden_size", "intermediate_size": "intermediate_size", "norm_eps": "rms_norm_eps",
}  # fmt: skip
NAMES = {
    "attention.wo": "self_attn.o_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj", "feed_forward.w2": "mlp.down_proj",
}  # fmt: skip


def prepare(task: Task) -> Task:
    """Write the weights as gpt-fast stores them; the task that is returned names their folder."""
    if task.gpt_fast is None:
        raise Unavailable("give a checkout of gpt-fast with --gpt-fast DIR")
    folder = Path(task.gpt_fast).resolve()
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise Unavailable(f"{folder} is no checkout of gpt-fast: it has no {' and no '.join(missing)}")
    model = task.weights()
    check_expressible(model.config, task.dtype)
    weights = Path(task.workspace).resolve() / GPT_FAST
    weights.mkdir(exist_ok=True)
    (weights / ARGUMENTS).write_text(json.dumps(model_arguments(model.config)))
    save_file(converted(dict(model.state_dict()), model.config), weights / WEIGHTS)
    threads = task.threads or torch.get_num_threads()
    return dataclasses.replace(task, model=str(weights), gpt_fast=str(folder), threads=threads, lent=None)


def check_expressible(config: LlamaConfig, dtype: str) -> None:
    """Raise :class:`Unavailable` if no version of gpt-fast can compute this network."""
    heads, d, size = config.num_attention_heads, config.head_dim, config.hidden_size
    faults = {
        f"gpt-fast has no {dtype}": dtype not in DTYPES,
        f"gpt-fast needs hidden_size = heads x head_dim, got {size} and {heads} x {d}": heads * d != size,
        f"gpt-fast has hidden_act silu, not {config.hidden_act}": config.hidden_act not in ("silu", "swish"),
        "gpt-fast has no biases": config.attention_bias or config.mlp_bias,
        f"gpt-fast has rope_type default and llama3, not {config.rope.rope_type}": config.rope.rope_type not in ROPES,
    }
    if found := [text for text, is_fault in faults.items() if is_fault]:
        raise Unavailable(found[0])


def model_arguments(config: LlamaConfig) -> dict[str, Any]:
    """gpt-fast's ``ModelArgs`` of a config; ``block_size`` bounds the positions."""
    arguments = {name: getattr(config, ours) for name, ours in ARGUMENTS_OF.items()}
    if config.rope.rope_type == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        arguments["rope_scaling"] = {name: getattr(config.rope, name) for name in names}
    return arguments | {"rope_base": config.rope.rope_theta}


def converted(weights: Mapping[str, torch.Tensor], config: LlamaConfig) -> dict[str, torch.Tensor]:
    """Hugging Face's tensors under gpt-fast's names: q, k and v in one matrix, for a rotary that turns neighbours."""
    from fastllama.loading.gguf_writer import interleaved

    embedding = weights["model.embed_tokens.weight"]
    found = {
        "tok_embeddings.weight": embedding,
        "norm.weight": weights["model.norm.weight"],
        "output.weight": weights.get("lm_head.weight", embedding).clone(),  # safetensors stores no tensor twice
    }
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}", f"layers.{layer}"
        for name, hf_name in NAMES.items():
            found[f"{theirs}.{name}.weight"] = weights[f"{ours}.{hf_name}.weight"]
        q, k, v = (weights[f"{ours}.self_attn.{name}_proj.weight"] for name in "qkv")
        q, k = interleaved(q, config.num_attention_heads), interleaved(k, config.num_key_value_heads)
        found[f"{theirs}.attention.wqkv.weight"] = torch.cat([q, k, v])
    return {name: tensor.contiguous() for name, tensor in found.items()}


class GptFast(Contender):
    """gpt-fast's own network, loop and compiled step; it decodes only what fits the task's batch and slots."""

    name = GPT_FAST

    def load(self, task: Task) -> None:
        """Import gpt-fast, load the weights, allocate the caches, have the step compiled at its first use."""
        assert task.gpt_fast is not None
        if task.device.startswith("cuda"):
            torch.cuda.set_device(task.device)
        self._task = task
        self._gpt_fast = import_generate(task.gpt_fast)
        if task.batch > 1 and "batch_size" not in inspect.signature(self._gpt_fast.generate).parameters:
            raise Unavailable(f"this version of gpt-fast decodes one sequence at a time, not {task.batch}")
        self._model = load_model(importlib.import_module("model"), task)
        with torch.device(task.device):
            self._model.setup_caches(max_batch_size=task.batch, max_seq_length=task.slots)
        step = torch.compile(self._gpt_fast.decode_one_token, mode="reduce-overhead", fullgraph=True)
        vars(self._gpt_fast)["decode_one_token"] = step
        git = subprocess.run(["git", "-C", task.gpt_fast, "rev-parse", "HEAD"], capture_output=True, text=True)
        self.info = {"commit": git.stdout.strip() or None}

    @torch.no_grad()
    def run(self, workload: Workload) -> Decode:
        task = self._task
        if workload.batch != task.batch or workload.prompt_len + workload.new_tokens > task.slots:
            raise Unavailable(f"opened for {task.batch} rows and {task.slots} slots, got another workload")
        if task.device.startswith("cuda"):
            return timed_by_difference(lambda n: self._decode(workload, n, [])[0], workload.new_tokens)
        return Decode.from_marks(*self._decode(workload, workload.new_tokens, [time.perf_counter()]))

    def _decode(self, workload: Workload, new_tokens: int, marks: list[float]) -> tuple[torch.Tensor, list[float]]:
        def mark(_: Any) -> None:
            marks.append(time.perf_counter())

        batch, device = workload.batch, self._task.device
        ids_bt = workload.input_ids(device).int()
        positions_t = torch.arange(workload.prompt_len, device=device)
        first_b1 = self._gpt_fast.prefill(self._model, ids_bt, positions_t, **GREEDY).clone().view(batch, 1)
        mark(first_b1)
        position = torch.tensor([workload.prompt_len], dtype=torch.int, device=device)
        decode, steps = self._gpt_fast.decode_n_tokens, new_tokens - 1
        rest, _ = decode(self._model, first_b1, position, steps, callback=mark, **GREEDY)
        return torch.cat([first_b1, *(token.view(batch, 1) for token in rest)], dim=1), marks


def import_generate(folder: str) -> ModuleType:
    """gpt-fast's ``generate``, without the libraries that its tokenizer wants: only token ids pass here."""
    sys.path.insert(0, folder)
    tokenizer = ModuleType("tokenizer")
    vars(tokenizer)["get_tokenizer"] = None
    sys.modules["tokenizer"] = tokenizer
    return importlib.import_module("generate")


def load_model(gpt_fast_model: ModuleType, task: Task) -> Any:
    """gpt-fast's network on the device, with a copy of the weights: a CPU reads mapped ones more slowly."""
    arguments = json.loads((Path(task.model) / ARGUMENTS).read_text())
    arguments["block_size"] = max(arguments["block_size"], task.slots)
    known = {field.name for field in dataclasses.fields(gpt_fast_model.ModelArgs)}
    if unknown := sorted(set(arguments) - known):
        raise Unavailable(f"this version of gpt-fast has no {', '.join(unknown)}")
    with torch.device("meta"):
        model = gpt_fast_model.Transformer(gpt_fast_model.ModelArgs(**arguments))
    model.to(getattr(torch, task.dtype)).to_empty(device=task.device)
    model.load_state_dict(load_file(Path(task.model) / WEIGHTS))
    return model.eval()
