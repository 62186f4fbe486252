"""The trained tokenizer and the one from Hugging Face."""

import json
import pickle

import pytest
import sentencepiece
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from sparsecut_jax.text.tokenizer import from_json, load, train, wrap
from sparsecut_jax.types import UserError

TEXTS = ["what color is the circle?", "is there a red shape?", "yes", "no", "what color is the shape?"] * 3
BYTES = 256 + 3  # all bytes, and <pad>, <s>, </s>


@pytest.fixture(scope="module")
def trained():
    return train(TEXTS, 300)


def test_special_ids(trained):
    assert (trained.pad, trained.bos, trained.eos) == (0, 1, 2)
    assert [trained.backend.id_to_token(i) for i in range(3)] == ["<pad>", "<s>", "</s>"]


def test_size_is_at_most_what_was_asked(trained):
    assert BYTES < trained.size <= 300
    assert train(TEXTS, BYTES).size == BYTES
    assert train([], 300).size == BYTES


def test_a_vocabulary_without_room_for_all_bytes_is_refused():
    with pytest.raises(UserError, match="259"):
        train(TEXTS, 100)


def test_merges_shorten_what_was_seen(trained):
    assert len(trained.encode("what color")) < len("what color")
    assert len(trained.encode("zqx")) == 3


def test_same_texts_same_tokenizer(trained):
    assert train(list(TEXTS), 300).to_json() == trained.to_json()


@pytest.mark.parametrize(
    "text",
    ["", " ", "what color", "  two  spaces ", "\n", "new: 12345", "Grüße, 日本語 😀", "a\0b", "</s><pad>", "<image>"],
)
def test_any_text_comes_back(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert not {trained.pad, trained.bos, trained.eos} & set(ids)


def test_nothing_is_added_around_text(trained):
    assert trained.encode("") == ()
    assert trained.encode("a") == (trained.backend.token_to_id("a"),)


def test_half_a_surrogate_pair_is_no_crash(trained):
    """JSON can spell "\\ud800", which is no Unicode text."""
    assert isinstance(trained.encode("a\ud800b"), tuple)
    assert train(["a\ud800b", "c"], 260).encode("b")


def test_decode_leaves_special_tokens_out(trained):
    assert trained.decode([trained.bos, *trained.encode("yes"), trained.eos, trained.pad]) == "yes"


def test_json_round_trip(trained):
    again = from_json(trained.to_json())
    assert (again.pad, again.bos, again.eos, again.size) == (0, 1, 2, trained.size)
    for text in ("what color is it?", "</s>", "日本語"):
        assert again.encode(text) == trained.encode(text)
    assert again.to_json() == trained.to_json()


def test_saved_folder_can_be_loaded(trained, tmp_path):
    trained.save(tmp_path / "new" / "folder")
    again = load(str(tmp_path / "new" / "folder"))
    assert (again.pad, again.bos, again.eos, again.size) == (0, 1, 2, trained.size)
    for text in ("what color is it?", "</s>", "日本語", ""):
        assert again.encode(text) == trained.encode(text)


def word_level(folder, **special):
    """A tokenizer without merges, as a folder of files."""
    backend = Backend(models.WordLevel({"a": 0, "b": 1, "[END]": 2}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def test_tokenizer_without_bos_and_pad(tmp_path):
    found = load(word_level(tmp_path, eos_token="[END]"))
    assert (found.pad, found.bos, found.eos) == (2, -1, 2)
    assert found.encode("b a b") == (1, 0, 1)


def test_tokenizer_without_end_is_refused(tmp_path):
    path = word_level(tmp_path)
    with pytest.raises(UserError, match="has no end-of-text token, so an answer could never end") as caught:
        load(path)
    assert str(caught.value).startswith(f"tokenizer.path={path!r}")


@pytest.mark.parametrize("content", [None, "", "{", "{}", "<html>"])
def test_folder_that_holds_no_tokenizer(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError) as caught:
        load(str(tmp_path))
    assert str(caught.value).startswith(f"tokenizer.path={str(tmp_path)!r}: no Hugging Face tokenizer could be read")


CHAT = "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"


def test_the_chat_template_stays_with_the_tokenizer(trained, tmp_path):
    told = wrap(trained.backend, trained.pad, trained.bos, trained.eos, CHAT)
    assert from_json(told.to_json()).chat_template == CHAT
    assert told.with_special("<image>")[0].chat_template == CHAT
    told.save(tmp_path)
    assert load(str(tmp_path)).chat_template == CHAT


def test_json_without_a_chat_template_is_as_it_was(trained):
    assert list(json.loads(trained.to_json())) == ["special", "tokenizer"]
    assert from_json(trained.to_json()).chat_template == ""


@pytest.mark.parametrize(
    "given", [CHAT, [{"name": "default", "template": CHAT}, {"name": "tool_use", "template": "x"}], None]
)
def test_the_chat_template_of_a_folder(tmp_path, given):
    path = word_level(tmp_path, eos_token="[END]", **({"chat_template": given} if given else {}))
    assert load(path).chat_template == (CHAT if given else "")


def test_a_chat_template_in_a_file_of_its_own(tmp_path):
    path = word_level(tmp_path, eos_token="[END]")
    (tmp_path / "chat_template.jinja").write_text(CHAT)
    assert load(path).chat_template == CHAT


def test_a_copy_reads_no_special_tokens_from_text_either(trained):
    """Worker processes get one."""
    again = pickle.loads(pickle.dumps(trained))
    assert (again.pad, again.bos, again.eos) == (trained.pad, trained.bos, trained.eos)
    for copy in (again, trained.with_special("<image>")[0]):
        assert copy.encode("</s> <image>") == trained.encode("</s> <image>")


def test_long_texts_are_not_remembered():
    tokenizer = train(["a b"], 300)
    assert tokenizer.encode("a" * 10_000) == tokenizer.encode("a") * 10_000
    assert tokenizer._short.cache_info().maxsize * 500 < 100e6
    before = tokenizer._short.cache_info().currsize
    tokenizer.encode("b" * 501)
    assert tokenizer._short.cache_info().currsize == before


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ({}, ("a ", 300, " b ", 300, "")),
        ({"rstrip": True}, ("a ", 300, "b ", 300, "")),
        ({"lstrip": True}, ("a", 300, " b", 300, "")),
    ],
)
def test_special_tokens_swallow_white_space_where_they_say_so(trained, kind, expected):
    backend = Backend.from_str(trained.backend.to_str())
    backend.add_special_tokens([AddedToken("<X>", **kind)])
    found = wrap(backend, 0, 1, 2).split_special("a <X> b <X>")
    assert found == tuple(backend.token_to_id("<X>") if piece == 300 else piece for piece in expected)


def test_split_special_cuts_a_template_and_not_what_users_say():
    tokenizer = train(["a b"], 300)
    assert tokenizer.split_special("x<s>y\n</s>") == ("x", 1, "y\n", 2, "")
    assert tokenizer.split_special("plain") == ("plain",)
    assert tokenizer.decode(tokenizer.encode("<s>")) == "<s>"


def test_size_is_the_rows_that_an_embedding_needs():
    """Ids may have gaps: the largest one counts."""
    backend = Backend(models.WordLevel({"<s>": 0, "</s>": 1, "far": 9999}, unk_token="<s>"))
    assert wrap(backend, 0, 0, 1).size == 10_000


def test_a_sentencepiece_model_as_llama_2_and_vicuna_have_it(tmp_path):
    """tokenizer.model alone: the ids are sentencepiece's own, and look-alikes of its end token stay text."""
    (tmp_path / "texts").write_text("\n".join(TEXTS * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "texts"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=290, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "legacy": False}))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    loaded = load(str(tmp_path))
    theirs = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    assert (loaded.bos, loaded.eos, loaded.size) == (1, 2, 290)
    for text in ("what color is it?", "a shape </s>", "Zürich 7"):
        assert list(loaded.encode(text)) == theirs.encode(text)
        assert loaded.decode(loaded.encode(text)) == text
