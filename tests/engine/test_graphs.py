"""Compiled steps and their CUDA graphs: what can be seen of them without a CUDA device."""

from __future__ import annotations

import gc
import logging
from contextlib import contextmanager

import pytest
import torch

from fastllama.engine import graphs
from fastllama.engine.graphs import CallOrder, CompiledStep, StepKey, cuda_graph_thread


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


def test_a_build_of_torch_with_cuda_does_not_complain_of_a_machine_without(monkeypatch, caplog) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    graphs._compile(lambda: None, graphs=False)
    torchs = logging.getLogger("torch.utils.cpp_extension")
    torchs.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/usr/local")
    torchs.warning("something else")
    assert [record.message for record in caplog.records] == ["something else"]


def test_an_unknown_way_to_take_steps_on_a_cpu_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("FASTLLAMA_CPU_STEP", "jit")
    with pytest.raises(ValueError, match="FASTLLAMA_CPU_STEP is 'jit', expected native or compiled"):
        graphs.Steps(torch.device("cpu"))


def test_an_unknown_way_to_record_graphs_is_refused(monkeypatch) -> None:
    monkeypatch.setenv(graphs.SWITCH, "cudagraph")
    with pytest.raises(ValueError, match="FASTLLAMA_CUDA_GRAPHS is 'cudagraph', expected inductor or explicit"):
        graphs.Steps(torch.device("cuda"))


class FakeCuda:
    """Stands in for torch.cuda's graphs, streams and events, and keeps what is done with them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list = []
        self.failures = 0
        fake, log = self, self.done

        class Graph:
            def replay(self) -> None:
                log.append("replay")

        class Stream:
            def __init__(self, device=None) -> None:
                pass

            def wait_event(self, event) -> None:
                log.append(("wait", self, event))

        class Event:
            def record(self, stream) -> None:
                log.append(("record", stream, self))

        @contextmanager
        def recording(graph, pool, stream, capture_error_mode):
            if fake.failures:
                fake.failures -= 1
                raise RuntimeError("no memory")
            log.append(("capture", pool))
            yield

        self.stream = Stream
        for name, stand_in in (("Stream", Stream), ("CUDAGraph", Graph), ("graph", recording), ("Event", Event)):
            monkeypatch.setattr(f"torch.cuda.{name}", stand_in)
        monkeypatch.setattr("torch.cuda.graph_pool_handle", lambda: "pool")


@pytest.fixture
def cuda(monkeypatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def test_a_recorded_step_runs_is_recorded_once_and_then_replays(cuda) -> None:
    step = graphs.RecordedStep(lambda value: cuda.done.append(value), torch.device("cuda"), "pool")
    for _ in range(graphs.WARMUP_RUNS + 3):
        step(7)
    assert cuda.done == [7, 7, ("capture", "pool"), 7, "replay", "replay", "replay"]


def test_a_step_whose_recording_failed_is_recorded_at_the_next_call(cuda) -> None:
    step = graphs.RecordedStep(lambda: cuda.done.append("run"), torch.device("cuda"), "pool")
    for _ in range(graphs.WARMUP_RUNS):
        step()
    cuda.done.clear()
    cuda.failures = 1
    with pytest.raises(RuntimeError, match="no memory"):
        step()
    assert cuda.done == []
    step()
    step()
    assert cuda.done == [("capture", "pool"), "run", "replay", "replay"]


def test_all_recorded_steps_share_one_pool(cuda, monkeypatch) -> None:
    monkeypatch.setenv(graphs.SWITCH, graphs.EXPLICIT)
    pools = iter(["pool", "another pool"])
    monkeypatch.setattr("torch.cuda.graph_pool_handle", lambda: next(pools))
    monkeypatch.setattr(graphs, "_compile", lambda step, graphs: CompiledStep(step, step))
    steps = graphs.Steps(torch.device("cuda"))
    for batch in (4, 2, 1):
        run = steps.bound(StepKey("decode", batch, 1), lambda: None)
        for _ in range(graphs.WARMUP_RUNS + 1):
            run()
    assert [entry for entry in cuda.done if entry != "replay"] == [("capture", "pool")] * 3


def test_a_call_waits_on_the_device_for_the_call_before_it_even_where_that_was_cut_short(cuda, monkeypatch) -> None:
    order, streams = CallOrder(torch.device("cuda")), [cuda.stream(), cuda.stream(), cuda.stream()]
    current = iter(streams)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: next(current))
    with order.call() as stream:
        assert stream is streams[0]
        cuda.done.append("first")

    def interrupted() -> None:
        with order.call():
            cuda.done.append("second")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with order.call():
        cuda.done.append("third")
    one, two, three = (entry[2] for entry in cuda.done if entry[0] == "record")
    assert cuda.done == [
        "first", ("record", streams[0], one),
        ("wait", streams[1], one), "second", ("record", streams[1], two),
        ("wait", streams[2], two), "third", ("record", streams[2], three),
    ]  # fmt: skip


def test_steps_that_are_cleared_are_freed_with_all_that_was_compiled_for_them() -> None:
    def step(x: torch.Tensor) -> None:
        x.add_(1)

    steps, x = graphs.Steps(torch.device("cpu")), torch.zeros(3)
    before = compiled_graphs()
    for tokens in range(3):
        steps.bound(StepKey("decode", 1, tokens), step, x)()
    assert (compiled_graphs() - before, x.tolist()) == (3, [3.0] * 3)
    steps.clear()
    assert compiled_graphs() == before
    steps.bound(StepKey("decode", 1, 0), step, x)()
    assert x.tolist() == [4.0] * 3


def compiled_graphs() -> int:
    """How many graphs of Inductor are alive."""
    gc.collect()
    return sum(type(x).__name__ == "CompiledFxGraph" for x in gc.get_objects())
