"""The shipped checkpoint: small, complete, as good as its record says, and the same to transformers."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

from fastllama import LlamaConfig, LlamaForCausalLM, load_tokenizer
from fastllama.config import GenerationConfig
from fastllama.loading.names import resolve_path

MAX_BYTES = 12_000_000
TIMES_BETTER_THAN_UNIFORM = 15
SAMPLE_TOKENS = 4_000
PROMPTS = ("def read_config(path):\n", "import os\nimport sys\n\n", "class Point:\n    def __init__(self")
AWKWARD = (" a", "    return\n\tx  \n\n", "naïve Ωμέγα 漢字 🦙")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """``tools/train_demo.py``: the corpus, the rule that holds files out and the evaluation."""
    path = Path(__file__).parents[2] / "tools" / "train_demo.py"
    sys.path.insert(0, str(path.parent))  # as where it is run as a script
    spec = importlib.util.spec_from_file_location("train_demo", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_path("demo")


@pytest.fixture(scope="module")
def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "recipe.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained("demo", dtype="float32", progress=False)


@pytest.fixture(scope="module")
def held_out(script: ModuleType) -> dict[str, str]:
    """The held-out files of the Python that runs the tests, the shortest first."""
    corpus = script.read_corpus()
    files = {path: text for path, text in corpus.items() if script.is_held_out(path)}
    return dict(sorted(files.items(), key=lambda item: len(item[1])))


def test_all_files_together_take_at_most_12_megabytes(folder: Path) -> None:
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "recipe.json"}
    assert set(sizes) == expected | {"tokenizer.model", "tokenizer_config.json"}
    assert sum(sizes.values()) <= MAX_BYTES, sizes


def test_configs_name_the_tokenizers_special_tokens(folder: Path) -> None:
    config, tokenizer = LlamaConfig.from_pretrained(folder), load_tokenizer("demo")
    generation = GenerationConfig.from_pretrained(folder)
    assert config.vocab_size == len(tokenizer)
    assert config.dtype == "bfloat16"
    assert not generation.do_sample
    assert generation.eos_token_id == (config.eos_token_id,) == (tokenizer.eos_token_id,) == (2,)
    assert generation.bos_token_id == config.bos_token_id == tokenizer.bos_token_id == 1
    assert generation.pad_token_id == config.pad_token_id == tokenizer.pad_token_id == 3


def test_the_record_is_of_this_script_and_this_checkpoint(
    script: ModuleType, record: dict[str, Any], model: LlamaForCausalLM
) -> None:
    assert record["recipe"] == json.loads(json.dumps(dataclasses.asdict(script.RECIPE)))
    assert record["training"]["steps"] == script.RECIPE.steps
    assert record["training"]["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert model.config == script.RECIPE.model_config()


def test_the_recorded_perplexity_follows_from_its_files_and_is_far_from_uniform(
    script: ModuleType, record: dict[str, Any], model: LlamaForCausalLM
) -> None:
    figures, files = record["held_out"], record["held_out"]["files"]
    tokens = sum(file["tokens"] for file in files.values())
    nats = sum(file["loss"] * file["tokens"] for file in files.values())
    assert all(script.is_held_out(path) for path in files)
    assert figures["tokens"] == tokens
    assert figures["perplexity_per_token"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / figures["bytes"], rel=1e-4)
    assert figures["perplexity_per_token"] <= model.config.vocab_size / TIMES_BETTER_THAN_UNIFORM


def test_held_out_files_cost_what_the_record_says(
    script: ModuleType, record: dict[str, Any], model: LlamaForCausalLM, held_out: dict[str, str]
) -> None:
    tokenizer = script.load_checkpoint(resolve_path("demo"))[1]
    measured: dict[str, Any] = {}
    for path, text in held_out.items():
        known = record["held_out"]["files"].get(path)
        fits = sum(file["tokens"] for file in measured.values()) < SAMPLE_TOKENS
        if known is not None and fits and known["sha256"] == script.sha256(text):
            measured |= script.held_out_figures(model, tokenizer, {path: text}, script.RECIPE)["files"]
    if not measured:
        pytest.skip("no held-out file of this Python is the one that was measured")
    for path, file in measured.items():
        known = record["held_out"]["files"][path]
        assert file["tokens"] == known["tokens"]
        assert file["loss"] == pytest.approx(known["loss"], rel=1e-3), path


def test_held_out_code_of_this_python_is_predicted_far_better_than_by_a_uniform_guess(
    script: ModuleType, model: LlamaForCausalLM, held_out: dict[str, str]
) -> None:
    tokenizer = load_tokenizer("demo")
    nats = tokens = 0.0
    for text in held_out.values():
        ids = tokenizer.encode(text)[: script.RECIPE.eval_context]
        nats += script.text_loss(model, ids, script.RECIPE.eval_context, script.RECIPE.eval_context)
        tokens += len(ids) - 1
        if tokens > SAMPLE_TOKENS:
            break
    assert math.exp(nats / tokens) <= model.config.vocab_size / TIMES_BETTER_THAN_UNIFORM


def test_text_survives_the_tokenizer_unchanged(held_out: dict[str, str]) -> None:
    tokenizer = load_tokenizer("demo")
    texts = [
        *held_out.values(),
        " a",
        "    return\n\tx  \n\n",
        "\r\n\0\x7f",
        "naïve Ωμέγα 漢字 🦙",
        "1234567",
    ]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_transformers_tokenizes_as_fastllama_does(folder: Path, held_out: dict[str, str]) -> None:
    pytest.importorskip("google.protobuf", reason="transformers reads tokenizer.model through protobuf")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer("demo")
    for text in [*list(held_out.values())[:20], *AWKWARD]:
        ids = theirs(text).input_ids
        assert ids == ours(text).input_ids
        assert theirs.decode(ids, skip_special_tokens=True) == text
    assert theirs.pad_token_id == ours.pad_token_id


def test_transformers_loads_the_folder_and_writes_the_same_greedy_text(folder: Path, model: LlamaForCausalLM) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = load_tokenizer("demo")
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        expected = theirs.generate(**inputs, max_new_tokens=40)
        torch.testing.assert_close(model.generate(**inputs, max_new_tokens=40), expected)
    model.release()
