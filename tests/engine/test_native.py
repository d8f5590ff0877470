"""Steps that are one operation of the CPU's kernels: nothing is compiled, and tokens are those of compiled steps."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastllama import LlamaForCausalLM, QuantizationConfig
from fastllama.causal_lm import engine_of

SAMPLED = {"do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 5}


def load(folder, make_pair, dtype, scheme, overrides) -> LlamaForCausalLM:
    make_pair(**overrides)[0].save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype, quantize=scheme)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("scheme", "overrides"),
    [
        (None, {"tie_word_embeddings": True}),
        (None, {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu", "vocab_size": 91}),
        ("int8", {"intermediate_size": 64, "vocab_size": 90}),
        ("int4", {"intermediate_size": 64, "vocab_size": 90, "tie_word_embeddings": True}),
        (QuantizationConfig(head_bits=None, symmetric=True), {"intermediate_size": 64}),
    ],
    ids=["tied", "biases", "int8", "int4 tied", "dense head"],
)
def test_tokens_equal_those_of_compiled_steps(tmp_path, make_pair, monkeypatch, dtype, scheme, overrides) -> None:
    model = load(tmp_path, make_pair, dtype, scheme, overrides)
    ids = torch.randint(1, 90, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    found = {}
    for kind in ("native", "compiled"):
        monkeypatch.setenv("FASTLLAMA_CPU_STEP", kind)
        model.release()
        greedy = model.generate(ids, mask, max_new_tokens=12)
        ends = {"eos_token_id": greedy[0, 12:14].tolist(), "pad_token_id": 2}
        found[kind] = [greedy, *(model.generate(ids, mask, max_new_tokens=9, **each) for each in (SAMPLED, ends))]
        assert bool(engine_of(model).compiled_steps) == (kind == "compiled")
    for native, compiled in zip(found["native"], found["compiled"], strict=True):
        assert torch.equal(native, compiled)


def test_a_process_that_decodes_imports_no_compiler(tmp_path, make_pair) -> None:
    make_pair()[0].save_pretrained(tmp_path)
    program = f"""
import sys, torch
from fastllama import LlamaForCausalLM
model = LlamaForCausalLM.from_pretrained({str(tmp_path)!r})
assert model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=4).shape == (1, 7)
print(*(name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_what_a_step_would_misread_is_refused(make_pair) -> None:
    model = make_pair()[0]
    model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2)
    runner = engine_of(model)
    buffers, network = runner._ready, runner._net.network()
    cos_sd, sin_sd, k_caches, v_caches, _ = buffers.memory
    rows = buffers.rows(1).tensors
    weights, kinds, eps, activation = network
    step = torch.ops.fastllama.decode_step

    def call(rows=rows, weights=weights, kinds=kinds, vocab=96) -> None:
        step(rows, cos_sd, sin_sd, weights, kinds, k_caches, v_caches, eps, activation, vocab)

    call()
    for bad in (
        {"rows": rows[:-1]}, {"rows": [rows[0].int(), *rows[1:]]}, {"rows": [*rows[:3], rows[3].float(), *rows[4:]]},
        {"weights": weights[:-1]}, {"weights": weights[:1]}, {"kinds": kinds[:1]}, {"vocab": 97}, {"vocab": 0},
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="fastllama: "):
            call(**bad)
    buffers.rows(1).ids_b1.fill_(96)
    with pytest.raises(RuntimeError, match="id 96 of an embedding of 96 rows"):
        call()


# ---- torch's threads, kept at hand while a step runs ---------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("quantize", ["none", "int4"])
def test_tokens_do_not_depend_on_the_number_of_threads(threads, quantize) -> None:
    model, ids = LlamaForCausalLM.from_pretrained("demo", quantize=quantize), torch.randint(3, 4000, (3, 9))
    found = []
    for count in (1, 2, 3, 7):  # more than there are cores, too
        threads(count)
        found.append(model.generate(ids, max_new_tokens=24, **SAMPLED))
    assert all(torch.equal(each, found[0]) for each in found)


def test_models_on_several_threads_of_the_caller_decode_at_the_same_time(threads) -> None:
    threads(2)
    models = [LlamaForCausalLM.from_pretrained("demo") for _ in range(3)]
    ids = torch.randint(3, 4000, (1, 9))
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda model: model.generate(ids, max_new_tokens=48, do_sample=False), models))
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_an_error_within_a_step_keeps_its_text_and_leaves_the_threads_usable(threads, count) -> None:
    threads(count)
    model, ids = LlamaForCausalLM.from_pretrained("demo"), torch.randint(3, 4000, (1, 9))
    wanted = model.generate(ids, max_new_tokens=12, do_sample=False)
    buffers = engine_of(model)._buffers
    assert buffers is not None
    (step,) = buffers.bound.values()
    buffers.slots(0, 1).position_b1.fill_(10**6)
    with pytest.raises(RuntimeError, match="position 1000000 lies outside the KV cache"):
        step()
    model.release()
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), wanted)
