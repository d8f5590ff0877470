"""gpt-fast as a peer: our weights in its layout decode the same tokens, and what it cannot do is one line.

The checkout here is one that the test writes from ``data``: a small network with gpt-fast's names, its fused q, k and
v, and a rotary embedding that turns neighbouring dimensions, written in complex numbers.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastllama import LlamaConfig, LlamaForCausalLM
from fastllama.config import RopeParameters
from fastllama_benchmarks.contenders import Task
from fastllama_benchmarks.contenders import gpt_fast as contender
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


@pytest.fixture
def llama(tiny: LlamaConfig) -> Callable[..., LlamaForCausalLM]:
    """Makes a tiny Llama whose weights and norms are random."""

    def llama(**overrides: Any) -> LlamaForCausalLM:
        model = LlamaForCausalLM(tiny.replace(rms_norm_eps=1e-3, **overrides)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.uniform_(0.5, 1.5)
        return model

    return llama


@pytest.fixture
def task_of(checkout: Path, tmp_path: Path) -> Callable[..., Task]:
    """What gpt-fast decodes a model's weights with, written and ready."""

    def task_of(model: LlamaForCausalLM, batch: int = 1, slots: int = 12, gpt_fast: Path = checkout) -> Task:
        dtype, places = str(model.dtype).removeprefix("torch."), {"gpt_fast": str(gpt_fast), "workspace": str(tmp_path)}
        return contender.prepare(Task("", dtype, batch=batch, slots=slots, lent=model, **places))

    return task_of


@pytest.mark.parametrize(
    "overrides",
    [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4}, {"rope": LLAMA3, "num_hidden_layers": 3}],
    ids=["grouped", "tied", "multi-head", "llama3"],
)
def test_a_network_that_turns_neighbours_computes_our_logits_with_the_converted_weights(
    llama, task_of, checkout: Path, overrides: dict[str, Any]
) -> None:
    ours, network = llama(**overrides), SimpleNamespace(**runpy.run_path(str(checkout / "model.py")))
    theirs = contender.load_model(network, task_of(ours, 2, 48))  # type: ignore[arg-type]
    theirs.setup_caches(2, 48)
    ids_bt = torch.randint(64, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids_bt, torch.arange(40)), ours(ids_bt).logits, rtol=1e-4, atol=1e-4)


def test_the_worker_decodes_what_the_eager_forward_does(llama, task_of) -> None:
    model = llama(rope=LLAMA3, tie_word_embeddings=True)
    workload, eager = Workload.random(64, 3, 20, 12), Eager()
    eager.load(Task("", "float32", lent=model))
    with closing(Remote("gpt-fast")) as remote:
        remote.load(task_of(model, 3, 32))
        remote.run(workload)
        run = remote.run(workload)
        assert run.tokens == eager.run(workload).tokens
        assert run.ttft > 0
        assert len(run.tpot) == 11
        assert min(run.tpot) > 0
        assert remote.info["threads"] == torch.get_num_threads()
        assert remote.run(Workload.random(64, 3, 20, 1)).tpot == ()
        with pytest.raises(Unavailable, match=r"^opened for 3 rows and 32 slots, got another workload$"):
            remote.run(Workload.random(64, 3, 20, 13))


@pytest.mark.parametrize(
    ("old", "new", "batch", "why"),
    [
        ("THREADS", "raise ImportError('no flex attention')\nTHREADS", 1, "ImportError: no flex attention"),
        ("max_new_tokens, batch_size", "max_new_tokens", 2, "decodes one sequence at a time, not 2"),
    ],
    ids=["broken", "one sequence"],
)
def test_what_the_checkout_cannot_do_is_one_line(
    llama, task_of, checkout: Path, old: str, new: str, batch: int, why: str
) -> None:
    source = checkout / "generate.py"
    source.write_text(source.read_text().replace(old, new, 1))
    with closing(Remote("gpt-fast")) as remote:
        remote.load(task_of(llama(), batch))
        with pytest.raises(Unavailable) as raised:
            remote.run(Workload.random(64, batch, 8, 4))
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
    llama, task_of, overrides: dict[str, Any], dtype: torch.dtype, named: str
) -> None:
    with pytest.raises(Unavailable, match=named):
        task_of(llama(**overrides).to(dtype))


def test_a_folder_without_gpt_fast_is_refused_with_what_it_lacks(llama, task_of, tmp_path: Path) -> None:
    (tmp_path / "model.py").touch()
    with pytest.raises(Unavailable, match=r"is no checkout of gpt-fast: it has no generate\.py"):
        task_of(llama(), gpt_fast=tmp_path)
    with pytest.raises(Unavailable, match="--gpt-fast DIR"):
        contender.prepare(Task("", "float32"))
