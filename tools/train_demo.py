"""Train the demo checkpoint of ``fastllama/data/demo`` from the Python standard library's own sources.

    python tools/train_demo.py --work-dir build/demo  # about an hour on two cores with bfloat16 instructions

Everything follows from ``RECIPE`` of ``demo_recipe.py`` and the installation that runs this file: which files are read
and which are held out, the tokenizer, the order of the batches, the initial weights. A run that was stopped and is
started again with the same work directory goes on after the last state it saved.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import logging
import math
import os
import platform
import random
import re
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from demo_recipe import (
    BOS,
    EOS,
    PAD,
    RECIPE,
    SKIPPED_PARTS,
    SKIPPED_PREFIXES,
    Phase,
    Recipe,
    is_held_out,
    read_corpus,
    sha256,
    train_tokenizer,
)
from torch import nn
from torch.nn import functional as F

from fastllama.causal_lm import LlamaForCausalLM

logger = logging.getLogger("train_demo")

DEMO_FOLDER = Path(__file__).resolve().parents[1] / "fastllama" / "data" / "demo"

# The model continues text and knows no roles: a chat is its messages, one after the other.
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n{% endfor %}"

# A blank line before a top-level statement: where a file may be cut, so that the model learns to begin there.
TOP_LEVEL_START = re.compile(r"(?<=\n\n)(?=(?:def|class|async def|import|from|@|if) ?)")


# ---- batches -----------------------------------------------------------------------------------------------


class Batches:
    """Windows of the training files, in an order that depends on the seed and the epoch alone."""

    def __init__(self, recipe: Recipe, texts: list[str], tokenizer: Any) -> None:
        self.recipe, self.texts, self.tokenizer = recipe, texts, tokenizer

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Every batch of every phase, int64 ``[batch, context]``."""
        first_epoch = 0
        for phase in self.recipe.phases:
            stream = self._phase(phase, first_epoch)
            yield from itertools.islice(stream, phase.steps)
            first_epoch += 1000

    def _phase(self, phase: Phase, first_epoch: int) -> Iterator[torch.Tensor]:
        for epoch in itertools.count(first_epoch):
            rng = random.Random(f"{self.recipe.seed}/{epoch}")
            ids = torch.tensor(self._epoch_ids(rng))
            windows = ids[: len(ids) // phase.context * phase.context].view(-1, phase.context)
            order = list(range(len(windows)))
            rng.shuffle(order)
            for i in range(0, len(order) - phase.batch + 1, phase.batch):
                yield windows[order[i : i + phase.batch]]

    def _epoch_ids(self, rng: random.Random) -> list[int]:
        """All files in a new order, cut again before top-level statements; <s> begins a piece."""
        pieces = []
        for text in rng.sample(self.texts, len(self.texts)):
            cuts = [m.start() for m in TOP_LEVEL_START.finditer(text)]
            cuts = [0] + [c for c in cuts if rng.random() < self.recipe.cut_probability] + [len(text)]
            for start, end in itertools.pairwise(cuts):
                pieces.append((text[start:end], end == len(text)))
        encoded = self.tokenizer.encode([text for text, _ in pieces], num_threads=2)
        ids: list[int] = []
        for piece, (_, ends_file) in zip(encoded, pieces, strict=True):
            ids += [BOS, *piece, EOS] if ends_file else [BOS, *piece]
        return ids


# ---- training ----------------------------------------------------------------------------------------------


def make_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon (orthogonalised momentum) for the layers' matrices, AdamW for the embedding and the norms."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.dim() == 2 and ".layers." in name else others).append(parameter)
    muon = torch.optim.Muon(
        matrices,
        lr=recipe.peak_lr,
        weight_decay=recipe.weight_decay,
        momentum=recipe.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    decay = [{"params": [p for p in others if p.dim() == 2]}]
    no_decay = [{"params": [p for p in others if p.dim() == 1], "weight_decay": 0.0}]
    adam = torch.optim.AdamW(
        decay + no_decay, lr=recipe.peak_lr, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
    )
    return [muon, adam]


class Trainer:
    """The training loop, with a state file that a later run continues from."""

    def __init__(self, recipe: Recipe, batches: Batches, state_file: Path, use_compile: bool) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.batches, self.state_file = recipe, batches, state_file
        self.model = LlamaForCausalLM(recipe.model_config())
        self.model.train()
        self.optimizers = make_optimizers(self.model, recipe)
        self.loss = torch.compile(self._loss, dynamic=False) if use_compile else self._loss
        self.step, self.tokens, self.seconds = 0, 0, 0.0

    def _loss(self, ids_bt: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids_bt, labels=ids_bt, use_cache=False).loss

    def run(self, stop_after: int | None = None, save_every: int = 100) -> None:
        """Train to the recipe's last step (or to ``stop_after``) and leave the state in the state file."""
        if self.state_file.exists():
            self._load_state()
        last = self.recipe.steps if stop_after is None else stop_after
        started, elapsed_before, mean_loss = time.perf_counter(), self.seconds, None
        for ids_bt in itertools.islice(self.batches, self.step, last):
            loss = self._train_step(ids_bt)
            self.step += 1
            self.tokens += ids_bt.numel()
            self.seconds = elapsed_before + time.perf_counter() - started
            mean_loss = loss if mean_loss is None else 0.95 * mean_loss + 0.05 * loss
            if self.step % 10 == 0:
                logger.info("step %d/%d  loss %.3f  %.0f s", self.step, self.recipe.steps, mean_loss, self.seconds)
            if self.step % save_every == 0 or self.step == last:
                self._save_state()

    def _train_step(self, ids_bt: torch.Tensor) -> float:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.learning_rate(self.step)
            optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.loss(ids_bt)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.item()

    def _save_state(self) -> None:
        state = {
            "recipe": asdict(self.recipe),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": (self.step, self.tokens, self.seconds),
        }
        temporary = self.state_file.with_suffix(".partial")
        torch.save(state, temporary)
        os.replace(temporary, self.state_file)

    def _load_state(self) -> None:
        state = torch.load(self.state_file, weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            raise ValueError(
                f"{self.state_file} was written by another recipe; give another --work-dir or delete the file"
            )
        self.model.load_state_dict(state["model"])
        for optimizer, optimizer_state in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        self.step, self.tokens, self.seconds = state["progress"]
        logger.info("resuming after step %d", self.step)


# ---- evaluation --------------------------------------------------------------------------------------------


@torch.inference_mode()
def text_loss(model: LlamaForCausalLM, ids: list[int], context: int, stride: int) -> float:
    """The summed negative log-likelihood, in nats, of ``ids[1:]``, each given the ids before it.

    The ids are read in windows of ``context`` tokens that start ``stride`` apart, so every token is predicted
    once, from all ids before it or from at least ``context - stride`` of them.
    """
    total, scored = 0.0, 1
    for start in range(0, len(ids), stride):
        window = torch.tensor(ids[start : start + context])
        logits_tv = model(input_ids=window[None], use_cache=False).logits[0]
        first = scored - start
        total += F.cross_entropy(logits_tv[first - 1 : -1], window[first:], reduction="sum").item()
        scored = start + len(window)
        if scored == len(ids):
            return total
    raise AssertionError("the windows end with the ids")


def held_out_figures(model: LlamaForCausalLM, tokenizer: Any, texts: dict[str, str], recipe: Recipe) -> dict[str, Any]:
    """Loss and perplexities over whole files, and what each file contributes.

    ``</s>`` after a file counts as one of its tokens, ``<s>`` before it does not.
    """
    files = {}
    for path, text in texts.items():
        ids = [BOS, *tokenizer.encode(text), EOS]
        loss = text_loss(model, ids, recipe.eval_context, recipe.eval_stride)
        files[path] = {
            "sha256": sha256(text),
            "bytes": len(text.encode()),
            "tokens": len(ids) - 1,
            "loss": round(loss / (len(ids) - 1), 5),
        }
    size, tokens = (sum(file[key] for file in files.values()) for key in ("bytes", "tokens"))
    nats = sum(file["loss"] * file["tokens"] for file in files.values())
    perplexity = math.exp(nats / tokens)
    return {
        "context": recipe.eval_context,
        "stride": recipe.eval_stride,
        "bytes": size,
        "tokens": tokens,
        "loss_per_token": round(nats / tokens, 5),
        "perplexity_per_token": round(perplexity, 4),
        "perplexity_per_byte": round(math.exp(nats / size), 5),
        "bits_per_byte": round(nats / size / math.log(2), 5),
        "times_better_than_uniform": round(recipe.vocab_size / perplexity, 2),
        "files": files,
    }


# ---- the checkpoint ----------------------------------------------------------------------------------------


def save_checkpoint(trained: LlamaForCausalLM, tokenizer_model: bytes, recipe: Recipe, folder: Path) -> None:
    """Write the weights in bfloat16, the configs and the tokenizer, for fastllama and for transformers."""
    model = LlamaForCausalLM(recipe.model_config().replace(dtype="bfloat16")).to(torch.bfloat16)
    model.load_state_dict(trained.state_dict())
    model.save_pretrained(folder)
    # Greedy, and no length: transformers warns where the file's length meets a caller's max_new_tokens.
    generation_config = {"bos_token_id": BOS, "do_sample": False, "eos_token_id": EOS, "pad_token_id": PAD}
    write_json(folder / "generation_config.json", generation_config)
    (folder / "tokenizer.model").write_bytes(tokenizer_model)
    tokenizer_config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "legacy": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": recipe.max_position_embeddings,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", tokenizer_config)


def load_checkpoint(folder: Path) -> tuple[LlamaForCausalLM, Any]:
    """The checkpoint as it is on disk, in float32 arithmetic, and its tokenizer."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype="float32", progress=False)
    return model, sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def corpus_figures(corpus: dict[str, str], tokenizer: Any) -> dict[str, Any]:
    """How much is trained on, with a digest over paths and texts that identifies the corpus."""
    training = {path: text for path, text in corpus.items() if not is_held_out(path)}
    digest = hashlib.sha256()
    for path, text in corpus.items():
        digest.update(f"{path}\n{sha256(text)}\n".encode())
    return {
        "source": "the *.py files of the standard library",
        "python": platform.python_version(),
        "skipped": sorted(SKIPPED_PARTS) + [f"{prefix}*" for prefix in SKIPPED_PREFIXES],
        "held_out_rule": f"sha256(path) % {RECIPE.held_out_modulus} == 0",
        "sha256": digest.hexdigest(),
        "training_files": len(training),
        "training_bytes": sum(len(text.encode()) for text in training.values()),
        "training_tokens": sum(len(ids) for ids in tokenizer.encode(list(training.values()))),
        "held_out_files": len(corpus) - len(training),
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write indented JSON that ends with a newline."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# ---- command line ------------------------------------------------------------------------------------------


def train(work_dir: Path, corpus: dict[str, str], arguments: argparse.Namespace) -> Trainer:
    """Train the tokenizer and the model, or go on where the work directory's last run stopped."""
    work_dir.mkdir(parents=True, exist_ok=True)
    texts = [text for path, text in corpus.items() if not is_held_out(path)]
    tokenizer_file = work_dir / "tokenizer.model"
    if not tokenizer_file.exists():
        tokenizer_file.write_bytes(train_tokenizer(texts, RECIPE.vocab_size))
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_file))
    trainer = Trainer(RECIPE, Batches(RECIPE, texts, tokenizer), work_dir / "state.pt", not arguments.eager)
    trainer.run()
    return trainer


def main() -> None:
    """Train, save the checkpoint, measure what was saved and write the record next to it."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--work-dir", type=Path, required=True, help="for the state a stopped run resumes from")
    parser.add_argument("--output", type=Path, default=DEMO_FOLDER, help="folder the checkpoint is written to")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch")
    parser.add_argument("--eager", action="store_true", help="do not compile the training step (slower)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(arguments.threads)

    corpus = read_corpus()
    trainer = train(arguments.work_dir, corpus, arguments)
    tokenizer_model = (arguments.work_dir / "tokenizer.model").read_bytes()
    save_checkpoint(trainer.model, tokenizer_model, RECIPE, arguments.output)

    model, tokenizer = load_checkpoint(arguments.output)
    held_out = {path: text for path, text in corpus.items() if is_held_out(path)}
    figures = held_out_figures(model, tokenizer, held_out, RECIPE)
    record = {
        "script": "tools/train_demo.py",
        "recipe": asdict(RECIPE),
        "corpus": corpus_figures(corpus, tokenizer),
        "training": {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "steps": trainer.step,
            "tokens": trainer.tokens,
            "seconds": round(trainer.seconds),
            "threads": arguments.threads,
            "torch": torch.__version__,
            "sentencepiece": sentencepiece.__version__,
        },
        "held_out": figures,
    }
    write_json(arguments.output / "recipe.json", record)
    summary = {key: value for key, value in figures.items() if key != "files"}
    logger.info("held out: %s", json.dumps(summary))


if __name__ == "__main__":
    main()
