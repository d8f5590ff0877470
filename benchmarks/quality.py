"""``bench quality``: what quantization costs in perplexity and agreement, and saves in bytes."""

from __future__ import annotations

import ast
import hashlib
import math
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastllama import LlamaForCausalLM, load_tokenizer
from fastllama.measure import weight_bytes_per_step
from fastllama.quantization.quality import quality, windows

from .rounds import Say

HELD_OUT = 20  # one of 20 files of the standard library, by the hash of its name, as for the demo's training


def held_out_text(docstrings: bool) -> str:
    """The standard library's files that the demo was not trained on, or only their docstrings."""
    root = Path(sysconfig.get_path("stdlib"))
    texts = []
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root).as_posix()
        is_held_out = int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT == 0
        if is_held_out and not name.startswith(("site-packages", "test/", "dist-packages")):
            with suppress(SyntaxError, UnicodeDecodeError):
                text = file.read_text(encoding="utf-8")
                texts += _docstrings(text) if docstrings else [text]
    return "\n\n".join(texts)


def _docstrings(source: str) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            yield text


def measure(
    name: str, dtype: str | None, device: str, schemes: Sequence[str], text: str, tokens: int, window: int, say: Say
) -> dict[str, Any]:
    """The fields of a record: for each scheme, how it predicts the text, next to the model as it is."""
    say("loading")
    reference = LlamaForCausalLM.from_pretrained(name, dtype, device, "none", progress=False)
    tokenizer = load_tokenizer(name)
    ids = tokenizer.encode(text, add_special_tokens=False)[:tokens]
    texts = list(windows(ids, min(window, len(ids)), tokenizer.bos_token_id))
    rows = {}
    for scheme in ("none", *schemes):
        say(f"reading with {scheme}")
        model = reference
        if scheme != "none":
            quantize = None if scheme == "stored" else scheme
            model = LlamaForCausalLM.from_pretrained(name, dtype, device, quantize, progress=False)
        rows[scheme] = vars(quality(model, reference, texts)) | {"bytes_per_step": weight_bytes_per_step(model)}
    where = {"model": name, "dtype": str(reference.dtype).removeprefix("torch."), "device": str(reference.device)}
    are_numbers = all(math.isfinite(row["perplexity"]) for row in rows.values())
    return where | {"schemes": rows, "parity": are_numbers}
