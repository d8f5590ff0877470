"""Rotary positions, KV write and attention over the live slots."""
