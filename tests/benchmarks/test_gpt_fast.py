"""gpt-fast as a peer: our weights in its layout decode the same tokens, and what it cannot do is one line.

The checkout here is one that the test writes from ``data``: a small network with gpt-fast's names, its fused q, k and
v, and a rotary embedding that turns neighbouring dimensions, written in complex numbers.
"""

from __future__ import annotations

import importlib.util
from contextlib import closing
from pathlib import Path
from types import ModuleType
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

DATA = Path(__file__).parent / "data"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with what is used of gpt-fast."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "model.py").write_text((DATA / "gpt_fast_model.txt").read_text())
    (folder / "generate.py").write_text(
        f"THREADS = {torch.get_num_threads()}\n{(DATA / 'gpt_fast_generate.txt').read_text()}"
    )
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
