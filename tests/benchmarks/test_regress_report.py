"""What a report says, for people and for programs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fastllama_benchmarks.regress.report import headline, markdown, table, to_dict

MACHINE: dict[str, Any] = {"cpu": "A processor", "cores": 2, "gpu": None}


@pytest.mark.parametrize(
    ("factors", "line"),
    [
        ((1.0, 1.0, 1.0), "PASS: not slower"),
        ((0.8, 0.8, 0.8), "PASS: not slower; faster: tpot-b1, ttft-b4"),
        ((1.1,) * 5, "FAIL: slower: tpot-b1, ttft-b4"),
        ((1.3, 0.7, 1.2), "INCONCLUSIVE, not failed; undecided: tpot-b1, ttft-b4"),
    ],
)
def test_the_headline_is_the_outcome(result_of, factors: tuple[float, ...], line: str) -> None:
    assert headline(result_of(*factors)) == line
    assert markdown(result_of(*factors), MACHINE, "command").startswith(f"## Latency: {line}\n")


def test_the_table_has_times_change_noise_threshold_and_verdict(result_of) -> None:
    found = result_of(1.1, 1.1, 1.1, 1.1, 1.1)
    interval = "+10.0 (+10.0 to +10.0)"
    assert table(found).to_numpy().tolist()[0] == ["tpot-b1", "1.000", "1.100", interval, "0.0", "3.0", "slower"]
    assert f"| tpot-b1 | 1.000 | 1.100 | {interval} | 0.0 | 3.0 | slower |" in markdown(found, MACHINE, "command")


def test_the_report_names_revisions_machine_settings_and_command(result_of) -> None:
    text = markdown(result_of(1.0, 1.0, 1.0), MACHINE, "fastllama-regress --base main")
    assert "- base: `aaaaaaaaaaaa` Before\n" in text
    assert "- head: the checkout at `bbbbbbbbbbbb` Say" in text
    assert "somebody, with uncommitted changes\n" in text
    assert "- demo, bfloat16, prompts of 128 tokens, 64 new tokens; 3 rounds of 8 turns\n- A processor, 2 cores" in text
    assert "- cpu, torch 2.13.0, Python 3.11.7, 2 threads\n" in text
    assert text.endswith("```\nfastllama-regress --base main\n```\n")
    assert "| change in round, % | 1 | 2 | 3 |\n| --- | --- | --- | --- |\n| decode step, batch 1 | +0.0 |" in text


def test_the_json_holds_every_sample_and_no_number_that_json_has_not(result_of) -> None:
    found = json.loads(json.dumps(to_dict(result_of(1.0, 1.0, 1.0), MACHINE), allow_nan=False))
    assert found["rounds"][2]["ttft-b4"]["base again"] == [[1e-3] * 4]
    assert found["settings"]["metrics"] == ["tpot-b1", "ttft-b4"]
    assert found["verdicts"]["tpot-b1"]["outcome"] == "no slower"
    assert found["head"]["dirty"] is True
    few = to_dict(result_of(1.0), MACHINE)
    assert few["verdicts"]["tpot-b1"]["change"] == {"mean": 0.0, "low": None, "high": None}
    json.dumps(few, allow_nan=False)
