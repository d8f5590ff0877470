"""``fastllama quantize``: the folder that it writes, and what it refuses."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastllama import LlamaConfig, LlamaForCausalLM, QuantizationConfig, load_tokenizer
from fastllama.cli.app import app
from fastllama.loading.gguf_writer import write_gguf


def run(*arguments: object):
    return CliRunner().invoke(app, ["quantize", *map(str, arguments)])


def test_the_folder_decodes_and_has_the_tokenizer(tmp_path) -> None:
    done = run("demo", tmp_path / "small")
    assert done.exit_code == 0, done.output
    assert "0.00384 GB of weights" in done.stdout
    model = LlamaForCausalLM.from_pretrained(tmp_path / "small")
    assert model.config.quantization == QuantizationConfig()
    assert load_tokenizer(tmp_path / "small").encode("def f():") == load_tokenizer("demo").encode("def f():")
    ids = load_tokenizer("demo")("def f():", return_tensors="pt").input_ids
    expected = LlamaForCausalLM.from_pretrained("demo", quantize="int4").generate(ids, max_new_tokens=4)
    assert model.generate(ids, max_new_tokens=4).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--scheme", "int8"], QuantizationConfig(bits=8, group_size=None)),
        (["--group-size", "64", "--symmetric"], QuantizationConfig(group_size=64, symmetric=True)),
        (["--group-size", "0", "--head-bits", "0"], QuantizationConfig(group_size=None, head_bits=None)),
        (["--exclude", "down_proj,lm_head"], QuantizationConfig(exclude=("down_proj", "lm_head"))),
    ],
    ids=str,
)
def test_its_options_are_in_the_config(options, expected, tmp_path) -> None:
    assert run("demo", tmp_path / "small", *options, "--quiet").exit_code == 0
    assert LlamaConfig.from_pretrained(tmp_path / "small").quantization == expected


def test_a_text_chooses_the_codes(tmp_path) -> None:
    (tmp_path / "text").write_text(Path(__file__).read_text(encoding="utf-8")[:2000], encoding="utf-8")
    for name, options in {"plain": [], "calibrated": ["--calibrate", tmp_path / "text"]}.items():
        assert run("demo", tmp_path / name, *options, "--quiet").exit_code == 0
    models = [LlamaForCausalLM.from_pretrained(name) for name in ("demo", tmp_path / "plain", tmp_path / "calibrated")]
    ids = load_tokenizer("demo")(Path(__file__).read_text(encoding="utf-8")[:1000], return_tensors="pt").input_ids
    expected, plain, calibrated = (model(ids).logits for model in models)
    assert (calibrated - expected).norm() < 0.8 * (plain - expected).norm()


def test_a_short_text_is_enough_and_a_wrong_name_is_said(tmp_path, caplog) -> None:
    (tmp_path / "text").write_text("x", encoding="utf-8")
    assert run("demo", tmp_path / "new", "--calibrate", tmp_path / "text", "--exclude", "nosuch").exit_code == 0
    assert "there is no module 'nosuch' to exclude from quantization" in caplog.text


def test_a_source_without_tokenizer_files_is_said(tmp_path, caplog) -> None:
    shape = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    write_gguf(LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4)), tmp_path / "model.gguf")
    assert run(tmp_path / "model.gguf", tmp_path / "small", "--quiet").exit_code == 0
    assert "has no tokenizer" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "TAKEN"], "is not empty; name a new folder"),
        (["demo", "new", "--scheme", "int3"], "quantize is 'int3'"),
        (["demo", "new", "--head-bits", "3"], "head_bits is 3"),
        (["demo", "new", "--group-size", "48"], "group_size is 48"),
        (["no-such-folder/x", "new"], "no-such-folder"),
        (["demo", "new", "--scheme", "int8", "--calibrate", __file__], "chooses codes of 4 bits, and --scheme is int8"),
        (["demo", "new", "--calibrate", os.devnull], "is empty: there is no text to calibrate with"),
        (["demo", "new", "--calibrate", sys.executable], "is not a text in UTF-8"),
    ],
    ids=str,
)
def test_wrong_use_is_one_line(arguments, message, tmp_path: Path) -> None:
    (tmp_path / "TAKEN").mkdir()
    (tmp_path / "TAKEN" / "file").touch()
    done = run(arguments[0], tmp_path / arguments[1], *arguments[2:])
    assert done.exit_code == 1
    assert message in done.stderr.replace("\n", "")
    assert not (tmp_path / "new").exists()
