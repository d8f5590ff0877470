"""What drafts are worth: prescribed shares, costs of steps, the command."""

from __future__ import annotations

from pathlib import Path

import pytest
from drafts import draft_always

from fastllama import LlamaForCausalLM, load_tokenizer
from fastllama.engine.runner import Runner
from fastllama_benchmarks.records import read
from fastllama_benchmarks.speculation import Prescribed, measure, prompt_of, step_costs

SIZES = {"batch": 2, "prompt_len": 8, "new_tokens": 24, "rounds": 1}


@pytest.fixture
def model(checkpoint: str) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(checkpoint, progress=False)


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_that_share_of_drafts_comes_true(share: float) -> None:
    truth = [list(range(2000))]
    source, hits = Prescribed(truth, share), 0
    for at in range(0, 2000, 4):
        draft = source.draft([0], 4)[0]
        hits += sum(a == b for a, b in zip(draft.tokens, truth[0][at : at + 4], strict=True))
        assert all(0 <= token < 2000 for token in draft.tokens)
        source.extend(0, truth[0][at : at + 4])
    assert source.draft([0], 4) == {}
    assert hits / 2000 == pytest.approx(share, abs=0.04)


def test_figures_of_shares(model, memory, monkeypatch) -> None:
    draft_always(monkeypatch)
    found = measure(model, None, ["1", "0"], **SIZES)
    assert found["parity"]
    right, wrong = found["texts"]["1"], found["texts"]["0"]
    assert right["acceptance"] == [1.0] * 7
    assert right["tokens_per_step"] == 23 / 5  # 8, 8, 4, 2 and 1: no more than there is room for
    assert wrong["tokens_per_step"] == 1.0
    assert wrong["acceptance"] == [0.0] * 7
    assert all(text["same_tokens"] and text["ratio"] > 0 for text in found["texts"].values())
    assert set(found["costs"]) == {"2", "4", "8"}


def test_a_second_model_drafts_what_it_costs(model, memory, checkpoint, monkeypatch) -> None:
    written = []
    genuine = Runner.write

    def write(self, *args):
        written.append(self)
        return genuine(self, *args)

    monkeypatch.setattr(Runner, "write", write)
    second = LlamaForCausalLM.from_pretrained(checkpoint, progress=False)
    found = measure(model, None, ["0.9"], assistant=second, **SIZES)
    assert found["parity"]
    assert found["assistant"]["hidden_size"] == 32
    assert {*written} == {second.engine}


def test_other_tokens_are_wrong(model, memory, monkeypatch) -> None:
    genuine = Runner.step_with

    def step_with(self, draft_bt):
        return [[token ^ 1 for token in row] for row in genuine(self, draft_bt)]

    monkeypatch.setattr(Runner, "step_with", step_with)
    monkeypatch.setattr("fastllama.generation.speculation.MARGIN", 0.0)
    found = measure(model, None, ["1"], **SIZES)
    assert not found["parity"]
    assert not found["texts"]["1"]["same_tokens"]


def test_costs_are_over_a_step_of_one_token(model, monkeypatch) -> None:
    ticks = iter(range(10**6))
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))  # every step takes as long
    assert step_costs(model, 2, 8) == {2: 1.0, 4: 1.0, 8: 1.0}


def test_prompts_in_words() -> None:
    tokenizer = load_tokenizer("demo")
    wish = tokenizer.decode(prompt_of("code", tokenizer))
    assert "Rename the argument" in wish
    tokenizer.chat_template = None
    code, story = (tokenizer.decode(prompt_of(text, tokenizer)) for text in ("code", "story"))
    start = code[code.index('"""') :][:200]
    assert code.count(start) == 2  # it begins again
    assert "Once upon a time" in story


def test_the_command(bench, memory, checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    asked = ("--model", checkpoint, "--speculate", "0.7", "--prompt-len", "8", "--new-tokens", "16", "--rounds", "1")
    result = bench("decode", *asked, "--batch", "1,2", "--record", str(file), "--assistant-model", checkpoint, "-q")
    assert result.exit_code == 0, result.stderr
    assert "speed-up tokens a step accepted, by place" in " ".join(result.stdout.split())
    assert "drafts by a second model, 2 layers of 32" in result.stdout
    assert [(record["kind"], record["batch"]) for record in read(file)] == [("speculation", 1), ("speculation", 2)]


@pytest.mark.parametrize("text", ["poem", "1.5", "0.7,x", "-1", "."])
def test_texts_that_there_are_not_are_wrong_usage(bench, text: str) -> None:
    result = bench("decode", "--speculate", text)
    assert result.exit_code == 2
    assert "expected code, story, or a share from 0 to 1" in " ".join(result.stderr.split())
