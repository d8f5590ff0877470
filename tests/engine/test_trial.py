"""A compiled step is held against the step as it is written, on a text of its own; nothing of the engine changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from shapes import SHAPE

from fastllama import LlamaConfig, LlamaForCausalLM
from fastllama.engine import steps
from fastllama.engine.graphs import StepKey, Steps
from fastllama.engine.runner import Runner
from fastllama.engine.trial import agrees

STEPS = [
    ("decode", 1), ("decode_processed", 1), ("draft", 2), ("draft", 8), ("verify", 1), ("verify", 4),
    ("prefill", 8), ("prefill", 32),
]  # fmt: skip


@pytest.fixture(params=["float32", "bfloat16", "float64", "bfloat16-int8"])
def runner(request, monkeypatch) -> Runner:
    """Its steps are as they are written."""
    monkeypatch.setenv("FASTLLAMA_CPU_STEP", "compiled")
    monkeypatch.setattr(Steps, "_compile", lambda self, step: (step, step))
    monkeypatch.setattr(Steps, "bound", lambda self, key, step, *args: lambda: step(*args))
    torch.manual_seed(3)
    dtype, _, cache = request.param.partition("-")
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | {"initializer_range": 0.3})).to(getattr(torch, dtype)).eval()
    return Runner(model, torch.int8 if cache else None)


def everything(runner: Runner) -> list[torch.Tensor]:
    buffers = runner._ready
    return [*buffers.rows(2).tensors, *buffers.memory.k_caches, *buffers.memory.v_caches]


@pytest.mark.parametrize(("kind", "tokens"), STEPS)
@pytest.mark.parametrize("slots", [24, 64])
def test_a_step_agrees_with_itself_and_changes_nothing(runner, kind, tokens, slots) -> None:
    key = StepKey(kind, 2, tokens)
    with runner.session():
        runner.reserve(2, slots)
        buffers = runner._ready
        buffers.rows(2).ids_b1.copy_(torch.tensor([[3], [9]]))
        buffers.rows(2).position_b1.copy_(torch.tensor([[slots - 1], [11]]))
        buffers.rows(2).finished_b.copy_(torch.tensor([True, False]))
        step = runner._compiled(*key)
        before = [x.clone() for x in everything(runner)]
        assert agrees(runner._net, buffers, key, step)
        assert all(torch.equal(x, y) for x, y in zip(everything(runner), before, strict=True))

        def interrupted() -> None:
            step()
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            agrees(runner._net, buffers, key, interrupted)
        assert all(torch.equal(x, y) for x, y in zip(everything(runner), before, strict=True))


def wrongs(runner: Runner, key: StepKey, step: Callable[[], None]) -> dict[str, Callable[[], None]]:
    """Ways to compute something else, by what is wrong."""
    buffers, net = runner._ready, runner._net
    rows, memory = buffers.rows(2), buffers.memory
    inputs = rows if key.kind in ("decode", "decode_processed", "draft") else buffers.chunk(2, key.tokens)
    positions = rows.position_b1 if inputs is rows else inputs.position_bt
    ids = rows.ids_b1 if inputs is rows else inputs.ids_bt

    def altered(tensor: torch.Tensor, value: object) -> Callable[[], None]:
        """Run on other values of one tensor, which are put back."""

        def run() -> None:
            kept = tensor.clone()
            tensor.copy_(value if isinstance(value, torch.Tensor) else torch.full_like(tensor, value))
            step()
            if tensor.data_ptr() not in (rows.ids_b1.data_ptr(), rows.position_b1.data_ptr()):
                tensor.copy_(kept)

        return run

    def then(change: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            step()
            change()

        return run

    found = {
        "does nothing": lambda: None,
        "embeds one token": altered(ids, 0),
        "sees no position": altered(memory.cos_sd, 1.0),
        "forgets a layer": then(lambda: memory.v_caches[1].zero_()),
    }
    if key.kind == "verify":
        found["scales logits"] = then(lambda: buffers.logits(2, key.tokens).mul_(1.2))
    if inputs is rows:
        found["gives another token"] = then(lambda: rows.output_bn.add_(1).remainder_(net.vocab_size))
        found["keeps another token"] = then(lambda: rows.ids_b1.add_(1))
        found["stays"] = then(lambda: positions.sub_(1))
        found["counts no step"] = then(lambda: rows.step_b.zero_())
    if key.kind in ("decode_processed", "draft"):
        found["has no penalty"] = altered(rows.processing.bias_values, 0.0)
    if key.kind == "draft":
        drafts = buffers.draft(2, key.tokens - 1)
        found["drafts nothing"] = altered(drafts, 1)
        found["takes one token"] = lambda: steps.decode_processed(net, rows, memory)
        found["takes wrong drafts"] = then(lambda: rows.output_bn[:, 0].add_(1))
    return found


@pytest.mark.parametrize(("kind", "tokens"), STEPS)
def test_what_computes_something_else_does_not_agree(runner, kind, tokens) -> None:
    key = StepKey(kind, 2, tokens)
    with runner.session():
        runner.reserve(2, 64)
        step = runner._compiled(*key)
        passed = [
            name for name, run in wrongs(runner, key, step).items() if agrees(runner._net, runner._ready, key, run)
        ]
    assert not passed
