"""Start-up: phases that add up, caches that are empty when they should be, interleaving, and failures in one line."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastllama import LlamaForCausalLM
from fastllama_benchmarks import startup
from fastllama_benchmarks.contenders import Task
from fastllama_benchmarks.startup import measure, start, stored_weights
from fastllama_benchmarks.workload import Decode, Unavailable, Workload

WORKLOAD = Workload.random(64, 1, 5, 8)


@pytest.fixture(scope="module")
def right_tokens(checkpoint: str) -> tuple[int, ...]:
    """What the tiny checkpoint decodes greedily, by the eager forward without a cache."""
    model, ids = LlamaForCausalLM.from_pretrained(checkpoint, progress=False), WORKLOAD.input_ids()
    for _ in range(WORKLOAD.new_tokens):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return tuple(ids[0, WORKLOAD.prompt_len :].tolist())


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch, memory: type) -> Any:
    """Starts nothing: each process of a contender takes the seconds given for it (None: it breaks); notes them all."""

    def use(tokens: Any, **seconds: list[float | None]) -> list[tuple[str, str, bool]]:
        events: list[tuple[str, str, bool]] = []

        def fake(key: str, task: Task, workload: Workload, caches: Path) -> Any:
            events.append((key, caches.name, not caches.exists()))
            caches.mkdir(exist_ok=True)
            taken = seconds[key].pop(0)
            if taken is None:
                raise Unavailable("it broke")
            return {"compile": taken / 2, "to_first_token": taken}, tokens.get(key)

        worker = SimpleNamespace(load=lambda task: None, info={"threads": 1}, close=lambda: None)
        monkeypatch.setattr(startup, "start", fake)
        monkeypatch.setattr(startup, "Remote", lambda key: worker)
        return events

    return use


def test_the_phases_up_to_the_first_token_add_up_to_the_time_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(workload: Workload) -> Decode:
        done = runs.pop(0)
        clock.now += done.ttft + sum(done.tpot)
        return done

    clock = SimpleNamespace(now=0.0)
    runs = [Decode(((1, 2),), 5.0, (0.5,)), *[Decode(((1, 2),), 0.5, (0.5,))] * 3]
    info = {"phases": {"interpreter": 0.25, "import": 0.75, "load": 1.0}}
    worker = SimpleNamespace(load=lambda task: None, info=info, run=run, close=lambda: None)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(startup, "Remote", lambda key, env: worker)
    phases, tokens = start("eager", Task("", "float32"), WORKLOAD, Path())
    parts = {**info["phases"], "compile": 4.5, "first_token": 0.5}
    assert phases == parts | {"to_first_token": 7.0, "to_last_token": 7.5}
    assert sum(parts.values()) == phases["to_first_token"]
    assert tokens == (1, 2)


def test_contenders_start_interleaved_first_on_empty_caches_then_on_what_they_left(
    checkpoint, right_tokens, fakes
) -> None:
    tokens = dict.fromkeys(("fastllama", "eager"), right_tokens)
    events = fakes(tokens, fastllama=[9.0, 1.0, 3.0, 2.0], eager=[9.0, 2.0, 6.0, 4.0])
    found = measure(checkpoint, prompt_len=5, rounds=3, peers=("eager",))
    names = [name for name, _, _ in events]
    assert names == ["fastllama", "eager", "eager", "fastllama", "fastllama", "eager", "eager", "fastllama"]
    assert [is_empty for _, _, is_empty in events] == [True, True] + [False] * 6
    assert len({caches for _, caches, _ in events}) == 2, "each has caches of its own"
    assert found["phases"]["empty"]["to_first_token"] == 9.0
    assert found["phases"]["warm"] == {"compile": 1.0, "to_first_token": 2.0}
    assert found["peers"]["eager forward"]["ratio"] == {"empty": 1.0, "warm": 2.0}
    assert found["parity"] is found["peers"]["eager forward"]["parity"] is True


def test_a_peer_that_breaks_on_the_way_is_one_line_and_not_measured(checkpoint, right_tokens, fakes) -> None:
    fakes({"fastllama": right_tokens}, fastllama=[1.0, 1.0], eager=[1.0, None])
    found = measure(checkpoint, prompt_len=5, rounds=1, peers=("eager", "gpt-fast"))
    assert found["peers"]["eager"] == {"unavailable": "it broke"}
    assert "--gpt-fast DIR" in found["peers"]["gpt-fast"]["unavailable"]
    fakes({}, fastllama=[None])
    with pytest.raises(Unavailable, match="it broke"):
        measure(checkpoint, prompt_len=5, rounds=1)


def test_random_weights_and_weights_of_another_dtype_are_written_to_files_first(checkpoint, tmp_path) -> None:
    assert stored_weights(checkpoint, "float32", tmp_path) == Path(checkpoint).resolve()
    copy = stored_weights(checkpoint, "bfloat16", tmp_path)
    assert LlamaForCausalLM.from_pretrained(copy, progress=False).dtype == torch.bfloat16


@pytest.mark.parametrize("contender", ["transformers", pytest.param("fastllama", marks=pytest.mark.slow)])
def test_a_started_process_reports_its_phases_and_decodes_the_right_tokens(
    checkpoint, right_tokens, tmp_path, contender, monkeypatch
) -> None:
    monkeypatch.setattr(startup, "environment", lambda _: None)  # the caches of all tests
    phases, tokens = start(contender, Task(checkpoint, "float32"), WORKLOAD, tmp_path / "caches")
    assert tokens == right_tokens
    assert all(seconds >= 0 for seconds in phases.values())
    assert phases["load"] < phases["to_first_token"] < phases["to_last_token"]


def test_the_command_prints_a_table_and_the_record_is_the_last_line(
    bench, checkpoint, right_tokens, fakes, tmp_path
) -> None:
    fakes({"fastllama": right_tokens}, fastllama=[8.0, 2.0], eager=[4.0, 3.0])
    record, sizes = tmp_path / "records.jsonl", ("--prompt-len", "5", "--rounds", "1", "--device", "cpu")
    done = bench("startup", "--model", checkpoint, *sizes, "--peers", "eager", "--json", "-", "--record", str(record))
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == json.loads(record.read_text())
    assert found["memory_bandwidth_gb_s"] == 10
    assert found["peers"]["eager forward"]["ratio"] == {"empty": 0.5, "warm": 1.5}
    assert "1.50 x" in done.stderr
    assert "eager forward reports no tokens" in done.stderr
