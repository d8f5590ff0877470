"""The benchmarks: floor, contenders, records, and the gate that fails when decoding gets slower.

In a checkout ``python -m benchmarks.gpu_suite`` runs them where they lie; installed they are the package
``fastllama_benchmarks``, which ``fastllama bench`` and ``fastllama-regress`` import. So their imports of each other are
relative.
"""
