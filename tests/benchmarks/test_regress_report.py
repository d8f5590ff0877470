"""What a report says, for people and for programs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastllama_benchmarks.regress.gate import Result, Settings, verdicts_of
from fastllama_benchmarks.regress.outputs import compare, first_difference, prompts
from fastllama_benchmarks.regress.report import headline, markdown, table, to_dict
from fastllama_benchmarks.regress.revisions import Revision
from fastllama_benchmarks.regress.rounds import SIDES, Metric, Round
from fastllama_benchmarks.workload import Unavailable

METRICS = (Metric("tpot", 1), Metric("ttft", 4))
MACHINE: dict[str, Any] = {"cpu": "A processor", "cores": 2, "gpu": None}
INFO = {"device": "cpu", "device_type": "cpu", "torch": "2.13.0", "python": "3.11.7", "threads": 2, "vocab_size": 9}
BASE = Revision("main", "a" * 40, "Before", False, "a" * 12)
HEAD = Revision(".", "b" * 40, "Say `x` | <b>y</b> for @somebody", True, "c" * 12, True)
TOKENS = {"base": {1: ((1, 2),)}, "head": {1: ((1, 3),)}}


def rounds_of(*factors: float) -> tuple[Round, ...]:
    """Rounds in which the head takes this many times as long as the base, which takes 1 ms."""
    return tuple(
        Round(
            {
                str(metric): {arm: [[1e-3 * (factor if SIDES[arm] == "head" else 1)] * 4] for arm in SIDES}
                for metric in METRICS
            },
            tokens=TOKENS,
            info=dict.fromkeys(SIDES, INFO),
        )
        for factor in factors
    )


def result_of(*factors: float, **settings: Any) -> Result:
    asked = Settings(Path(), "main", ".", Path("cache"), METRICS, **settings)
    rounds = rounds_of(*factors)
    return Result(asked, BASE, HEAD, rounds=rounds, verdicts=verdicts_of(rounds, asked.threshold))


def different(accepted: bool) -> Result:
    difference = first_difference(((1, 2, 3), (4, 5, 6)), ((1, 2, 9), (4, 8, 6)), prompt_len=17)
    factors = (1.0, 1.0, 1.0) if accepted else ()
    asked = result_of(1.0, 1.0, 1.0, accept_different_outputs=accepted)
    return replace(
        asked, difference=difference, rounds=rounds_of(*factors), verdicts=asked.verdicts if accepted else {}
    )


@pytest.mark.parametrize(
    ("factors", "line"),
    [
        ((1.0, 1.0, 1.0), "PASS: not slower"),
        ((0.8, 0.8, 0.8), "PASS: not slower; faster: tpot-b1, ttft-b4"),
        ((1.1,) * 5, "FAIL: slower: tpot-b1, ttft-b4"),
        ((1.3, 0.7, 1.2), "INCONCLUSIVE, not failed; undecided: tpot-b1, ttft-b4"),
    ],
)
def test_the_headline_is_the_outcome(factors: tuple[float, ...], line: str) -> None:
    assert headline(result_of(*factors)) == line
    assert markdown(result_of(*factors), MACHINE, "command").startswith(f"## Latency: {line}\n")


def test_the_table_has_times_change_noise_threshold_and_verdict() -> None:
    found = result_of(1.1, 1.1, 1.1, 1.1, 1.1)
    interval = "+10.0 (+10.0 to +10.0)"
    assert table(found).to_numpy().tolist()[0] == ["tpot-b1", "1.000", "1.100", interval, "0.0", "3.0", "slower"]
    assert f"| tpot-b1 | 1.000 | 1.100 | {interval} | 0.0 | 3.0 | slower |" in markdown(found, MACHINE, "command")


def test_a_side_s_time_is_the_quantile_that_is_judged() -> None:
    times = {arm: [[1e-3, 2e-3, 9.0]] * 40 for arm in SIDES}
    found = replace(result_of(1.0), rounds=(Round({str(metric): times for metric in METRICS}),))
    assert table(found).to_numpy().tolist()[0][1:3] == ["1.000", "1.000"]


def test_the_report_names_revisions_machine_settings_and_command() -> None:
    text = markdown(result_of(1.0, 1.0, 1.0), MACHINE, "fastllama-regress --base main")
    assert "- base: `aaaaaaaaaaaa` Before\n" in text
    assert "- head: the checkout at `bbbbbbbbbbbb` Say" in text
    assert "somebody, with uncommitted changes\n" in text
    assert "- demo, bfloat16, prompts of 128 tokens, 64 new tokens; 3 rounds of 8 turns\n- A processor, 2 cores" in text
    assert "- base: cpu, torch 2.13.0, Python 3.11.7, 2 threads\n" in text
    assert text.endswith("```\nfastllama-regress --base main\n```\n")
    assert "| change in round, % | 1 | 2 | 3 |\n| --- | --- | --- | --- |\n| decode step, batch 1 | +0.0 |" in text


def test_rounds_that_do_not_count_are_in_parentheses() -> None:
    found = result_of(1.0, 1.0, 1.0, 1.0)
    restless = {
        arm: [[1e-3 * (1 + (turn if SIDES[arm] == "head" else 7 - turn))] for turn in range(8)] for arm in SIDES
    }
    rounds = (*found.rounds[:3], replace(found.rounds[3], times={str(metric): restless for metric in METRICS}))
    text = markdown(replace(found, rounds=rounds, verdicts=verdicts_of(rounds, None)), MACHINE, "command")
    assert "| decode step, batch 1 | +0.0 | +0.0 | +0.0 | (+0.0) |" in text
    assert "is excluded (3 rounds; 1 disturbed, not counted)" in text


def test_a_subject_cannot_shape_the_report() -> None:
    text = markdown(result_of(1.0, 1.0, 1.0), MACHINE, "command")
    assert r"Say \`x\` \| \<b\>y\</b\> for \@somebody" in text


def test_an_inconclusive_report_warns() -> None:
    assert "**The machine was too noisy, or" in markdown(result_of(1.3, 0.7, 1.2), MACHINE, "command")
    assert "too noisy" not in markdown(result_of(1.0, 1.0, 1.0), MACHINE, "command")


def test_outputs_that_differ_are_the_whole_report() -> None:
    found = different(accepted=False)
    assert found.failed
    assert headline(found) == (
        "FAIL: outputs differ from token 1 (row 2 of 2, prompt of 17 tokens): base 5, head 8"
    )  # fmt: skip
    text = markdown(found, MACHINE, "command")
    assert "| change" not in text
    assert "- In float32 outputs differ from token 1" in text


def test_outputs_that_differ_can_be_accepted() -> None:
    found = different(accepted=True)
    assert not found.failed
    assert "base 5, head 8 (accepted)." in markdown(found, MACHINE, "command")


def test_a_difference_in_the_timed_dtype_is_only_reported() -> None:
    found = replace(result_of(1.0, 1.0, 1.0), timed_difference=first_difference(((1,),), ((2,),), 128))
    assert not found.failed
    assert "- In bfloat16 outputs differ from token 0 (prompt of 128 tokens): base 1, head 2; that is allowed" in (
        markdown(found, MACHINE, "command")
    )


def test_the_json_holds_every_sample_and_no_number_that_json_has_not() -> None:
    found = json.loads(json.dumps(to_dict(result_of(1.0, 1.0, 1.0), MACHINE), allow_nan=False))
    assert found["rounds"][2]["ttft-b4"]["base again"] == [[1e-3] * 4]
    assert found["settings"]["metrics"] == ["tpot-b1", "ttft-b4"]
    assert found["verdicts"]["tpot-b1"]["outcome"] == "no slower"
    assert found["head"]["dirty"] is True
    few = to_dict(result_of(1.0), MACHINE)
    assert few["verdicts"]["tpot-b1"]["change"] == {"mean": 0.0, "low": None, "high": None}
    json.dumps(few, allow_nan=False)


def test_rows_that_end_early_differ_where_they_end() -> None:
    found = first_difference(((1, 2, 3),), ((1, 2),), prompt_len=5)
    assert found is not None
    assert (found.token, found.base, found.head) == (2, 3, None)
    assert first_difference(((1, 2),), ((1, 2),), prompt_len=5) is None


def test_outputs_are_compared_on_short_prompts_and_on_every_batch_that_is_timed() -> None:
    cases = [(case.batch, case.prompt_len) for case in prompts(100, [1, 4], 128)]
    assert cases == [(1, 1), (1, 17), (1, 128), (4, 128)]


def test_a_worker_that_hides_its_tokens_is_refused() -> None:
    silent: Any = SimpleNamespace(run=lambda workload: SimpleNamespace(tokens=None))
    with pytest.raises(Unavailable, match="did not report its tokens"):
        compare(silent, silent, prompts(100, [1], 8))
