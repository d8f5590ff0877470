"""LlamaForCausalLM: the public class, on top of the network, the loader and the engine."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch

from fastllama.config import GenerationConfig, LlamaConfig, QuantizationConfig
from fastllama.engine.decoder import check_plain
from fastllama.engine.runner import Runner
from fastllama.generation.drafting import say_off
from fastllama.generation.generate import Assistant, Streamer, cache_in_step, check_cache, even_out, generate, stream
from fastllama.generation.known import DraftCounts, known_of
from fastllama.generation.outside import generate_outside
from fastllama.generation.request import outside_the_step, start_of
from fastllama.loading.load import load_model
from fastllama.loading.save import save_model
from fastllama.model.cache import one_cache
from fastllama.model.llama import Llama

_making_an_engine = threading.Lock()  # or threads that share a new model would each make one


class LlamaForCausalLM(Llama):
    """A Llama decoder with its language-model head, under Hugging Face's parameter names.

    ``forward`` is the eager reference. ``generate`` and ``stream`` decode through the compiled engine, which shares
    these weights.

    Args:
        config: the architecture.

    Attributes:
        kv_cache_dtype: of the keys and values that the engine caches: None for the parameters' dtype, or torch.int8 for
            8 bits with a scale for each head of each token, on a CPU. Can be set at any time.
        prefix_caching: whether a prompt that begins like what the engine has computed before is computed from where it
            differs, so that a turn of a chat costs its own tokens. Can be set at any time.

    Source: arXiv 2302.13971, 2307.09288 and 2407.21783; parameter names and layouts of the checkpoints on the
    Hugging Face hub.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        self.generation_config = GenerationConfig(**ids)
        self.kv_cache_dtype: torch.dtype | None = None
        self.prefix_caching = True
        self.engine: Runner | None = None  # made by the first call that decodes

    @property
    def generation_config(self) -> GenerationConfig:
        """What :meth:`generate` does where a call does not say; transformers' object can be set, too."""
        return self._generation_config

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        is_ours = isinstance(config, GenerationConfig)
        self._generation_config = config if is_ours else GenerationConfig.from_hf(config)

    @property
    def draft_counts(self) -> DraftCounts:
        """What has come of the drafts of speculative decoding, since the engine was made."""
        return DraftCounts() if self.engine is None else copy.deepcopy(known_of(self.engine).counts)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"engine": None}  # copies and pickles make an engine of their own

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device = "cpu",
        quantize: str | QuantizationConfig | None = None,
        progress: bool = True,
        strict: bool = False,
        kv_cache_dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        device_map: str | torch.device | dict[str, Any] | None = None,
    ) -> LlamaForCausalLM:
        """Load a checkpoint.

        Args:
            name: a folder, a ``.gguf`` file, a Hugging Face id, ``"demo"`` for the bundled checkpoint, or
                ``"random:SHAPE"`` for random weights in a published shape such as ``"random:llama-3.2-1b"``.
            dtype: dtype of the parameters; the checkpoint's for None and ``"auto"`` (float32 for blocks of GGUF).
            device: where the parameters go.
            quantize: keep the weights in 8 or 4 bits, made while they are read: ``"int8"``, ``"int4"`` or a
                QuantizationConfig; None for those of a checkpoint as it is, quantized or not.
            progress: show a progress bar on stderr if that is a terminal.
            strict: refuse what is otherwise named in a warning and left out: unknown keys of the configs, tensors that
                no Llama uses, generation settings that nobody knows.
            kv_cache_dtype: ``"int8"`` to cache keys and values in 8 bits; None for the parameters' dtype.
            torch_dtype, device_map: transformers' names of ``dtype`` and ``device``: one device, or ``"auto"`` for a
                GPU where there is one.

        Returns:
            The model in eval mode.

        Raises:
            CheckpointError: the checkpoint was not found, is incomplete, damaged or does not fit its config.
            ValueError, NotImplementedError: its configs ask for something that fastllama does not support, or the model
                is to be spread over devices.
        """
        dtype = torch_dtype if dtype is None else dtype
        device = device if device_map is None else device_of(device_map)
        cache_dtype = check_cache_dtype(kv_cache_dtype)
        model = load_model(cls, name, dtype=dtype, device=device, quantize=quantize, progress=progress, strict=strict)
        model.kv_cache_dtype = cache_dtype
        return model

    def save_pretrained(self, folder: str | Path, max_shard_size: str | int = "5GB") -> None:
        """Write a checkpoint that transformers loads: configs and safetensors weights.

        Args:
            folder: created if needed; weights of an earlier checkpoint in it are removed.
            max_shard_size: maximum size of a file in bytes, as an int or a string such as ``"500MB"`` or ``"2GiB"``.
        """
        save_model(self, folder, max_shard_size=max_shard_size)

    def generate(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        generation_config: GenerationConfig | None = None,
        streamer: Streamer | None = None,
        **settings: Any,
    ) -> Any:
        """Decode through the compiled engine, or outside of it what its steps do not do.

        Args:
            input_ids: prompts, integers ``[b, t]``, padded on either side; ``inputs=`` is another name for them. Where
                there are none, a row begins with the BOS id.
            attention_mask: ``[b, t]``, 0 where a prompt is padded. Without a mask, pad ids are padding, unless the pad
                id is also an EOS id.
            generation_config: ours or transformers'; what it does not set is as in the model's own.
            streamer: an object with ``put`` and ``end``, as in transformers; receives the prompt, then each token.
            settings: override the generation config. The fields of :class:`GenerationConfig` may be lists with a value
                for each prompt, but for ``num_return_sequences`` and ``bos_token_id``. Besides,
                ``prefix_allowed_tokens_fn`` as in transformers; ``token_mask``, a function of a row's number, its
                tokens, int64 ``[n]``, and a mask, int32 ``[words]``, in which it clears bit v % 32 of word v // 32 of
                every token v that may not follow; ``speculate="auto"`` for several tokens a step where they can be
                guessed, or transformers' ``prompt_lookup_num_tokens`` and ``max_matching_ngram_size``, or
                ``assistant_model``, a smaller model of fastllama that guesses; ``stop_strings`` with ``tokenizer``;
                ``past_key_values`` or ``cache``, a StaticCache of the prompts' first tokens, which are not computed
                again, and in the end of all tokens but the last one. What else
                transformers takes is done by its code over the engine's logits, or over the eager forward, where a
                warning says why, once.

        Returns:
            int64 ``[b, t + n]`` on the device of ``input_ids``, with ``num_return_sequences`` that many rows for each
            prompt: the prompts as given, then the new tokens. A row that ended early is filled with the pad id. With
            ``return_dict_in_generate`` transformers' object.

        Raises:
            NotImplementedError: what the compiled step does not do, where transformers is not installed.
            TypeError: an unknown setting, by name.
            ValueError: a setting out of range, ids outside the vocabulary, a prompt without tokens.
        """
        second: Any = attention_mask
        if hasattr(second, "to_dict"):  # transformers' second argument
            attention_mask, generation_config = None, second
        config = self.generation_config.under(generation_config)
        if (inputs := settings.pop("inputs", None)) is not None:
            if input_ids is not None:
                raise ValueError("got input_ids and inputs, which are two names for the prompts; give one of them")
            input_ids = inputs
        assistant = self._assistant(config, settings)
        cache = one_cache(settings.get("past_key_values"), settings.get("cache"))
        rest = {name: value for name, value in settings.items() if name not in ("past_key_values", "cache")}
        if cache is not None and input_ids is not None:
            check_cache(cache, self.config)
            is_outside = bool(outside_the_step(config, rest, self.device.type))
            if not is_outside and cache_in_step(engine_of(self), cache, input_ids, attention_mask, config, rest):
                settings = rest
            else:
                even_out(cache, len(input_ids))
        if outside_the_step(config, settings, self.device.type):
            runner_of = functools.partial(engine_of, self)
            return generate_outside(self, runner_of, config, input_ids, attention_mask, streamer, settings)
        if input_ids is None:
            input_ids = start_of(config)
        return generate(engine_of(self), input_ids, attention_mask, config, streamer, cache, assistant, **settings)

    def stream(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        generation_config: GenerationConfig | None = None,
        **settings: Any,
    ) -> Generator[torch.Tensor, None, None]:
        """Decode like :meth:`generate`, but yield the new tokens step by step: int64 ``[b]`` on the CPU.

        To turn them into text, use :meth:`Tokenizer.detokenizer`. Other calls wait until the iterator is exhausted or
        its ``close()`` is called.
        """
        config = self.generation_config.under(generation_config)
        assistant = self._assistant(config, settings)
        return stream(engine_of(self), input_ids, attention_mask, config, assistant, **settings)

    def _assistant(self, config: GenerationConfig, settings: dict[str, Any]) -> Assistant | None:
        """The second model of a call, if it is one of ours, which is taken out of the call's settings.

        Raises:
            TypeError: it is no model.
            ValueError: it is this model, or has another vocabulary.
        """
        second: Any = settings.get("assistant_model")
        if second is not None and not isinstance(second, torch.nn.Module):
            raise TypeError(f"assistant_model is a {type(second).__name__}; expected a model that is loaded")
        if not isinstance(second, LlamaForCausalLM):
            return None
        if second is self:
            raise ValueError("assistant_model is the model itself; expected a smaller one with the same tokenizer")
        ours, its = self.config.vocab_size, second.config.vocab_size
        if ours != its:
            raise ValueError(
                f"assistant_model has a vocabulary of {its} tokens, the model one of {ours}; expected one with the "
                "same tokenizer"
            )
        del settings["assistant_model"]
        if outside := outside_the_step(config, settings, self.device.type):
            say_off(f"next to {', '.join(sorted(outside))}")
            return None
        try:
            return engine_of(second), second.generation_config
        except NotImplementedError as error:
            raise NotImplementedError(f"assistant_model: {error}") from error

    def warmup(self, max_batch_size: int = 1, max_cache_len: int | None = None, *, speculate: bool = False) -> None:
        """Allocate memory and compile every step, so that no later call within these sizes has to.

        Args:
            max_batch_size: maximum number of rows of a call.
            max_cache_len: maximum number of tokens of a row, prompt and new tokens together; the smaller of 4096 and
                ``max_position_embeddings`` when None.
            speculate: compile the steps that take several tokens, too, of this model as one that decodes and as an
                ``assistant_model``.
        """
        engine_of(self).warmup(max_batch_size, max_cache_len, speculate)

    def release(self) -> None:
        """Free the engine's memory: cache, buffers and compiled steps. The next call makes them again."""
        if self.engine is not None:
            self.engine.release()
            self.engine = None


def engine_of(model: LlamaForCausalLM) -> Runner:
    """The model's engine, made on first use and again when the model's weights were replaced or moved.

    Raises:
        NotImplementedError: the model's modules do something that the engine would not do.
    """
    check_plain(model)
    cache_dtype = check_cache_dtype(model.kv_cache_dtype)
    with _making_an_engine:
        if model.engine is None or model.engine.cache_dtype != cache_dtype or not model.engine.serves(model):
            model.engine = Runner(model, cache_dtype)
        model.engine.reuses_prefixes = model.prefix_caching
        return model.engine


def device_of(device_map: str | torch.device | dict[str, Any]) -> str | torch.device:
    """The one device that transformers' ``device_map`` names.

    Raises:
        NotImplementedError: it names several.
    """
    devices = list(dict.fromkeys(device_map.values() if isinstance(device_map, dict) else [device_map]))
    if len(devices) != 1:
        named = ", ".join(map(str, devices))
        raise NotImplementedError(f"device_map names {named}: fastllama keeps a model on one device")
    if devices[0] in ("auto", "balanced", "balanced_low_0", "sequential"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{devices[0]}" if isinstance(devices[0], int) else devices[0]


def check_cache_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype of the engine's KV cache; None for the parameters'.

    Raises:
        ValueError: it is none that there is.
    """
    if dtype not in (None, "auto", "int8", torch.int8):
        raise ValueError(f'kv_cache_dtype is {dtype!r}, expected "int8", or None for the dtype of the parameters')
    return torch.int8 if dtype in ("int8", torch.int8) else None
