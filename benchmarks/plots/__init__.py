"""Drawings of records, with matplotlib."""
