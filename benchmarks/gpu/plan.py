"""What the GPU suite measures, in which order and at which sizes: data, without torch.

The order is by value: what comes last is the first to be left out where time runs short.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

INT8, INT4 = "int8", "int4"
SLOTS_MULTIPLE = 128  # capacities are multiples of it
PEERS = ("transformers", "static", "gpt-fast")


@dataclass(frozen=True)
class Point:
    """One decode that is measured.

    Attributes:
        shape: of the model, a key of ``Scale.models``.
        batch: rows.
        prompt_len: tokens of each prompt.
        slots: of the KV cache.
        rounds, warmups: timed and unmeasured runs.
        quantize: None, or a precision that may not be there yet.
        peers: what to compare with.
        is_profiled: look at what a step launches, too.
    """

    shape: str
    batch: int
    prompt_len: int
    slots: int
    rounds: int = 3
    warmups: int = 2
    quantize: str | None = None
    peers: tuple[str, ...] = ()
    is_profiled: bool = False

    def __str__(self) -> str:
        return f"{self.shape} {self.quantize or 'bf16'} b{self.batch} {self.prompt_len}/{self.slots}"


@dataclass(frozen=True)
class Scale:
    """The sizes of a suite.

    Attributes:
        models: of each shape the name, as ``from_pretrained`` takes it.
        dtype: of unquantized weights.
        batches: three of them.
        short, long, longest: tokens of the prompts.
        new_tokens: of each decode.
        kernel_rounds: of the kernel table.
    """

    models: tuple[tuple[str, str], ...]
    dtype: str
    batches: tuple[int, int, int]
    short: int
    long: int
    longest: int
    new_tokens: int
    kernel_rounds: int

    def slots(self, prompt_len: int) -> int:
        """Slots for a prompt and its new tokens, rounded up."""
        return -(-(prompt_len + self.new_tokens) // SLOTS_MULTIPLE) * SLOTS_MULTIPLE


TINY_MODEL = "tiny"  # a folder that the suite writes
FULL = Scale(
    models=(("1b", "random:llama-3.2-1b"), ("8b", "random:llama-3.1-8b")),
    dtype="bfloat16",
    batches=(1, 8, 32),
    short=512,
    long=8192,
    longest=32672,  # with the new tokens 32k
    new_tokens=96,
    kernel_rounds=3,
)
TINY = Scale(
    models=(("1b", TINY_MODEL), ("8b", TINY_MODEL)),
    dtype="bfloat16",
    batches=(1, 2, 2),
    short=16,
    long=160,
    longest=320,
    new_tokens=64,
    kernel_rounds=1,
)


@dataclass(frozen=True)
class Step:
    """A part of the suite that runs in a process of its own.

    Attributes:
        name: for ``--only``.
        what: one line.
        expected: seconds that it should take on an H100 or H200.
        limit: seconds after which it is ended.
        gigabytes: GPU memory that it needs at most.
        is_rehearsed: compile its decode steps beforehand, while the tests run.
    """

    name: str
    what: str
    expected: float
    limit: float
    gigabytes: float = 1
    is_rehearsed: bool = False


MACHINE, TESTS, KERNELS = "machine", "tests", "kernels"
STEPS = (
    Step(MACHINE, "environment and copy bandwidth", 12, 60),
    Step(TESTS, "tests marked gpu; meanwhile the decode steps of what follows are compiled", 100, 170),
    Step("1b", "1B shape, batch 1, short context: peers, host time, what a step launches", 70, 150, 6, True),
    Step("8b", "8B shape, the same", 110, 220, 24, True),
    Step(KERNELS, "each operation of a decode step", 30, 120, 8, True),
    Step("8b-batches", "8B shape, larger batches, short context", 35, 110, 24, True),
    Step("1b-batches", "1B shape, larger batches, short context", 25, 90, 8, True),
    Step("8b-long", "8B shape, long context, and short context in a long cache", 55, 150, 36, True),
    Step("1b-long", "1B shape, the same, and the largest batch", 40, 120, 45, True),
    Step("8b-32k", "8B shape, batch 1, 32k tokens", 60, 180, 60),
    Step("quantized", "int8 and int4, batch 1", 15, 120, 24),
    Step("8b-long-largest", "8B shape, largest batch, long context", 70, 150, 110),
)


@dataclass(frozen=True)
class Goal:
    """What a decode in bf16 is to reach on an H200: a step in so many microseconds, or so much of the bandwidth."""

    shape: str
    batch: int
    prompt_len: int
    step_us: float | None = None
    mbu: float | None = None


GOALS_OF = "H200"
GOALS = (
    Goal("1b", 1, FULL.short, step_us=640),
    Goal("8b", 1, FULL.short, step_us=3880),
    Goal("1b", 8, FULL.short, step_us=712),
    Goal("1b", 32, FULL.short, step_us=824),
    Goal("8b", 1, FULL.longest, mbu=0.9),
)


def points(step: str, scale: Scale) -> tuple[Point, ...]:
    """The decodes of a step; none for a step that decodes nothing."""
    one, some, many = scale.batches
    short, long = scale.slots(scale.short), scale.slots(scale.long)
    shape = step.split("-")[0]
    at_one = Point(shape, one, scale.short, short, peers=PEERS, is_profiled=True)

    def in_short(batch: int) -> Point:
        return Point(shape, batch, scale.short, short)

    at_long = Point(shape, one, scale.long, long, rounds=2, warmups=1)
    plan = {
        "1b": (at_one,),
        "8b": (at_one,),
        "8b-batches": (in_short(some), in_short(many)),
        "1b-batches": (in_short(some), in_short(many)),
        # Both in one cache: what a step costs should follow the live length, not the capacity.
        "8b-long": (at_long, replace(at_long, prompt_len=scale.short), replace(at_long, batch=some)),
        "1b-long": (
            at_long,
            replace(at_long, prompt_len=scale.short),
            replace(at_long, batch=some),
            replace(at_long, batch=many),
        ),
        "8b-32k": (Point(shape, one, scale.longest, scale.slots(scale.longest), rounds=1, warmups=1),),
        "8b-long-largest": (replace(at_long, batch=many, rounds=1, warmups=1),),
        "quantized": tuple(
            Point(model, one, scale.short, short, quantize=precision, is_profiled=True)
            for precision in (INT8, INT4)
            for model, _ in scale.models
        ),
    }
    return plan.get(step, ())
