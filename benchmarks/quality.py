"""``bench quality``: what quantization costs in perplexity and agreement, and saves in bytes."""

from __future__ import annotations

import ast
import hashlib
import math
import sysconfig
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from fastllama import LlamaForCausalLM, load_tokenizer
from fastllama.config.quantization import QuantizationConfig
from fastllama.loading.names import resolve
from fastllama.measure import BandwidthProbe, weight_bytes_per_step
from fastllama.quantization.quality import quality, windows

from .environment import bandwidth
from .records import weight_fields
from .rounds import Say

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
INT8_KV = "int8-kv"  # the weights as they are over a KV cache in 8 bits
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
                nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, DOCUMENTED)]
                texts += filter(None, map(ast.get_docstring, nodes)) if docstrings else [text]
    return "\n\n".join(texts)


def measure(
    name: str, dtype: str | None, device: str, schemes: list[str], text: Path | None, tokens: int, window: int, say: Say
) -> dict[str, Any]:
    """The fields of a record: for each scheme, how it predicts the text, next to the model as it is."""
    for scheme in set(schemes) - {"none", "stored", INT8_KV}:
        resolve(scheme) if "/" in scheme else QuantizationConfig.of(scheme)  # fails before anything is read
    content = text.read_text(encoding="utf-8") if text else held_out_text(docstrings=name != "demo")
    say("loading")
    reference = LlamaForCausalLM.from_pretrained(name, dtype, device, "none", progress=False)
    tokenizer = load_tokenizer(name)
    ids = tokenizer.encode(content, add_special_tokens=False)[:tokens]
    texts = list(windows(ids, window, tokenizer.bos_token_id))
    rows = {}
    for scheme in dict.fromkeys(("none", *schemes)):
        say(f"reading with {scheme}")
        model, kv = reference, torch.int8 if scheme == INT8_KV else None
        if scheme not in ("none", INT8_KV):
            source, quantize = (scheme, None) if "/" in scheme else (name, None if scheme == "stored" else scheme)
            model = LlamaForCausalLM.from_pretrained(source, dtype, device, quantize, progress=False)
        rows[scheme] = {"bytes_per_step": weight_bytes_per_step(model)} | vars(quality(model, reference, texts, kv))
    are_numbers = all(math.isfinite(row["perplexity"]) for row in rows.values())
    found = {"schemes": rows, "parity": are_numbers, "text": text.name if text else "the standard library"}
    return weight_fields(name, reference) | bandwidth(BandwidthProbe(device)) | found
