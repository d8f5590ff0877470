"""Memory for weights is asked to come in huge pages."""

import re
import sys
from pathlib import Path

import pytest
import torch
from shapes import SHAPE

from fastllama import LlamaConfig, LlamaForCausalLM
from fastllama.loading.memory import HUGE_PAGE, LEAST_BYTES, empty

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
