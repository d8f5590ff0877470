"""The engine: no compilation after warm-up, memory, threads, interrupts."""

from __future__ import annotations

import concurrent.futures
import copy
import gc
import itertools
import logging
import threading
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastllama import LlamaConfig, LlamaForCausalLM
from fastllama.causal_lm import engine_of
from fastllama.config import RopeParameters
from fastllama.engine import graphs as graphs_module
from fastllama.engine import prefill as prefill_module
from fastllama.engine.prefill import PREFILL_CHUNKS, prefill_chunks
from fastllama.engine.row import Sampling
from fastllama.engine.runner import Runner
from fastllama.engine.steps import batch_bucket
from fastllama.generation.loop import decode as decode_rows
from fastllama.generation.request import Request
from fastllama.ops import row_seed

pytestmark = pytest.mark.usefixtures("compiled_steps")

TINY = LlamaConfig(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, bos_token_id=None, eos_token_id=None,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(TINY).eval()


def prompts(*lengths: int) -> list[torch.Tensor]:
    return [torch.randint(0, 96, (length,)) for length in lengths]


def decode(runner: Runner, rows: list[torch.Tensor], new: int, seed: int = 0, **settings) -> torch.Tensor:
    ends = {name: settings.pop(name) for name in ("eos_token_ids", "pad_token_id") if name in settings}
    requests = [
        Request(prompt, new, Sampling(**settings, seed=row_seed(seed, row)), **ends) for row, prompt in enumerate(rows)
    ]
    return torch.cat(list(decode_rows(runner, requests)), dim=1)


@pytest.mark.slow
def test_no_call_compiles_anything_after_warmup(model) -> None:
    model.warmup(max_batch_size=4, max_cache_len=320)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    steps, addresses = set(model.engine.compiled_steps), cache_addresses(model)
    random = torch.Generator().manual_seed(0)
    held: list[tuple[torch.Tensor, list]] = []
    with torch.compiler.set_stance("fail_on_recompile"):
        for call in range(200):
            length, rows, new = (int(torch.randint(1, n, (), generator=random)) for n in (301, 5, 20))
            sampled = [
                {},
                {"do_sample": True, "temperature": 0.7},
                {"do_sample": True, "top_k": 70, "top_p": 0.9},
                {"do_sample": True, "top_k": 0, "min_p": 0.05},
            ][call % 4]
            out = model.generate(torch.randint(0, 96, (rows, length)), max_new_tokens=new, **sampled)
            assert out.shape == (rows, length + new)
            held.append((out, out.tolist()))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert set(model.engine.compiled_steps) == steps
    assert cache_addresses(model) == addresses
    assert all(out.tolist() == before for out, before in held)


def cache_addresses(model: LlamaForCausalLM) -> list[int]:
    return [x.data_ptr() for x in model.engine.cache.key_cache + model.engine.cache.value_cache]


def test_the_engine_shares_the_models_weights(model) -> None:
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.generate(torch.randint(0, 96, (1, 4)), max_new_tokens=2)
    attention = model.model.layers[0].self_attn
    storages = {p.untyped_storage().data_ptr() for p in (attention.q_proj.weight, attention.v_proj.weight)}
    assert len(storages) == 1
    engine_storages = {p.untyped_storage().data_ptr() for p in model.engine._net.parameters()}
    assert engine_storages == {p.untyped_storage().data_ptr() for p in model.parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_weights_changed_in_place_reach_the_engine_and_replaced_ones_remake_it() -> None:
    model = LlamaForCausalLM(TINY).eval()
    ids = torch.randint(0, 96, (1, 6))
    model.generate(ids, max_new_tokens=4)
    first = model.engine
    model.load_state_dict(LlamaForCausalLM(TINY).state_dict())
    assert model.generate(ids, max_new_tokens=4).tolist() == eager_greedy(model, ids, 4).tolist()
    assert model.engine is first
    model.model.layers[0].mlp.up_proj.weight.data = torch.randn(48, 32)
    assert model.generate(ids, max_new_tokens=4).tolist() == eager_greedy(model, ids, 4).tolist()
    assert model.engine is not first


def eager_greedy(model: LlamaForCausalLM, ids: torch.Tensor, new: int) -> torch.Tensor:
    with torch.no_grad():
        for _ in range(new):
            ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    return ids


@pytest.mark.parametrize(
    "rope",
    [
        RopeParameters("dynamic", factor=2.0),
        RopeParameters(
            "longrope", factor=4.0, original_max_position_embeddings=24, short_factor=(1.0,) * 4, long_factor=(3.0,) * 4
        ),
    ],
    ids=lambda rope: rope.rope_type,
)
def test_rope_that_depends_on_the_length_equals_transformers_across_the_threshold(rope, make_pair) -> None:
    ours, theirs = make_pair(rope=rope, head_dim=8, max_position_embeddings=24)
    for length in (10, 40):
        ids = torch.randint(1, 96, (1, length))
        expected = theirs.generate(ids, max_new_tokens=25, do_sample=False, pad_token_id=0)
        assert ours.generate(ids, max_new_tokens=25).tolist() == expected.tolist()


def test_a_copy_decodes_with_weights_and_engine_of_its_own(model) -> None:
    ids = torch.randint(0, 96, (1, 6))
    expected = model.generate(ids, max_new_tokens=4)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    assert torch.equal(twin.generate(ids, max_new_tokens=4), expected)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    assert twin.engine is not model.engine


def test_stale_and_unused_slots_are_never_read(model) -> None:
    model.warmup(max_batch_size=2, max_cache_len=64)
    engine, rows = model.engine, prompts(9, 17)
    engine.reuses_prefixes = False
    expected = decode(engine, rows, 6)
    for cache in engine.cache.key_cache + engine.cache.value_cache:
        cache.fill_(float("nan"))
    assert torch.equal(decode(engine, rows, 6), expected)


def test_ragged_rows_equal_single_rows(model) -> None:
    rows = prompts(1, 50, 7, 8, 140)
    model.warmup(max_batch_size=1, max_cache_len=160)
    alone = [decode(model.engine, [row], 12) for row in rows]
    assert torch.equal(decode(model.engine, rows, 12), torch.cat(alone))


def test_sampled_rows_do_not_depend_on_their_neighbours(model) -> None:
    rows = prompts(5, 9, 12)
    together = decode(model.engine, rows, 10, temperature=1.0, top_k=20, seed=3)
    assert torch.equal(decode(model.engine, rows[:1], 10, temperature=1.0, top_k=20, seed=3), together[:1])


def test_a_finished_row_gives_the_pad_id_and_decoding_stops_with_the_last_row(model) -> None:
    rows = prompts(5, 9)
    free = decode(model.engine, rows, 12)
    eos = (int(free[0, 2]), int(free[1, 6]))
    ends = [min(i for i, token in enumerate(row) if token in eos) for row in free.tolist()]
    out = decode(model.engine, rows, 12, eos_token_ids=eos, pad_token_id=95)
    assert out.shape == (2, max(ends) + 1)
    for row, end in enumerate(ends):
        assert out[row, : end + 1].tolist() == free[row, : end + 1].tolist()
        assert out[row, end + 1 :].tolist() == [95] * (max(ends) - end)


def test_a_longer_call_makes_the_cache_grow_and_says_so(caplog) -> None:
    model = LlamaForCausalLM(TINY).eval()
    model.warmup(max_cache_len=16)
    ids = torch.randint(0, 96, (3, 20))
    with caplog.at_level(logging.INFO, "fastllama.engine"):
        out = model.generate(ids, max_new_tokens=10)
    assert model.engine.cache.batch_size == 4
    assert model.engine.cache.max_cache_len == 32
    assert "grows to 4 rows of 32 slots" in caplog.text
    assert out.tolist() == eager_greedy(model, ids, 10).tolist()


def test_caches_that_were_outgrown_leave_no_compiled_step_behind() -> None:
    def alive() -> int:
        gc.collect()
        return sum(type(x).__name__ == "CompiledFxGraph" for x in gc.get_objects())

    fresh, before = LlamaForCausalLM(TINY).eval(), alive()
    fresh.warmup(max_cache_len=8)
    for length in (10, 20, 40):
        fresh.generate(torch.randint(0, 96, (1, length)), max_new_tokens=2)
    assert fresh.engine.cache.max_cache_len > 40
    assert alive() - before == 2  # rows whose logits are changed have a step of their own
    fresh.release()
    assert alive() == before


def test_warmup_compiles_the_largest_batch_first(caplog) -> None:
    fresh = LlamaForCausalLM(TINY).eval()
    with caplog.at_level(logging.INFO, "fastllama.engine"):
        fresh.warmup(max_batch_size=4, max_cache_len=16)
    compiled = [record.args[:2] for record in caplog.records if "compiling" in record.message]
    assert compiled == [(kind, rows) for rows in (4, 2, 1) for kind in ("decode", "decode_processed")]


def test_a_session_that_was_cut_short_leaves_every_slot_idle(model) -> None:
    runner = engine_of(model)
    request = Request(torch.tensor([3, 4, 5]), 9)

    def interrupted() -> None:
        with runner.session():
            runner.reserve(2, 32)
            runner.prefill({0: request, 1: request})
            runner._buffers.memory.arrived_p.fill_(7)  # as a kernel that never ended leaves it
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with runner.session():
        assert runner._buffers.rows(2).finished_b.all()
        assert not runner._buffers.memory.arrived_p.any()


def test_the_last_slot_of_the_cache_can_be_used(model) -> None:
    fresh = LlamaForCausalLM(TINY).eval()
    fresh.warmup(max_cache_len=12)
    ids = torch.randint(0, 96, (1, 9))
    assert fresh.generate(ids, max_new_tokens=3).tolist() == eager_greedy(fresh, ids, 3).tolist()
    assert fresh.engine.cache.max_cache_len == 12


def test_progress_of_compilation_is_logged(caplog) -> None:
    fresh = LlamaForCausalLM(TINY).eval()
    with caplog.at_level(logging.INFO, "fastllama.engine"):
        fresh.generate(torch.randint(0, 96, (1, 4)), max_new_tokens=2)
    assert "compiling decode step: batch 1, tokens 1" in caplog.text


def test_a_dropped_model_is_collected_with_its_engine_and_cache() -> None:
    fresh = LlamaForCausalLM(TINY).eval()
    fresh.generate(torch.randint(0, 96, (1, 4)), max_new_tokens=2)
    watched = [
        weakref.ref(x)
        for x in (fresh, fresh.engine, fresh.engine._net, fresh.engine.cache.key_cache[0], fresh.lm_head.weight)
    ]
    del fresh
    gc.collect()
    assert [ref() for ref in watched] == [None] * len(watched)


def test_release_gives_the_memory_back_and_the_next_call_works(model) -> None:
    ids = torch.randint(0, 96, (1, 4))
    before = model.generate(ids, max_new_tokens=4)
    watched = [weakref.ref(model.engine), weakref.ref(model.engine.cache.key_cache[0])]
    model.release()
    gc.collect()
    assert model.engine is None
    assert [ref() for ref in watched] == [None, None]
    assert torch.equal(model.generate(ids, max_new_tokens=4), before)
    model.release()
    model.release()  # twice is fine


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_an_interrupt_at_any_step_leaves_the_engine_usable(model, monkeypatch, kind, at) -> None:
    rows, engine = prompts(1600), model.engine or warm(model)
    engine.reuses_prefixes = False
    expected = decode(engine, rows, 8)
    genuine, wanted, calls = graphs_module.call_plainly, kind == "prefill", itertools.count(1)

    def interrupted(device_type, step, args) -> None:
        genuine(device_type, step, args)
        if step.__name__.startswith("prefill") == wanted and next(calls) == at:
            raise KeyboardInterrupt

    for module in (graphs_module, prefill_module):  # compiled steps, and those that run as they are
        monkeypatch.setattr(module, "call_plainly", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decode(model.engine, rows, 8)
    monkeypatch.undo()
    assert torch.equal(decode(model.engine, rows, 8), expected)


def warm(model: LlamaForCausalLM) -> Runner:
    model.warmup()
    return model.engine


def test_an_interrupt_while_compiling_leaves_the_engine_usable(monkeypatch) -> None:
    fresh = LlamaForCausalLM(TINY).eval()
    ids = torch.randint(0, 96, (1, 6))

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("torch._dynamo.output_graph.OutputGraph.call_user_compiler", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fresh.generate(ids, max_new_tokens=2)
    assert fresh.generate(ids, max_new_tokens=4).tolist() == eager_greedy(fresh, ids, 4).tolist()


def test_callers_from_several_threads_wait_for_each_other(model) -> None:
    rows = [prompts(n) for n in (3, 30, 60, 9)]
    engine = model.engine or warm(model)
    expected = [decode(engine, row, 15) for row in rows]
    results: dict[int, torch.Tensor] = {}

    def call(index: int) -> None:
        for _ in range(5):
            results[index] = decode(engine, rows[index], 15)
            assert torch.equal(results[index], expected[index])

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [0, 1, 2, 3]
    assert all(torch.equal(results[i], expected[i]) for i in range(4))


def test_a_second_call_inside_an_open_stream_is_an_error_not_a_deadlock(model) -> None:
    ids = torch.randint(0, 96, (1, 4))
    tokens = model.stream(ids, max_new_tokens=10)
    next(tokens)
    with pytest.raises(RuntimeError, match="close"):
        model.generate(ids, max_new_tokens=2)
    tokens.close()
    assert model.generate(ids, max_new_tokens=2).shape == (1, 6)


def test_callers_may_be_in_inference_mode_or_not(model) -> None:
    fresh = LlamaForCausalLM(TINY).eval()
    ids = torch.randint(0, 96, (1, 4))
    with torch.inference_mode():
        first = fresh.generate(ids, max_new_tokens=3)
    assert torch.equal(fresh.generate(ids, max_new_tokens=3), first)
    with torch.inference_mode():
        assert torch.equal(fresh.generate(ids, max_new_tokens=3), first)


def test_reserve_makes_room_and_compiles_nothing(model) -> None:
    model.release()
    engine = engine_of(model)
    with engine.session():
        engine.reserve(3, 100)
    assert engine.cache is not None
    assert (engine.cache.batch_size, engine.cache.max_cache_len) == (4, 100)
    assert engine.compiled_steps == ()


@pytest.mark.parametrize(("rows", "slots"), [(0, 16), (1, 1), (1, -5)])
def test_warmup_refuses_sizes_that_hold_nothing(model, rows, slots) -> None:
    with pytest.raises(ValueError, match="at least"):
        model.warmup(rows, slots)


@given(tokens=st.integers(0, 3000))
def test_prefill_chunks_cover_the_prompt_and_only_the_last_is_padded(tokens) -> None:
    exact, padded = prefill_chunks(tokens, exact=True), prefill_chunks(tokens, exact=False)
    assert sum(exact) == tokens
    assert 0 <= sum(padded) - tokens < max(padded, default=1)
    assert exact[:-1] == padded[:-1]
    assert set(padded) <= set(PREFILL_CHUNKS)


@pytest.mark.parametrize("lengths", [(1,), (9, 40), (3, 17, 600)])
def test_compiled_prefill_in_padded_chunks_equals_exact_prefill(model, monkeypatch, lengths) -> None:
    rows = prompts(*lengths)
    expected = decode(model.engine or warm(model), rows, 6)
    monkeypatch.setattr(Runner, "_compiles_prefill", True)
    assert torch.equal(decode(model.engine, rows, 6), expected)
    assert any(key[0] == "prefill" for key in model.engine.compiled_steps) == (max(lengths) > 1)


def test_batches_run_in_powers_of_two() -> None:
    assert [batch_bucket(n) for n in (1, 2, 3, 4, 5, 8, 9)] == [1, 2, 4, 4, 8, 8, 16]


@pytest.mark.slow
@pytest.mark.parametrize("compiled_prefill", [False, True])
def test_without_kernels_torch_operators_decode_the_same_tokens(monkeypatch, compiled_prefill) -> None:
    monkeypatch.setattr(
        "fastllama.ops.rules.without_kernels", lambda device_type, dtype: "as on a device without kernels"
    )
    monkeypatch.setattr(Runner, "_compiles_prefill", compiled_prefill)
    fresh = LlamaForCausalLM(TINY).eval()
    ids = torch.randint(0, 96, (3, 20))
    assert fresh.generate(ids, max_new_tokens=8).tolist() == eager_greedy(fresh, ids, 8).tolist()
    addresses = cache_addresses(fresh)
    fresh.generate(ids[:1], max_new_tokens=8, do_sample=True, seed=1)
    assert cache_addresses(fresh) == addresses


def test_autocast_around_a_call_changes_nothing(model) -> None:
    ids = torch.randint(0, 96, (1, 20))
    expected = model.generate(ids, max_new_tokens=4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.generate(ids, max_new_tokens=4), expected)


def test_threads_that_share_a_new_model_share_its_engine(monkeypatch) -> None:
    fresh, made, genuine = LlamaForCausalLM(TINY).eval(), [], Runner.__init__

    def counting(self, *args) -> None:
        made.append(self)
        genuine(self, *args)

    monkeypatch.setattr(Runner, "__init__", counting)
    barrier = threading.Barrier(4)

    def call() -> None:
        barrier.wait()
        fresh.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=1)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_an_interrupt_waits_for_the_step_that_a_worker_is_running(monkeypatch) -> None:
    steps, finished = graphs_module.Steps(torch.device("cpu")), threading.Event()
    monkeypatch.setattr(steps, "_worker", concurrent.futures.ThreadPoolExecutor(1))
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: None)
    started = threading.Event()

    def slow(*args) -> None:
        started.set()
        finished.wait(5)

    def interrupted(self, timeout=None) -> None:
        started.wait(5)
        threading.Timer(0.2, finished.set).start()
        raise KeyboardInterrupt

    monkeypatch.setattr(graphs_module, "_call_on_stream", slow)
    monkeypatch.setattr(concurrent.futures.Future, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        steps._on_worker(slow, ())
    assert finished.is_set()


def test_seeds_of_any_size_are_taken(model) -> None:
    assert (
        model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2, do_sample=True, seed=2**70).shape[1] == 5
    )
