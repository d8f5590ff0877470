"""Ids and text against transformers and sentencepiece; streaming, chat templates, errors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers.tokenization_python import Trie
from vocabularies import (
    CORPUS,
    EXTENDED,
    LLAMA_2,
    LLAMA_3,
    PIECES,
    TEXTS,
    fuzz,
    listed,
    llama_2_bpe,
    llama_2_json,
    llama_3_json,
    processor,
    sentencepiece_model,
    written,
)

from fastllama.tokenizer import Tokenizer, TokenizerError, load_tokenizer

JSON_FOLDERS: dict[str, Callable[[Path], Path]] = {
    "llama-2": lambda path: written(
        path, json_file=llama_2_json(), tokenizer_class="PreTrainedTokenizerFast", **LLAMA_2
    ),
    "llama-2-metaspace": lambda path: written(
        path,
        json_file=llama_2_json(metaspace=True),
        tokenizer_class="LlamaTokenizer",
        legacy=False,
        **LLAMA_2,
    ),
    "llama-2-extended": lambda path: written(path, json_file=llama_2_json(), **EXTENDED),
    "llama-3": lambda path: written(path, json_file=llama_3_json(), **LLAMA_3),
}
FOLDERS = JSON_FOLDERS | {
    "sentencepiece": lambda path: written(path, model=sentencepiece_model(), legacy=False),
    "sentencepiece-extended": lambda path: written(path, model=sentencepiece_model(), **EXTENDED),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All the folders, by name."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: make(root / name) for name, make in FOLDERS.items()}


@pytest.fixture(scope="module", params=JSON_FOLDERS)
def pair(request: pytest.FixtureRequest, folders: dict[str, Path]) -> tuple[Tokenizer, Any]:
    """Ours and transformers' tokenizer of one folder with a tokenizer.json."""
    folder = folders[request.param]
    return load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=FOLDERS)
def tokenizer(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Tokenizer:
    """Ours, of each folder in turn."""
    return load_tokenizer(folders[request.param])


@pytest.fixture
def llama(folders: dict[str, Path]) -> Tokenizer:
    """A fresh tokenizer of a bare tokenizer.model."""
    return load_tokenizer(folders["sentencepiece"])


# tokenizer.json


@fuzz
@given(text=TEXTS, special=st.booleans())
def test_ids_of_a_tokenizer_json_equal_transformers(pair: Any, text: str, special: bool) -> None:
    ours, theirs = pair
    assert ours(text, add_special_tokens=special) == dict(theirs(text, add_special_tokens=special))
    assert ours.encode(text) == theirs.encode(text)


@fuzz
@given(data=st.data(), skip=st.booleans())
def test_text_of_any_ids_of_a_tokenizer_json_equals_transformers(pair: Any, data: Any, skip: bool) -> None:
    ours, theirs = pair
    ids = data.draw(st.lists(st.integers(0, len(theirs) + 2), max_size=20))
    assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@fuzz
@given(
    texts=st.lists(TEXTS, min_size=1, max_size=4),
    padding=st.sampled_from([True, "longest", "max_length"]),
    side=st.sampled_from(["left", "right", None]),
    cut=st.sampled_from(["left", "right"]),
    max_length=st.integers(1, 12),
)
def test_padded_and_truncated_tensors_equal_transformers(
    pair: Any, texts: list[str], padding: Any, side: str | None, cut: str, max_length: int
) -> None:
    ours, theirs = pair
    ours.pad_token = theirs.pad_token = theirs.eos_token
    ours.truncation_side = theirs.truncation_side = cut
    options = {"padding": padding, "padding_side": side, "truncation": True, "max_length": max_length}
    got, expected = ours(texts, return_tensors="pt", **options), theirs(texts, return_tensors="pt", **options)
    assert got.input_ids.dtype == torch.long
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name])


def test_special_tokens_and_sizes_equal_transformers(pair: Any) -> None:
    ours, theirs = pair
    assert (len(ours), ours.vocab_size, ours.padding_side) == (
        len(theirs),
        theirs.vocab_size,
        theirs.padding_side,
    )
    for name in ("bos_token", "eos_token", "unk_token"):
        assert getattr(ours, name) == getattr(theirs, name)
        assert getattr(ours, f"{name}_id") == getattr(theirs, f"{name}_id")
    assert set(theirs.all_special_ids) <= set(ours.all_special_ids)
    assert ours.convert_ids_to_tokens([0, 5, 300]) == theirs.convert_ids_to_tokens([0, 5, 300])
    assert ours.convert_tokens_to_ids(["a", "no such"]) == theirs.convert_tokens_to_ids(["a", "no such"])
    assert ours.convert_tokens_to_ids("a") == theirs.convert_tokens_to_ids("a")


def test_special_tokens_that_tokenizer_json_lacks_are_added_to_it(tmp_path: Path) -> None:
    folder = written(tmp_path, json_file=llama_2_json(), pad_token="<pad>", extra_special_tokens=["<x>"], **LLAMA_2)
    ours, theirs = load_tokenizer(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert ours.pad_token_id == theirs.pad_token_id == PIECES
    assert ours("<pad><x>a") == dict(theirs("<pad><x>a"))
    assert ours.decode([PIECES, PIECES + 1, 261], skip_special_tokens=True) == theirs.decode([261])


def test_flags_of_listed_tokens_replace_those_of_tokenizer_json_and_names_alone_do_not(tmp_path: Path) -> None:
    vocabulary = llama_2_json()
    vocabulary.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True, special=True)])
    vocabulary.add_tokens([tokenizers.AddedToken("<tool>", normalized=False)])
    names: dict[str, Any] = LLAMA_2 | {"tokenizer_class": "PreTrainedTokenizerFast", "mask_token": "<mask>"}
    flags: dict[str, Any] = {"added_tokens_decoder": {str(PIECES + 1): listed("<tool>", rstrip=True)}}
    for i, config in enumerate((names, names | flags)):
        folder = written(tmp_path / str(i), json_file=vocabulary, **config)
        ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
        ids = ours.encode("a <mask> <tool> b")
        assert ids == theirs.encode("a <mask> <tool> b")
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)


def test_special_tokens_that_an_old_tokenizer_json_has_normalized_are_skipped(tmp_path: Path) -> None:
    vocabulary = json.loads(llama_2_json().to_str())
    for token in vocabulary["added_tokens"]:
        token["normalized"] = True  # the tokenizers library then writes "▁<s>" and does not skip it
    ours = load_tokenizer(written(tmp_path, json_file=json.dumps(vocabulary), **LLAMA_2))
    assert ours.decode([*ours.encode("Hello"), 2], skip_special_tokens=True) == "Hello"


def test_tokenizer_json_goes_before_tokenizer_model(tmp_path: Path) -> None:
    written(tmp_path, model=b"broken", json_file=llama_3_json())
    assert load_tokenizer(tmp_path).decode(load_tokenizer(tmp_path).encode("a b"), True) == "a b"


def test_settings_of_truncation_and_padding_inside_tokenizer_json_do_nothing_unasked(tmp_path: Path) -> None:
    with_settings = llama_2_json()
    with_settings.enable_truncation(3)
    with_settings.enable_padding(length=99)
    ids = load_tokenizer(written(tmp_path, json_file=with_settings)).encode("Hello world, Hello world")
    assert ids == llama_2_json().encode("Hello world, Hello world").ids


def test_flags_of_the_config_count_only_where_tokenizer_json_has_no_post_processor(tmp_path: Path) -> None:
    flags: dict[str, Any] = LLAMA_2 | {"add_bos_token": False, "add_eos_token": True}
    with_one = load_tokenizer(written(tmp_path / "a", json_file=llama_2_json(), **flags))
    without = load_tokenizer(written(tmp_path / "b", json_file=llama_2_json(template=False), **flags))
    assert (with_one.encode("a")[0], with_one.encode("a")[-1] == 2) == (1, False)
    assert (without.encode("a")[0] == 1, without.encode("a")[-1]) == (False, 2)


# tokenizer.model


@fuzz
@given(text=TEXTS)
def test_ids_of_plain_text_are_those_of_sentencepiece(llama_models: Any, text: str) -> None:
    for marker in ("<s>", "</s>", "<unk>"):
        text = text.replace(marker, "")
    for own, ours in llama_models:
        assert ours.encode(text, add_special_tokens=False) == own.encode(text)


@pytest.fixture(scope="module")
def llama_models(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """sentencepiece and ours, for models that treat spaces, unknown characters and Unicode differently."""
    root = tmp_path_factory.mktemp("models")
    options: list[dict[str, Any]] = [
        {},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True, "normalization_rule_name": "nmt_nfkc", "byte_fallback": False},
        {"model_type": "unigram"},
    ]
    found = []
    for i, option in enumerate(options):
        for legacy in (True, False):
            model = sentencepiece_model(**option)
            folder = written(root / f"{i}{legacy}", model=model, legacy=legacy)
            found.append((processor(model), load_tokenizer(folder)))
    return found


@pytest.fixture(scope="module")
def llama_pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[Tokenizer, Any]]:
    """By ``legacy``: ours of a tokenizer.model, and what transformers 5 makes of the same vocabulary."""
    vocab, merges = llama_2_bpe()
    pairs = {}
    for legacy in (True, False):
        folder = written(tmp_path_factory.mktemp("pair"), model=sentencepiece_model(), legacy=legacy)
        theirs = transformers.LlamaTokenizer(vocab=vocab, merges=merges, legacy=legacy, add_bos_token=True)
        pairs[legacy] = load_tokenizer(folder), theirs
    return pairs


@fuzz
@given(ids=st.lists(st.integers(3, PIECES - 1), max_size=20))
def test_text_of_any_ordinary_ids_is_that_of_sentencepiece(llama_pairs: Any, ids: list[int]) -> None:
    for ours, _ in llama_pairs.values():
        assert ours.decode(ids) == processor(sentencepiece_model()).decode(ids)


# transformers 5 takes a space for the prefix space where it would add one, and so loses it; by ``legacy``.
LOST_SPACES = {True: re.compile(r"(?:^|(?<=<s>)|(?<=</s>)|(?<=<unk>))[ ▁]+"), False: re.compile("^[ ▁]+")}


@fuzz
@given(text=TEXTS, legacy=st.booleans())
def test_a_tokenizer_model_equals_transformers_5_but_for_leading_spaces(
    llama_pairs: Any, text: str, legacy: bool
) -> None:
    ours, theirs = llama_pairs[legacy]
    text = LOST_SPACES[legacy].sub("", text)
    ids = theirs.encode(text)
    assert ours.encode(text) == ids
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def transformers_4_ids(text: str, legacy: bool, special: list[str]) -> list[int]:
    """What transformers 4's LlamaTokenizer does (tokenize and _tokenize of 4.46), for special tokens only."""
    own = processor(sentencepiece_model())
    without_prefix = processor(sentencepiece_model() + b"\x1a\x02\x18\x00")
    unknown = without_prefix.encode("<unk>")

    def encode(part: str) -> list[int]:
        if legacy:
            return own.encode(part)
        if part.startswith(("▁", " ")):
            return without_prefix.encode("<unk>" + part)[len(unknown) :]
        return without_prefix.encode(part)

    if not legacy and text:
        text = "▁" + text.replace("▁", " ")
    parts = Trie(special).split(text)
    ids: list[int] = []
    for part in parts:
        ids += [own.piece_to_id(part)] if part in special else encode(part)
    starts_with_bare_prefix = len(parts) > 1 and parts[0] == "▁" and parts[1] in special
    return ids[1:] if not legacy and starts_with_bare_prefix else ids


@fuzz
@given(text=TEXTS, legacy=st.booleans())
def test_ids_of_a_tokenizer_model_equal_transformers_4(llama_pairs: Any, text: str, legacy: bool) -> None:
    ours, _ = llama_pairs[legacy]
    expected = transformers_4_ids(text, legacy, ["<s>", "</s>", "<unk>"])
    assert ours.encode(text, add_special_tokens=False) == expected


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({}, ["▁a", "▁", "<s>", "."]),
        ({"legacy": False}, ["▁a", "▁", "<s>", "."]),
        ({"legacy": True}, ["▁a", "▁", "<s>", "▁", "."]),
        ({"legacy": True, "add_prefix_space": False}, ["a", "▁", "<s>", "."]),
        ({"legacy": False, "add_prefix_space": False}, ["a", "▁", "<s>", "."]),
    ],
)
def test_the_prefix_space_stands_where_legacy_and_add_prefix_space_put_it(
    tmp_path: Path, config: dict[str, Any], tokens: list[str]
) -> None:
    ours = load_tokenizer(written(tmp_path, model=sentencepiece_model(), **config))
    ids = ours.encode("a <s>.", add_special_tokens=False)
    assert ours.convert_ids_to_tokens(ids) == tokens
    assert ours.decode(ids).replace("> .", ">.") == "a <s>."


def test_the_models_own_flag_decides_about_the_prefix_space_where_nothing_is_said(tmp_path: Path) -> None:
    model = sentencepiece_model(add_dummy_prefix=False)
    silent = load_tokenizer(written(tmp_path / "a", model=model))
    told = load_tokenizer(written(tmp_path / "b", model=model, add_prefix_space=True))
    assert silent.convert_ids_to_tokens(silent.encode("a")[1:]) == ["a"]
    assert told.decode(told.encode("a")[1:]) == "a"
    assert told.encode("a") != silent.encode("a")


def test_a_space_after_an_added_token_stays_in_a_model_that_removes_extra_spaces(tmp_path: Path) -> None:
    model = sentencepiece_model(remove_extra_whitespaces=True)
    ours = load_tokenizer(written(tmp_path, model=model, legacy=False))
    assert ours.decode(ours.encode("a<s>  b", add_special_tokens=False)) == "a<s> b"


@pytest.mark.parametrize(
    ("flags", "around"),
    [
        ({}, ([1], [])),
        ({"add_bos_token": False}, ([], [])),
        ({"add_eos_token": True}, ([1], [2])),
        ({"add_bos_token": False, "add_eos_token": True}, ([], [2])),
        ({"bos_token": None}, ([], [])),
    ],
)
def test_bos_and_eos_are_added_as_the_flags_say(tmp_path: Path, flags: dict, around: tuple) -> None:
    ours = load_tokenizer(written(tmp_path, model=sentencepiece_model(), **flags))
    inside = ours.encode("Hello", add_special_tokens=False)
    assert ours.encode("Hello") == [*around[0], *inside, *around[1]]


def test_added_tokens_are_cut_out_with_their_flags(folders: dict[str, Path]) -> None:
    ours = load_tokenizer(folders["sentencepiece-extended"])
    pad, mask, tool = PIECES, PIECES + 1, PIECES + 2
    assert (ours.pad_token_id, len(ours), ours.vocab_size) == (pad, PIECES + 3, PIECES)

    def tokens(text: str) -> list[str]:
        return ours.convert_ids_to_tokens(ours.encode(text, add_special_tokens=False))

    assert tokens("a  <mask> b") == ["▁a", "<mask>", "▁", "b"]  # lstrip
    assert tokens("a <tool>  b") == ["▁a", "▁", "<tool>", "b"]  # rstrip
    assert tokens("<pad><s><mask>") == ["<pad>", "<s>", "<mask>"]
    assert tokens("a<pad> <pad>") == ["▁a", "<pad>", "▁", "<pad>"]
    assert ours.decode([pad, mask, tool, 2]) == "<pad><mask><tool></s>"
    assert ours.decode([pad, mask, tool, 2], skip_special_tokens=True) == "<tool>"


def test_the_longest_added_token_wins_and_single_words_stand_alone(tmp_path: Path) -> None:
    added = {
        str(PIECES): listed("<x>"),
        str(PIECES + 1): listed("<x>y"),
        "482": listed("yes", single_word=True),
    }
    ours = load_tokenizer(written(tmp_path, model=sentencepiece_model(), added_tokens_decoder=added))
    assert ours.encode("<x>y<x>", add_special_tokens=False) == [PIECES + 1, PIECES]
    assert 482 in ours.encode("oh yes!")
    assert 482 not in ours.encode("eyes")


def test_control_pieces_and_tokens_with_a_role_are_special(tmp_path: Path) -> None:
    model = sentencepiece_model(control_symbols="<control>")
    role: dict[str, Any] = {"pad_token": "<pad>", "added_tokens_decoder": {str(PIECES): listed("<pad>", special=False)}}
    ours = load_tokenizer(written(tmp_path, model=model, **role))
    control = processor(model).piece_to_id("<control>")
    assert ours.decode([control, PIECES]) == "<control><pad>"
    assert ours.decode([control, PIECES], skip_special_tokens=True) == ""


def test_added_tokens_json_says_nothing_where_the_config_lists_added_tokens(tmp_path: Path) -> None:
    folder = written(tmp_path, model=sentencepiece_model(), added_tokens_decoder={str(PIECES): listed("<new>")})
    (folder / "added_tokens.json").write_text(json.dumps({"<old>": PIECES}))
    assert load_tokenizer(folder).convert_ids_to_tokens(PIECES) == "<new>"


def test_the_older_layout_of_added_tokens_is_read(tmp_path: Path) -> None:
    folder = written(tmp_path, model=sentencepiece_model(), **LLAMA_2)
    (folder / "added_tokens.json").write_text(json.dumps({"<new>": PIECES, "<fun>": PIECES + 1}))
    special = {
        "pad_token": {"content": "<new>", "lstrip": False},
        "additional_special_tokens": ["<more>", "</s>"],
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    ours = load_tokenizer(folder)
    ids = ours.encode("a<new><fun><more>", add_special_tokens=False)
    assert ids[-3:] == [PIECES, PIECES + 1, PIECES + 2]
    assert (ours.pad_token_id, len(ours)) == (PIECES, PIECES + 3)
    assert ours.decode(ids, skip_special_tokens=True) == "a<fun>"


def test_ids_past_the_vocabulary_have_no_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Hello", add_special_tokens=False)
    assert tokenizer.decode([*ids, 10**6]) == tokenizer.decode(ids)
    broken = tokenizer.convert_tokens_to_ids(broken_byte(tokenizer))
    parted = [i for token_id in [*tokenizer.encode("a漢😀"), broken] for i in (10**6, token_id)]
    stream = tokenizer.detokenizer()
    text = "".join([*map(stream.put, parted), stream.end()])
    assert text == tokenizer.decode(parted, skip_special_tokens=True)


def broken_byte(tokenizer: Tokenizer) -> str:
    """The token of a byte that is no part of any character."""
    return "<0xFF>" if tokenizer.unk_token else "ÿ"


# Calling


def test_an_encoding_is_a_mapping_with_attributes(llama: Tokenizer) -> None:
    encoding = llama("a", return_tensors="pt")
    assert {**encoding}.keys() == {"input_ids", "attention_mask"}
    assert encoding["input_ids"] is encoding.input_ids
    assert encoding.input_ids.shape == encoding.attention_mask.shape == (1, 2)
    assert encoding.to("cpu").input_ids.device.type == "cpu"
    with pytest.raises(AttributeError, match=r"input_ids, attention_mask, not token_type_ids"):
        _ = encoding.token_type_ids


def test_one_text_gives_a_row_and_several_give_rows(llama: Tokenizer) -> None:
    row = llama("Hello").input_ids
    assert llama(["Hello", ""]).input_ids == [row, [1]]
    assert llama([]).input_ids == []
    assert llama([], return_tensors="pt").input_ids.shape == (0, 0)
    assert llama("", add_special_tokens=False, return_tensors="pt").input_ids.shape == (1, 0)


def test_max_length_alone_truncates_and_needs_room_for_special_tokens(llama: Tokenizer) -> None:
    assert llama("Hello world", max_length=2).input_ids == llama("Hello world").input_ids[:2]
    assert llama("Hello world", max_length=2, truncation=False).input_ids == llama("Hello world").input_ids
    with pytest.raises(ValueError, match="no room"):
        llama("Hello", max_length=0)


def test_model_max_length_is_the_default_limit(tmp_path: Path, llama: Tokenizer) -> None:
    limited = load_tokenizer(written(tmp_path, model=sentencepiece_model(), model_max_length=4))
    assert len(limited("Hello world, this", truncation=True).input_ids) == 4
    with pytest.raises(ValueError, match="truncation needs max_length"):
        llama("Hello", truncation=True)


def test_padding_without_a_pad_token_says_what_to_do(llama: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.pad_token = tokenizer\.eos_token"):
        llama(["a", "a b"], padding=True)
    llama.pad_token_id = llama.eos_token_id
    assert llama.pad_token == "</s>"
    short, long = llama("a").input_ids, llama("a a a").input_ids
    encoding = llama(["a", "a a a"], padding=True)
    assert encoding.input_ids == [[2, 2, *short], long]
    assert encoding.attention_mask == [[0, 0, 1, 1], [1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"return_tensors": "np"}, "'pt'"),
        ({"padding": "most"}, "'longest'"),
        ({"return_tensors": "pt"}, "rows of 2 to 3 tokens"),
        ({"padding": True, "padding_side": "top"}, "'left' or 'right'"),
    ],
)
def test_wrong_arguments_are_named(llama: Tokenizer, arguments: dict[str, Any], message: str) -> None:
    llama.pad_token = llama.eos_token
    with pytest.raises(ValueError, match=message):
        llama(["a", "a a"], **arguments)


@pytest.mark.parametrize("text", [None, 3, b"bytes", ["a", 3], [["a"]]])
def test_what_is_no_text_is_refused(llama: Tokenizer, text: Any) -> None:
    with pytest.raises(TypeError, match="expected a text or a list of texts"):
        llama(text)


def test_tokens_that_do_not_exist_are_refused(llama: Tokenizer) -> None:
    llama.pad_token = "[PAD]"
    with pytest.raises(ValueError, match=r"pad_token is '\[PAD\]', which is not in the vocabulary"):
        llama(["a"], padding=True)
    with pytest.raises(ValueError, match="vocabulary of 480 tokens"):
        llama.pad_token_id = 480
    with pytest.raises(ValueError, match="-100 is no token id"):
        llama.decode([5, -100])


@pytest.mark.parametrize("text", ["", "\n", "\x00", "a\x00b", "😀" * 50, "👩‍👩‍👧", "e\u0301" * 9, "\ufeffa"])
def test_odd_texts_survive_the_way_there_and_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text


def test_a_very_long_text_is_encoded_whole(tokenizer: Tokenizer) -> None:
    text = "Hello world, 日本語 and more. " * 10_000
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_a_lone_surrogate_is_refused_with_its_place(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"lone surrogate, '\\ud83d' at position 2"):
        tokenizer(["fine", "no\ud83d"])


# Decoding


def test_clean_up_drops_spaces_by_the_rules_of_transformers(tokenizer: Tokenizer) -> None:
    text = "well , it 's fine . is n't it ? I 'm , we 've , you 're , the ' x ' !"
    ids = tokenizer.encode(text, add_special_tokens=False)
    expected = transformers.PreTrainedTokenizerBase.clean_up_tokenization(None, text)  # pyright: ignore
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=True) == expected
    assert tokenizer.decode(ids) == text


def test_batch_decode_takes_rows_and_tensors(llama: Tokenizer) -> None:
    llama.pad_token = llama.eos_token
    batch = llama(["Hello", "Hello world"], padding=True, return_tensors="pt").input_ids
    assert llama.batch_decode(batch, skip_special_tokens=True) == ["Hello", "Hello world"]
    assert llama.batch_decode(batch.tolist(), skip_special_tokens=True) == ["Hello", "Hello world"]
    assert llama.decode(batch[1], skip_special_tokens=True) == "Hello world"
    assert llama.decode(batch[1, -1]) == llama.decode(int(batch[1, -1]))


# Streaming


@settings(fuzz, max_examples=150)
@given(data=st.data(), skip=st.booleans())
def test_streamed_text_is_the_decoded_text_and_never_taken_back(tokenizer: Tokenizer, data: Any, skip: bool) -> None:
    some_id = st.integers(0, len(tokenizer) + 1)
    byte_heavy = st.integers(3, 258) if tokenizer.unk_token else st.integers(0, 255)
    ids = data.draw(
        st.lists(some_id | byte_heavy | st.lists(byte_heavy, max_size=3), max_size=30) | TEXTS.map(tokenizer.encode)
    )
    flat = [i for item in ids for i in (item if isinstance(item, list) else [item])]
    full = tokenizer.decode(flat, skip_special_tokens=skip)
    stream = tokenizer.detokenizer(skip_special_tokens=skip)
    text = ""
    for item in ids:
        text += stream.put(item)
        assert full.startswith(text)
    assert text + stream.end() == full
    assert stream.put(flat) + stream.end() == full  # and again, after end()


@pytest.mark.parametrize("character", ["é", "€", "😀", "👩‍👩‍👧", "e\u0301", "漢"])
def test_a_streamed_character_comes_whole(tokenizer: Tokenizer, character: str) -> None:
    stream = tokenizer.detokenizer()
    ids = tokenizer.encode(f"a{character}b", add_special_tokens=False)
    pieces = [stream.put(i) for i in ids] + [stream.end()]
    assert "".join(pieces) == f"a{character}b"
    assert "\ufffd" not in "".join(pieces)
    assert all(piece in f"a{character}b" for piece in pieces)


def test_plain_words_are_streamed_at_once(tokenizer: Tokenizer) -> None:
    stream = tokenizer.detokenizer()
    ids = tokenizer.encode("Hello world, this is a test", add_special_tokens=False)
    text = ""
    for n, token_id in enumerate(ids, 1):
        text += stream.put(token_id)
        assert text == tokenizer.decode(ids[:n])


@pytest.mark.parametrize("text", ["Hello world, 日本語 😀. ", "\N{THAI CHARACTER KO KAI}", None])
def test_streaming_costs_the_same_for_every_token(
    tokenizer: Tokenizer, text: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tokenizer.convert_tokens_to_ids(broken_byte(tokenizer))
    ids = tokenizer.encode(text * 400) if text else [broken] * 2000
    decoded = 0
    decode = tokenizer._backend.decode

    def counting(ids: list[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return decode(ids)

    monkeypatch.setattr(tokenizer._backend, "decode", counting)
    stream = tokenizer.detokenizer()
    streamed = "".join([*map(stream.put, ids), stream.end()])
    monkeypatch.undo()
    assert streamed == tokenizer.decode(ids, skip_special_tokens=True)
    assert decoded <= 10 * len(ids)


# Chat templates

LLAMA_2_CHAT = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
BLOCKS_CHAT = """
{%- if tools %}
    {%- for tool in tools %}
{{ tool | tojson(indent=2) }}
    {%- endfor %}
{% endif %}
{% for message in messages %}
    {% if message.role == 'skip' %}
        {% continue %}
    {% endif %}
<|{{ message.role }}|>
{% generation %}{% set said = message.content %}{{ said }}{% endgeneration %}{{ said is defined }}

    {% if loop.index == 3 %}{% break %}{% endif %}
{% endfor %}
{{ {'é': '<&>'} | tojson }}{{ strftime_now('%Y') }}{{ colour }}{{ unk_token }}
{% if add_generation_prompt %}<|assistant|>{% endif %}
"""
CONVERSATION = [
    {"role": "user", "content": " Hey, 日本語? "},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "More <s>"},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"city": "<str>"}}}]


@pytest.mark.parametrize("template", [LLAMA_2_CHAT, BLOCKS_CHAT], ids=["llama-2", "blocks"])
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "tools"])
def test_chats_are_written_as_transformers_writes_them(pair: Any, template: str, prompt: bool, tools: Any) -> None:
    ours, theirs = pair
    options = {"chat_template": template, "add_generation_prompt": prompt, "tools": tools, "colour": "red"}
    assert ours.apply_chat_template(CONVERSATION, tokenize=False, **options) == theirs.apply_chat_template(
        CONVERSATION, tokenize=False, **options
    )
    expected = theirs.apply_chat_template(CONVERSATION, return_dict=False, **options)
    assert ours.apply_chat_template(CONVERSATION, **options) == expected
    assert ours.apply_chat_template([CONVERSATION] * 2, **options) == [expected] * 2
    assert ours.apply_chat_template(CONVERSATION, max_length=3, **options) == expected
    cut = {"max_length": 3, "truncation": True}
    shortened = ours.apply_chat_template(CONVERSATION, **cut, **options)
    assert shortened == theirs.apply_chat_template(CONVERSATION, return_dict=False, **cut, **options)
    tensor = ours.apply_chat_template(CONVERSATION, return_tensors="pt", return_dict=True, **options)
    assert tensor.input_ids.tolist() == [expected]


def test_template_files_go_before_the_config(tmp_path: Path) -> None:
    folder = written(tmp_path, model=sentencepiece_model(), chat_template="config")
    assert chat(folder) == "config"
    (folder / "chat_template.jinja").write_text("file")
    assert chat(folder) == load_tokenizer(folder).chat_template == "file"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag")
    assert (chat(folder), chat(folder, chat_template="rag")) == ("file", "rag")


def chat(folder: Path, **options: Any) -> str:
    """The conversation, written by the tokenizer of a folder."""
    return load_tokenizer(folder).apply_chat_template(CONVERSATION, tokenize=False, **options)


def test_named_templates_are_chosen_by_name_and_by_tools(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    folder = written(tmp_path / "a", model=sentencepiece_model(), chat_template=named)
    assert chat(folder) == "D"
    assert chat(folder, tools=TOOLS) == "T"
    assert chat(folder, chat_template="tool_use") == "T"
    assert chat(folder, chat_template="{{ 1 + 1 }}") == "2"
    folder = written(tmp_path / "b", model=sentencepiece_model(), chat_template=[named[1]])
    with pytest.raises(ValueError, match=r"\['tool_use'\] and no default"):
        chat(folder)


@pytest.mark.parametrize(
    ("template", "conversation", "message"),
    [
        (None, CONVERSATION, "no chat template"),
        (LLAMA_2_CHAT, CONVERSATION[1:], "roles must alternate"),
        ("{% if %}", CONVERSATION, "chat template cannot write"),
        ("{{ messages.append(1) }}", CONVERSATION, "chat template cannot write"),
        ("{{ ''.__class__.__mro__ }}", CONVERSATION, "chat template cannot write"),
        ("{{ 1 / 0 }}", CONVERSATION, "chat template cannot write"),
        ("{{ 'x'.index('z') }}", CONVERSATION, "chat template cannot write"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", CONVERSATION, "chat template cannot write"),
        (LLAMA_2_CHAT, [], "empty"),
        (LLAMA_2_CHAT, "Hey", "list of messages"),
        (LLAMA_2_CHAT, CONVERSATION[0], "list of messages"),
    ],
)
def test_chats_that_cannot_be_written_say_why(
    llama: Tokenizer, template: str | None, conversation: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        llama.apply_chat_template(conversation, chat_template=template)


MASKED_CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}<|assistant|>{% generation %}"
    "{{ message.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}<|user|>{{ message.content }}{% endif %}\n{% endfor %}"
)


@pytest.mark.parametrize("last", ["Yes, and", "Yes, and ", "  Yes", [{"type": "text", "text": "Yes, "}]], ids=str)
@pytest.mark.parametrize("template", [LLAMA_2_CHAT, MASKED_CHAT], ids=["strips", "keeps"])
def test_an_open_last_message_ends_the_prompt_as_in_transformers(pair: Any, template: str, last: Any) -> None:
    ours, theirs = pair
    conversation = [CONVERSATION[0], {"role": "assistant", "content": last}]
    if isinstance(last, list):
        template = "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}</s>{% endfor %}"
        conversation = [{"role": "user", "content": [{"type": "text", "text": "Hey"}]}, conversation[1]]
    options = {"chat_template": template, "continue_final_message": True, "tokenize": False}
    assert ours.apply_chat_template(conversation, **options) == theirs.apply_chat_template(conversation, **options)


@pytest.mark.parametrize(
    ("conversation", "options", "message"),
    [
        (CONVERSATION, {"chat_template": "x"}, "does not write the last message"),
        ([{"role": "user"}], {"chat_template": "x"}, "no text in 'content'"),
        (CONVERSATION, {"chat_template": "x", "add_generation_prompt": True}, "exclude each other"),
    ],
)
def test_what_cannot_be_continued_is_an_error(llama: Tokenizer, conversation: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llama.apply_chat_template(conversation, continue_final_message=True, **options)


@pytest.mark.parametrize("padding", [False, True])
def test_masks_of_the_assistants_words_equal_those_of_transformers(pair: Any, padding: bool) -> None:
    ours, theirs = pair
    ours.pad_token = theirs.pad_token = theirs.eos_token
    batch = [[*CONVERSATION, {"role": "assistant", "content": "Done 日本 now."}], CONVERSATION[:2]]
    options = {"chat_template": MASKED_CHAT, "return_dict": True, "return_assistant_tokens_mask": True}
    got = ours.apply_chat_template(batch, padding=padding, **options)
    expected = theirs.apply_chat_template(batch, padding=padding, **options)
    assert got.assistant_masks == expected["assistant_masks"]
    assert any(map(any, got.assistant_masks))
    alone = ours.apply_chat_template(batch[1], **options)
    assert alone.assistant_masks == theirs.apply_chat_template(batch[1], **options)["assistant_masks"]
    with pytest.raises(ValueError, match="return_dict=True"):
        ours.apply_chat_template(batch, chat_template=MASKED_CHAT, return_assistant_tokens_mask=True)


def test_masks_need_a_tokenizer_json(llama: Tokenizer) -> None:
    options = {"chat_template": MASKED_CHAT, "return_dict": True, "return_assistant_tokens_mask": True}
    with pytest.raises(NotImplementedError, match=r"tokenizer\.json"):
        llama.apply_chat_template(CONVERSATION, **options)


def weather(city: str, days: int = 1) -> str:
    """
    Return the weather.

    Args:
        city: Where.
        days: How many days ahead.
    """
    return f"{city} {days}"


def test_functions_as_tools_become_the_schemas_of_transformers(pair: Any) -> None:
    ours, theirs = pair
    options = {"chat_template": BLOCKS_CHAT, "tools": [weather, TOOLS[0]], "tokenize": False}
    assert ours.apply_chat_template(CONVERSATION, **options) == theirs.apply_chat_template(CONVERSATION, **options)


def test_tools_and_documents_of_another_kind_are_refused(llama: Tokenizer) -> None:
    with pytest.raises(TypeError, match="JSON schemas"):
        llama.apply_chat_template(CONVERSATION, chat_template="x", tools=["weather"])  # pyright: ignore
    with pytest.raises(ValueError, match="a tool cannot be described"):
        llama.apply_chat_template(CONVERSATION, chat_template="x", tools=[lambda city: city])
    with pytest.raises(TypeError, match="documents are dicts"):
        llama.apply_chat_template(CONVERSATION, chat_template="x", documents=["text"])  # pyright: ignore
    written = llama.apply_chat_template(
        CONVERSATION, tokenize=False, chat_template="{{ documents[0].text }}", documents=[{"title": "a", "text": "b"}]
    )
    assert written == "b"


def test_a_template_that_writes_bos_gets_no_second_one(pair: Any) -> None:
    ours, _ = pair
    ids = ours.apply_chat_template(CONVERSATION[:2], chat_template=MASKED_CHAT)
    assert ids.count(ours.bos_token_id) == 1


# Files as they are published

BYTE_LEVEL = processors.ByteLevel(trim_offsets=False)


@pytest.mark.parametrize(
    ("tokenizer_class", "flags", "template", "around"),
    [  # what transformers 4.57 gives for these files
        ("LlamaTokenizerFast", {"add_bos_token": True}, False, (1, 0)),
        ("LlamaTokenizerFast", {}, False, (1, 0)),
        ("LlamaTokenizerFast", {"add_bos_token": False}, True, (0, 0)),
        ("LlamaTokenizerFast", {"add_bos_token": True, "add_eos_token": True}, True, (1, 1)),
        ("PreTrainedTokenizerFast", {"add_bos_token": True}, False, (0, 0)),
        ("PreTrainedTokenizerFast", {"add_bos_token": False}, True, (1, 0)),
        ("PreTrainedTokenizerFast", {"add_bos_token": True, "add_eos_token": True}, None, (0, 0)),
        (None, {"add_bos_token": False}, True, (0, 0)),
        (None, {}, False, (1, 0)),
    ],
)
def test_flags_of_llamas_classes_count_before_the_post_processor(
    tmp_path: Path, tokenizer_class: str | None, flags: dict[str, Any], template: bool | None, around: tuple[int, int]
) -> None:
    vocabulary = tokenizers.Tokenizer.from_str(llama_3_json())
    if not template:
        vocabulary.post_processor = None if template is None else BYTE_LEVEL
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')  # which stands for the class where none is named
    folder = written(tmp_path, json_file=vocabulary, **LLAMA_3 | flags | {"tokenizer_class": tokenizer_class})
    ours = load_tokenizer(folder)
    plain = ours.encode("Hello", add_special_tokens=False)
    bos, eos = ours.bos_token_id, ours.eos_token_id
    assert ours.encode("Hello") == [bos] * around[0] + plain + [eos] * around[1]


@pytest.mark.parametrize("config", [{"model_max_length": "512"}, {"added_tokens_decoder": {"x": 1}}], ids=str)
def test_a_config_of_another_form_says_so(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json"):
        load_tokenizer(written(tmp_path, json_file=llama_3_json(), **config))


def test_a_byte_level_file_under_llamas_class_keeps_its_spaces(tmp_path: Path) -> None:
    folder = written(tmp_path, json_file=llama_3_json(), **LLAMA_3 | {"tokenizer_class": "LlamaTokenizerFast"})
    ours, file = load_tokenizer(folder), tokenizers.Tokenizer.from_str(llama_3_json())
    for text in CORPUS:
        assert ours.encode(text) == file.encode(text).ids
        assert ours.decode(ours.encode(text, add_special_tokens=False)) == text


def test_a_tokenizer_json_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    folder = written(tmp_path, json_file=llama_3_json())
    file = folder / "tokenizer.json"
    expected = load_tokenizer(folder).encode("Hello")
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_tokenizer(folder).encode("Hello") == expected


def test_a_tokenizer_json_alone_is_enough(tmp_path: Path) -> None:
    ours = load_tokenizer(written(tmp_path, json_file=llama_3_json()))
    assert ours.encode("Hello") == tokenizers.Tokenizer.from_str(llama_3_json()).encode("Hello").ids
    assert (ours.bos_token, ours.pad_token_id) == (None, None)


@pytest.mark.parametrize("model", [True, False], ids=["tokenizer.model", "tokenizer.json"])
def test_special_tokens_are_split_like_text_where_the_config_says_so(tmp_path: Path, model: bool) -> None:
    files: dict[str, Any] = {"model": sentencepiece_model()} if model else {"json_file": llama_2_json()}
    usual = load_tokenizer(written(tmp_path / "a", **files, **LLAMA_2))
    split = load_tokenizer(written(tmp_path / "b", **files, **LLAMA_2, split_special_tokens=True))
    assert usual.encode("a</s>")[-1] == 2
    assert 2 not in split.encode("a</s>")
    assert split.decode(split.encode("a</s>", add_special_tokens=False)) == "a</s>"


@pytest.mark.parametrize("unknown", ["", {"content": "", "special": True}, None])
def test_an_empty_unknown_token_is_none(tmp_path: Path, unknown: Any) -> None:
    folder = written(tmp_path, json_file=llama_3_json(), **LLAMA_3 | {"unk_token": unknown, "pad_token": ""})
    ours = load_tokenizer(folder)
    assert (ours.unk_token, ours.pad_token, len(ours)) == (
        None,
        None,
        tokenizers.Tokenizer.from_str(llama_3_json()).get_vocab_size(),
    )


def test_added_tokens_far_apart_keep_their_ids(tmp_path: Path) -> None:
    far = {"32000": listed("<far>"), "40000": listed("<farther>", special=False)}
    ours = load_tokenizer(written(tmp_path, model=sentencepiece_model(), **LLAMA_2, added_tokens_decoder=far))
    ids = ours.encode("<far>a<farther>", add_special_tokens=False)
    assert (ids[0], ids[-1]) == (32000, 40000)
    assert ours.decode([32000, 33000, 40000], skip_special_tokens=True) == "<farther>"


# Loading


@pytest.mark.parametrize(("name", "resolved"), [("org/model", "org/model"), ("random:llama-3.2-1b", "demo")])
def test_names_are_resolved_and_random_shapes_have_the_demo_tokenizer(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str, resolved: str
) -> None:
    monkeypatch.setattr("fastllama.loading.names.resolve_path", {resolved: folders["sentencepiece"]}.__getitem__)
    assert len(load_tokenizer(name)) == PIECES


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (None, b"", "has no tokenizer: expected tokenizer.json or tokenizer.model"),
        ("tokenizer.model", b"", "truncated"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "tiktoken"),
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n", "git lfs pull"),
        ("tokenizer.json", b"{", "no whole tokenizer.json"),
        ("tokenizer.json", b"\xff", "no whole tokenizer.json"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json is not valid JSON"),
        ("special_tokens_map.json", b"[]", "holds a JSON list"),
    ],
)
def test_folders_that_cannot_be_read_say_why(tmp_path: Path, file: str | None, content: bytes, message: str) -> None:
    if file is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_tokenizer_model_is_seen(tmp_path: Path, share: float) -> None:
    model = sentencepiece_model()
    (tmp_path / "tokenizer.model").write_bytes(model[: int(share * len(model))])
    with pytest.raises(TokenizerError, match="truncated"):
        load_tokenizer(tmp_path)
