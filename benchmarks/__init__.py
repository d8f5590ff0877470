"""Measure decoding against peers and the bound, and fail when it gets slower.

That line stands for ``fastllama bench`` in the list of commands: what is imported for it is this file alone.
In a checkout they are the package ``benchmarks``, installed they are ``fastllama_benchmarks``, which ``fastllama
bench`` finds through an entry point; so their imports of each other are relative.
"""
