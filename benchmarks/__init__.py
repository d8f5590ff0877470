"""The benchmarks: contenders, records, reports, and the gate that fails when decoding gets slower.

In a checkout they are the package ``benchmarks``, installed they are ``fastllama_benchmarks``, which ``fastllama
bench`` finds through an entry point; so their imports of each other are relative.
"""
