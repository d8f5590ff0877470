"""The network, eager and complete: what everything else is checked against."""
