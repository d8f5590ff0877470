"""accelerate(): a transformers model that decodes through the engine."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import transformers

from fastllama.integrations.transformers import accelerate


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
    with caplog.at_level(logging.WARNING, "fastllama"):
        assert torch.equal(fast.generate(ids, max_new_tokens=5, num_beams=2), expected)
    assert "num_beams" in caplog.text


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


def test_quantized_models_are_refused(theirs) -> None:
    theirs.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ValueError, match="the transformers model is quantized"):
        accelerate(theirs)


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
    assert "extra" in caplog.text


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
