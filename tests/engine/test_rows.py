"""Rows that share a batch: each decodes as it would alone, whatever its neighbours are, whenever they come and go."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

import pytest
import torch

from fastllama import LlamaConfig, LlamaForCausalLM
from fastllama.engine.row import Sampling
from fastllama.engine.runner import Runner
from fastllama.generation.loop import decode
from fastllama.generation.request import Request

SLOTS, CACHE_LEN = 4, 32  # few, so that there is little to compile
MANY = 64  # more than the kernels take on a CPU, in float32
CONFIG = LlamaConfig(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, bos_token_id=None, eos_token_id=None,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(CONFIG).eval()


class CompiledPrefill(Runner):
    """Prefills as on CUDA."""

    _compiles_prefill = True


@pytest.fixture(scope="module")
def runners(model) -> Callable[[str], Runner]:
    """With steps that are one operation, compiled steps, prefills too, more rows than the kernels take; made once."""

    @functools.cache
    def made(kind: str) -> Runner:
        with pytest.MonkeyPatch.context() as patch:
            if kind.startswith("compiled"):
                patch.setenv("FASTLLAMA_CPU_STEP", "compiled")
            runner = (CompiledPrefill if kind == "compiled prefill" else Runner)(model)
        runner.warmup(MANY if kind == "many" else SLOTS, CACHE_LEN)
        assert bool(runner.compiled_steps) == (kind != "native")
        return runner

    return made


def random_request(draw: random.Random) -> Request:
    sampling = [
        Sampling(),
        Sampling(temperature=0.8, seed=draw.getrandbits(40)),
        Sampling(temperature=1.5, top_k=draw.randint(1, 30), top_p=0.9, min_p=0.02, seed=draw.getrandbits(40)),
    ]
    return Request(
        torch.tensor([draw.randrange(96) for _ in range(draw.choice([1, 2, 7, 8, 9, 16, 20]))]),
        draw.randint(1, 12),
        draw.choice(sampling),
        eos_token_ids=tuple(draw.sample(range(96), draw.randint(0, 3))),
        pad_token_id=draw.randrange(96),
    )


def tokens_alone(runner: Runner, request: Request) -> list[int]:
    return torch.cat(list(decode(runner, [request])), dim=1)[0].tolist()


def ended(request: Request, tokens: list[int]) -> bool:
    return len(tokens) == request.max_new_tokens or (tokens[-1:] and tokens[-1] in request.eos_token_ids)


def run_schedule(runner: Runner, requests: list[Request], draw: random.Random) -> list[list[int]]:
    """Decode all requests in all slots, loading free slots in random order, at random steps, while others decode."""
    slots = runner.cache.batch_size
    waiting, results = list(enumerate(requests)), [[] for _ in requests]
    active: dict[int, int] = {}
    with runner.session():
        while waiting or active:
            free = [slot for slot in range(slots) if slot not in active]
            take = draw.randint(0 if active else 1, len(free)) if free else 0
            chosen = dict(zip(draw.sample(free, take), waiting[:take], strict=False))
            del waiting[:take]
            if chosen:
                active |= {slot: index for slot, (index, _) in chosen.items()}
                drawn = runner.prefill({slot: request for slot, (_, request) in chosen.items()})
                newest = runner.newest().read()[:, 0].tolist()
                for slot, (index, _) in chosen.items():
                    results[index] += [newest[slot]] * drawn
            else:
                runner.step()
                for slot, token in enumerate(runner.newest().read()[:, 0].tolist()):
                    if slot in active:
                        results[active[slot]].append(token)
            for slot, index in list(active.items()):
                if results[index] and ended(requests[index], results[index]):
                    runner.free(slot)
                    del active[slot]
    return results


SCHEDULES = {"native": 100, "compiled": 30, "compiled prefill": 30, "many": 2}


@pytest.mark.parametrize(("kind", "schedule"), [(kind, n) for kind, count in SCHEDULES.items() for n in range(count)])
def test_rows_that_come_and_go_equal_each_row_alone(runners, kind, schedule) -> None:
    runner, draw = runners(kind), random.Random(schedule)
    requests = [random_request(draw) for _ in range(draw.randint(2, 2 * runner.cache.batch_size + 1))]
    expected = [tokens_alone(runner, request) for request in requests]
    before = runner.compiled_steps
    with torch.compiler.set_stance("fail_on_recompile"):
        assert run_schedule(runner, requests, draw) == expected
    assert runner.compiled_steps == before


@pytest.mark.parametrize("kind", ["native", "compiled", "compiled prefill"])
def test_a_row_that_ends_in_a_burst_gives_nothing_but_its_pad_id_from_then_on(runners, kind) -> None:
    runner = runners(kind)
    requests = [Request(torch.tensor([5, 6]), 3, pad_token_id=9), Request(torch.tensor([7]), 11, pad_token_id=8)]
    expected = [tokens_alone(runner, request) for request in requests]
    out = torch.cat(list(decode(runner, requests)), dim=1)
    assert out.tolist() == [expected[0] + [9] * 8, expected[1]]


@pytest.mark.parametrize("kind", ["native", "compiled"])
def test_a_batch_that_grows_while_rows_decode_changes_none_of_them(model, monkeypatch, kind) -> None:
    monkeypatch.setenv("FASTLLAMA_CPU_STEP", kind)
    fresh, draw = Runner(model), random.Random(7)
    requests = [Request(torch.tensor([draw.randrange(96) for _ in range(9)]), 12) for _ in range(3)]
    expected = [tokens_alone(fresh, request) for request in requests]
    with fresh.session():
        fresh.reserve(4, CACHE_LEN)
        fresh.prefill({0: requests[0]})
        for _ in range(4):
            fresh.step()
        drawn = fresh.prefill({1: requests[1], 2: requests[2]})  # a bucket that there was no step for
        for _ in range(12 - drawn):
            fresh.step()
        out = fresh.output(0, 12).read()
    assert [row.tolist() for row in out[:3]] == expected


def test_stepping_without_rows_says_what_to_do(model) -> None:
    fresh = Runner(model)
    with fresh.session(), pytest.raises(RuntimeError, match="prefill\\(\\) comes before step"):
        fresh.step()
