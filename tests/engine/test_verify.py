"""Steps of several tokens: the logits of every position, against the eager forward."""

from __future__ import annotations

import pytest
import torch

from fastllama.engine.graphs import StepKey
from fastllama.engine.runner import Runner
from fastllama.generation.request import Request

VERIFY = (1, 2, 4, 8)


def prompts_of(*lengths: int) -> list[torch.Tensor]:
    return [torch.randint(0, 96, (length,)) for length in lengths]


@pytest.fixture(scope="module", params=["native", "compiled"])
def warm(make_pair_once, request) -> tuple:
    model, _ = make_pair_once()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTLLAMA_CPU_STEP", request.param)
        runner = Runner(model)
    runner.warmup(2, 80, speculate=True)
    return model, runner


@pytest.mark.parametrize("t", range(1, 9))
@pytest.mark.parametrize("lengths", [(1,), (30, 7)])
def test_logits_of_all_positions_equal_the_eager_forward(warm, t, lengths) -> None:
    model, runner = warm
    prompts = prompts_of(*lengths)
    with runner.session(), torch.compiler.set_stance("fail_on_recompile"):
        runner.prefill({slot: Request(prompt, 40) for slot, prompt in enumerate(prompts)})
        newest_b1 = runner.newest().read()[: len(lengths)]
        ids_bt = torch.cat((newest_b1, torch.randint(0, 96, (len(lengths), t - 1))), dim=1)
        position_bt = torch.tensor(lengths)[:, None] + torch.arange(t)
        logits_btv = runner.write(ids_bt, position_bt).clone()
    for prompt, tail, logits_tv in zip(prompts, ids_bt, logits_btv, strict=True):
        with torch.no_grad():
            expected = model(torch.cat((prompt, tail))[None]).logits[0, len(prompt) :]
        assert (logits_tv - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_writing_moves_no_row_so_that_what_is_not_taken_is_forgotten(warm) -> None:
    _, runner = warm
    requests = {slot: Request(prompt, 20) for slot, prompt in enumerate(prompts_of(9, 3))}

    def tokens(written: bool) -> list:
        with runner.session():
            runner.prefill(requests)
            for step in range(10):
                if written:
                    ids_bt = torch.cat((runner.newest().read()[:2], torch.randint(0, 96, (2, 5))), dim=1)
                    runner.write(ids_bt, torch.tensor([[9], [3]]) + step + torch.arange(6))
                runner.step()
            return runner.output(0, 11).read()[:2].tolist()

    assert tokens(written=True) == tokens(written=False)


def test_there_is_one_compiled_step_for_each_batch_bucket_and_number_of_tokens(warm) -> None:
    _, runner = warm
    if runner._steps.is_one_operation(torch.float32, 2, 8):
        assert runner.compiled_steps == ()
        return
    expected = {StepKey("verify", b, t) for b in (1, 2) for t in VERIFY}
    assert {key for key in runner.compiled_steps if key.kind == "verify"} == expected
    assert next(iter(runner.compiled_steps)).batch == 2  # the largest first
