"""Compiled steps and their CUDA graphs: what can be seen of them without a CUDA device."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from fastllama.engine import graphs
from fastllama.engine.graphs import cuda_graph_thread


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


def test_an_unknown_way_to_record_graphs_is_refused(monkeypatch) -> None:
    monkeypatch.setenv(graphs.SWITCH, "cudagraph")
    with pytest.raises(ValueError, match="FASTLLAMA_CUDA_GRAPHS is 'cudagraph', expected inductor or explicit"):
        graphs.Steps(torch.device("cuda"))


def test_a_captured_step_runs_is_recorded_once_and_then_replays(monkeypatch) -> None:
    done = []

    class Graph:
        def replay(self) -> None:
            done.append("replay")

    @contextmanager
    def recording(graph, stream, capture_error_mode):
        done.append("record")
        yield

    monkeypatch.setattr("torch.cuda.Stream", lambda device: None)
    monkeypatch.setattr("torch.cuda.CUDAGraph", Graph)
    monkeypatch.setattr("torch.cuda.graph", recording)
    step = graphs.CapturedStep(lambda value: done.append(value), torch.device("cuda"))
    for _ in range(graphs.WARMUP_RUNS + 3):
        step(7)
    assert done == [7, 7, "record", 7, "replay", "replay", "replay"]


def test_a_step_that_cannot_be_recorded_is_recorded_at_the_next_call(monkeypatch) -> None:
    @contextmanager
    def failing(graph, stream, capture_error_mode):
        raise RuntimeError("no")
        yield

    monkeypatch.setattr("torch.cuda.Stream", lambda device: None)
    monkeypatch.setattr("torch.cuda.CUDAGraph", object)
    step = graphs.CapturedStep(lambda: None, torch.device("cuda"))
    for _ in range(graphs.WARMUP_RUNS):
        step()
    monkeypatch.setattr("torch.cuda.graph", failing)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no"):
            step()
