"""``bench startup``: how long a fresh process takes to its first token."""
