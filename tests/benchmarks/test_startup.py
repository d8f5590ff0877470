"""Start-up: phases that add up, caches that are empty when they should be, turns, and what goes wrong in one line."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fastllama import LlamaConfig, LlamaForCausalLM
from fastllama.cli.app import app
from fastllama_benchmarks.harness import Unavailable, Workload
from fastllama_benchmarks.peers import Places
from fastllama_benchmarks.startup import measure as startup
from fastllama_benchmarks.startup import starters as startup_starters
from fastllama_benchmarks.startup.measure import EMPTY, WARM, measure, stored_weights
from fastllama_benchmarks.startup.runner import Call, phases_of
from fastllama_benchmarks.startup.starters import (
    CACHES,
    GptFast,
    LlamaBench,
    Script,
    Started,
    environment,
    last_words,
)

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
    initializer_range=0.3,
    dtype="float32",
)
WORKLOAD = Workload.random(CONFIG.vocab_size, 1, 5, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint."""
    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    LlamaForCausalLM(CONFIG).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def right_tokens(folder: Path) -> tuple[int, ...]:
    """What the tiny checkpoint decodes greedily, by the eager forward without a cache."""
    model, ids = LlamaForCausalLM.from_pretrained(folder, progress=False), WORKLOAD.input_ids()
    for _ in range(WORKLOAD.new_tokens):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return tuple(ids[0, WORKLOAD.prompt_len :].tolist())


class Fake:
    """Starts nothing: notes the folder of each start and whether it was empty, and says what it was told to."""

    def __init__(self, name: str, tokens: tuple[int, ...] | None, seconds: list[float], events: list[Any]) -> None:
        self.name, self._tokens, self._seconds, self._events = name, tokens, iter(seconds), events

    def start(self, caches: Path) -> Started:
        self._events.append((self.name, caches.name, not caches.exists()))
        caches.mkdir(exist_ok=True)
        seconds = next(self._seconds)
        if math.isnan(seconds):
            raise Unavailable("it broke")
        return Started({"compile": seconds / 2, "to_first_token": seconds}, self._tokens)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes :func:`measure` start these."""

    def use(*starters: Fake) -> None:
        monkeypatch.setattr(startup, "open_starters", lambda *_: (list(starters), {}))

    return use


def test_the_phases_up_to_the_first_token_add_up_to_the_time_of_the_whole() -> None:
    first, settled = Call((1, 2), (12.0, 17.0, 17.5)), Call((1, 2), (20.0, 20.5, 21.0))
    phases = phases_of([10.0, 10.25, 11.0, 12.0], [first, settled])
    parts = {"interpreter": 0.25, "import": 0.75, "load": 1.0, "compile": 4.5, "first_token": 0.5}
    assert phases == parts | {"to_first_token": 7.0, "to_last_token": 7.5}
    assert sum(parts.values()) == phases["to_first_token"]


def test_contenders_start_by_turns_first_on_empty_caches_then_on_what_they_left(folder, right_tokens, fakes) -> None:
    events: list[Any] = []
    fakes(*(Fake(name, right_tokens, [9.0, 1.0, 3.0, 2.0], events) for name in ("fastllama", "peer")))
    found = measure(str(folder), prompt_len=5, rounds=3)
    names = [name for name, _, _ in events]
    assert names == ["fastllama", "peer", "peer", "fastllama", "fastllama", "peer", "peer", "fastllama"]
    assert [is_empty for _, _, is_empty in events] == [True, True] + [False] * 6
    assert len({caches for _, caches, _ in events}) == 2, "each has caches of its own"
    assert [starts.medians(EMPTY)["to_first_token"] for starts in found.starts] == [9.0, 9.0]
    assert [starts.medians(WARM)["compile"] for starts in found.starts] == [1.0, 1.0]
    assert all(starts.parity.passed for starts in found.starts)


def test_every_round_on_empty_caches_has_new_ones(folder, right_tokens, fakes) -> None:
    events: list[Any] = []
    fakes(Fake("fastllama", right_tokens, [4.0, 6.0, 2.0], events))
    found = measure(str(folder), prompt_len=5, rounds=1, cold_rounds=2)
    assert [is_empty for _, _, is_empty in events] == [True, True, False]
    assert found.starts[0].medians(EMPTY)["to_first_token"] == 5.0
    assert found.to_dict()["cold_rounds"] == 2


def test_a_peer_that_breaks_on_the_way_is_told_and_not_measured(folder, right_tokens, fakes) -> None:
    fakes(Fake("fastllama", right_tokens, [1.0, 1.0], []), Fake("peer", None, [1.0, math.nan], []))
    found = measure(str(folder), prompt_len=5, rounds=1)
    assert found.missing == {"peer": "it broke"}
    assert [starts.name for starts in found.starts] == ["fastllama"]
    assert found.to_dict()["peers"] == {"peer": {"unavailable": "it broke"}}


def test_where_fastllama_itself_breaks_there_is_nothing_to_measure(folder, fakes) -> None:
    fakes(Fake("fastllama", None, [math.nan], []))
    with pytest.raises(Unavailable, match="it broke"):
        measure(str(folder), prompt_len=5, rounds=1)


def test_wrong_tokens_in_one_process_of_many_fail_the_gate(folder, right_tokens, fakes) -> None:
    class Fickle(Fake):
        def start(self, caches: Path) -> Started:
            started = super().start(caches)
            self._tokens = tuple((token + 1) % CONFIG.vocab_size for token in right_tokens)
            return started

    fakes(Fickle("fastllama", right_tokens, [1.0, 1.0], []))
    assert measure(str(folder), prompt_len=5, rounds=1).to_dict()["parity"] is False


def test_peers_that_are_not_there_say_so(folder, tmp_path) -> None:
    places = Places(tmp_path / "nowhere", tmp_path / "no-program")
    starters, missing = startup.open_starters(
        ("gpt-fast", "llama.cpp"), places, folder, "float32", "cpu", WORKLOAD, tmp_path
    )
    assert [starter.name for starter in starters] == ["fastllama"]
    assert "no checkout of gpt-fast" in missing["gpt-fast"]
    assert "no program" in missing["llama.cpp"]


def test_random_weights_and_weights_of_another_dtype_are_written_to_files_first(folder, tmp_path) -> None:
    assert stored_weights(str(folder), "float32", tmp_path) == folder.resolve()
    copy = stored_weights(str(folder), "bfloat16", tmp_path)
    assert LlamaForCausalLM.from_pretrained(copy, progress=False).dtype == torch.bfloat16


def test_processes_get_caches_of_their_own_and_nothing_that_slows_compiling(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("TORCH_COMPILE_DEBUG", "1")
    found = environment(tmp_path)
    assert "TORCH_COMPILE_DEBUG" not in found
    assert all(Path(found[name]).parent == tmp_path for name in CACHES)


@pytest.mark.parametrize(
    ("stderr", "expected"),
    [
        (
            "Traceback\n  a line\ntorch._inductor.exc.InductorError: no compiler\n\nSet TORCH_LOGS for more",
            "no compiler",
        ),
        ("it has no weights\n", "it has no weights"),
        ("", "it wrote nothing"),
    ],
)
def test_a_failed_process_is_explained_by_the_line_that_names_its_error(stderr: str, expected: str) -> None:
    assert last_words(stderr).endswith(expected)


def test_a_script_that_fails_gives_its_reason(tmp_path) -> None:
    script = Script("fastllama", "eager", tmp_path / "nowhere", "float32", "cpu", WORKLOAD, tmp_path)
    with pytest.raises(Unavailable, match=r"runner.py ended with code 1: .*CheckpointNotFoundError"):
        script.start(tmp_path / "caches")


@pytest.mark.parametrize("contender", ["eager", "transformers"])
def test_a_started_process_tells_its_phases_and_decodes_the_right_tokens(
    folder, right_tokens, tmp_path, contender
) -> None:
    script = Script(contender, contender, folder, "float32", "cpu", WORKLOAD, tmp_path)
    started = script.start(tmp_path / "caches")
    assert started.tokens == right_tokens
    phases = started.phases
    assert all(seconds >= 0 for seconds in phases.values())
    before = phases["interpreter"] + phases["import"] + phases["load"]
    assert before < phases["to_first_token"] < phases["to_last_token"]


@pytest.mark.slow
@pytest.mark.parametrize("contender", ["fastllama", "static"])
def test_a_compiled_contender_decodes_the_right_tokens(folder, right_tokens, tmp_path, contender, monkeypatch) -> None:
    monkeypatch.setattr(startup_starters, "environment", lambda _: dict(os.environ))  # the caches of all tests
    started = Script(contender, contender, folder, "float32", "cpu", WORKLOAD, tmp_path).start(tmp_path)
    assert started.tokens == right_tokens
    assert started.phases["compile"] > 0


def program(path: Path, source: str) -> str:
    """A file that runs as a program."""
    path.write_text(f"#!{sys.executable}\n{source}")
    path.chmod(0o755)
    return str(path)


def test_llama_bench_is_timed_as_a_whole_and_runs_the_prompt_once(tmp_path) -> None:
    told_to = str(tmp_path / "told")
    source = f"import json, sys\nprint('--no-warmup')\njson.dump(sys.argv[1:], open({told_to!r}, 'w'))"
    bench = LlamaBench(program(tmp_path / "llama-bench", source), tmp_path / "m.gguf", "cpu", WORKLOAD)
    started = bench.start(tmp_path / "caches")
    assert started.tokens is None
    assert set(started.phases) == {"to_first_token"}
    told = json.loads((tmp_path / "told").read_text())
    assert told[told.index("-p") + 1] == "5"
    assert told[told.index("-n") + 1] == "0"
    assert "--no-warmup" in told


def test_a_llama_bench_that_always_warms_up_is_not_used(tmp_path) -> None:
    with pytest.raises(Unavailable, match="no --no-warmup"):
        LlamaBench(program(tmp_path / "llama-bench", "print('usage')"), tmp_path / "m.gguf", "cpu", WORKLOAD)


def test_gpt_fast_is_timed_from_the_start_of_its_worker(folder, tmp_path) -> None:
    answer = {"tokens": [[1, 2]], "ttft": 0.25, "tpot": [0.5]}
    worker = (
        "import json, sys\n"
        "print(json.dumps({'ready': {}}), flush=True)\n"
        f"for line in sys.stdin: print(json.dumps({answer!r}), flush=True)\n"
    )
    starter = GptFast(tmp_path, folder, "cpu", WORKLOAD, tmp_path)
    starter._command = [sys.executable, "-c", worker]
    started = starter.start(tmp_path / "caches")
    assert started.tokens == (1, 2)
    assert started.phases["first_token"] == 0.25
    assert started.phases["to_first_token"] == pytest.approx(started.phases["load"] + 0.25)


def invoke(*arguments: str) -> Any:
    """Runs the command in this process."""
    return CliRunner().invoke(app, ["bench", "startup", *arguments])


def test_the_command_prints_a_table_and_the_record_is_the_last_line(folder, right_tokens, fakes, tmp_path) -> None:
    fakes(Fake("fastllama", right_tokens, [8.0, 2.0], []), Fake("peer", None, [4.0, 3.0], []))
    record = tmp_path / "records.jsonl"
    done = invoke("--model", str(folder), "--prompt-len", "5", "--rounds", "1", "--json", "-", "--record", str(record))
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == json.loads(record.read_text())
    assert found["phases"] == {
        "empty": {"compile": 4.0, "to_first_token": 8.0},
        "warm": {"compile": 1.0, "to_first_token": 2.0},
    }
    assert found["peers"]["peer"]["ratio"] == {"empty": 0.5, "warm": 1.5}
    assert "1.5 x" in done.stderr
    assert "peer does not tell its tokens" in done.stderr


def test_the_command_refuses_figures_of_wrong_tokens(folder, fakes, tmp_path) -> None:
    fakes(Fake("fastllama", (0,) * 8, [1.0, 1.0], []))
    record = tmp_path / "records.jsonl"
    done = invoke("--model", str(folder), "--prompt-len", "5", "--rounds", "1", "--record", str(record))
    assert done.exit_code == 1
    assert "parity" in done.stderr
    assert not record.exists()


def test_an_unknown_model_is_one_line() -> None:
    done = invoke("--model", "random:llama-9", "--quiet")
    assert done.exit_code == 1
    assert "no shape 'llama-9'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
