"""The instruction sets that the C++ kernels are compiled for, and which of them a processor has.

There is a library for each level. All of them fit into one package; the best one that the processor can run is loaded.
Imports the standard library alone, for the build of the package does not have torch.
"""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path
from typing import NamedTuple

SWITCH = "FASTLLAMA_CPU_LEVEL"  # names a level to be used in place of the best one
CPUINFO = Path("/proc/cpuinfo")


class Level(NamedTuple):
    """One instruction set.

    Attributes:
        name: for people, and in names of files.
        flags: of the compiler.
        needs: what the processor must have, as Linux names it.
    """

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str]

    def above(self, name: str, flags: str, needs: str) -> Level:
        """A level that has everything of this one and more."""
        return Level(name, (*self.flags, *flags.split()), self.needs | set(needs.split()))


NOTHING = Level("", (), frozenset())
PORTABLE = NOTHING.above("portable", "-msse4.2 -mpopcnt -mcx16", "ssse3 sse4_2 popcnt cx16")
AVX2 = PORTABLE.above("avx2", "-mavx2 -mfma -mf16c -mbmi -mbmi2 -mlzcnt -mmovbe", "avx2 fma f16c bmi1 bmi2 abm movbe")
AVX_VNNI = AVX2.above("avxvnni", "-mavxvnni", "avx_vnni")
AVX512 = AVX2.above(
    "avx512",
    "-mavx512f -mavx512bw -mavx512cd -mavx512dq -mavx512vl",
    "avx512f avx512bw avx512cd avx512dq avx512vl",
)
VNNI = AVX512.above("avx512vnni", "-mavx512vnni", "avx512_vnni")
BF16 = VNNI.above("avx512bf16", "-mavx512bf16", "avx512_bf16")
NEON = Level("neon", ("-march=armv8-a",), frozenset({"asimd"}))
DOTPROD = Level("dotprod", ("-march=armv8.2-a+dotprod+fp16",), NEON.needs | {"asimddp", "asimdhp"})
#: By machine, the lowest first.
LEVELS = {"x86_64": (PORTABLE, AVX2, AVX_VNNI, AVX512, VNNI, BF16), "aarch64": (NEON, DOTPROD)}


def known() -> tuple[Level, ...]:
    """The levels of processors like this one, the lowest first; none where it is of another kind."""
    return LEVELS.get(platform.machine(), ())


def runnable() -> list[Level]:
    """The levels that this processor can run, the best first.

    Where it is of no known kind, or does not say what it is, one that the compiler is to find out.
    """
    has = frozenset(features().split())
    levels = [level for level in reversed(known()) if level.needs <= has] if has else []
    return levels or [Level("native", ("-march=native",), frozenset())]


def usable() -> list[Level]:
    """Those of :func:`runnable` that may be used: all, or the one that FASTLLAMA_CPU_LEVEL names.

    Raises:
        ValueError: it names none that this processor can run.
    """
    levels, forced = runnable(), os.environ.get(SWITCH)
    if not forced:
        return levels
    if chosen := [level for level in levels if level.name == forced]:
        return chosen
    names = ", ".join(level.name for level in reversed(levels))
    raise ValueError(f"{SWITCH} is {forced!r}; this processor can run {names}")


def named(text: str) -> list[Level]:
    """The levels that a text asks for: ``own``, the best of this processor; ``all``; ``none``; or names with commas.

    Raises:
        ValueError: there is no such level.
    """
    if text == "own":
        return runnable()[:1]
    if text in ("all", "none"):
        return [*known()] if text == "all" else []
    by_name = {level.name: level for level in (*known(), *runnable())}
    if unknown := [name for name in text.split(",") if name not in by_name]:
        raise ValueError(f"no instruction set is called {', '.join(unknown)}; there are {', '.join(by_name)}")
    return [by_name[name] for name in text.split(",")]


@functools.cache
def features() -> str:
    """What the processor says it has, as Linux writes it; nothing where it does not say."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "")
