"""A small network whose matrices every quantization scheme takes, ids of two rows for it, and a mask of padding."""

from __future__ import annotations

from typing import Any

import torch

SHAPE: dict[str, Any] = {
    "vocab_size": 90, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2, "eos_token_id": None,
}  # fmt: skip
IDS = torch.tensor([[1, 17, 5, 60, 33, 3], [2, 2, 2, 9, 8, 7]])
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])  # a row that is padded on the left, and one not
