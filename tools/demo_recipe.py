"""What the demo checkpoint is trained on, and how: see ``train_demo.py``.

The corpus is every ``*.py`` file below ``sysconfig.get_path("stdlib")`` that is UTF-8, in the order of their paths,
without the folders and files of ``SKIPPED_PARTS`` and ``SKIPPED_PREFIXES``. One file in ``RECIPE.held_out_modulus``,
chosen by the SHA-256 of its path, is never seen, by the tokenizer neither.
"""

from __future__ import annotations

import hashlib
import io
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from fastllama.config import LlamaConfig

# Not part of every installation (third-party packages, test suites), not code that is worth imitating
# (character tables, generated data), or near copies of other modules (lib2to3), which would flatter the
# held-out figure.
# fmt: off
SKIPPED_PARTS = frozenset({
    "site-packages", "dist-packages", "lib-dynload", "__pycache__", "test", "tests", "idle_test", "encodings",
    "pydoc_data", "lib2to3",
})
# fmt: on
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")

UNK, BOS, EOS, PAD = 0, 1, 2, 3


@dataclass(frozen=True)
class Phase:
    """A stretch of training: ``steps`` batches of ``batch`` windows of ``context`` tokens."""

    steps: int
    batch: int
    context: int


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, apart from the corpus itself."""

    seed: int = 20240607
    held_out_modulus: int = 20
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    max_position_embeddings: int = 2048
    phases: tuple[Phase, ...] = (Phase(1400, 16, 512), Phase(80, 4, 2048))
    peak_lr: float = 4e-3
    warmup_steps: int = 100
    decay_steps: int = 400
    weight_decay: float = 0.1
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    cut_probability: float = 0.25
    eval_context: int = 1024
    eval_stride: int = 512

    @property
    def steps(self) -> int:
        """Optimizer steps in all phases."""
        return sum(phase.steps for phase in self.phases)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, a constant stretch, and a linear way down to zero in the last ``decay_steps``."""
        warm_up, way_down = (step + 1) / self.warmup_steps, (self.steps - step) / self.decay_steps
        return self.peak_lr * min(1.0, warm_up, way_down)

    def model_config(self) -> LlamaConfig:
        """The architecture: small, with grouped-query attention and tied embeddings."""
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            max_position_embeddings=self.max_position_embeddings,
            tie_word_embeddings=True,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )


RECIPE = Recipe()


def read_corpus(root: Path | None = None) -> dict[str, str]:
    """The corpus: POSIX path below the standard library → text, sorted by path.

    Newlines are kept as they are in the file. Empty files and files that are not UTF-8 are left out.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    corpus = {}
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        if SKIPPED_PARTS.intersection(parts) or any(part.startswith(SKIPPED_PREFIXES) for part in parts):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            corpus["/".join(parts)] = text
    return corpus


def is_held_out(path: str, modulus: int = RECIPE.held_out_modulus) -> bool:
    """Whether the file is kept for evaluation: ``modulus`` divides the SHA-256 of its POSIX path."""
    return int(sha256(path), 16) % modulus == 0


def sha256(text: str) -> str:
    """The SHA-256 of the text in UTF-8, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def train_tokenizer(texts: list[str], vocab_size: int) -> bytes:
    """A SentencePiece model as Llama's: BPE with byte fallback that keeps every character and every space."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n") if line.strip()),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        character_coverage=0.9999,
        max_sentence_length=16384,
        unk_id=UNK,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=PAD,
        num_threads=2,
        minloglevel=2,
    )
    return model.getvalue()
