"""What every test starts from: no network, own caches, few threads, a fixed seed, poisoned memory."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.utils._device

CACHE_ENV = "FASTLLAMA_TEST_CACHE"  # names a folder that is kept, to compile only once over many runs
CACHES = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "TORCH_EXTENSIONS_DIR": "extensions",
    "HF_HOME": "huggingface",
    "FASTLLAMA_CACHE_DIR": "fastllama",
}
EMPTY_FACTORIES = ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"))

temporary_cache: str | None = None


def pytest_configure(config: pytest.Config) -> None:
    """Points every cache at a folder of this run, before anything has read the environment."""
    global temporary_cache
    root = os.environ.get(CACHE_ENV)
    if not root:
        root = temporary_cache = tempfile.mkdtemp(prefix="fastllama-tests-")
        os.environ[CACHE_ENV] = root  # for the workers of pytest-xdist
    for variable, folder in CACHES.items():
        os.environ[variable] = os.path.join(os.path.abspath(root), folder)
    os.environ["HF_HUB_OFFLINE"] = "1"
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are defined
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threads = min(4, len(os.sched_getaffinity(0)))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # for the processes that tests start
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads of several workers must not spin against each other
    torch.set_num_threads(threads)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes the run's caches."""
    if temporary_cache:
        shutil.rmtree(temporary_cache, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked ``gpu`` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def filled_with_nan(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A factory of uninitialised tensors whose floating-point ones hold NaN, so that using them shows."""

    @functools.wraps(factory)
    def poisoned(*args, **kwargs) -> torch.Tensor:
        tensor = factory(*args, **kwargs)
        if not torch.compiler.is_compiling() and tensor.is_floating_point():
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return poisoned


@pytest.fixture(scope="session", autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Eager ``torch.empty``, ``empty_like`` and ``new_empty`` give NaN in place of whatever was there."""
    torch.utils._device._device_constructors()  # remembers the genuine factories for `with torch.device(...)`
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in EMPTY_FACTORIES:
            patch.setattr(owner, name, filled_with_nan(getattr(owner, name)))
        yield


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """The same random numbers in every test, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def compiled_steps() -> Iterator[None]:
    """Engines made meanwhile compile their steps, as on CUDA; else a CPU's kernels take a step as one operation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTLLAMA_CPU_STEP", "compiled")
        yield


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """For tests that count compilations: nothing compiled by other tests is known to torch.compile."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def make_pair(make_pair_once) -> Callable[..., tuple]:
    """Makes a tiny random Llama of ours and the same one of transformers', float32, eager attention."""
    return make_pair_once


@pytest.fixture(scope="session")
def make_pair_once() -> Callable[..., tuple]:
    """``make_pair`` for fixtures of a wider scope."""

    def make(**overrides):
        import transformers

        from fastllama import LlamaConfig, LlamaForCausalLM

        shape = {
            "vocab_size": 96, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "max_position_embeddings": 512, "initializer_range": 0.3,
            "bos_token_id": None, "eos_token_id": None,
        }  # fmt: skip
        config = LlamaConfig(**(shape | overrides))
        ours = LlamaForCausalLM(config).eval()
        theirs = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**config.to_dict(), attn_implementation="eager")
        ).eval()
        with torch.no_grad():
            for name, parameter in ours.named_parameters():
                if name.endswith(("bias", "norm.weight")):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        theirs.load_state_dict(ours.state_dict())
        return ours, theirs

    return make
