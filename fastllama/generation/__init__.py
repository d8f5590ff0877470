"""Policies over the engine: who decodes, with what, until when."""
