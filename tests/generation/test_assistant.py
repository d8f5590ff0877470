"""Drafts by a second model: what it is asked for, what it keeps, and what is refused."""

from __future__ import annotations

import threading

import pytest
import torch
from drafts import make

from fastllama import LlamaConfig, LlamaForCausalLM, StaticCache
from fastllama.engine.runner import Runner
from fastllama.generation import assistant, drafting
from fastllama.generation.assistant import AssistantSource
from fastllama.generation.request import Request
from fastllama.integrations.transformers import accelerate, unaccelerate

IDS = torch.tensor([[5, 9, 3, 7], [4, 4, 4, 1]])


def test_a_model_that_agrees_is_believed(exact, eager) -> None:
    twin = make("float32")
    plain = exact.generate(IDS, max_new_tokens=41)
    drafted = exact.generate(IDS, max_new_tokens=41, assistant_model=twin, assistant_confidence_threshold=0)
    assert torch.equal(plain, drafted)
    assert 40 <= sum(eager) + len(eager) < 48  # all of them come true


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_twin_samples_the_same_tokens(temperature, exact, eager) -> None:
    call = {"do_sample": True, "temperature": temperature, "seed": 5, "max_new_tokens": 41, "eos_token_id": ()}
    plain = exact.generate(IDS, **call)
    drafted = exact.generate(IDS, assistant_model=make("float32"), assistant_confidence_threshold=0, **call)
    assert torch.equal(plain, drafted)
    assert 40 <= sum(eager) + len(eager) < 48


def test_it_drafts_as_it_would_decode_whatever_was_taken_of_its_drafts(second) -> None:
    prompts = [torch.tensor([5, 9, 3, 7]), torch.tensor([4, 2]), torch.tensor([6] * 20)]
    texts, generator = [prompt.tolist() for prompt in prompts], torch.Generator().manual_seed(1)
    runner = Runner(second)
    with runner.session():
        source = AssistantSource(runner, [Request(prompt, 99) for prompt in prompts], threshold=0.0)
        for count in (3, 7, 1, 3, 0, 7, 3, 1, 7):
            found = source.draft([0, 1, 2], count) if count else {}
            for row, text in enumerate(texts):
                draft = found[row].tokens if count else []
                with torch.no_grad():
                    for at, token in enumerate(draft):
                        assert token == int(second(torch.tensor([text + draft[:at]])).logits[0, -1].argmax())
                taken = int(torch.randint(0, count + 1, (), generator=generator)) if count else 12
                new = [*draft[:taken], *torch.randint(0, 90, (1 if count else 12,), generator=generator).tolist()]
                source.extend(row, new)
                text += new
        source.close()
    with runner.session():
        runner.reserve(3, 200)
        starts = runner._reuse({row: torch.tensor(text) for row, text in enumerate(texts)}, 1)
    assert all(starts[row] > len(prompt) for row, prompt in enumerate(prompts))  # what it has computed counts later


def test_a_draft_ends_before_a_token_that_is_hardly_probable(second) -> None:
    prompt, threshold = torch.tensor([5, 9, 3, 7]), 0.5
    runner = Runner(second)
    with runner.session():
        whole = AssistantSource(runner, [Request(prompt, 99)], threshold=0.0).draft([0], 7)[0].tokens
    with torch.no_grad():
        logits = second(torch.cat((prompt, torch.tensor(whole)))[None]).logits[0, 3:-1]
    probable = logits.softmax(-1).gather(1, torch.tensor(whole)[:, None])[:, 0]
    expected = whole[: int((probable >= threshold).long().cumprod(0).sum())]
    assert len(expected) < 7
    with runner.session():
        found = AssistantSource(runner, [Request(prompt, 99)], threshold).draft([0], 7)
    assert (found[0].tokens if found else []) == expected


def test_interrupted_while_it_drafts_it_keeps_nothing_wrong(exact, second, eager, monkeypatch) -> None:
    genuine, calls = Runner.write, []

    def write(self, *args):
        calls.append(0)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return genuine(self, *args)

    monkeypatch.setattr(Runner, "write", write)
    second.prefix_caching = True
    with pytest.raises(KeyboardInterrupt):
        exact.generate(IDS, max_new_tokens=40, assistant_model=second, assistant_confidence_threshold=0)
    longer = exact.generate(IDS, max_new_tokens=20)
    with_cache = second.generate(longer, max_new_tokens=20)
    second.prefix_caching = False
    assert torch.equal(second.generate(longer, max_new_tokens=20), with_cache)
    assert torch.equal(exact.generate(IDS, max_new_tokens=20, assistant_model=second), longer)


def test_two_models_that_draft_for_each_other_wait_in_one_order(exact, second) -> None:
    expected = {id(m): m.generate(IDS, max_new_tokens=30).tolist() for m in (exact, second)}
    found: list[bool] = []

    def decode(model: LlamaForCausalLM, other: LlamaForCausalLM) -> None:
        for _ in range(5):
            tokens = model.generate(IDS, max_new_tokens=30, assistant_model=other)
            found.append(tokens.tolist() == expected[id(model)])

    threads = [threading.Thread(target=decode, args=pair, daemon=True) for pair in ((exact, second), (second, exact))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [True] * 10


def test_a_stream_takes_it(exact, second, eager) -> None:
    plain = exact.generate(IDS, max_new_tokens=30)[:, 4:]
    assert torch.equal(torch.stack([*exact.stream(IDS, max_new_tokens=30, assistant_model=second)], dim=1), plain)
    assert eager


def test_where_it_cannot_draft_the_model_decodes_alone(exact, second, eager, monkeypatch) -> None:
    monkeypatch.setattr(Runner, "why_no_logits", lambda self, rows: "of a reason")
    plain = exact.generate(IDS, max_new_tokens=20)
    assert torch.equal(exact.generate(IDS, max_new_tokens=20, assistant_model=second), plain)
    assert not eager


def test_settings_come_from_the_call_or_the_second_model(exact, second, eager, monkeypatch) -> None:
    thresholds = []
    genuine = assistant.AssistantSource.__init__

    def init(self, runner, requests, threshold) -> None:
        thresholds.append(threshold)
        genuine(self, runner, requests, threshold)

    monkeypatch.setattr(assistant.AssistantSource, "__init__", init)
    call = {"max_new_tokens": 20, "assistant_model": second}
    exact.generate(IDS, **call)
    second.generation_config.assistant_confidence_threshold = 0.7
    exact.generate(IDS, **call)
    exact.generate(IDS, assistant_confidence_threshold=0, num_assistant_tokens=1, **call)
    second.generation_config.other.clear()
    assert thresholds == [0.4, 0.7, 0]
    assert eager[-1] == 1


def test_what_cannot_draft_is_refused(exact) -> None:
    with pytest.raises(ValueError, match="is the model itself"):
        exact.generate(IDS, assistant_model=exact)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    other = LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape))
    with pytest.raises(ValueError, match="vocabulary of 50 tokens, the model one of"):
        exact.generate(IDS, assistant_model=other)


def test_its_cache_grows_in_the_middle_of_a_batch(exact, eager) -> None:
    other = make("float32")
    other.warmup(2, 16)
    plain = exact.generate(IDS, max_new_tokens=60)
    drafted = exact.generate(IDS, max_new_tokens=60, assistant_model=other, assistant_confidence_threshold=0)
    assert torch.equal(drafted, plain)
    assert other.engine.cache.max_cache_len > 16
    assert eager


@pytest.mark.parametrize(
    "setting",
    [{"num_beams": 2}, {"max_time": 60.0}, {"return_dict_in_generate": True}, {"logits_processor": [lambda _, x: x]}],
    ids=lambda setting: next(iter(setting)),
)
def test_next_to_what_the_step_does_not_do_it_is_left_out(setting, exact, second, eager, caplog) -> None:
    drafting.say_off.cache_clear()
    plain = exact.generate(IDS, max_new_tokens=8, **setting)
    other = exact.generate(IDS, max_new_tokens=8, assistant_model=second, **setting)
    pair = [getattr(each, "sequences", each) for each in (plain, other)]
    assert torch.equal(*pair)
    assert f"no tokens are drafted: next to {next(iter(setting))}" in caplog.text
    assert not eager


def test_next_to_a_cache_it_is_left_out(exact, second, eager) -> None:
    cache = StaticCache(exact.config, 2, 64)
    plain = exact.generate(IDS, max_new_tokens=20)
    assert torch.equal(exact.generate(IDS, max_new_tokens=20, past_key_values=cache, assistant_model=second), plain)
    assert not eager


def test_an_accelerated_model_takes_it(make_pair_once, second, eager) -> None:
    _, theirs = make_pair_once()
    model = accelerate(theirs)
    try:
        other = LlamaForCausalLM(model.fastllama.config).eval()
        plain = model.generate(IDS, max_new_tokens=30, do_sample=False)
        call = {"max_new_tokens": 30, "do_sample": False, "assistant_model": other, "assistant_confidence_threshold": 0}
        assert torch.equal(model.generate(IDS, **call), plain)
        assert eager
        beams = model.generate(IDS, max_new_tokens=8, num_beams=3, do_sample=False)
        for asked in ({"assistant_model": other}, {"speculate": "auto", "prompt_lookup_pool_tokens": 9}):
            assert torch.equal(model.generate(IDS, max_new_tokens=8, num_beams=3, do_sample=False, **asked), beams)
    finally:
        unaccelerate(model)


def test_off_is_off(exact, second, eager) -> None:
    exact.generate(IDS, max_new_tokens=20, speculate="off", assistant_model=second)
    exact.generate(IDS, max_new_tokens=20, speculate="off", prompt_lookup_num_tokens=5)
    assert not eager


def test_a_name_is_no_model(exact) -> None:
    with pytest.raises(TypeError, match="assistant_model is a str; expected a model that is loaded"):
        exact.generate(IDS, assistant_model="demo")
