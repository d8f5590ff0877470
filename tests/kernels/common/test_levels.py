"""The instruction sets of the C++ kernels: which a processor has, and that the kernels are right with each of them."""

from __future__ import annotations

import functools
import itertools
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastllama_kernels.common import build, compiling, levels

KERNELS = Path(__file__).resolve().parent.parent
NUMERICS = ("attention/test_op.py", "layers", "linear/test_op.py", "linear/test_packed.py", "common/test_bandwidth.py")
BELOW = [level.name for level in levels.runnable()[1:]]

# From /proc/cpuinfo of such machines, but for what is no vector instruction.
PENRYN = "sse sse2 pni ssse3 cx16 sse4_1"
IVY_BRIDGE = "sse sse2 pni ssse3 cx16 sse4_1 sse4_2 popcnt avx f16c"
ZEN3 = IVY_BRIDGE + " fma movbe abm bmi1 avx2 bmi2 sha_ni vaes"
ALDER_LAKE = ZEN3 + " avx_vnni"
SKYLAKE_X = IVY_BRIDGE + " fma movbe abm bmi1 avx2 bmi2 avx512f avx512dq avx512cd avx512bw avx512vl"
ICE_LAKE = SKYLAKE_X + " avx512ifma avx512vbmi avx512_vbmi2 avx512_vnni avx512_bitalg"
SAPPHIRE_RAPIDS = ICE_LAKE + " avx_vnni avx512_bf16 amx_bf16 avx512_fp16 amx_tile amx_int8"
CORTEX_A72 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
NEOVERSE_N1 = CORTEX_A72 + " atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp ssbs"


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Lets levels see another processor."""

    def of(machine: str, cpuinfo: str | None) -> None:
        file = tmp_path / "cpuinfo"
        if cpuinfo is not None:
            file.write_text(cpuinfo)
        monkeypatch.setattr(platform, "machine", lambda: machine)
        monkeypatch.setattr(levels, "CPUINFO", file)
        monkeypatch.setattr(levels, "features", levels.features.__wrapped__)

    monkeypatch.delenv(levels.SWITCH, raising=False)
    return of


@pytest.mark.parametrize(
    ("machine", "field", "flags", "best"),
    [
        ("x86_64", "flags", PENRYN, "native"),
        ("x86_64", "flags", IVY_BRIDGE, "portable"),
        ("x86_64", "flags", ZEN3, "avx2"),
        ("x86_64", "flags", ALDER_LAKE, "avxvnni"),
        ("x86_64", "flags", SKYLAKE_X, "avx512"),
        ("x86_64", "flags", ICE_LAKE, "avx512vnni"),
        ("x86_64", "flags", SAPPHIRE_RAPIDS, "avx512bf16"),
        ("aarch64", "Features", CORTEX_A72, "neon"),
        ("aarch64", "Features", NEOVERSE_N1, "dotprod"),
        ("riscv64", "isa", "rv64imafdcv", "native"),
    ],
)
def test_the_best_level_of_a_processor(processor, machine: str, field: str, flags: str, best: str) -> None:
    processor(machine, f"processor\t: 0\n{field}\t\t: {flags}\nbogomips\t: 100\n" * 2)
    assert levels.usable()[0].name == best


def test_the_levels_of_a_processor_go_down_to_the_lowest(processor) -> None:
    processor("x86_64", f"flags\t\t: {ICE_LAKE}\n")
    assert [level.name for level in levels.usable()] == ["avx512vnni", "avx512", "avx2", "portable"]


def test_where_the_processor_does_not_say_the_compiler_finds_out(processor) -> None:
    processor("x86_64", None)
    assert [level.flags for level in levels.usable()] == [("-march=native",)]


def test_a_level_can_be_forced_and_one_that_would_not_run_is_refused(processor, monkeypatch) -> None:
    processor("x86_64", f"flags\t\t: {ZEN3}\n")
    monkeypatch.setenv(levels.SWITCH, "portable")
    assert [level.name for level in levels.usable()] == ["portable"]
    monkeypatch.setenv(levels.SWITCH, "avx512")
    with pytest.raises(ValueError, match=r"FASTLLAMA_CPU_LEVEL is 'avx512'; this processor can run portable, avx2"):
        build.load.__wrapped__()


def test_a_wish_for_levels(processor) -> None:
    processor("x86_64", f"flags\t\t: {ZEN3}\n")
    wishes = {"own": ["avx2"], "none": [], "avx512,portable": ["avx512", "portable"]}
    assert {wish: [level.name for level in levels.named(wish)] for wish in wishes} == wishes
    assert levels.named("all") == list(levels.LEVELS["x86_64"])


def test_libraries_of_other_levels_have_other_names() -> None:
    names = {compiling.file_name(level) for each in levels.LEVELS.values() for level in each}
    assert len(names) == sum(map(len, levels.LEVELS.values()))


@pytest.mark.slow
@pytest.mark.parametrize("level", levels.known(), ids=lambda level: level.name)
def test_the_kernels_compile_for_every_level(level: levels.Level, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(compiling, "FLAGS", (*compiling.FLAGS, "-O0"))  # faster, and as strict
    library = tmp_path / "library.so"
    assert compiling.compile_all({level: library}, Path(torch.__file__).parent / "include", tmp_path) == {}
    assert library.exists()


@pytest.mark.slow
@pytest.mark.parametrize("level", BELOW)
def test_the_kernels_are_right_on_levels_below_the_own_one(level: str) -> None:
    files = [str(KERNELS / name) for name in NUMERICS]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    code = f"import sys, pytest; from fastllama_kernels.common import build; assert build.level() == {level!r}; "
    command[1:3] = ["-c", code + "sys.exit(pytest.main(sys.argv[1:]))"]
    done = subprocess.run(command, env=os.environ | {levels.SWITCH: level}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


BEGIN = """
import json, time, torch
from fastllama_kernels.common import build
from fastllama_kernels.linear import packed, quantize
assert build.load() is None
ops = torch.ops.fastllama
torch.set_num_threads(1)
"""

# Rows of weights a microsecond in the processor's caches, on one thread: of the fastest of many calls, without what a
# call costs whatever its size.
SPEEDS = """
def fastest(rows, bits, offsets, n):
    x, weight, times = torch.randn(rows, 2048).bfloat16(), torch.randn(n, 2048).bfloat16(), []
    codes, scales, offset = ops.quantize(weight, min(bits, 8), 32, offsets)
    offset = offset if offsets else None
    for _ in range(300):
        begin = time.perf_counter()
        if bits == 16:
            ops.linear(x, weight)
        else:
            ops.linear_packed(x, codes, scales, offset, None, None, 0.0, None, True)
        times.append(time.perf_counter() - begin)
    return min(times)

print(json.dumps([1e-6 * 992 / (fastest(rows, *kind, 1024) - fastest(rows, *kind, 32))
                  for kind in ((16, False), (8, False), (4, False), (4, True)) for rows in (1, 4)]))
"""


@functools.cache
def printed(code: str, level: str) -> list:
    environment = os.environ | {levels.SWITCH: level}
    done = subprocess.run([sys.executable, "-c", BEGIN + code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(("level", "below"), [*itertools.pairwise(level.name for level in levels.runnable())])
def test_a_level_is_not_slower_than_the_one_below_it(level: str, below: str) -> None:
    # What stays in memory in place of registers is three to ten times slower; the rest is what machines vary by.
    ratios = [speed / other for speed, other in zip(printed(SPEEDS, level), printed(SPEEDS, below), strict=True)]
    assert min(ratios) > 0.6, ratios


# Rows of weights a microsecond on one thread, of codes that fit the caches and of codes that do not, for 1 and 4 rows.
STREAMS = """
def speed(rows, bits, n, copies):
    x, weight, times = torch.randn(rows, 2048).bfloat16(), torch.randn(n, 2048).bfloat16(), []
    codes, scales, offset = ops.quantize(weight, bits, 32, bits == 4)
    held = [(codes.clone(), scales.clone(), offset.clone() if bits == 4 else None) for _ in range(copies)]
    for _ in range(5 if copies > 1 else 300):
        begin = time.perf_counter()
        for each in held:
            ops.linear_packed(x, *each, None, None, 0.0, None, True)
        times.append(time.perf_counter() - begin)
    return 1e-6 * n * copies / min(times)

print(json.dumps([[speed(rows, bits, 1024, 1), speed(rows, bits, 16384, 16)] for bits in (4, 8) for rows in (1, 4)]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("level", [level.name for level in levels.runnable() if level.name != "portable"])
def test_four_rows_read_memory_as_one_does(level: str) -> None:
    # Without prefetching they take twice as long, where neither memory nor the processor would.
    found = printed(STREAMS, level)
    for (_, one_outside), (four_inside, four_outside) in zip(found[::2], found[1::2], strict=True):
        assert four_outside > 0.65 * min(one_outside, four_inside), found
