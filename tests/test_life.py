"""What happens to a model and to the machine around it: copies, moves, forks, threads, settings, folders, memory."""

from __future__ import annotations

import asyncio
import copy
import itertools
import os
import pickle
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastllama import LlamaConfig, LlamaForCausalLM
from fastllama.config import RopeParameters
from fastllama.config.fields import write_json
from fastllama.generation.loop import AHEAD
from fastllama.loading import save
from fastllama.model import cache as caches
from fastllama_kernels.common import build, compiling, levels

BUILT = build.BUILT / compiling.file_name(levels.runnable()[0])

TINY = LlamaConfig(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
IDS = torch.tensor([[5, 9, 41, 7, 30, 77]])


def fresh() -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(TINY).eval()


@pytest.fixture(scope="module")
def decoded() -> LlamaForCausalLM:
    """A model that has decoded."""
    model = fresh()
    model.generate(IDS, max_new_tokens=2)
    return model


@pytest.fixture(scope="module")
def expected() -> list[int]:
    return eager(fresh(), 12)


def eager(model: LlamaForCausalLM, new: int) -> list[int]:
    ids = IDS
    with torch.no_grad():
        for _ in range(new):
            ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    return ids[0, IDS.shape[1] :].tolist()


def tokens(model: LlamaForCausalLM, new: int = 12) -> list[int]:
    return model.generate(IDS, max_new_tokens=new)[0, IDS.shape[1] :].tolist()


# ---- the model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("after_decoding", [False, True])
@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_decode_the_same_tokens_with_weights_of_their_own(way, after_decoding, decoded, expected):
    twin = way(decoded if after_decoding else fresh())
    with torch.no_grad():
        decoded.lm_head.weight.neg_()
    assert tokens(twin) == expected
    with torch.no_grad():
        decoded.lm_head.weight.neg_()
    assert tokens(decoded) == expected


CHANGES: dict[str, Callable[[LlamaForCausalLM], Any]] = {
    "double": lambda model: model.double(),
    "bfloat16 and back": lambda model: model.to(torch.bfloat16).float(),
    "load_state_dict": lambda model: model.load_state_dict(larger(model)),
    "assigned": lambda model: model.load_state_dict(larger(model), assign=True),
    "trained": lambda model: trained(model),
}


def larger(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    return {key: value * 1.5 for key, value in model.state_dict().items()}


@pytest.mark.parametrize("way", CHANGES)
def test_weights_that_are_changed_after_decoding_reach_the_engine(way):
    model = fresh()
    before = tokens(model)
    CHANGES[way](model)
    assert tokens(model) == eager(model, 12)
    if way in ("load_state_dict", "assigned", "trained"):  # the others only round the weights
        assert tokens(model) != before


def test_half_precision_after_decoding_decodes_in_half_precision():
    model = fresh()
    tokens(model)
    model.half()
    assert len(tokens(model)) == 12
    assert model.engine is not None
    assert model.engine.dtype == torch.float16


def trained(model: LlamaForCausalLM) -> None:
    """Some steps of gradient descent."""
    model.train().requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        loss: Any = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
    model.eval()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m.model.layers[1].mlp.up_proj.register_forward_hook(print),
            r"layers\.1\.mlp\.up_proj has a forward hook",
        ),
        (lambda m: m.register_forward_pre_hook(print), "the model has a forward hook"),
        (lambda m: setattr(m.model.layers[0], "self_attn", torch.nn.Identity()), r"layers\.0\.self_attn is a Identity"),
        (lambda m: setattr(m.lm_head, "forward", print), r"lm_head has a forward\(\) of its own"),
        (lambda m: setattr(m.model.layers[0].mlp, "act", torch.tanh), "another activation"),
        (
            lambda m: torch.nn.utils.parametrizations.orthogonal(m.model.layers[0].self_attn.q_proj),
            r"q_proj is a ParametrizedLinear",
        ),
    ],
    ids=["hook", "pre-hook", "replaced", "forward", "activation", "parametrized"],
)
def test_modules_that_the_engine_would_not_run_are_refused_with_the_reason(change, message):
    model = fresh()
    tokens(model)
    change(model)
    for call in (lambda: model.generate(IDS), lambda: model.stream(IDS), lambda: model.warmup()):
        with pytest.raises(NotImplementedError, match=rf"{message}.*forward\(\)"):
            call()


def test_a_forward_put_into_a_class_is_refused(decoded, monkeypatch):
    mlp = type(decoded.model.layers[0].mlp)
    monkeypatch.setattr(mlp, "forward", lambda self, x: x)
    with pytest.raises(NotImplementedError, match=r"layers\.0\.mlp has a forward\(\) that was put into its class"):
        decoded.generate(IDS)


def test_a_global_hook_is_refused(decoded):
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(NotImplementedError, match="a global forward hook"):
            decoded.generate(IDS)
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.model.layers.__delitem__(1), "has 1 layers .* expected 2 layers"),
        (lambda model: model.lm_head.half(), "float16 on cpu and float32 on cpu"),
        (lambda model: model.to("meta"), "float32 on meta"),
    ],
    ids=["a layer less", "two dtypes", "meta"],
)
def test_a_model_that_is_no_longer_whole_is_refused(change, message):
    model = fresh()
    tokens(model)
    change(model)
    with pytest.raises(NotImplementedError, match=message):
        model.generate(IDS)


def test_a_process_that_was_forked_while_a_stream_was_open_decodes(decoded, expected):
    with closing(decoded.stream(IDS, max_new_tokens=50)) as stream:
        next(stream)
        assert ends_well(lambda: tokens(decoded) == expected and refuses(stream) and tokens(decoded) == expected)
        assert int(next(stream)) == expected[1]  # the stream goes on here


def refuses(stream: Iterator[torch.Tensor]) -> bool:
    """Whether a stream that another process has begun says so."""
    with pytest.raises(RuntimeError, match="begun in another process"):
        next(stream)
    return True


# ---- what is set around a call -----------------------------------------------------------------


@pytest.fixture
def restored() -> Iterator[None]:
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "setting",
    [
        lambda: torch.set_default_dtype(torch.float64),
        lambda: torch.set_num_threads(1),
        lambda: torch.use_deterministic_algorithms(True),
    ],
    ids=["default dtype", "one thread", "deterministic"],
)
@pytest.mark.parametrize("is_new", [False, True], ids=["has decoded", "new"])
@pytest.mark.usefixtures("restored")
def test_settings_of_torch_change_no_token(setting: Callable[[], None], is_new, decoded, expected):
    model = fresh() if is_new else decoded
    setting()
    assert tokens(model) == expected


def test_inference_mode_changes_no_token_and_calls_may_come_from_inside_and_outside(expected):
    model = fresh()
    for inside in (True, False, True):
        with torch.inference_mode(inside):
            assert tokens(model) == expected


def test_calls_from_an_event_loop(decoded, expected):
    async def both() -> list[list[int]]:
        return await asyncio.gather(*(asyncio.to_thread(tokens, decoded) for _ in range(3)))

    async def streamed() -> list[int]:
        seen = []
        for token_b in decoded.stream(IDS, max_new_tokens=12):
            seen.append(int(token_b))
            await asyncio.sleep(0)
        return seen

    assert asyncio.run(both()) == [expected] * 3
    assert asyncio.run(streamed()) == expected


def test_an_exception_of_a_signal_handler_ends_a_call_and_leaves_the_model_usable(decoded, expected):
    class Late(Exception):
        pass

    def raise_late(*_: Any) -> None:
        raise Late

    previous = signal.signal(signal.SIGALRM, raise_late)
    # Again every 5 seconds: Python drops an exception that is raised while it frees an object.
    signal.setitimer(signal.ITIMER_REAL, 0.3, 5)
    try:
        with pytest.raises(Late):
            decoded.generate(IDS, max_new_tokens=10**9)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert tokens(decoded) == expected


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # an interrupt while an object is freed
def test_an_interrupt_after_any_call_while_the_cache_grows_leaves_the_model_usable():
    torch.manual_seed(1)
    longer = replace(TINY, max_position_embeddings=10, rope=RopeParameters("dynamic", factor=2.0))
    model = LlamaForCausalLM(longer).eval()  # whose rotary tables change with every token
    expected = tokens(model)
    watched = ("engine/buffers.py", "engine/machine.py", "engine/runner.py", "engine/prefixes.py", "model/cache.py")

    def interrupt(at: int) -> bool:
        """Decode, interrupted at a call in these files; whether there was that call."""
        calls = itertools.count()

        def profile(frame: Any, event: str, _: Any) -> None:
            # Where Python looks for signals: after a call into C, and where a function begins.
            if event in ("call", "c_return") and frame.f_code.co_filename.endswith(watched) and next(calls) == at:
                raise KeyboardInterrupt

        model.engine.release()
        model.warmup(max_cache_len=8)
        sys.setprofile(profile)
        try:
            with suppress(KeyboardInterrupt):
                tokens(model)
        finally:
            sys.setprofile(None)
        return next(calls) > at

    at = 0
    while interrupt(at):
        assert tokens(model) == expected, f"after an interrupt at call {at}"
        at += 1
    assert at > 300


def ends_well(check: Callable[[], bool]) -> bool:
    """Whether a check holds in a forked process, and ends."""
    child = os.fork()
    if child == 0:
        os._exit(0 if check() else 1)
    process = os.pidfd_open(child)
    has_ended = bool(select.select([process], [], [], 60)[0])
    os.close(process)
    if not has_ended:
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("after_decoding", [False, True])
def test_a_forked_process_decodes_the_same_tokens(after_decoding, decoded, expected):
    model = decoded if after_decoding else fresh()
    assert ends_well(lambda: tokens(model) == expected)
    assert tokens(model) == expected


# ---- memory ------------------------------------------------------------------------------------


def test_the_cache_grows_while_rows_decode_and_compiles_nothing_for_it():
    model = fresh()
    model.warmup(max_batch_size=2, max_cache_len=16)
    prompts = torch.tensor([[5, 9, 41], [9, 2, 8]])
    with torch.compiler.set_stance("fail_on_recompile"):
        got = model.generate(prompts, max_new_tokens=300)
    assert model.engine is not None
    assert model.engine.cache.max_cache_len == 2 * (3 + AHEAD)  # it grew before the first token, and once after
    again = fresh()
    again.warmup(max_batch_size=2, max_cache_len=512)
    assert got.tolist() == again.generate(prompts, max_new_tokens=300).tolist()


def test_memory_follows_what_is_written_and_not_the_budget():
    model = fresh()
    eos = tokens(model)[3]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = model.generate(IDS, max_new_tokens=10**9, eos_token_id=eos)
    assert out[0, -1] == eos
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_a_cache_that_the_machine_cannot_hold_is_an_error_and_the_model_goes_on(monkeypatch, expected):
    model = fresh()
    model.warmup(max_cache_len=32)
    monkeypatch.setattr(caches, "free_memory", lambda device: 1000)
    with pytest.raises(caches.CacheMemoryError, match=r"needs .* GB more and 1e-06 GB are free: decode fewer"):
        model.generate(IDS, max_new_tokens=200)
    assert tokens(model) == expected


def test_a_context_of_128k_starts_small(expected):
    torch.manual_seed(1)
    model = LlamaForCausalLM(TINY.replace(max_position_embeddings=131072)).eval()
    assert tokens(model) == expected
    assert model.engine is not None
    assert model.engine.cache.max_cache_len == 4096


# ---- the machine -------------------------------------------------------------------------------

DECODE = """
import pathlib, sys, torch
from fastllama import LlamaForCausalLM
from fastllama_kernels.common import build
build.BUILT = pathlib.Path(sys.argv[2] or build.BUILT)
model = LlamaForCausalLM.from_pretrained(sys.argv[1], progress=False)
print(model.generate(torch.tensor([[5, 9, 41, 7, 30, 77]]), max_new_tokens=12)[0, 6:].tolist())
"""
CACHES = (
    "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME", "FASTLLAMA_CACHE_DIR",
)  # fmt: skip


def decode_elsewhere(
    folder: Path, caches: str | Path, built: str = "", **changes: str | None
) -> subprocess.CompletedProcess[str]:
    """Decode in a process with caches of its own, and kernels built elsewhere; variables that are None are not set."""
    environment = os.environ | dict.fromkeys(CACHES, str(caches)) | changes
    environment = {name: value for name, value in environment.items() if value is not None}
    command = [sys.executable, "-c", DECODE, str(folder), built]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint under a name with a space and characters beyond ASCII."""
    path = tmp_path_factory.mktemp("a folder") / "größe 日本"
    fresh().save_pretrained(path)
    return path


def test_without_a_compiler_decoding_goes_on_and_says_what_to_do(folder, expected, tmp_path):
    none = {"PATH": str(tmp_path), "CXX": "no-such-compiler", "CC": "no-such-compiler"}
    done = decode_elsewhere(folder, tmp_path, str(tmp_path), **none)
    assert done.stdout.strip() == str(expected), done.stderr
    assert "no C++ compiler" in done.stderr
    assert "install g++ or clang++, or name one with CXX" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2


def test_without_a_writable_cache_folder_decoding_goes_on_and_says_what_to_do(folder, expected, tmp_path):
    changes = {"TMPDIR": str(tmp_path), "FASTLLAMA_CPU_STEP": "compiled", "PYTHONWARNINGS": "ignore"}  # torch has some
    done = decode_elsewhere(folder, "/dev/null/caches", str(tmp_path), **changes)
    assert done.stdout.strip() == str(expected), done.stderr
    assert "Traceback" not in done.stderr
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR"):
        assert f"compiled code goes to {tmp_path}" in done.stderr
        assert f"set {variable}" in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3  # the third: the kernels are compiled


@pytest.mark.skipif(not BUILT.exists(), reason="the package holds no kernels that were built for this processor")
def test_with_kernels_that_are_built_no_compiler_is_needed(folder, expected, tmp_path):
    done = decode_elsewhere(folder, tmp_path, PATH=str(tmp_path), CXX="no-such-compiler")
    assert done.stdout.strip() == str(expected), done.stderr
    assert done.stderr == ""


@pytest.mark.slow
def test_home_may_be_unset_and_cache_folders_may_have_any_name(folder, expected, tmp_path):
    done = decode_elsewhere(folder, tmp_path / "wo der Cache liegt 日本", HOME=None)
    assert done.stdout.strip() == str(expected), done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_disk_while_saving_leaves_the_checkpoint_that_was_there(tmp_path, monkeypatch):
    model = fresh()
    model.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with torch.no_grad():
        model.lm_head.weight.zero_()

    def full_disk(file: Path, content: Any) -> None:
        if len(written) == 2:
            raise OSError("no space left on device")
        written.append(file)
        write_json(file, content)

    monkeypatch.setattr(save, "write_json", full_disk)
    written: list[Path] = []
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(tmp_path, max_shard_size=15_000)
    assert len(written) == 2  # the index and the config were there, and all weights
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
