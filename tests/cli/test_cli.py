"""The command: what goes to stdout and stderr, exit codes, and one run on a real checkpoint."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer.main
from typer.testing import CliRunner

import fastllama
from fastllama import GenerationConfig, LlamaConfig, LlamaForCausalLM
from fastllama.cli import console
from fastllama.cli.app import app
from fastllama.cli.info import gather
from fastllama.cli.options import sampling_arguments
from fastllama.generation.known import DraftCounts

ANSWER = "wörld"


class FakeDetokenizer:
    """One character a token; gives it when it is complete."""

    def put(self, ids: int | list[int]) -> str:
        return "".join(map(chr, ids)) if isinstance(ids, list) else chr(ids)

    def end(self) -> str:
        return ""


class FakeTokenizer:
    """Characters are tokens."""

    chat_template: str | None = None

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=list(map(ord, text)))

    def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> list[int]:
        assert add_generation_prompt
        return list(map(ord, "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"))

    def detokenizer(self) -> FakeDetokenizer:
        return FakeDetokenizer()


class FakeModel:
    """Answers every prompt with the same word and keeps what it was asked."""

    config = LlamaConfig(max_position_embeddings=100)
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self) -> None:
        self.generation_config = GenerationConfig(other={"epsilon_cutoff": 0.1})
        self.prompts: list[str] = []
        self.settings: list[dict[str, Any]] = []
        self.loaded: dict[str, Any] = {}
        self.failure: BaseException | None = None
        self.draft_counts = DraftCounts()

    def from_pretrained(self, name: str, **arguments: Any) -> FakeModel:
        self.loaded = {"name": name} | arguments
        return self

    def stream(self, input_ids: torch.Tensor, **settings: Any) -> Iterator[torch.Tensor]:
        self.prompts.append("".join(map(chr, input_ids[0].tolist())))
        self.settings.append(settings)
        if settings.get("speculate") == "auto":
            self.draft_counts = DraftCounts(2, 5, [2, 1, 1, 0, 0, 0, 0], [2, 1, 0, 0, 0, 0, 0])
        for count, character in enumerate(ANSWER[: settings["max_new_tokens"]]):
            if count == 2 and self.failure is not None:
                failure, self.failure = self.failure, None
                raise failure
            yield torch.tensor([ord(character)])


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    """What every ``--model`` loads."""
    fake = FakeModel()
    monkeypatch.setattr(fastllama, "LlamaForCausalLM", fake)
    monkeypatch.setattr(fastllama, "load_tokenizer", lambda name: FakeTokenizer())
    monkeypatch.setattr(FakeTokenizer, "chat_template", None)
    return fake


def run(*arguments: str, stdin: str = "") -> Any:
    """Runs the command in this process."""
    return CliRunner().invoke(app, list(arguments), input=stdin)


# ---- generate ----------------------------------------------------------------------------------------------


def test_generate_writes_the_new_text_to_stdout_and_statistics_to_stderr(model: FakeModel) -> None:
    result = run("generate", "hello ")
    assert (result.exit_code, result.stdout) == (0, ANSWER + "\n")
    assert "5 tokens" in result.stderr
    assert model.prompts == ["hello "]
    assert model.loaded["name"] == "demo"


def test_generate_reads_the_prompt_from_stdin(model: FakeModel) -> None:
    assert run("generate", "-", stdin="two\nlines\n").exit_code == 0
    assert model.prompts == ["two\nlines\n"]


def test_quiet_leaves_stderr_empty(model: FakeModel) -> None:
    result = run("generate", "hello", "--quiet")
    assert (result.stdout, result.stderr) == (ANSWER + "\n", "")


def test_json_is_one_object_on_stdout(model: FakeModel) -> None:
    result = run("generate", "hé", "--json", "-n", "3")
    record = json.loads(result.stdout)
    assert record["text"] == "wör"
    assert record["prompt"] == "hé"
    assert record["ids"] == list(map(ord, "wör"))
    assert record["prompt_ids"] == list(map(ord, "hé"))
    assert record["timing"]["tokens_per_second"] > 0
    assert (record["model"], record["dtype"], record["device"]) == ("demo", "float32", "cpu")


def test_loading_options_reach_the_loader(model: FakeModel) -> None:
    run(
        "generate",
        "x",
        "-m",
        "some/model",
        "--dtype",
        "bfloat16",
        "--device",
        "cpu",
        "--quantize",
        "int8",
        "--kv-cache-dtype",
        "int8",
    )
    expected = {
        "name": "some/model",
        "dtype": "bfloat16",
        "device": "cpu",
        "quantize": "int8",
        "kv_cache_dtype": "int8",
    }
    assert expected.items() <= model.loaded.items()


def test_sampling_options_reach_the_model(model: FakeModel) -> None:
    run(
        "generate",
        "x",
        "--temperature",
        "0.5",
        "--top-k",
        "5",
        "--top-p",
        "0.9",
        "--min-p",
        "0.1",
        "--seed",
        "3",
    )
    assert model.settings[0] == {
        "max_new_tokens": 99,
        "num_return_sequences": 1,
        "do_sample": True,
        "temperature": 0.5,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.1,
        "seed": 3,
    }


def test_a_temperature_of_zero_is_greedy(model: FakeModel) -> None:
    assert run("generate", "hello", "--temperature", "0", "--top-p", "0.9", "--seed", "1").exit_code == 0
    assert {"do_sample": False, "seed": 1}.items() <= model.settings[0].items()
    assert "temperature" not in model.settings[0]


def test_strict_reaches_the_loader_and_settings_that_are_not_available_go(model: FakeModel) -> None:
    refused = run("generate", "hello", "--strict", "--dtype", "bf16")
    assert (refused.exit_code, model.loaded["strict"], model.loaded["dtype"]) == (1, True, "bf16")
    assert "decoding without the checkpoint's settings epsilon_cutoff" in refused.stderr
    assert run("generate", "hello").exit_code == 0
    assert model.generation_config == GenerationConfig()


def test_what_is_left_out_is_said(model: FakeModel, caplog: pytest.LogCaptureFixture) -> None:
    run("generate", "hello")
    assert "decoding without the checkpoint's settings epsilon_cutoff" in caplog.text


def test_settings_of_a_size_that_the_step_does_not_do_go_too(model: FakeModel) -> None:
    model.generation_config = GenerationConfig(no_repeat_ngram_size=20, forced_eos_token_id=[1, 2], suppress_tokens=[5])
    assert run("generate", "hello").exit_code == 0
    assert model.generation_config == GenerationConfig(suppress_tokens=[5])


def test_without_options_the_checkpoint_decides_how_to_sample() -> None:
    assert sampling_arguments(None, None, None, None, None, None) == {}
    assert sampling_arguments(False, None, None, None, None, 1) == {"do_sample": False, "seed": 1}
    assert sampling_arguments(True, None, None, None, None, None) == {"do_sample": True}


def test_the_default_budget_is_what_the_context_has_room_for(model: FakeModel) -> None:
    run("generate", "x" * 60)
    assert model.settings[0]["max_new_tokens"] == 40


def test_the_engine_says_on_stderr_what_it_compiles(model: FakeModel) -> None:
    with console.progress(quiet=False):
        pass  # leaves the logger as it was
    model_stream = model.stream

    def stream(input_ids: torch.Tensor, **settings: Any) -> Iterator[torch.Tensor]:
        console.logging.getLogger("fastllama.engine").info("compiling %s", "decode")
        yield from model_stream(input_ids, **settings)

    model.stream = stream  # type: ignore[method-assign]
    assert "compiling decode" in run("generate", "x").stderr
    assert "compiling decode" not in run("generate", "x", "--quiet").stderr
    assert not console.logging.getLogger("fastllama.engine").handlers


# ---- errors ------------------------------------------------------------------------------------------------


def test_a_library_error_is_one_line_and_exit_code_1(model: FakeModel) -> None:
    model.failure = ValueError("no such\nthing")
    result = run("generate", "x")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "fastllama: error: no such thing"


def test_an_unforeseen_error_is_named(model: FakeModel) -> None:
    model.failure = KeyError("layers")
    assert "KeyError: 'layers'" in run("generate", "x").stderr


def test_debug_lets_the_traceback_through(model: FakeModel) -> None:
    model.failure = ValueError("no such thing")
    assert isinstance(run("generate", "x", "--debug").exception, ValueError)


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate",),
        ("generate", "x", "--no-such-option"),
        ("generate", "x", "-n", "0"),
        ("generate", "x", "--greedy", "--top-k", "5"),
        ("no-such-command",),
    ],
)
def test_wrong_usage_is_exit_code_2(model: FakeModel, arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error" in result.stderr


def test_ctrl_c_is_exit_code_130(model: FakeModel) -> None:
    model.failure = KeyboardInterrupt()
    result = run("generate", "x")
    assert result.exit_code == 130
    assert "Traceback" not in result.stderr


def test_help_and_version_need_no_model() -> None:
    assert run("--version").stdout.startswith("fastllama ")
    assert "generate" in run().stdout
    assert run("generate", "-h").exit_code == 0


@pytest.mark.parametrize("name", ["generate", "chat", "info"])
def test_the_help_of_every_option_is_a_noun_phrase_with_its_default(name: str) -> None:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    for option in command.params:
        if option.param_type_name == "option" and option.name != "help":
            assert re.fullmatch(r"[A-Z][^.]*(\.\d[^.]*)?\.", option.help), option.name
            assert ";" not in option.help.replace("; - for", "").replace("; 0 for", ""), option.name
            has_default = option.default is not None or isinstance(option.show_default, str)
            assert has_default, f"{option.name} has no default and does not say what happens without it"


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_drafts_are_asked_for_and_counted(model: FakeModel, command: str) -> None:
    arguments = ("generate", "hello ") if command == "generate" else ("chat",)
    result = run(*arguments, "--speculate", stdin="hello\n")
    assert result.exit_code == 0
    assert model.settings[0]["speculate"] == "auto"
    assert ", 2.50 a step" in result.stderr
    result = run(*arguments, stdin="hello\n")
    assert "speculate" not in model.settings[1]
    assert "a step" not in result.stderr


def test_drafts_are_in_the_record(model: FakeModel) -> None:
    timing = json.loads(run("generate", "hello ", "--speculate", "--json").stdout)["timing"]
    assert timing["tokens_per_step"] == 2.5
    assert timing["acceptance"] == [1.0, 1.0, 0.0, None, None, None, None]


def test_a_second_model_is_loaded_as_the_first_one(model: FakeModel) -> None:
    run("generate", "hello ", "--assistant-model", "small")
    assert model.settings[0]["assistant_model"] is model
    assert (model.loaded["name"], model.loaded["dtype"], model.loaded["device"]) == ("small", "float32", "cpu")


# ---- chat --------------------------------------------------------------------------------------------------


def test_chat_continues_plain_text_without_a_template(model: FakeModel) -> None:
    result = run("chat", stdin="one\n\ntwo\n")
    assert result.exit_code == 0
    assert result.stdout == f"{ANSWER}\n{ANSWER}\n"
    assert model.prompts == ["one", f"one\n{ANSWER}\ntwo"]
    assert "no chat template" in result.stderr


def test_chat_says_when_the_limit_has_cut_an_answer(model: FakeModel) -> None:
    assert (
        "cut after 3 tokens; --max-new-tokens allows more"
        in run("chat", "-q", "--max-new-tokens", "3", stdin="one\n").stderr
    )
    assert "cut after" not in run("chat", stdin="one\n").stderr
    model.generation_config = GenerationConfig(eos_token_id=ord(ANSWER[2]))
    assert "cut after" not in run("chat", "--max-new-tokens", "3", stdin="one\n").stderr


def test_chat_uses_the_template_and_remembers_every_turn(model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeTokenizer, "chat_template", "some template")
    run("chat", "--system", "be kind", stdin="one\ntwo\n/quit\nnever seen\n")
    first = "<system>be kind<user>one<assistant>"
    assert model.prompts == [first, f"{first}{ANSWER}<user>two<assistant>"]


def test_ctrl_c_stops_only_the_answer(model: FakeModel) -> None:
    model.failure = KeyboardInterrupt()
    result = run("chat", stdin="one\ntwo\n")
    assert result.exit_code == 0
    assert result.stdout == f"wö\n{ANSWER}\n"
    assert model.prompts[1] == "one\nwö\ntwo"
    assert "stopped" in result.stderr


def test_clear_forgets_the_conversation(model: FakeModel) -> None:
    run("chat", stdin="one\n/clear\ntwo\n")
    assert model.prompts == ["one", "two"]


def test_a_turn_that_does_not_fit_is_reported_and_forgotten(model: FakeModel) -> None:
    model.failure = fastllama.CacheOverflowError("too long")
    result = run("chat", stdin="one\ntwo\n")
    assert result.exit_code == 0
    assert "too long; /clear" in result.stderr
    assert model.prompts[1] == "two"


# ---- with a real checkpoint --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a tokenizer of single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("checkpoint")
    vocabulary = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Starts the command in a process of its own."""
    command = [sys.executable, "-m", "fastllama", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, encoding="utf-8", **options)


def test_generate_streams_what_the_model_writes_and_compares_with_the_eager_forward(checkpoint: Path) -> None:
    process = start(
        "generate", "def f(", "-m", str(checkpoint), "-n", "12", "--greedy", "--json", "--table",
        stdout=subprocess.PIPE,
    )  # fmt: skip
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    record = json.loads(stdout)
    tokenizer = fastllama.load_tokenizer(checkpoint)
    assert len(record["ids"]) == 12
    assert record["text"] == tokenizer.decode(record["prompt_ids"] + record["ids"])[len("def f(") :]
    assert record["comparison"]["parity"] is True
    assert record["comparison"]["new_tokens"] == 12
    assert "eager forward" in record["comparison"]["peers"]


def test_info_reports_sizes_and_operations(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastllama.measure.READ_BYTES", 1 << 25)
    facts = json.loads(run("info", "-m", str(checkpoint), "--context", "100", "--json", "-").stdout)
    assert facts["model"]["hidden_size"] == 64
    assert facts["decoding"]["kv_cache_bytes"] == 2 * 2 * 2 * 16 * 100 * 4
    assert facts["decoding"]["floor_ms_full_cache"] > facts["decoding"]["floor_ms_empty_cache"] > 0
    assert {"op", "implementation", "reason"} <= facts["ops"][0].keys()
    result = run("info", "-m", str(checkpoint))
    assert "measuring memory bandwidth" in result.stderr
    assert "linear" in result.stdout
    names = [line.strip().split("  ")[0] for line in result.stdout.splitlines() if line.startswith("  ")]
    assert "KV cache, full context" in names
    assert [name for name in names if "_" in name and name not in {op["op"] for op in facts["ops"]}] == []


@pytest.mark.parametrize(
    ("settings", "way"),
    [
        ({"no_repeat_ngram_size": 3, "suppress_tokens": [4]}, "the compiled step"),
        ({"no_repeat_ngram_size": 20}, "transformers' loop, for no_repeat_ngram_size=20"),
        ({"num_beams": 4}, "transformers' loop, for num_beams=4"),
    ],
)
def test_info_says_which_way_calls_take(checkpoint: Path, tmp_path: Path, monkeypatch, settings, way) -> None:
    shutil.copytree(checkpoint, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("fastllama.cli.info._decoding", lambda *_: {})
    assert gather(str(tmp_path / "model"), None, "cpu", None, quiet=True)["model"]["generate"] == way


def test_info_of_a_published_shape_loads_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastllama.measure.READ_BYTES", 1 << 25)
    facts = json.loads(run("info", "-m", "random:llama-3.1-70b", "--json", "-").stdout)
    assert facts["decoding"]["parameters"] == 70_553_706_496


def test_an_unknown_shape_is_one_line() -> None:
    result = run("info", "-m", "random:llama-9")
    assert result.exit_code == 1
    assert "llama-3.2-1b" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_reader_that_goes_away_ends_the_command_quietly(checkpoint: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    process = start("info", "-m", str(checkpoint), "--json", "-", stdout=write_end)
    os.close(write_end)
    _, stderr = process.communicate()
    assert (process.returncode, stderr) == (141, "")
