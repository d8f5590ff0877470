"""llama.cpp as a peer: llama-bench is run and read as it should be, on our weights."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastllama import LlamaConfig, LlamaForCausalLM
from fastllama_benchmarks.contenders import Task
from fastllama_benchmarks.contenders.llama_cpp import LlamaCpp, find_llama_bench, prepare
from fastllama_benchmarks.workload import Unavailable, Workload

# Of what llama-bench 0c1e570 printed for `-m demo.gguf -o json -r 1 -t 1 -ngl 0 -p 0 -n 8 -d 16`.
RECORDED = """[{
    "build_commit": "0c1e570", "build_number": 1, "cpu_info": "AMD EPYC", "gpu_info": "", "backends": "CPU",
    "n_threads": 1, "type_k": "f16", "type_v": "f16", "n_gpu_layers": 0, "flash_attn": -1, "n_prompt": 0, "n_gen": 8,
    "n_depth": 16, "avg_ns": 5720582, "stddev_ns": 0, "avg_ts": 1398.459108, "samples_ns": [ 5720582 ]
}]"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A llama-bench that notes how it was called and prints what the real one does."""
    code = f"""\
        import json, os, sys
        arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
        assert open(arguments["-m"], "rb").read(4) == b"GGUF"
        arguments["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES")
        with open({str(tmp_path / "calls")!r}, "a") as calls:
            print(json.dumps(arguments), file=calls)
        result, = json.loads({RECORDED!r})
        result["avg_ns"] = 3_000_000 if arguments["-n"] == "0" else 500_000 * int(arguments["-n"])
        print(json.dumps([result]))
        """
    return script(tmp_path / "llama-bench", code)


def script(path: Path, code: str) -> Path:
    """A program in Python."""
    lines = [line.removeprefix(" " * 8) for line in code.splitlines()]
    path.write_text("\n".join([f"#!{sys.executable}", *lines]))
    path.chmod(0o755)
    return path


def calls(tmp_path: Path) -> list[dict[str, str]]:
    """How the fake was called."""
    return [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]


@pytest.fixture
def opened(tiny: LlamaConfig, tmp_path: Path) -> Callable[[Path], LlamaCpp]:
    """Opens a llama-bench on a tiny model's weights."""

    def opened(program: Path) -> LlamaCpp:
        contender, model = LlamaCpp(), LlamaForCausalLM(tiny)
        contender.load(prepare(Task("", "float32", llama_bench=str(program), workspace=str(tmp_path), lent=model)))
        return contender

    return opened


def test_llama_bench_times_the_prompt_and_then_as_many_steps_as_others_take(opened, tmp_path, program) -> None:
    contender = opened(program)
    run = contender.run(Workload.random(64, 1, 24, 9))
    assert (run.tokens, run.ttft, run.tpot) == (None, pytest.approx(3e-3), pytest.approx((5e-4,)))
    threads = str(torch.get_num_threads())
    same = {"-m": str(tmp_path / "model.gguf"), "-o": "json", "-r": "1", "-t": threads, "-ngl": "0"}
    same |= {"CUDA_VISIBLE_DEVICES": ""}
    assert calls(tmp_path) == [same | {"-p": "24", "-n": "0"}, same | {"-p": "0", "-n": "8", "-d": "24"}]
    assert contender.info["build_commit"] == "0c1e570"
    assert contender.run(Workload.random(64, 1, 24, 1)).tpot == ()


def test_on_cuda_all_layers_run_on_one_gpu_and_a_build_without_one_is_refused(tmp_path: Path, program: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    contender = LlamaCpp()
    contender.load(Task(str(tmp_path / "model.gguf"), "float32", "cuda:1", llama_bench=str(program)))
    with pytest.raises(Unavailable, match="built for the CPU alone; the model is on CUDA"):
        contender.run(Workload.random(64, 1, 8, 4))
    (call,) = calls(tmp_path)
    assert (call["-ngl"], call["-sm"], call["-mg"]) == ("99", "none", "1")
    assert call["CUDA_VISIBLE_DEVICES"] == os.environ.get("CUDA_VISIBLE_DEVICES")


def test_a_start_is_the_whole_process_and_runs_the_prompt_once(opened, tmp_path: Path) -> None:
    code = f"""\
        import json, sys
        print("--no-warmup")
        json.dump(sys.argv[1:], open({str(tmp_path / "asked")!r}, "w"))
        """
    assert opened(script(tmp_path / "bench", code)).start(Workload.random(64, 1, 5, 8), os.environ) > 0
    asked = json.loads((tmp_path / "asked").read_text())
    assert asked[-5:] == ["-p", "5", "-n", "0", "--no-warmup"]
    with pytest.raises(Unavailable, match="no --no-warmup"):
        opened(script(tmp_path / "older", "print('usage')")).start(Workload.random(64, 1, 5, 8), os.environ)


def test_a_missing_program_is_named_with_the_option_that_gives_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(Unavailable, match="llama-bench not found on PATH; give it with --llama-bench PATH"):
        find_llama_bench()
    with pytest.raises(Unavailable, match="--llama-bench elsewhere/llama-bench: there is no program"):
        find_llama_bench("elsewhere/llama-bench")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_llama_bench() == str(program)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; sys.exit('error: invalid parameter for argument: -d')", "code 1: error: invalid parameter"),
        ("raise SystemExit(3)", "ended with code 3: it wrote nothing"),
        ("print('| model | t/s |')", "printed no result as JSON but"),
        ("print('[]')", "printed no result as JSON but"),
    ],
)
def test_what_goes_wrong_in_llama_bench_is_one_line(opened, tmp_path: Path, code: str, said: str) -> None:
    contender = opened(script(tmp_path / "broken", code))
    with pytest.raises(Unavailable, match=said) as raised:
        contender.run(Workload.random(64, 1, 8, 4))
    assert "\n" not in str(raised.value)
