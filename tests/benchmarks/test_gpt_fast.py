"""gpt-fast as a peer: our weights in its layout decode the same tokens, and what it cannot do is one line.

The checkout here is one that the test writes: a small network with gpt-fast's names, its fused q, k and v, and a rotary
embedding that turns neighbouring dimensions, written in complex numbers.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from contextlib import closing
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from fastllama import LlamaConfig, LlamaForCausalLM
from fastllama.config import RopeParameters
from fastllama_benchmarks.contenders import Task, gpt_fast
from fastllama_benchmarks.contenders.fastllama import Eager
from fastllama_benchmarks.contenders.remote import Remote
from fastllama_benchmarks.workload import Unavailable, Workload, reason

LLAMA3 = RopeParameters(
    "llama3", 10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)

MODEL = """
from dataclasses import dataclass
from math import pi

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class ModelArgs:
    block_size: int = 2048
    vocab_size: int = 32000
    n_layer: int = 32
    n_head: int = 32
    dim: int = 4096
    intermediate_size: int = None
    n_local_heads: int = -1
    head_dim: int = 64
    rope_base: float = 10000
    norm_eps: float = 1e-5
    rope_scaling: dict = None


def frequencies(args):
    for pair in range(args.head_dim // 2):
        frequency = args.rope_base ** (-2 * pair / args.head_dim)
        if args.rope_scaling:
            factor, low, high, old = (args.rope_scaling[name] for name in (
                "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))
            turns = old * frequency / (2 * pi)
            slow = min(max((high - turns) / (high - low), 0), 1)
            frequency = slow * frequency / factor + (1 - slow) * frequency
        yield frequency


class Norm(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(args.dim)), args.norm_eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.wqkv = nn.Linear(args.dim, (args.n_head + 2 * args.n_local_heads) * args.head_dim, bias=False)
        self.wo = nn.Linear(args.dim, args.dim, bias=False)

    def forward(self, x, turn, position, cache):
        args = self.args
        q, k, v = (part.unflatten(-1, (-1, args.head_dim)).transpose(1, 2) for part in self.wqkv(x).split(
            [args.dim, args.n_local_heads * args.head_dim, args.n_local_heads * args.head_dim], dim=-1))
        q, k = (torch.view_as_real(torch.view_as_complex(part.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)
                for part in (q, k))
        cache[0, :, :, position], cache[1, :, :, position] = k, v
        groups = args.n_head // args.n_local_heads
        k, v = (part.repeat_interleave(groups, dim=1) for part in cache)
        seen = torch.arange(k.shape[2]) <= position[:, None]
        return self.wo(F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.intermediate_size, bias=False)
        self.w3 = nn.Linear(args.dim, args.intermediate_size, bias=False)
        self.w2 = nn.Linear(args.intermediate_size, args.dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.attention, self.feed_forward = Attention(args), FeedForward(args)
        self.attention_norm, self.ffn_norm = Norm(args), Norm(args)

    def forward(self, x, *context):
        x = x + self.attention(self.attention_norm(x), *context)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(Block(args) for _ in range(args.n_layer))
        self.norm = Norm(args)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)

    def setup_caches(self, max_batch_size, max_seq_length):
        args = self.args
        shape = (args.n_layer, 2, max_batch_size, args.n_local_heads, max_seq_length, args.head_dim)
        self.caches = torch.zeros(shape, dtype=self.output.weight.dtype)
        angles = torch.outer(torch.arange(args.block_size), torch.tensor(list(frequencies(args))))
        self.turns = torch.polar(torch.ones_like(angles), angles)

    def forward(self, ids, position):
        x = self.tok_embeddings(ids)
        for layer, cache in zip(self.layers, self.caches):
            x = layer(x, self.turns[position], position, cache)
        return self.output(self.norm(x))
"""

GENERATE = """
import torch
from model import Transformer
from tokenizer import get_tokenizer

COMPILED = []
ALLOWED = {"temperature": 1.0, "top_k": 1}


def compile(function, **options):
    assert options == {"mode": "reduce-overhead", "fullgraph": True}, options
    COMPILED.append(function)
    return function


torch.compile = compile


def prefill(model, x, input_pos, **sampling):
    assert sampling == ALLOWED and not torch.is_grad_enabled() and not COMPILED[1:]
    print("what gpt-fast prints is no answer")
    return model(x, input_pos)[:, -1].argmax(-1, keepdim=True).int()


def decode_one_token(model, x, input_pos, **sampling):
    assert sampling == ALLOWED and COMPILED == [decode_one_token] and torch.get_num_threads() == THREADS
    logits = model(x, input_pos)[:, -1]
    return logits.argmax(-1, keepdim=True).int(), logits


def decode_n_tokens(model, cur_token, input_pos, num_new_tokens, callback=lambda _: _, **sampling):
    tokens = []
    for _ in range(num_new_tokens):
        cur_token, _ = decode_one_token(model, cur_token, input_pos, **sampling)
        input_pos += 1
        tokens.append(cur_token.clone())
        callback(tokens[-1])
    return tokens, []


def generate(model, prompt, max_new_tokens, batch_size):
    raise NotImplementedError
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with what is used of gpt-fast."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "model.py").write_text(MODEL)
    (folder / "generate.py").write_text(f"THREADS = {torch.get_num_threads()}\n{GENERATE}")
    (folder / "tokenizer.py").write_text("raise ImportError('a library that nobody needs here')")
    return folder


def random_llama(**overrides: Any) -> LlamaForCausalLM:
    """A tiny Llama of few heads whose weights and norms are random."""
    shape = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-3, "initializer_range": 0.3,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**(shape | overrides))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    return model


def load_module(file: Path) -> ModuleType:
    """The module, under no name that others could import it by."""
    spec = importlib.util.spec_from_file_location(f"checkout_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def task_of(model: LlamaForCausalLM, checkout: Path, workspace: Path, batch: int = 1, slots: int = 12) -> Task:
    """What gpt-fast decodes the model's weights with, written and ready."""
    dtype = str(model.dtype).removeprefix("torch.")
    asked = Task("", dtype, batch=batch, slots=slots, gpt_fast=str(checkout), workspace=str(workspace), lent=model)
    return gpt_fast.prepare(asked)


@pytest.mark.parametrize(
    "overrides",
    [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4}, {"rope": LLAMA3, "num_hidden_layers": 3}],
    ids=["grouped", "tied", "multi-head", "llama3"],
)
def test_a_network_that_turns_neighbours_computes_our_logits_with_the_converted_weights(
    tmp_path: Path, checkout: Path, overrides: dict[str, Any]
) -> None:
    ours = random_llama(**overrides)
    theirs = gpt_fast.load_model(load_module(checkout / "model.py"), task_of(ours, checkout, tmp_path, 2, 48))
    theirs.setup_caches(2, 48)
    ids_bt = torch.randint(96, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids_bt, torch.arange(40)), ours(ids_bt).logits, rtol=1e-4, atol=1e-4)


def test_weights_keep_their_dtype(tmp_path: Path, checkout: Path) -> None:
    task = task_of(random_llama().to(torch.bfloat16), checkout, tmp_path)
    theirs = gpt_fast.load_model(load_module(checkout / "model.py"), task)
    assert {parameter.dtype for parameter in theirs.parameters()} == {torch.bfloat16}


def test_the_worker_decodes_what_the_eager_forward_does(tmp_path: Path, checkout: Path) -> None:
    model = random_llama(rope=LLAMA3, tie_word_embeddings=True)
    workload, eager = Workload.random(96, 3, 20, 12), Eager()
    eager.load(Task("", "float32", lent=model))
    contender = Remote("gpt-fast")
    with closing(contender):
        contender.load(task_of(model, checkout, tmp_path, 3, 32))
        contender.run(workload)
        run = contender.run(workload)
        assert run.tokens == eager.run(workload).tokens
        assert run.ttft > 0
        assert len(run.tpot) == 11
        assert min(run.tpot) > 0
        assert contender.info["threads"] == torch.get_num_threads()
        assert contender.run(Workload.random(96, 3, 20, 1)).tpot == ()
        with pytest.raises(Unavailable, match=r"^opened for 3 rows and 32 slots, got another workload$"):
            contender.run(Workload.random(96, 3, 20, 13))


@pytest.mark.parametrize(
    ("old", "new", "batch", "why"),
    [
        (
            "",
            "raise ImportError('no flex attention in this torch')\n",
            1,
            "ImportError: no flex attention in this torch",
        ),
        (
            "max_new_tokens, batch_size",
            "max_new_tokens",
            2,
            "this version of gpt-fast decodes one sequence at a time, not 2",
        ),
    ],
    ids=["broken", "one sequence"],
)
def test_what_the_checkout_cannot_do_is_one_line(
    tmp_path: Path, checkout: Path, old: str, new: str, batch: int, why: str
) -> None:
    source = (checkout / "generate.py").read_text()
    (checkout / "generate.py").write_text(source.replace(old, new) if old else new)
    contender = Remote("gpt-fast")
    contender.load(task_of(random_llama(), checkout, tmp_path, batch))
    with closing(contender), pytest.raises(Unavailable) as raised:
        contender.run(Workload.random(96, batch, 8, 4))
    assert reason(raised.value).endswith(why)


def test_a_version_without_rope_scaling_refuses_llama3(tmp_path: Path, checkout: Path) -> None:
    older = SimpleNamespace(ModelArgs=dataclasses.make_dataclass("ModelArgs", ["dim", "block_size"]))
    with pytest.raises(Unavailable, match=r"this version of gpt-fast has no .*rope_scaling"):
        gpt_fast.load_model(older, task_of(random_llama(rope=LLAMA3), checkout, tmp_path))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("overrides", "dtype", "named"),
    [
        ({"head_dim": 16}, torch.float32, "hidden_size = heads x head_dim, got 32 and 4 x 16"),
        ({"hidden_act": "gelu"}, torch.float32, "not gelu"),
        ({"attention_bias": True}, torch.float32, "no biases"),
        ({"mlp_bias": True}, torch.float32, "no biases"),
        ({"rope": RopeParameters("linear", 10000.0, factor=2.0)}, torch.float32, "not linear"),
        ({}, torch.float64, "no float64"),
    ],
)
def test_what_gpt_fast_cannot_compute_is_refused_by_name(
    tmp_path: Path, checkout: Path, overrides: dict[str, Any], dtype: torch.dtype, named: str
) -> None:
    with pytest.raises(Unavailable, match=named):
        task_of(random_llama(**overrides).to(dtype), checkout, tmp_path)


def test_a_folder_without_gpt_fast_is_refused_with_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "model.py").touch()
    with pytest.raises(Unavailable, match=r"is no checkout of gpt-fast: it has no generate\.py"):
        task_of(random_llama(), tmp_path, tmp_path)
    with pytest.raises(Unavailable, match="--gpt-fast DIR"):
        gpt_fast.prepare(Task("", "float32"))
