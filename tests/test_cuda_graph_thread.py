"""The engine's thread for CUDA graphs: what can be seen of it without a CUDA device."""

from __future__ import annotations

from fastllama.engine import cuda_graph_thread


def containers_of_this_thread() -> int:
    """Which containers of CUDA graphs Inductor finds on the thread that calls this."""
    from torch._inductor import cudagraph_trees

    return id(cudagraph_trees.get_obj(cudagraph_trees.local, "tree_manager_containers"))


def test_every_thread_for_cuda_graphs_has_a_place_of_its_own_for_them() -> None:
    threads = [cuda_graph_thread() for _ in range(2)]
    found = [thread.submit(containers_of_this_thread).result() for thread in threads]
    assert len({*found, containers_of_this_thread()}) == 3
    for thread in threads:
        thread.shutdown()
