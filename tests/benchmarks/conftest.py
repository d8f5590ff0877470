"""What tests of the benchmarks share: the command, a tiny checkpoint, a memory, repositories, results of the gate."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fastllama import LlamaConfig, LlamaForCausalLM
from fastllama.measure import Bandwidth
from fastllama_benchmarks import decode, launches, quality, speculation, startup
from fastllama_benchmarks.cli import app
from fastllama_benchmarks.kernels import measure as kernels
from fastllama_benchmarks.regress.gate import Result, Settings, verdicts_of
from fastllama_benchmarks.regress.revisions import Revision, git
from fastllama_benchmarks.regress.rounds import SIDES, Metric, Round

AUTHOR = ("-c", "user.name=somebody", "-c", "user.email=somebody@localhost")
INFO = {"device": "cpu", "device_type": "cpu", "torch": "2.13.0", "python": "3.11.7", "threads": 2, "vocab_size": 9}


@pytest.fixture(autouse=True)
def terminating() -> Iterator[None]:
    """Commands take SIGTERM as Ctrl-C for as long as their process lives; here it lives on."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def bench() -> Callable[..., Any]:
    """Runs ``fastllama bench`` in this process."""
    return lambda *arguments: CliRunner().invoke(app, [*arguments])


@pytest.fixture(scope="session")
def tiny() -> LlamaConfig:
    """A network that decodes at once."""
    return LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.5, dtype="float32",
    )  # fmt: skip


@pytest.fixture(scope="session")
def checkpoint(tiny: LlamaConfig, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(tiny).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> type:
    """A memory of 10 GB/s, which is not measured."""

    class Probe:
        best, readings = Bandwidth(1e10, "made up"), (1e10, 0.95e10)

        def __init__(self, device: torch.device | str) -> None:
            self.device = device

        def sample(self) -> None:
            pass

    for module in (decode, kernels, launches, quality, speculation, startup):
        monkeypatch.setattr(module, "BandwidthProbe", Probe)
    return Probe


@pytest.fixture(scope="session")
def new_repository() -> Callable[[Path], Callable[..., str]]:
    """Makes a repository; gives what commits files of a text by name, and returns the commit's id."""

    def new(folder: Path) -> Callable[..., str]:
        def commit(message: str, **files: str) -> str:
            for name, text in files.items():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(text)
            git(folder, "add", "--all")
            git(folder, *AUTHOR, "commit", "--quiet", "--allow-empty", "-m", message)
            return git(folder, "rev-parse", "HEAD")

        folder.mkdir(exist_ok=True)
        git(folder, "init", "--quiet", "--initial-branch=main")
        return commit

    return new


@pytest.fixture(scope="session")
def result_of() -> Callable[..., Result]:
    """What the gate finds where the head takes this many times as long as the base in each round."""
    base = Revision("main", "a" * 40, "Before", False, "a" * 12)
    head = Revision(".", "b" * 40, "Say `x` | <b>y</b> for @somebody", True, "c" * 12, True)
    metrics = (Metric("tpot", 1), Metric("ttft", 4))
    tokens = {"base": {1: ((1, 2),)}, "head": {1: ((1, 3),)}}

    def result_of(*factors: float, **settings: Any) -> Result:
        asked = Settings(Path(), "main", ".", Path("cache"), metrics, **settings)
        times = [{arm: [[1e-3 * (by if side == "head" else 1)] * 4] for arm, side in SIDES.items()} for by in factors]
        of_both = [dict.fromkeys(map(str, metrics), each) for each in times]
        rounds = tuple(Round(each, tokens, dict.fromkeys(SIDES, INFO)) for each in of_both)
        verdicts = verdicts_of(rounds, asked.threshold) if rounds else {}
        return Result(asked, base, head, rounds=rounds, verdicts=verdicts)

    return result_of
