"""accelerate(): a transformers model that decodes through the engine."""

from __future__ import annotations

import copy
import functools
import inspect
import logging

import peft
import pytest
import torch
import transformers
from shapes import LEFT
from transformers import modeling_utils
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from fastllama.config import GenerationConfig, RopeParameters
from fastllama.integrations.transformers import _say_fallback, accelerate, generate, unaccelerate


@pytest.fixture
def theirs(make_pair):
    model = make_pair(tie_word_embeddings=True)[1]
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, 96, (2, 7))


def test_generate_runs_in_the_engine_and_gives_the_same_tokens(theirs, ids) -> None:
    expected = theirs.generate(ids, max_new_tokens=8, do_sample=False)
    fast = accelerate(theirs)
    assert fast is theirs
    assert torch.equal(fast.generate(ids, max_new_tokens=8, do_sample=False), expected)
    assert fast.fastllama.engine.cache is not None


def test_the_weights_are_shared_and_the_state_dict_stays(theirs, ids) -> None:
    before = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    fast = accelerate(theirs)
    fast.generate(ids, max_new_tokens=2)
    engine = {p.untyped_storage().data_ptr() for p in fast.fastllama.engine._net.parameters()}
    assert engine == {p.untyped_storage().data_ptr() for p in theirs.parameters()}
    after = theirs.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_what_the_engine_does_not_do_runs_in_transformers_and_is_logged(theirs, ids, caplog) -> None:
    expected = theirs.generate(ids, max_new_tokens=5, num_beams=2)
    fast = accelerate(theirs)
    with caplog.at_level(logging.INFO, "fastllama"):
        assert torch.equal(fast.generate(ids, max_new_tokens=5, num_beams=2), expected)
    assert "num_beams" in caplog.text


def test_a_reason_is_said_once_though_its_objects_are_others(theirs, ids, caplog) -> None:
    fast = accelerate(theirs)
    _say_fallback.cache_clear()
    with caplog.at_level(logging.INFO, "fastllama"):
        for _ in range(3):
            fast.generate(ids, max_new_tokens=2, stopping_criteria=[transformers.generation.MaxTimeCriteria(60.0)])
    assert caplog.text.count("decoding in transformers' loop with the engine's logits") == 1


def test_streamers_of_transformers_work(theirs, ids) -> None:
    class Recorder(transformers.generation.streamers.BaseStreamer):
        def __init__(self) -> None:
            self.pieces: list[torch.Tensor] = []

        def put(self, value: torch.Tensor) -> None:
            self.pieces.append(value)

        def end(self) -> None:
            self.pieces.append(torch.empty(0))

    streamer = Recorder()
    out = accelerate(theirs).generate(ids, max_new_tokens=3, streamer=streamer)
    assert torch.equal(streamer.pieces[0], ids)
    assert torch.equal(torch.stack(streamer.pieces[1:4], 1), out[:, 7:])
    assert len(streamer.pieces) == 5


def test_other_architectures_are_refused() -> None:
    config = transformers.MistralConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ValueError, match="model_type"):
        accelerate(transformers.MistralForCausalLM(config))


def test_what_a_passed_generation_config_leaves_unset_comes_from_the_models_own(theirs, ids) -> None:
    free = theirs.generate(ids[:1], max_new_tokens=8, do_sample=False)
    theirs.generation_config.eos_token_id = int(free[0, 9])
    config = transformers.GenerationConfig(max_new_tokens=8, do_sample=False)
    expected = theirs.generate(ids[:1], generation_config=config)
    assert torch.equal(accelerate(theirs).generate(ids[:1], generation_config=config), expected)
    exact = transformers.GenerationConfig(max_length=9, do_sample=False)
    assert theirs.generate(ids[:1], generation_config=exact).shape[1] <= 9


def test_replaced_weights_are_followed_and_foreign_modules_fall_back(theirs, ids, caplog) -> None:
    fast = accelerate(theirs)
    fast.generate(ids, max_new_tokens=2)
    theirs.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.randn(56, 32))
    plain = copy.deepcopy(theirs)
    del plain.__dict__["generate"]
    expected = plain.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(fast.generate(ids, max_new_tokens=6, do_sample=False), expected)
    theirs.model.layers[0].mlp.extra = torch.nn.Linear(2, 2)
    with caplog.at_level(logging.WARNING, "fastllama"):
        assert torch.equal(fast.generate(ids, max_new_tokens=6, do_sample=False), expected)
    assert "model.layers.0.mlp.extra is not part of a Llama, unlike what the config describes" in caplog.text


def test_a_copy_of_an_accelerated_model_decodes_with_its_own_weights(theirs, ids) -> None:
    fast = accelerate(theirs)
    expected = fast.generate(ids, max_new_tokens=6, do_sample=False)
    twin = copy.deepcopy(fast)
    with torch.no_grad():
        theirs.model.norm.weight.neg_()
    assert torch.equal(twin.generate(ids, max_new_tokens=6, do_sample=False), expected)
    assert twin.fastllama is not fast.fastllama


def test_eos_ids_in_a_tensor_are_taken(theirs, ids, caplog) -> None:
    fast = accelerate(theirs)
    with caplog.at_level(logging.WARNING, "fastllama"):
        assert fast.generate(ids, max_new_tokens=2, do_sample=False, eos_token_id=torch.tensor([95])).shape[1] <= 9
    assert "eos_token_id" not in caplog.text


def test_copies_that_are_accelerated_again_and_undone_are_what_they_were(theirs, ids) -> None:
    before = theirs.generate
    expected = before(ids, max_new_tokens=4, do_sample=False)
    fast = accelerate(accelerate(theirs))
    assert torch.equal(fast.generate(ids, max_new_tokens=4, do_sample=False), expected)
    assert unaccelerate(fast) is theirs
    assert theirs.generate == before
    assert not {"generate", "fastllama"} & vars(theirs).keys()


# ---- a model that is not what its config describes -----------------------------------------------------------------


def half(*args: torch.Tensor) -> torch.Tensor:
    """As a hook or a forward(): half of its last argument."""
    return args[-1] * 0.5


class HalfMLP(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 0.5


def replace_class(model) -> None:
    model.model.layers[0].mlp.__class__ = HalfMLP


def replace_weights_by_a_parametrization(model) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.parametrizations.weight.original0.mul_(0.5)


def repeat_a_layer(model) -> None:
    model.model.layers[1] = model.model.layers[0]


def append_a_layer(model) -> None:
    model.model.layers.append(LlamaDecoderLayer(model.config, 2))


CHANGES = {
    "hook": lambda model: model.model.layers[1].mlp.register_forward_hook(half),
    "hook before": lambda model: model.model.norm.register_forward_pre_hook(lambda module, x: (x[0].flip(-1),)),
    "hook of the head": lambda model: model.lm_head.register_forward_hook(lambda module, x, y: -y),
    "own forward": lambda model: setattr(model.model.layers[0].mlp, "forward", half),
    "class": replace_class,
    "activation": lambda model: setattr(model.model.layers[0].mlp, "act_fn", torch.nn.ReLU()),
    "eps": lambda model: setattr(model.model.norm, "variance_epsilon", 9.0),
    "eps of the config": lambda model: setattr(model.config, "rms_norm_eps", 0.7),
    "scaling": lambda model: setattr(model.model.layers[1].self_attn, "scaling", 3.0),
    "frequencies": lambda model: model.model.rotary_emb.inv_freq.mul_(0.1),
    "cast frequencies": lambda model: model.bfloat16(),
    "repeated layer": repeat_a_layer,
    "another layer": append_a_layer,
    "parametrization": replace_weights_by_a_parametrization,
    "adapter": lambda model: peft.inject_adapter_in_model(
        peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False), model
    ),
    "attention": lambda model: setattr(model.config, "_attn_implementation", "backwards"),
    "quantized": lambda model: setattr(model.config, "quantization_config", {"quant_method": "gptq", "bits": 4}),
}


@pytest.fixture
def backwards():
    """An attention that transformers knows under a name, which attends to values backwards."""
    modelling = transformers.models.llama.modeling_llama

    def attend(module, query, key, value, mask, **kwargs):
        return modelling.eager_attention_forward(module, query, key, value.flip(2), mask, **kwargs)

    transformers.AttentionInterface.register("backwards", attend)
    transformers.AttentionMaskInterface.register("backwards", transformers.masking_utils.eager_mask)
    yield
    del transformers.AttentionInterface._global_mapping["backwards"]
    del transformers.AttentionMaskInterface._global_mapping["backwards"]


@pytest.mark.usefixtures("backwards")
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_decodes_in_transformers_and_says_why(change, before, theirs, ids, caplog) -> None:
    if before:
        accelerate(theirs).generate(ids, max_new_tokens=2, do_sample=False)
    CHANGES[change](theirs)
    asked = {"max_new_tokens": 6, "do_sample": False, "use_cache": change != "repeated layer"}
    fast = theirs if before else accelerate(theirs)
    _say_fallback.cache_clear()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "fastllama"):
        got = [fast.generate(ids, **asked).tolist() for _ in range(2)]
    assert caplog.text.count("decoding with transformers' own generate: ") == 1
    assert got == [unaccelerate(fast).generate(ids, **asked).tolist()] * 2


def test_a_forward_that_is_put_into_a_class_of_transformers_is_seen(theirs, ids, monkeypatch, caplog) -> None:
    fast = accelerate(theirs)
    _say_fallback.cache_clear()
    genuine = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", functools.wraps(genuine)(lambda self, x: genuine(self, x) * 0.5))
    got = fast.generate(ids, max_new_tokens=6, do_sample=False)
    assert "model.layers.0.mlp has a forward() that was put into its class" in caplog.text
    assert torch.equal(got, unaccelerate(fast).generate(ids, max_new_tokens=6, do_sample=False))


@pytest.mark.parametrize("name", ["apply_rotary_pos_emb", "repeat_kv", "sdpa"])
def test_functions_of_transformers_that_were_replaced_are_seen(theirs, ids, monkeypatch, caplog, name) -> None:
    fast = accelerate(theirs)
    _say_fallback.cache_clear()
    theirs.set_attn_implementation("sdpa" if name == "sdpa" else "eager")
    where = modeling_utils.ALL_ATTENTION_FUNCTIONS if name == "sdpa" else vars(modeling_llama)
    genuine = where[name]
    monkeypatch.setitem(where, name, lambda *args, **kwargs: genuine(*args, **kwargs))
    got = fast.generate(ids, max_new_tokens=6, do_sample=False)
    assert "was replaced" in caplog.text
    assert torch.equal(got, unaccelerate(fast).generate(ids, max_new_tokens=6, do_sample=False))


@pytest.mark.parametrize("how", ["partial", "wrapped", "object"])
def test_whatever_replaces_a_function_is_seen(theirs, ids, monkeypatch, caplog, how) -> None:
    class Called:
        def __call__(self, *args: object) -> object:
            return genuine(*args)

    fast, genuine = accelerate(theirs), modeling_llama.apply_rotary_pos_emb
    put = {
        "partial": functools.partial(genuine),
        "wrapped": torch.no_grad()(lambda *x: genuine(*x)),
        "object": Called(),
    }
    with monkeypatch.context() as patch:
        patch.setattr(modeling_llama, "apply_rotary_pos_emb", put[how])
        _say_fallback.cache_clear()
        fast.generate(ids, max_new_tokens=2, do_sample=False)
    assert "apply_rotary_pos_emb() of transformers was replaced" in caplog.text
    monkeypatch.setattr(LlamaMLP, "forward", torch.no_grad()(lambda self, x: x))
    fast.generate(ids, max_new_tokens=2, do_sample=False)
    assert "forward() that was put into its class" in caplog.text


def test_what_is_fastllamas_own_counts_in_loops_too_and_in_configs_of_transformers_never(theirs, ids) -> None:
    asked = {"max_new_tokens": 9, "do_sample": False}
    plain = theirs.generate(ids, **asked).tolist()
    theirs.generation_config.presence_penalty = 50.0  # which transformers does not follow
    assert theirs.generate(ids, custom_generate=generate, **asked).tolist() == plain
    fast = accelerate(theirs)
    assert fast.generate(ids, **asked).tolist() == plain
    config = GenerationConfig(frequency_penalty=-30.0, **asked)
    changed = fast.generate(ids, generation_config=config).tolist()
    assert changed != plain
    assert fast.generate(ids, generation_config=config, max_time=60.0).tolist() == changed
    assert fast.generate(ids, frequency_penalty=-30.0, max_time=60.0, **asked).tolist() == changed
    sampled = {"do_sample": True, "seed": 4, "max_new_tokens": 6, "max_time": 60.0}
    assert fast.generate(ids, **sampled).tolist() == fast.generate(ids, **sampled).tolist()


def test_what_the_engine_refuses_falls_back(theirs, ids, caplog) -> None:
    expected = theirs.generate(ids, max_new_tokens=3, do_sample=False)
    fast = accelerate(theirs)
    _say_fallback.cache_clear()
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert torch.equal(fast.generate(ids, max_new_tokens=3, do_sample=False), expected)
    finally:
        hook.remove()
    assert "a global forward hook is registered" in caplog.text


@pytest.mark.parametrize("rope_type", ["dynamic", "yarn", "linear", "llama3"])
def test_a_model_as_its_config_describes_it_decodes_in_the_engine(rope_type, make_pair, ids, caplog) -> None:
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8}
    rope = llama3 if rope_type == "llama3" else {}
    theirs = make_pair(
        rope=RopeParameters(rope_type, factor=2.0, **rope), max_position_embeddings=16, attention_bias=True
    )[1]
    asked = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    expected = theirs.generate(ids, **asked)
    fast = accelerate(theirs)
    assert torch.equal(fast.generate(ids, **asked), expected)
    assert fast.fastllama.engine.cache is not None
    assert "decoding with transformers" not in caplog.text


def test_a_longrope_whose_lengths_versions_read_otherwise_gives_transformers_tokens(ids) -> None:
    rope = {
        "rope_type": "longrope",
        "factor": 3.0,
        "original_max_position_embeddings": 8,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 2.0, 4.0, 8.0],
    }
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.3, rope_scaling=rope, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    expected = theirs.generate(ids, max_new_tokens=20, do_sample=False)
    assert torch.equal(accelerate(theirs).generate(ids, max_new_tokens=20, do_sample=False), expected)


@pytest.mark.parametrize("custom", [{}, {"custom_generate": generate}])
def test_a_penalty_counts_padding_where_transformers_does(custom, theirs, ids) -> None:
    asked = {"max_new_tokens": 8, "do_sample": False, "repetition_penalty": 0.5, "attention_mask": LEFT}
    expected = theirs.generate(ids, **asked)
    fast = theirs if custom else accelerate(theirs)
    assert torch.equal(fast.generate(ids, **asked, **custom), expected)


def test_a_cache_that_is_given_stays_with_transformers(theirs, ids, caplog) -> None:
    name = "cache" if "cache" in inspect.signature(type(theirs).forward).parameters else "past_key_values"
    expected = theirs.generate(ids, max_new_tokens=4, do_sample=False)
    _say_fallback.cache_clear()
    cache = transformers.DynamicCache()
    got = accelerate(theirs).generate(ids, max_new_tokens=4, do_sample=False, **{name: cache})
    assert torch.equal(got, expected)
    assert cache.get_seq_length() == ids.shape[1] + 3
    assert name in caplog.text


def test_a_model_in_torch_compile_decodes_in_the_engine(theirs, ids, caplog) -> None:
    expected = theirs.generate(ids, max_new_tokens=6, do_sample=False)
    fast = accelerate(torch.compile(theirs))
    assert torch.equal(fast.generate(ids, max_new_tokens=6, do_sample=False), expected)
    assert "decoding with transformers" not in caplog.text


def test_the_default_device_changes_nothing(theirs, ids) -> None:
    expected = theirs.generate(ids, max_new_tokens=6, do_sample=False)
    with torch.device("meta"):
        assert torch.equal(accelerate(theirs).generate(ids, max_new_tokens=6, do_sample=False), expected)


def test_a_head_that_was_untied_by_hand_counts(theirs, ids, caplog) -> None:
    theirs.lm_head.weight = torch.nn.Parameter(torch.randn_like(theirs.lm_head.weight))
    expected = theirs.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(accelerate(theirs).generate(ids, max_new_tokens=6, do_sample=False), expected)
    assert "the head's weights are not as that says" in caplog.text


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"])
def test_virtual_tokens_of_an_adapter_count(kind, theirs, ids, caplog) -> None:
    configs = {"PROMPT_TUNING": peft.PromptTuningConfig, "PREFIX_TUNING": peft.PrefixTuningConfig}
    config = configs.get(kind, peft.PromptEncoderConfig)(num_virtual_tokens=3, task_type="CAUSAL_LM")
    adapted, asked = peft.get_peft_model(theirs, config), {"max_new_tokens": 5, "do_sample": False}
    expected = adapted.generate(input_ids=ids, **asked)
    adapted.generate(input_ids=ids, **asked)
    assert torch.equal(adapted.generate(input_ids=ids, custom_generate=generate, **asked), expected)


def test_hooks_that_transformers_leaves_behind_are_no_reason_to_fall_back(theirs, ids, caplog) -> None:
    fast = accelerate(theirs)
    fast.generate(ids, max_new_tokens=2, return_dict_in_generate=True, output_hidden_states=True)
    caplog.clear()
    fast.generate(ids, max_new_tokens=2, do_sample=False)
    assert "decoding with transformers" not in caplog.text


def test_embeddings_that_were_resized_decode_in_the_engine(theirs, ids, caplog) -> None:
    theirs.resize_token_embeddings(104)
    expected = theirs.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(accelerate(theirs).generate(ids, max_new_tokens=6, do_sample=False), expected)
    assert "decoding with transformers" not in caplog.text


def test_arguments_by_position_and_our_own_config_are_taken(theirs, ids) -> None:
    config = transformers.GenerationConfig(max_new_tokens=4, do_sample=False)
    processors = transformers.LogitsProcessorList([transformers.SuppressTokensLogitsProcessor([3, 4])])
    expected = [theirs.generate(ids, config), theirs.generate(ids, config, processors)]
    fast, ours = accelerate(theirs), GenerationConfig(max_new_tokens=4, do_sample=False)
    for given in (config, ours):
        assert torch.equal(fast.generate(ids, given), expected[0])
        assert torch.equal(fast.generate(ids, given, processors), expected[1])


# ---- custom_generate -----------------------------------------------------------------------------------------------


def test_transformers_hands_its_calls_to_the_engine(theirs, ids, caplog) -> None:
    mask = torch.ones_like(ids).index_fill(1, torch.tensor([0, 1]), 0)
    penalty = {"repetition_penalty": 1.4, "min_new_tokens": 3, "eos_token_id": [41, 42]}
    for asked in (
        {},
        {"attention_mask": mask},
        {"eos_token_id": 41},
        {"do_sample": True, "top_k": 1, "top_p": 0.9},
        penalty,
        {"no_repeat_ngram_size": 1, "suppress_tokens": [5, 6], "bad_words_ids": [[7, 8], [9]]},
        {"sequence_bias": {(5,): 3.0}, "begin_suppress_tokens": [5], "forced_eos_token_id": 4},
    ):
        expected = theirs.generate(ids, max_new_tokens=6, **asked)
        assert torch.equal(theirs.generate(ids, max_new_tokens=6, custom_generate=generate, **asked), expected)
    assert "decoding with transformers" not in caplog.text
    assert theirs.fastllama.engine.cache is not None


@pytest.mark.parametrize(
    "asked",
    [
        {"num_beams": 2},
        {"encoder_no_repeat_ngram_size": 2},
        {"logits_processor": [lambda _, x: -x]},
        {"logits_processor": [transformers.RepetitionPenaltyLogitsProcessor(3.0)]},
        {"stopping_criteria": [transformers.MaxLengthCriteria(10)]},
        {"max_time": 50.0},
    ],
    ids=lambda asked: "+".join(asked),
)
def test_what_the_engine_does_not_do_stays_in_transformers_loops(asked, theirs, ids, caplog) -> None:
    expected = theirs.generate(ids, max_new_tokens=6, **asked)
    _say_fallback.cache_clear()
    with caplog.at_level(logging.INFO, "fastllama"):
        assert torch.equal(theirs.generate(ids, max_new_tokens=6, custom_generate=generate, **asked), expected)
    assert "decoding in transformers' loop with the engine's logits" in caplog.text


@pytest.mark.parametrize("asked", [{}, {"epsilon_cutoff": 0.01}])
def test_rows_that_transformers_has_expanded_stay_as_many(asked, theirs, ids) -> None:
    out = theirs.generate(
        ids, max_new_tokens=3, do_sample=True, num_return_sequences=3, custom_generate=generate, **asked
    )
    assert out[:, :7].tolist() == ids.repeat_interleave(3, dim=0).tolist()


def test_positions_of_the_caller_count(theirs, ids) -> None:
    asked = {"max_new_tokens": 4, "position_ids": torch.arange(7).expand(2, 7) * 2}
    expected = theirs.generate(ids, **asked)
    assert theirs.generate(ids, custom_generate=generate, **asked).tolist() == expected.tolist()
    assert accelerate(theirs).generate(ids, **asked).tolist() == expected.tolist()


def test_an_empty_cache_of_the_caller_is_filled(theirs, ids) -> None:
    cache = transformers.DynamicCache()
    theirs.generate(ids, max_new_tokens=3, past_key_values=cache, custom_generate=generate)
    if getattr(cache, "_is_user_defined", False):  # older versions do not say whose it is
        assert cache.get_seq_length() == 9


def test_streamers_get_the_prompt_once(theirs, ids) -> None:
    class Recorder(transformers.generation.streamers.BaseStreamer):
        def __init__(self) -> None:
            self.pieces: list[list] = []

        def put(self, value: torch.Tensor) -> None:
            self.pieces.append(value.tolist())

        def end(self) -> None:
            self.pieces.append([])

    expected, streamer = Recorder(), Recorder()
    theirs.generate(ids[:1], max_new_tokens=3, do_sample=False, streamer=expected)
    streamer.put(ids[:1])  # transformers does; some of its versions then forget to pass the streamer on
    config = transformers.GenerationConfig(max_length=10, do_sample=False, pad_token_id=0)
    generate(theirs, ids[:1], generation_config=config, streamer=streamer)
    assert streamer.pieces == expected.pieces
