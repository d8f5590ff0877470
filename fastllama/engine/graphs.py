"""How a step becomes one call: on a CPU one operation; else compiled by torch.compile, on CUDA recorded as one graph.

``FASTLLAMA_CPU_STEP=compiled`` has steps compiled on a CPU too, as they are where its kernels do not take them.

Two ways to record it, chosen by the environment variable ``FASTLLAMA_CUDA_GRAPHS``:

    inductor    (default) torch.compile's ``reduce-overhead`` mode records and replays. Its graphs belong to the thread
                that recorded them, so they run on a thread of their own.
    explicit    the compiled step is recorded here as one ``torch.cuda.CUDAGraph``. A replay is one call, on any
                thread. All graphs share one pool of memory.
"""

from __future__ import annotations

import concurrent.futures
import functools
import logging
import threading
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from fastllama import ops
from fastllama.ops.rules import steps_are_native, switch

logger = logging.getLogger(__name__)

SWITCH = "FASTLLAMA_CUDA_GRAPHS"
INDUCTOR, EXPLICIT = KINDS = ("inductor", "explicit")
WARMUP_RUNS = 2  # of a step on CUDA before it is recorded: the first compiles, and allocates what it keeps

Step = Callable[..., None]


class StepKey(NamedTuple):
    """What a step is compiled for: ``prefill``, ``decode`` or ``verify``, rows, and tokens a row."""

    kind: str
    batch: int
    tokens: int


class CompiledStep(NamedTuple):
    """A step's function of its own, and what torch.compile made of it."""

    function: types.FunctionType
    run: Step


class Steps:
    """The compiled steps of an engine. A step is always called on the tensors it was first called on.

    Args:
        device: where the steps run.

    Raises:
        ValueError: ``FASTLLAMA_CUDA_GRAPHS`` or ``FASTLLAMA_CPU_STEP`` is set to something else than its choices.
    """

    def __init__(self, device: torch.device) -> None:
        self._may_be_native = steps_are_native(device.type)
        self._kind = switch(SWITCH, KINDS) if device.type == "cuda" else None
        self._device = device
        self._steps: dict[StepKey, CompiledStep] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._kind == EXPLICIT else None
        self._worker = cuda_graph_thread() if self._kind == INDUCTOR else None

    @property
    def keys(self) -> tuple[StepKey, ...]:
        """What has been compiled."""
        return tuple(self._steps)

    @property
    def runs_to_warm_up(self) -> int:
        """How often a step has to run until it only replays."""
        return 1 if self._kind is None else WARMUP_RUNS + 1

    def is_one_operation(self, dtype: torch.dtype, batch: int, tokens: int) -> bool:
        """Whether the kernels take a whole decode or verify step of this size, so that nothing is to be compiled."""
        return self._may_be_native and ops.runs_at_once(self._device, dtype, batch * tokens, tokens)

    def bound(self, key: StepKey, step: Step, *args: Any) -> Callable[[], None]:
        """One run of the step of this key on these arguments; the first run compiles it."""
        compiled = self._steps.get(key)
        if compiled is None:
            compiled = self._steps[key] = self._compile(step)
        if self._worker is not None:
            return functools.partial(self._on_worker, compiled.run, args)
        return functools.partial(call_plainly, self._device.type, compiled.run, args)

    def clear(self, *keys: StepKey) -> None:
        """Forget these steps, all of them where none is named, and give their graphs back."""
        for key in keys or self.keys:
            # It would keep all that was compiled for it.
            torch._dynamo.eval_frame.remove_from_cache(self._steps.pop(key).function)

    def _compile(self, step: Step) -> CompiledStep:
        compiled = _compile(step, graphs=self._kind != EXPLICIT)
        if self._kind != EXPLICIT:
            return compiled
        return compiled._replace(run=RecordedStep(compiled.run, self._device, self._pool))

    def _on_worker(self, step: Step, args: tuple[Any, ...]) -> None:
        assert self._worker is not None
        stream = torch.cuda.current_stream(self._device)
        future = self._worker.submit(_call_on_stream, stream, step, args)
        try:
            future.result()
        except BaseException:  # interrupted: the step must not run into the next call
            concurrent.futures.wait([future])
            raise


class RecordedStep:
    """A compiled step that is recorded as a CUDA graph after some runs, and replayed from then on.

    Args:
        step: to record.
        device: where it runs.
        pool: the memory its graph shares with other graphs; none of them is replayed while another one is.
    """

    def __init__(self, step: Step, device: torch.device, pool: Any) -> None:
        self._step, self._device, self._pool = step, device, pool
        self._runs = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *args: Any) -> None:
        """Run it; ``args`` are the same tensors each time."""
        if self._graph is None and self._runs < WARMUP_RUNS:
            self._step(*args)
            self._runs += 1
            return
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            stream = torch.cuda.Stream(self._device)  # torch's own one may be of another device
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                self._step(*args)
            self._graph = graph
        self._graph.replay()


class CallOrder:
    """Puts the calls of an engine in order on the device, whatever CUDA streams they are made on.

    What a call has launched may still run when the call has ended: the next one waits for it, on the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._done: torch.cuda.Event | None = None

    @contextmanager
    def call(self) -> Iterator[torch.cuda.Stream | None]:
        """One call; gives the stream on which all of it is to be launched, None where there are no streams."""
        if self._device.type != "cuda":
            yield None
            return
        stream = torch.cuda.current_stream(self._device)
        if self._done is not None:
            stream.wait_event(self._done)
        try:
            yield stream
        finally:
            self._done = torch.cuda.Event()
            self._done.record(stream)


def _compile(step: Step, graphs: bool) -> CompiledStep:
    """Compile a step under a code object of its own.

    Dynamo keeps compiled code per code object, scans it linearly and stops at a limit; with one code object per step,
    there is one entry, no limit to meet, and the entry can go when the step goes.

    A step is only ever called on the buffers it was compiled for. To check them again at each call would cost a small
    model a tenth of its time, so nothing is checked; what was set globally at the time (threads, matmul precision)
    stays as it was.
    """
    if not torch.cuda.is_available():  # a build of torch with CUDA complains, of a machine without
        logging.getLogger("torch.utils.cpp_extension").addFilter(_is_not_about_a_missing_gpu)
    fresh = types.FunctionType(step.__code__.replace(), step.__globals__, step.__name__, step.__defaults__)
    options: dict[str, Any] = torch._inductor.list_mode_options("reduce-overhead") if graphs else {}
    options |= {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    options |= {"size_asserts": False, "alignment_asserts": False}
    options |= {"triton.enable_pdl": False}  # Inductor's kernels need not wait, ours rely on it that all before them do
    compiled = torch.compile(fresh, fullgraph=True, dynamic=False, options=options)
    return CompiledStep(fresh, CompiledOrPlain(compiled, fresh))


def _is_not_about_a_missing_gpu(record: logging.LogRecord) -> bool:
    return "No CUDA runtime is found" not in record.getMessage()


class CompiledOrPlain:
    """A compiled step that runs as it is written where the machine cannot compile: slower, with a warning.

    Args:
        compiled: compiles when it is first called.
        plain: the same step.
    """

    def __init__(self, compiled: Step, plain: Step) -> None:
        self._run, self._plain, self._has_run = compiled, plain, False
        self.__name__ = plain.__name__

    def __call__(self, *args: Any) -> None:
        if self._has_run:
            self._run(*args)
            return
        try:
            self._run(*args)
        except Exception as error:
            reason = machine_fault(error)
            if reason is None:
                raise
            _say_plain(reason)
            self._run = self._plain
            self._run(*args)
        self._has_run = True


def machine_fault(error: BaseException) -> str | None:
    """What the machine lacks, where that is why a step could not be compiled; None: it is another fault."""
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    seen: BaseException | None = error
    while seen is not None:
        inner = getattr(seen, "inner_exception", None)
        if isinstance(seen, InvalidCxxCompiler):
            return "there is no C++ compiler that torch.compile finds; install g++ or clang++, or name one with CXX"
        if isinstance(seen, CppCompileError):
            return f"the C++ compiler failed ({_first_error(str(seen))})"
        if isinstance(seen, OSError):
            return f"{seen}; TORCHINDUCTOR_CACHE_DIR names a folder that can be written to"
        seen = inner or seen.__cause__
    return None


def _first_error(output: str) -> str:
    lines = output.strip().splitlines()
    return next((line for line in lines if "error" in line and "CppCompileError" not in line), lines[0])[:200]


@functools.cache
def _say_plain(reason: str) -> None:
    logger.warning("steps are not compiled, which makes decoding slower: %s", reason)


def cuda_graph_thread() -> ThreadPoolExecutor:
    """A thread that can record Inductor's CUDA graphs.

    Before torch 2.13 only the thread that imports the module of these graphs can, and another one that tries fails an
    assertion. So it is imported here, for graphs that the caller may have of its own, and the new thread is given the
    same to keep graphs in.
    """
    from torch._inductor import cudagraph_trees

    def prepare() -> None:
        local: Any = cudagraph_trees.local
        if not hasattr(local, "tree_manager_containers"):
            local.tree_manager_containers = {}
            local.tree_manager_locks = defaultdict(threading.Lock)

    return ThreadPoolExecutor(1, "fastllama-cuda", initializer=prepare)


@contextmanager
def plain_mode() -> Iterator[None]:
    """Without gradients, outside inference mode: buffers made in it could not be updated outside."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def call_plainly(device_type: str, step: Step, args: tuple[Any, ...]) -> None:
    """Run a step without gradients, outside inference mode, in the weights' own dtype whatever autocast says."""
    is_on = torch.is_autocast_enabled(device_type)
    no_autocast = torch.autocast(device_type, enabled=False) if is_on else nullcontext()
    with torch.inference_mode(False), torch.no_grad(), no_autocast:
        step(*args)


def _call_on_stream(stream: torch.cuda.Stream, step: Step, args: tuple[Any, ...]) -> None:
    with torch.cuda.stream(stream):
        call_plainly("cuda", step, args)
