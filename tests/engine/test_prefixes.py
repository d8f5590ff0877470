"""Prompts that begin like what a slot holds: computed from where they differ, with the tokens of a new engine."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from fastllama import LlamaConfig, LlamaForCausalLM
from fastllama.config import RopeParameters
from fastllama.engine import steps
from fastllama.engine.prefixes import LEAST_REUSED
from fastllama.engine.runner import Runner
from fastllama.generation.loop import decode
from fastllama.generation.request import Request

SHAPE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


class CompiledPrefill(Runner):
    """Prefills as on CUDA."""

    _compiles_prefill = True


@pytest.fixture(params=["native", "compiled", "compiled prefill"])
def runner(model, request, monkeypatch) -> Runner:
    if request.param != "native":
        monkeypatch.setenv("FASTLLAMA_CPU_STEP", "compiled")
    return (CompiledPrefill if request.param == "compiled prefill" else Runner)(model)


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """The number of tokens of each chunk that was prefilled, of all rows."""
    counts: list[int] = []

    def counted(prefill: Callable[..., None], net, chunk, *rest) -> None:
        counts.append(chunk.ids_bt.numel())
        prefill(net, chunk, *rest)

    for name in ("prefill", "prefill_and_sample"):
        prefill = getattr(steps, name)
        monkeypatch.setattr(steps, name, lambda *args, prefill=prefill: counted(prefill, *args))
    return counts


def tokens_of(runner: Runner, prompts: list[torch.Tensor], new: int = 6) -> list[list[int]]:
    return torch.cat(list(decode(runner, [Request(prompt, new) for prompt in prompts])), dim=1).tolist()


def some(count: int) -> torch.Tensor:
    return torch.randint(0, 96, (count,))


def test_random_turns_give_the_tokens_of_an_engine_that_holds_nothing(model, runner) -> None:
    draw, plain = random.Random(3), Runner(model)
    plain.reuses_prefixes = False
    texts = [some(30)]
    for _ in range(25):
        prompts = []
        for _ in range(draw.choice([1, 1, 2, 3])):
            begin = draw.choice(texts)
            prompts.append(torch.cat((begin[: draw.randint(1, len(begin))], some(draw.choice([1, 3, 20])))))
        got = tokens_of(runner, prompts)
        assert got == tokens_of(plain, prompts)
        texts += [torch.cat((prompt, torch.tensor(new)))[:150] for prompt, new in zip(prompts, got, strict=True)]


def test_a_turn_costs_its_own_tokens(model, computed) -> None:
    runner, prompt = Runner(model), some(40)
    (answer,) = tokens_of(runner, [prompt])
    computed.clear()
    turn = torch.cat((prompt, torch.tensor(answer), some(5)))
    (again,) = tokens_of(runner, [turn])
    assert computed == [1 + 5], "the newest token of the answer had not been computed"
    computed.clear()
    tokens_of(runner, [torch.cat((turn[:38], some(4))), torch.cat((turn, torch.tensor(again), some(3)))])
    assert sum(computed) == 2 * 4, "row 1 takes over what slot 0 held, row 0 the beginning of it"


def test_a_row_that_was_freed_while_others_decode_is_taken_up_again(model, computed) -> None:
    runner, prompts = Runner(model), [some(20), some(30)]
    with runner.session():
        runner.reserve(2, 100)
        runner.prefill({slot: Request(prompt, 40) for slot, prompt in enumerate(prompts)})
        for _ in range(5):
            runner.step()
        new = runner.output(0, 6).read()[0]
        runner.free(0)
        for _ in range(5):
            runner.step()  # slot 0 idles, and keeps what it holds
        computed.clear()
        turn = torch.cat((prompts[0], new, some(2)))
        runner.prefill({0: Request(turn, 4)})
        for _ in range(3):
            runner.step()
        assert computed == [1 + 2]
        got = runner.output(0, 4).read()[0].tolist()
    assert [got] == tokens_of(Runner(model), [turn], 4)


def test_short_beginnings_and_other_texts_are_computed(model, computed) -> None:
    runner, prompt = Runner(model), some(40)
    tokens_of(runner, [prompt])
    for turn in (torch.cat((prompt[: LEAST_REUSED - 1], (prompt[LEAST_REUSED - 1 :] + 1) % 96)), (prompt + 1) % 96):
        computed.clear()
        tokens_of(runner, [turn])
        assert computed == [40]


def test_a_cache_that_grows_keeps_what_it_holds(model, computed) -> None:
    runner, prompt = Runner(model), some(40)
    runner.warmup(1, 64)
    tokens_of(runner, [prompt])
    computed.clear()
    turn = torch.cat((prompt, some(60)))
    expected = tokens_of(Runner(model), [turn])
    computed.clear()
    assert tokens_of(runner, [turn]) == expected
    assert computed == [60]


def edit(model: LlamaForCausalLM, how: str) -> None:
    mlp = model.model.layers[0].mlp
    if how == "optimizer":
        with torch.no_grad():
            mlp.up_proj.weight[5, 7] += 1
    elif how == "merged adapter":
        mlp.up_proj.weight.data += torch.randn(48, 1) @ torch.randn(1, 32)
    elif how == "row of data":
        mlp.down_proj.weight.data[3] += 1
    elif how == "column of data":
        mlp.down_proj.weight.data[:, 3] += 1
    elif how == "part of a fused matrix":
        model.model.layers[0].self_attn.v_proj.weight.data[:, :16].zero_()
    else:
        model.model.embed_tokens.weight.data[int(model.edited_token)] += 1


@pytest.mark.parametrize(
    "how", ["optimizer", "merged adapter", "row of data", "column of data", "part of a fused matrix", "embedding"]
)
def test_edited_weights_are_seen(model, how, computed) -> None:
    prompt = some(40)
    model.edited_token = prompt[4]
    (answer,) = tokens_of(runner := Runner(model), [prompt])
    edit(model, how)
    turn = torch.cat((prompt, torch.tensor(answer), some(3)))
    computed.clear()
    got = tokens_of(runner, [turn])
    assert sum(computed) == len(turn)
    assert got == tokens_of(Runner(model), [turn])
    computed.clear()
    tokens_of(runner, [turn])
    assert computed == [1], "what was computed with the weights as they are now counts"


def test_an_adapter_that_comes_and_goes_leaves_nothing_behind(model) -> None:
    runner, weight = Runner(model), model.model.layers[0].mlp.up_proj.weight
    before, prompts = weight.detach().clone(), [some(40), some(40)]
    expected = [tokens_of(Runner(model), [prompt]) for prompt in prompts]
    tokens_of(runner, prompts[:1])
    weight.data += 1
    tokens_of(runner, prompts[1:])
    weight.data.copy_(before)
    assert [tokens_of(runner, [prompt]) for prompt in prompts] == expected


def test_weights_that_are_edited_while_rows_decode_are_seen(model) -> None:
    runner, prompt = Runner(model), some(40)
    stream = decode(runner, [Request(prompt, 6)])
    next(stream)
    edit(model, "optimizer")
    model.model.layers[0].self_attn.k_proj.weight.data.mul_(1.7)
    list(stream)
    assert tokens_of(runner, [prompt]) == tokens_of(Runner(model), [prompt])


def test_frequencies_that_follow_the_length_are_computed_for_each_length(computed) -> None:
    config = LlamaConfig(**SHAPE, rope=RopeParameters(rope_type="dynamic", factor=2.0))
    model = LlamaForCausalLM(config).eval()
    runner, prompt = Runner(model), some(40)
    tokens_of(runner, [prompt])
    computed.clear()
    tokens_of(runner, [prompt])
    assert computed == [40]


def test_a_prefill_that_was_interrupted_leaves_nothing_behind(model, monkeypatch) -> None:
    runner, prompt = Runner(model), some(40)
    expected = tokens_of(Runner(model), [prompt])
    tokens_of(runner, [some(40)])
    with monkeypatch.context() as patch:
        patch.setattr(steps, "prefill_and_sample", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tokens_of(runner, [prompt])
    assert tokens_of(runner, [prompt]) == expected


def test_logits_after_sequences_that_grow_branch_and_change_places(model, runner) -> None:
    draw = random.Random(5)
    beams = [some(20)] * 4
    for _ in range(12):
        beams = [
            torch.cat((draw.choice(beams), some(draw.choice([1, 1, 1, 3, 12])))) for _ in range(draw.randint(1, 5))
        ]
        with runner.session():
            runner.reserve(len(beams), 256)
            got = runner.logits_after(beams, goes_on=True).clone()
        for beam, logits_v in zip(beams, got, strict=True):
            with torch.no_grad():
                expected = model(beam[None]).logits[0, -1]
            assert (logits_v - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_logits_after_costs_one_step_a_token(model, computed) -> None:
    runner, beams = Runner(model), [some(20), some(25)]
    with runner.session():
        runner.reserve(2, 64)
        runner.logits_after(beams)
    computed.clear()
    with runner.session():
        runner.logits_after([torch.cat((beam, some(1))) for beam in reversed(beams)], goes_on=True)
    assert computed == []


def test_prompts_that_are_equal_are_computed_once(model, computed) -> None:
    tokens_of(Runner(model), [some(40)] * 3)
    assert computed == [39, 3]


def test_prompts_that_are_equal_have_equal_tokens(model, runner) -> None:
    prompt, other = some(40), some(30)
    got = tokens_of(runner, [prompt, other, prompt, prompt, other])
    plain = Runner(model)
    expected = [tokens_of(plain, [each])[0] for each in (prompt, other)]
    assert got == [expected[0], expected[1], expected[0], expected[0], expected[1]]
