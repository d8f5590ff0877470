"""Text to token ids and back, according to the checkpoint's own tokenizer files.

- settings.py: the JSON files next to the vocabulary
- backend.py: what a vocabulary can do
- json_backend.py: tokenizer.json; sentencepiece_backend.py: tokenizer.model
- chat.py: chat templates, rendered in a sandbox
- rows.py: texts checked, rows padded and made into tensors
- streaming.py: ids in, text out, one token at a time and never half a character
- tokenizer.py: the public class: padding, truncation, tensors, decoding, loading
"""

from __future__ import annotations

from fastllama.tokenizer.settings import TokenizerError
from fastllama.tokenizer.streaming import IncrementalDetokenizer
from fastllama.tokenizer.tokenizer import Encoding, Tokenizer, load_tokenizer

__all__ = ["Encoding", "IncrementalDetokenizer", "Tokenizer", "TokenizerError", "load_tokenizer"]
