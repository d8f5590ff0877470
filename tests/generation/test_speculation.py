"""Speculative decoding gives what plain decoding gives, whatever is drafted, and drafts where it pays."""

from __future__ import annotations

import pytest
import torch
from drafts import draft_always, make
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import SHAPE

from fastllama import GenerationConfig, LlamaForCausalLM, StaticCache
from fastllama.engine.runner import Runner
from fastllama.generation.drafting import drafting_of
from fastllama.generation.known import Costs, DraftCounts, Known, Odds
from fastllama.generation.lookup import Draft, LookupSource
from fastllama.generation.request import Request
from fastllama.generation.speculation import Drafter

VOCABULARY = SHAPE["vocab_size"]
KINDS = [("float32", None, None), ("bfloat16", None, None), ("float16", None, None), ("bfloat16", "int8", None),
         ("bfloat16", "int4", "int8")]  # fmt: skip


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: "-".join(filter(None, kind)))
def model(request, tmp_path_factory) -> LlamaForCausalLM:
    return make(*request.param, tmp_path_factory.mktemp("model"))


class Letters:
    """A tokenizer whose tokens are letters."""

    def decode(self, token_ids) -> str:
        return "".join(chr(97 + token) for token in token_ids)


# ---- what comes out ------------------------------------------------------------------------------------------------

few = st.integers(0, 5)  # tokens that come again
calls = st.fixed_dictionaries(
    {
        "max_new_tokens": st.integers(1, 60),
        "do_sample": st.booleans(),
        "temperature": st.sampled_from([0.3, 0.8, 1.5]),
        "top_k": st.sampled_from([0, 3, 20]),
        "top_p": st.sampled_from([0.7, 1.0]),
        "seed": st.integers(0, 99),
        "repetition_penalty": st.sampled_from([1.0, 1.2]),
        "presence_penalty": st.sampled_from([0.0, 0.6]),
        "frequency_penalty": st.sampled_from([0.0, 0.2]),
        "no_repeat_ngram_size": st.sampled_from([0, 0, 4]),
        "min_new_tokens": st.integers(0, 30),
        "eos_token_id": st.lists(st.integers(0, VOCABULARY - 1), max_size=20, unique=True),
        "stop_strings": st.none() | st.lists(st.text("abcdef", min_size=1, max_size=3), min_size=1, max_size=2),
        "bad_words_ids": st.none() | st.lists(st.lists(few, min_size=1, max_size=3), min_size=1, max_size=3),
    }
)


def batch_of(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


ways = st.sampled_from(["lookup", "pool", "model"])


@settings(deadline=None, max_examples=90)
@given(prompts=st.lists(st.lists(few, min_size=1, max_size=40), min_size=1, max_size=3), call=calls, way=ways)
def test_tokens_are_those_of_plain_decoding(model, second, prompts, call, way) -> None:
    how = {
        "lookup": {"speculate": "auto"},
        "pool": {"speculate": "auto", "prompt_lookup_pool_tokens": 200},
        "model": {"assistant_model": second, "assistant_confidence_threshold": 0.1},
    }
    with pytest.MonkeyPatch.context() as patch:
        draft_always(patch)
        call = {**batch_of(prompts), **call, "pad_token_id": 1, "tokenizer": Letters()}
        plain = model.generate(**call)
        drafted = model.generate(**call, **how[way])
    assert torch.equal(plain, drafted)


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(prompts=st.lists(st.lists(few, min_size=1, max_size=60), min_size=1, max_size=4), call=calls, way=ways)
def test_many_drawn(exact, second, prompts, call, way) -> None:
    test_tokens_are_those_of_plain_decoding.hypothesis.inner_test(exact, second, prompts, call, way)


def test_it_takes_fewer_steps_where_text_repeats(exact, eager) -> None:
    plain = exact.generate(torch.tensor([[5, 9, 3]]), max_new_tokens=120)
    assert not eager
    drafted = exact.generate(torch.tensor([[5, 9, 3]]), max_new_tokens=120, speculate="auto")
    assert torch.equal(plain, drafted)
    assert 0 < len(eager) < 60  # a greedy text of a random network ends in a loop


def test_a_stream_gives_each_token(exact, eager) -> None:
    ids = torch.tensor([[5, 9, 3], [4, 4, 4]])
    plain = torch.stack([*exact.stream(ids, max_new_tokens=50)], dim=1)
    assert torch.equal(torch.stack([*exact.stream(ids, max_new_tokens=50, speculate="auto")], dim=1), plain)
    assert eager


def test_a_text_goes_on_from_what_it_left_in_the_cache(exact, eager) -> None:
    exact.prefix_caching = True
    ids = torch.tensor([[5, 9, 3] * 12])
    first = exact.generate(ids, max_new_tokens=40, speculate="auto")
    second = exact.generate(first, max_new_tokens=40, speculate="auto")
    exact.prefix_caching = False
    assert torch.equal(second, exact.generate(first, max_new_tokens=40))


def test_the_memory_grows_while_tokens_are_drafted(eager) -> None:
    model = make("float32")
    model.warmup(max_cache_len=64)
    ids = torch.tensor([[5, 9, 3]])
    drafted = model.generate(ids, max_new_tokens=150, speculate="auto")
    assert model.engine.cache.max_cache_len > 64
    assert torch.equal(drafted, model.generate(ids, max_new_tokens=150))


@pytest.mark.parametrize("new_tokens", range(20, 29))
def test_a_cache_that_just_fits_does_not_grow(new_tokens, eager) -> None:
    model, ids = make("float32"), torch.tensor([[5, 9, 3] * 4, [7, 1, 2] * 4])
    model.warmup(2, ids.shape[1] + new_tokens)
    slots = model.engine.cache.max_cache_len
    drafted = model.generate(ids, max_new_tokens=new_tokens, speculate="auto")
    assert model.engine.cache.max_cache_len == slots
    assert torch.equal(drafted, model.generate(ids, max_new_tokens=new_tokens))
    assert eager


def test_next_to_a_cache_or_a_token_mask_nothing_is_drafted(exact, eager) -> None:
    ids = torch.tensor([[5, 9, 3]])
    plain = exact.generate(ids, max_new_tokens=30)
    cache = StaticCache(exact.config, 1, 64)
    assert torch.equal(exact.generate(ids, max_new_tokens=30, past_key_values=cache, speculate="auto"), plain)
    allowed = exact.generate(ids, max_new_tokens=30, token_mask=lambda *args: None, speculate="auto")
    assert torch.equal(allowed, plain)
    assert not eager


def test_a_row_that_a_string_has_ended_stays_where_it_is(exact, eager, monkeypatch) -> None:
    positions, genuine = list[int](), Runner.step_with

    def step_with(self, draft_bt):
        came = genuine(self, draft_bt)
        positions.append(int(self._ready.rows(2).position_b1[0]))
        return came

    monkeypatch.setattr(Runner, "step_with", step_with)
    ids = torch.tensor([[5, 9, 3], [4, 4, 4]])
    plain = exact.generate(ids, max_new_tokens=60)
    stop = Letters().decode(plain[0, 10:12].tolist())
    drafted = exact.generate(ids, max_new_tokens=60, stop_strings=stop, tokenizer=Letters(), speculate="auto")
    assert drafted.shape[1] == 63  # the other row goes on
    assert max(positions) < 3 + 9 + 8


def test_what_came_before_is_drafted_from_earlier_texts(eager) -> None:
    model, ids = make("float32"), torch.tensor([[5, 9, 3, 4, 2]])
    call = {"max_new_tokens": 40, "speculate": "auto"}
    plain = model.generate(ids, **call)
    assert not any(model.draft_counts.accepted)  # it does not repeat itself
    model.generate(ids, prompt_lookup_pool_tokens=100, **call)
    assert torch.equal(model.generate(ids, prompt_lookup_pool_tokens=100, **call), plain)
    assert sum(model.draft_counts.accepted) > 25


def test_beams_take_no_notice_of_it(exact) -> None:
    ids = torch.tensor([[5, 9, 3]])
    plain = exact.generate(ids, max_new_tokens=8, num_beams=3)
    assert torch.equal(exact.generate(ids, max_new_tokens=8, num_beams=3, speculate="auto"), plain)


@pytest.mark.parametrize("kind", ["native", "compiled"])
def test_any_drafts_give_the_same_tokens(kind, exact, monkeypatch) -> None:
    monkeypatch.setenv("FASTLLAMA_CPU_STEP", kind)
    requests = [
        Request(torch.tensor([5, 9, 3]), 30),
        Request(torch.tensor([1, 2]), 7, eos_token_ids=(4,)),
        Request(torch.tensor([8] * 9), 21),
    ]
    plain = exact.generate(**batch_of([r.prompt.tolist() for r in requests]), max_new_tokens=30)[:, 9:].tolist()
    runner, generator = Runner(exact), torch.Generator().manual_seed(0)
    new: list[list[int]] = [[], [], []]
    with runner.session():
        runner.reserve(3, 60)
        if runner.prefill(dict(enumerate(requests))):
            for tokens, token in zip(new, runner.newest().read().tolist(), strict=False):
                tokens += token
        while any(len(tokens) < request.max_new_tokens for tokens, request in zip(new, requests, strict=True)):
            right = torch.tensor([(plain[row][len(new[row]) :] + [0] * 3)[:3] for row in range(3)])
            wrong = torch.rand(3, 3, generator=generator) < 0.3
            came = runner.step_with(torch.where(wrong, (right + 1) % VOCABULARY, right))
            for row, tokens in enumerate(came):
                expected = 1 + int((~wrong[row]).long().cumprod(0).sum())
                assert len(tokens) == min(expected, requests[row].max_new_tokens - len(new[row]))
                new[row] += tokens
    assert new == [plain[row][: request.max_new_tokens] for row, request in enumerate(requests)]


# ---- what pays -----------------------------------------------------------------------------------------------------


def lookup(prompt: list[int]) -> LookupSource:
    return LookupSource([torch.tensor(prompt)], 32)


class Right:
    """A second model that costs something and is right, or not."""

    classes, is_free, key = 1, False, "right"

    def __init__(self) -> None:
        self.right, self.asked = True, 0

    def draft(self, going, count):
        self.asked += 1
        return {row: Draft([7 if self.right else 0] * count, [0] * count) for row in going}

    def extend(self, number, tokens) -> None:
        pass

    def close(self) -> None:
        pass


def test_a_row_drafts_while_it_pays() -> None:
    known, source = Known(), lookup([1, 2, 3, 4, 5, 1, 2])
    costs = known.steps[1] = Costs()
    drafter = Drafter(source, 1, [4], known, most=32)
    assert drafter.draft([0]) == [[]]  # what a plain step costs is not known
    for tokens, seconds in ((1, 1.0), (4, 1.3)):
        assert costs.of(tokens) is None
        for each in (9.0, seconds, seconds):  # the first one makes what it needs
            costs.note(tokens, each)
    assert (costs.of(1), costs.of(4)) == (1.0, 1.3)
    assert drafter.draft([0]) == [[3, 4, 5]]
    for other in range(100, 130):  # misses
        drafter.note(1, 1.0, [[]], [[other, 1, 2]])
        drafter.draft([0])
    assert drafter.draft([0]) == [[]]
    for _ in range(60):  # what would have been right
        drafter.note(1, 1.0, [[]], [source.rows[0].draft(3)[0]])
        drafter.draft([0])
    assert len(drafter.draft([0])[0]) == 3
    assert drafter.draft([]) == [[]]


def test_what_was_slow_is_tried_again() -> None:
    costs = Costs()
    for _ in range(3):
        costs.note(4, 9.0)
    for _ in range(256):
        costs.note(1, 1.0)
    assert costs.of(4) == 9.0
    costs.note(1, 1.0)
    assert (costs.of(1), costs.of(4)) == (1.0, None)


def test_a_second_model_sleeps_ever_longer_and_wakes_up() -> None:
    known, source = Known(), Right()
    drafter = Drafter(source, 1, [2, 4], known, most=20)

    def steps(count: int) -> int:
        """How often the second model is asked."""
        before = source.asked
        for _ in range(count):
            (draft,) = drafter.draft([0])
            came = [*draft, 7] if source.right else [7]
            drafter.note(1 + len(draft), 1.0, [draft], [came])
        return source.asked - before

    assert steps(50) == 47  # of three it learns what a plain step costs
    source.right = False
    assert steps(1000) < 60
    source.right = True
    steps(400)
    assert steps(50) >= 47


@pytest.mark.parametrize(("adapts", "sizes"), [(False, [3, 3, 3, 3]), (True, [3, 3, 2, 3])])
def test_a_schedule_follows_how_drafts_do(adapts, sizes, monkeypatch) -> None:
    draft_always(monkeypatch)
    source, found = Right(), []
    drafter = Drafter(source, 1, [2, 4], Known(), most=3, adapts=adapts)
    for right in (True, False, True, True):
        (draft,) = drafter.draft([0])
        drafter.note(1 + len(draft), 1.0, [draft], [[*draft, 7] if right else [1]])
        found.append(len(draft))
    assert found == sizes


def test_odds_are_of_the_tokens_up_to_the_first_wrong_one() -> None:
    odds = Odds(3)
    odds.note(Draft([1, 2, 3], [1, 1, 1]), [1, 9, 3])
    rate = pytest.approx((0.5 + 0.1 * 0.5) * 0.9)
    assert odds.rate == rate
    assert odds.of(Draft([5, 6], [0, 2])) == [0.5, 0.25]
    assert odds.of(Draft([5], [1])) == [rate]


def test_what_has_come_of_drafts_is_counted(exact, eager) -> None:
    model = make("float32")
    ids = torch.tensor([[5, 9, 3], [4, 4, 4]])
    assert model.draft_counts == DraftCounts()
    tokens = model.generate(ids, max_new_tokens=120, speculate="auto")[:, 3:]
    counts = model.draft_counts
    assert counts.tokens == tokens.numel() - 2  # the first ones come from the prefill
    assert counts.tokens - counts.steps == sum(counts.accepted)
    assert counts.tokens_per_step == counts.tokens / counts.steps > 1
    assert all(0 <= accepted <= drafted for accepted, drafted in zip(counts.accepted, counts.drafted, strict=True))
    assert counts.acceptance[0] == counts.accepted[0] / counts.drafted[0]
    assert DraftCounts().acceptance == [None] * 7


@pytest.mark.parametrize(
    ("given_settings", "expected"),
    [
        ({}, None),
        ({"speculate": "off"}, None),
        ({"speculate": None}, None),
        ({"speculate": "auto"}, (32, 32)),
        ({"prompt_lookup_num_tokens": 3}, (3, 32)),
        ({"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 2}, (3, 2)),
        ({"speculate": "auto", "max_matching_ngram_size": 99}, (32, 32)),
    ],
)
def test_settings(given_settings, expected, exact) -> None:
    runner = Runner(exact)
    for config, call in ((GenerationConfig(), given_settings), (GenerationConfig(other=given_settings), {})):
        drafting = drafting_of(config, call, runner)
        if expected is None:
            assert drafting is None
        else:
            source = drafting.source([Request(torch.tensor([1]), 1)])
            assert (drafting.most, source.rows[0].longest) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("speculate", "yes"),
        ("prompt_lookup_num_tokens", 0),
        ("max_matching_ngram_size", "2"),
        ("prompt_lookup_pool_tokens", -1),
        ("num_assistant_tokens", 0),
        ("num_assistant_tokens_schedule", "sometimes"),
        ("assistant_confidence_threshold", 2),
    ],
)
def test_a_setting_out_of_range_is_refused(exact, name, value) -> None:
    with pytest.raises(ValueError, match=name):
        exact.generate(torch.tensor([[1]]), **{"speculate": "auto", name: value})
