"""Speculative decoding gives what plain decoding gives, whatever is drafted, and drafts where it pays."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import SHAPE

from fastllama import LlamaConfig, LlamaForCausalLM, StaticCache
from fastllama.config import GenerationConfig
from fastllama.engine.runner import Runner
from fastllama.generation import speculation
from fastllama.generation.request import Request
from fastllama.generation.speculation import Costs, Drafter, Lookup, Odds, drafts_of

VOCABULARY = SHAPE["vocab_size"]
KINDS = [("float32", None, None), ("bfloat16", None, None), ("float16", None, None), ("bfloat16", "int8", None),
         ("bfloat16", "int4", "int8")]  # fmt: skip


def make(dtype: str, scheme: str | None = None, cache: str | None = None, folder=None) -> LlamaForCausalLM:
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | {"initializer_range": 0.3})).to(getattr(torch, dtype)).eval()
    if scheme is not None:
        model.save_pretrained(folder)
        model = LlamaForCausalLM.from_pretrained(folder, dtype, quantize=scheme, kv_cache_dtype=cache)
    model.prefix_caching = False  # what it reuses other kernels have computed
    return model


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: "-".join(filter(None, kind)))
def model(request, tmp_path_factory) -> LlamaForCausalLM:
    return make(*request.param, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def exact() -> LlamaForCausalLM:
    return make("float32")


@pytest.fixture
def eager(monkeypatch) -> list[int]:
    """Drafts whatever it costs; a list of how many tokens a row were drafted in each step."""
    monkeypatch.setattr(speculation, "MARGIN", 0.0)
    monkeypatch.setattr(Costs, "of", lambda self, tokens: 1.0)
    genuine, sizes = Runner.step_with, []

    def step_with(self, draft_bt):
        sizes.append(draft_bt.shape[1])
        return genuine(self, draft_bt)

    monkeypatch.setattr(Runner, "step_with", step_with)
    return sizes


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
        "bad_words_ids": st.none() | st.lists(st.lists(few, min_size=1, max_size=3), min_size=1, max_size=3),
    }
)


def batch_of(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


@settings(deadline=None, max_examples=60)
@given(prompts=st.lists(st.lists(few, min_size=1, max_size=40), min_size=1, max_size=3), call=calls)
def test_tokens_are_those_of_plain_decoding(model, prompts, call) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculation, "MARGIN", 0.0)
        patch.setattr(Costs, "of", lambda self, tokens: 1.0)
        batch = batch_of(prompts)
        plain = model.generate(**batch, **call, pad_token_id=1)
        drafted = model.generate(**batch, **call, pad_token_id=1, speculate="auto")
    assert torch.equal(plain, drafted)


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(prompts=st.lists(st.lists(few, min_size=1, max_size=60), min_size=1, max_size=4), call=calls)
def test_many_drawn(exact, prompts, call) -> None:
    test_tokens_are_those_of_plain_decoding.hypothesis.inner_test(exact, prompts, call)


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


def test_next_to_a_cache_or_a_token_mask_nothing_is_drafted(exact, eager) -> None:
    ids = torch.tensor([[5, 9, 3]])
    plain = exact.generate(ids, max_new_tokens=30)
    cache = StaticCache(exact.config, 1, 64)
    assert torch.equal(exact.generate(ids, max_new_tokens=30, past_key_values=cache, speculate="auto"), plain)
    allowed = exact.generate(ids, max_new_tokens=30, token_mask=lambda *args: None, speculate="auto")
    assert torch.equal(allowed, plain)
    assert not eager


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


# ---- what is drafted -----------------------------------------------------------------------------------------------


@given(st.lists(few, min_size=1, max_size=60), st.integers(1, 8), st.integers(1, 12))
def test_a_draft_is_what_followed_the_longest_match(text, count, longest) -> None:
    lookup = Lookup(longest)
    lookup.extend(text)
    found, length = lookup.draft(count)
    key = min(2, longest)

    def match(place: int) -> int:
        fits = (
            n for n in range(longest, key - 1, -1) if n <= place and text[place - n : place] == text[len(text) - n :]
        )
        return next(fits, 0)

    matches = {place: match(place) for place in range(key, len(text))}
    recent = sorted(place for place, n in matches.items() if n)[-16:]
    assert length == max((matches[place] for place in recent), default=0)
    if not length:
        assert found == []
        return
    (place,) = sorted(place for place in recent if matches[place] == length)[-1:]
    whole = list(text)
    while len(whole) < place + count:
        whole.append(whole[place + len(whole) - len(text)])
    assert found == whole[place : place + count]


def test_a_row_drafts_while_it_pays() -> None:
    costs = Costs()
    for tokens, seconds in ((1, 1.0), (4, 1.3)):
        assert costs.of(tokens) == pytest.approx(1 + 0.03 * (tokens - 1))  # a guess
        for each in (9.0, seconds, seconds):  # the first one makes what it needs
            costs.note(tokens, each)
    assert (costs.of(1), costs.of(4)) == (1.0, 1.3)
    drafter = Drafter([torch.tensor([1, 2, 3, 4, 5, 1, 2])], 32, [4], costs)
    assert drafter.draft([0]) == [[3, 4, 5]]
    for other in range(100, 130):  # misses
        drafter.note(1, 1.0, [[other, 1, 2]])
        drafter.draft([0])
    assert drafter.draft([0]) == [[]]
    for _ in range(60):  # what would have been right
        drafter.note(1, 1.0, [drafter.rows[0].draft(3)[0]])
        drafter.draft([0])
    assert len(drafter.draft([0])[0]) == 3
    assert drafter.draft([]) == [[]]


def test_odds_are_of_the_tokens_up_to_the_first_wrong_one() -> None:
    odds = Odds()
    odds.note(4, [1, 2, 3], [1, 9, 3])
    assert odds.of(2) == odds.of(9) == 0.5
    assert odds.of(4) == odds.of(3) == pytest.approx((0.5 + 0.1 * 0.5) * 0.9)


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
def test_settings(given_settings, expected) -> None:
    assert drafts_of(GenerationConfig(), given_settings) == expected
    assert drafts_of(GenerationConfig(other=given_settings), {}) == expected


@pytest.mark.parametrize(
    ("name", "value"), [("speculate", "yes"), ("prompt_lookup_num_tokens", 0), ("max_matching_ngram_size", "2")]
)
def test_a_setting_out_of_range_is_refused(exact, name, value) -> None:
    with pytest.raises(ValueError, match=name):
        exact.generate(torch.tensor([[1]]), **{"speculate": "auto", name: value})
