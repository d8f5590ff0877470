"""Memory for weights is asked to come in huge pages, that of caches comes as it is written to."""

import re
import sys
from pathlib import Path

import pytest
import torch
from shapes import SHAPE

from fastllama import LlamaConfig, LlamaForCausalLM, StaticCache
from fastllama.model.cache import CacheMemoryError, free_memory
from fastllama.model.memory import HUGE_PAGE, LEAST_BYTES, empty, promised, zeros

CPU = torch.device("cpu")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def flags_at(address: int) -> str:
    """What Linux notes of the mapping that an address lies in."""
    for entry in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        if entry:
            first, last = (int(end, 16) for end in entry.split()[0].split("-"))
            if first <= address < last:
                return entry.partition("VmFlags:")[2]
    raise AssertionError(f"nothing is mapped at {address:#x}")


@pytest.mark.skipif(sys.platform != "linux" or not HUGE_PAGES.exists(), reason="a system without such pages")
def test_large_tensors_are_advised() -> None:
    tensor = empty((4 * HUGE_PAGE,), torch.uint8, CPU)
    assert " hg" in flags_at(tensor.data_ptr() + 2 * HUGE_PAGE)
    assert tensor.fill_(7).sum(dtype=torch.long) == 7 * tensor.numel()


def test_small_ones_are_as_torch_makes_them() -> None:
    tensor = empty([LEAST_BYTES // 4 - 1], torch.float32, CPU)
    assert (tensor.shape, tensor.dtype, tensor.device) == ((LEAST_BYTES // 4 - 1,), torch.float32, CPU)


@pytest.mark.skipif(sys.platform != "linux" or not HUGE_PAGES.exists(), reason="a system without such pages")
def test_quantized_weights_lie_in_them(tmp_path: Path) -> None:
    config = LlamaConfig(**SHAPE | {"vocab_size": 8 * HUGE_PAGE // SHAPE["hidden_size"]})
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantize="int8")
    codes = model.model.embed_tokens.codes
    assert " hg" in flags_at(codes.data_ptr() + codes.nbytes // 2)


def resident() -> int:
    """Bytes of memory that this process has."""
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore


@pytest.mark.skipif(sys.platform != "linux", reason="reads the size from /proc")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_a_cache_takes_memory_for_what_it_holds(dtype) -> None:
    config = LlamaConfig(**SHAPE | {"max_position_embeddings": 1 << 16})
    before = resident()
    cache = StaticCache(config, 4, 1 << 16, dtype=dtype)
    assert resident() - before < cache.nbytes / 8
    if "[always]" not in HUGE_PAGES.read_text():
        for layer in cache.key_cache:
            layer[0, :, :16] = 1
        assert resident() - before < cache.nbytes / 8
    assert all(not layer[1:].any() and not layer[0, :, 16:].any() for layer in (*cache.key_cache, *cache.value_cache))


@pytest.mark.parametrize("shape", [(3, 5), (LEAST_BYTES, 2), (1, 2, LEAST_BYTES)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64])
def test_zeros_are_torchs(shape, dtype) -> None:
    tensor = zeros(shape, dtype, CPU)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
    assert not tensor.any()
    assert tensor.fill_(1).bool().all()


def test_what_caches_will_take_is_not_free(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 4000000 kB\nMemAvailable: 1000000 kB\n")  # whatever others do
    monkeypatch.setattr("fastllama.model.cache.MEMINFO", str(tmp_path / "meminfo"))
    config, slots = LlamaConfig(**SHAPE | {"max_position_embeddings": 1 << 20}), 1 << 16
    before, promised_before = free_memory(), promised()
    assert before == max(0, 1024 * 1000000 - promised_before)
    cache = StaticCache(config, 4, slots)
    assert promised() - promised_before == before - free_memory() == cache.nbytes
    cache.key_cache[0].fill_(1)
    assert promised() - promised_before == cache.nbytes - cache.key_cache[0].nbytes
    rows = int(0.6 * before / (cache.nbytes / 4))
    large = StaticCache(config, rows, slots)
    with pytest.raises(CacheMemoryError, match="are free"):
        StaticCache(config, rows, slots)
    with pytest.raises(CacheMemoryError, match="are free"):
        cache.resize(rows, slots)
    assert cache.key_cache[0].shape[0] == 4
    del large
    cache.resize(5, slots)
    assert promised() - promised_before == cache.nbytes // 5  # the fifth row
    del cache
    assert promised() == promised_before


def test_a_cache_that_does_not_get_memory_stays_as_it_was(monkeypatch) -> None:
    cache, calls = StaticCache(LlamaConfig(**SHAPE), 1, 64), iter(range(3))

    def scarce(*args):
        if next(calls, None) is None:
            raise MemoryError("there is no room for 3 GB")
        return zeros(*args)

    monkeypatch.setattr("fastllama.model.cache.zeros", scarce)
    before = [*cache.key_cache, *cache.value_cache]
    with pytest.raises(CacheMemoryError, match="no room for 3 GB; decode fewer"):
        cache.resize(2, 128)
    assert all(x is y for x, y in zip((*cache.key_cache, *cache.value_cache), before, strict=True))
    assert (cache.batch_size, cache.max_cache_len) == (1, 64)


@pytest.mark.parametrize("bytes_wanted", [1 << 60, 1 << 63])
def test_more_than_there_is_is_an_error(bytes_wanted: int) -> None:
    with pytest.raises(MemoryError, match=r"there is no room for \d\S+e\+09 GB"):
        zeros((bytes_wanted // 2, 2), torch.uint8, CPU)
