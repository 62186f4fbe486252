"""One walk over all rows: how long each is, which cannot be trained on, and why."""

import dataclasses
import json
import os
import random
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from small_tokenizers import byte_level, llama
from sparsecut_jax.data import walk as walk_lib
from sparsecut_jax.data.parts import Folder, Part, Split
from sparsecut_jax.data.rows import JsonRows
from sparsecut_jax.data.walk import Bad, RowEncoder, walk, walk_once
from sparsecut_jax.settings import StageConfig
from sparsecut_jax.text import tokenizer as tokenizers
from sparsecut_jax.text.conversation import TooLong, encode_row
from sparsecut_jax.text.templates import get_template
from sparsecut_jax.types import UserError

N = 4  # positions of an image


@pytest.fixture(scope="module")
def bytes_only():
    """Every byte of a text is a token: lengths can be counted by hand."""
    return tokenizers.train(["x"], 259)


@pytest.fixture(scope="module")
def encode(bytes_only):
    """Template "qa": <s> QUESTION ' ' ANSWER </s> QUESTION ' ' ANSWER </s>; at most 30 positions."""
    return RowEncoder(bytes_only, "qa", N, 30)


def turns(*words: str) -> list:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(words)]


def row(i, *words: str, images=(), **more) -> dict:
    return {"id": i, "images": list(images), "conversations": turns(*words), **more}


@pytest.fixture
def part_of(tmp_path):
    """Function that writes rows to a file, which becomes a Part; images/a.png is an image, images/b.png none."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    (folder / "b.png").write_bytes(b"<html>")

    def write(rows: list, name: str = "mine.jsonl", images: str = str(folder), max_images: int = 2) -> Part:
        path = tmp_path / name
        path.write_bytes(b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows))
        return Part(str(path), JsonRows(str(path)), Folder(images, 10**6, "config.data.images"), max_images)

    return write


def lengths_of(found) -> list[tuple[int, int]]:
    return list(zip(found.lengths.tokens.tolist(), found.lengths.images.tolist(), strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# lengths

ROWS = [
    row(0, "ab", "cd"),  # <s> ab _cd </s>
    row(1, "<image>\nab", "cd", images=["a.png"]),
    row(2, "<image>\nab", "cd", "efg", "h", images=["a.png"]),
    row(3, "<image><image>", "cd", images=["a.png", "a.png"]),
    row(4, "<image>\nab", "cd", "\nef", "g", images=["a.png"], independent=True),
    row(5, "é", "日"),
    row(6, "ab", "cd", system="be brief"),  # an empty line comes behind it
    row(7, "a" * 20, "b" * 7),  # fits to the last position
]
LENGTHS = [(7, 0), (12, 1), (18, 1), (13, 2), (18, 1), (8, 0), (17, 0), (30, 0)]


def test_lengths(part_of, encode):
    found = walk(Split((part_of(ROWS),)), encode)
    assert lengths_of(found) == LENGTHS
    assert found.lengths.tokens.dtype == found.lengths.images.dtype == np.int32
    assert found.bad == []
    assert found.digests.tolist() == [0] * 8  # unasked
    assert found.lengths.usable.tolist() == list(range(8))


def test_what_does_not_fit_is_cut_after_a_whole_turn(part_of, encode):
    rows = [
        row(0, "ab", "cd", "ef", "g" * 30),
        row(1, "ab", "cd", "ef", "g" * 30, "hi", "j"),
        row(2, "ab", "cd", "<image>", "e" * 30, images=["a.png"]),
    ]
    found = walk(Split((part_of(rows),)), encode)
    assert lengths_of(found) == [(7, 0), (7, 0), (7, 0)]
    assert found.cut.tolist() == [1, 2, 1] and found.cut.dtype == np.int32


def test_independent_questions_that_do_not_all_fit_may_take_everything(part_of, encode):
    """Which of them are taken is drawn anew in every epoch, and others may be longer."""
    one = {"images": ["a.png"], "independent": True}
    rows = [
        row(0, "<image>\nab", "cd", "\nef", "g" * 12, **one),  # 12 + 3 + 13 + 1
        row(1, "<image>\nab", "cd", "\nef", "g" * 13, **one),
        row(2, "<image>\nab", "cd", "\nef", "g" * 14, **one),
        row(3, "<image>\nab", "c" * 30, "\nef", "g", **one),
    ]
    found = walk(Split((part_of(rows),)), encode)
    assert lengths_of(found) == [(29, 1), (30, 1), (30, 1), (30, 1)] and found.bad == []
    assert found.cut.tolist() == [0, 0, 0, 1]  # only the answer of 30 letters never fits
    assert [len(encode(rows[2], np.array(order)).tokens) for order in ([0, 1], [1, 0])] == [12, 24]


def test_a_template_without_questions_takes_one_answer(part_of, bytes_only):
    rows = [ROWS[1], ROWS[4], row(2, "<image>\nab", "cd", "\nef", "g" * 90, images=["a.png"], independent=True)]
    found = walk(Split((part_of(rows),)), RowEncoder(bytes_only, "plain", N, 30))
    assert lengths_of(found) == [(8, 1)] * 3  # <s> I I I I cd \n


def draw(rng: random.Random, alphabet: str = "ab ?.\n<|é日") -> dict:
    def words(most: int) -> str:
        return "".join(rng.choice(alphabet) for _ in range(rng.randrange(most)))

    images, independent = rng.randrange(3), rng.random() < 0.4
    said = []
    for _ in range(rng.randrange(1, 5)):
        said += [words(12), "x" + words(20)]
    if independent or rng.random() < 0.5:
        said[0] = "<image>" * images + said[0]
    else:
        for _ in range(images):
            i = rng.randrange(0, len(said), 2)
            said[i] += rng.choice(["<image>", "\n<image>\n"])
    more = {"system": words(40)} if rng.random() < 0.3 else {}
    return row(rng.random(), *said, images=["a.png"] * images, independent=independent, **more)


@pytest.mark.parametrize("template", ["plain", "vicuna_v1", "chatml", "llama3", "qa"])
@pytest.mark.parametrize("make", [byte_level, llama])
def test_lengths_are_those_of_encode_row(part_of, make, template):
    special = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tokenizer = make(*special)
    rng = random.Random(template)
    rows = [draw(rng) for _ in range(60)]
    seq_len = 60 if template in ("plain", "qa") else 120
    found = walk(Split((part_of(rows),)), RowEncoder(tokenizer, template, N, seq_len))
    too_long, whole = {bad.row for bad in found.bad}, get_template(template, tokenizer)
    for i, one in enumerate(rows):
        encode = lambda length, one=one: encode_row(one, tokenizer, whole, N, length)
        entire = len(encode(10**6).tokens)
        if i in too_long:
            assert found.lengths.tokens[i] == found.lengths.images[i] == 0
            with pytest.raises(TooLong):
                encode(seq_len)
            continue
        example = encode(seq_len)
        cut = one["independent"] and entire > seq_len
        assert lengths_of(found)[i] == (seq_len if cut else len(example.tokens), len(example.image_start)), one


@pytest.mark.parametrize("template", ["plain", "vicuna_v1", "chatml", "llama3", "qa"])
@pytest.mark.parametrize("make", [byte_level, llama])
def test_what_surely_fits_does(make, template):
    tokenizer = make("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    rng, sure = random.Random(template), 0
    for _ in range(200):
        one = draw(rng, "ab ?.\n<|")
        encoder = RowEncoder(tokenizer, template, N, rng.randrange(10, 1000))
        if encoder.surely_fits(one):
            sure += 1
            long = encode_row(one, tokenizer, get_template(template, tokenizer), N, 10**6)
            assert len(long.tokens) <= encoder.seq_len, one
    assert sure > 20


def test_a_template_that_the_tokenizer_lacks_is_refused_before_the_walk(bytes_only):
    for name in ("tokenizer", "llama3"):
        with pytest.raises(UserError):
            RowEncoder.of(StageConfig(template=name), N, bytes_only)
    assert RowEncoder.of(StageConfig(template="qa", seq_len=30), N, bytes_only) == RowEncoder(bytes_only, "qa", N, 30)


# ----------------------------------------------------------------------------------------------------------------------
# bad rows

MIXED = [
    row("good", "ab", "cd"),
    b'{"id": "cut", "conversations": [',
    b'{"id": "latin", "conversations": "\xe9"}',
    row("long", "ab", "c" * 30),
    {"id": "none"},
    [1, 2],
    row("roles", "ab", "cd") | {"conversations": turns("ab", "cd")[:1] * 2},
    row("path", "<image>", "cd", images=["../a.png"]),
    row("gone", "<image>", "cd", images=["c.png"]),
    row("broken", "<image>", "cd", images=["b.png"]),
    row(11, "<image>", "c" * 30, images=["a.png"]),
]


def told(found, part: Part) -> list[tuple]:
    assert all(bad.source == part.name and bad.key == (part.name, bad.row) for bad in found.bad)
    return [(bad.row, bad.id, bad.cause) for bad in found.bad]


def test_bad_rows_have_length_0_and_are_listed(part_of, encode):
    part = part_of(MIXED)
    found = walk(Split((part,)), encode)
    assert lengths_of(found) == [(7, 0), *[(0, 0)] * 7, (9, 1), (9, 1), (0, 0)]
    assert told(found, part) == [
        (1, "", "text"),
        (2, "", "text"),
        (3, "long", "too_long"),
        (4, "none", "format"),
        (5, "", "format"),
        (6, "roles", "roles"),
        (7, "path", "path"),
        (10, "11", "too_long"),
    ]
    reasons = {bad.row: bad.reason.replace(part.name, "FILE") for bad in found.bad}
    assert reasons[1].startswith("FILE row 1: it is not valid JSON: ")
    assert reasons[2].startswith("FILE row 2: it is not UTF-8: byte ")
    assert reasons[3] == "FILE row 3 (id 'long'): its first answer ends at position 35, but seq_len=30"
    assert reasons[5] == "FILE row 5: expected an object, got list"
    assert reasons[6] == "FILE row 6 (id 'roles'): turn 1 is from 'human', expected 'gpt'"
    assert reasons[10] == "FILE row 10 (id 11): its first answer ends at position 37, but seq_len=30"


@pytest.mark.parametrize(
    ("look", "expected"),
    [
        ("none", []),
        ("stat", [(8, "gone", "missing_image")]),
        ("decode", [(8, "gone", "missing_image"), (9, "broken", "broken_image")]),
    ],
)
def test_looking_at_images(part_of, encode, look, expected, tmp_path):
    part = part_of(MIXED)
    found = walk(Split((part,)), encode, look=look)
    assert [bad for bad in told(found, part) if bad[0] in (8, 9)] == expected
    reasons = {bad.row: bad.reason for bad in found.bad}
    folder = (tmp_path / "images").resolve()
    if expected:
        assert reasons[8] == f"{part.name} row 8 (id 'gone'): image {folder}/c.png does not exist"
    if look == "decode":
        assert reasons[9].startswith(
            f"{part.name} row 9 (id 'broken'): image {folder}/b.png cannot be read as an image"
        )


def test_rows_are_called_by_their_number_in_the_file(part_of, encode):
    first = part_of(MIXED, "a.jsonl").take(np.array([3, 0, 6]))
    second = part_of([row("x", "ab", "c" * 40)], "b.jsonl")
    found = walk(Split((first, second)), encode)
    assert [(bad.key, bad.id) for bad in found.bad] == [
        ((first.name, 3), "long"),
        ((first.name, 6), "roles"),
        ((second.name, 0), "x"),
    ]
    assert found.bad[2].reason.startswith(f"{second.name} row 0 (id 'x'): its first answer ends at position ")


def test_no_rows(encode):
    found = walk(Split(()), encode)
    assert (lengths_of(found), found.bad, found.digests.tolist()) == ([], [], [])


# ----------------------------------------------------------------------------------------------------------------------
# digests


def test_digests_are_those_of_images_and_words(part_of, encode):
    first = part_of([
        row(0, "<image>\nab", "cd", images=["a.png"]),
        {"id": 1, "image": "a.png", "conversations": turns("<image>\nab", "cd"), "more": 1},
        {"images": ["a.png"], "messages": [{"role": "user", "content": "<image>\nab"}, {"role": "assistant", "content": "cd"}]},
        row(3, "<image>\nab", "ce", images=["a.png"]),
        row(4, "<image>\nab", "cd", images=["b.png"]),
        row(5, "<image>\nab", "cd", images=["a.png"], system="x"),
        row(6, "<image>\nab", "cd", "ab", "cd", images=["a.png"]),
        row(7, "\ud800", "cd"),
        {"id": 8},
    ])  # fmt: skip
    found = walk(Split((first,)), encode, digests=True).digests
    assert found.dtype == np.uint64
    assert found[0] == found[1] == found[2] != 0
    assert len(set(found.tolist())) == 7 and found[8] == 0


def test_digests_of_encoded_images():
    a, b = ({"image": content, "conversations": turns("<image>", "x")} for content in (b"a", b"b"))
    assert walk_lib._digest(a, "") == walk_lib._digest(dict(a), "") != walk_lib._digest(b, "")
    named = {"image": "1.jpg", "conversations": []}
    assert walk_lib._digest(named, "one") != walk_lib._digest(named, "other")


# ----------------------------------------------------------------------------------------------------------------------
# several processes


@pytest.fixture
def processes(monkeypatch):
    monkeypatch.setattr(walk_lib, "FEW", 0)
    monkeypatch.setattr(walk_lib, "CHUNK", 4)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)


def test_several_processes_find_the_same(part_of, encode, processes, monkeypatch):
    split = Split((part_of(MIXED, "a.jsonl").take(np.arange(10, 0, -1)), part_of(ROWS, "b.jsonl")))
    done = []
    found = walk(split, encode, "stat", digests=True, progress=done.append)
    assert done == [4, 4, 4, 4, 2]
    monkeypatch.setattr(walk_lib, "FEW", 1000)
    monkeypatch.setattr(walk_lib, "CHUNK", 7)
    expected = walk(split, encode, "stat", digests=True, progress=done.append)
    assert done[5:] == [7, 7, 4]
    assert lengths_of(found) == lengths_of(expected)
    assert found.bad == expected.bad and len(found.bad) == 9
    assert found.digests.tolist() == expected.digests.tolist()


class Deadly(Sequence):
    """Rows that end the process which reads them, as the system does when memory runs out."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        os._exit(9)


def test_a_process_that_dies_ends_in_a_sentence(encode, processes):
    with pytest.raises(UserError, match=r"^a process reading the rows died \(out of memory\?\)"):
        walk(Split((Part("deadly", Deadly(), None, 1),)), encode)


# ----------------------------------------------------------------------------------------------------------------------
# what an earlier start has found


@pytest.fixture
def again(tmp_path, monkeypatch):
    """Function: `walk_once` on the file rows.npz, and whether it has walked."""
    walked = []
    real = walk_lib.walk
    monkeypatch.setattr(walk_lib, "walk", lambda *args, **more: walked.append(1) or real(*args, **more))

    def once(split: Split, encoder: RowEncoder, data: str = "sha256 1") -> tuple:
        walked.clear()
        return walk_once(str(tmp_path / "rows.npz"), split, encoder, data, lambda count: None), bool(walked)

    return once


def test_a_walk_is_kept_and_used_again(part_of, encode, again, tmp_path):
    split = Split((part_of(MIXED),))
    first, walked = again(split, encode)
    assert walked and sorted(os.listdir(tmp_path)) == ["images", "mine.jsonl", "rows.npz"]
    second, walked = again(split, encode)
    assert not walked
    assert lengths_of(second) == lengths_of(first) == lengths_of(walk(split, encode))
    assert second.cut.tolist() == first.cut.tolist()
    assert second.bad == first.bad and isinstance(second.bad[0], Bad)
    assert again(Split((part_of(MIXED),)), RowEncoder(**vars(encode)))[1] is False


def test_a_kept_walk_that_does_not_know_what_was_cut_is_made_again(part_of, encode, again, tmp_path):
    split = Split((part_of([row(0, "ab", "cd", "ef", "g" * 30)]),))
    again(split, encode)
    with np.load(tmp_path / "rows.npz") as kept:
        arrays = {name: kept[name] for name in kept if name != "cut"}
    np.savez(tmp_path / "rows.npz", **arrays)  # as earlier versions wrote it
    found, walked = again(split, encode)
    assert walked and found.cut.tolist() == [1]


def test_an_independent_question_that_is_not_trained_on_does_not_count(part_of, encode):
    """Nothing waits for another epoch here, so that the row takes what it takes."""
    one = row(0, "<image>ab", "cd", "ef", "g", images=["a.png"], independent=True)
    one["conversations"][3]["loss"] = False
    assert lengths_of(walk(Split((part_of([one]),)), encode)) == [(11, 1)]  # <s> I I I I a b ' ' c d </s>


def test_a_walk_of_something_else_is_not_used(part_of, encode, again):
    rows = [
        row(0, "ab", "cd"),
        row(1, "<image>ab", "cd", images=["a.png"]),
        row(2, "<image>" * 2, "c", images=["a.png"] * 2),
    ]
    part = part_of(rows)
    tokenizer = encode.tokenizer
    changes = {
        "at first": (Split((part,)), encode, "sha256 1"),
        "data": (Split((part,)), encode, "sha256 2"),
        "sources": (Split((part, part)), encode, "sha256 1"),
        "order of sources": (Split((part_of(rows, "b.jsonl"), part)), encode, "sha256 1"),
        "images of a row": (Split((part_of(rows, max_images=1),)), encode, "sha256 1"),
        "no folder of images": (Split((part_of(rows, images=""),)), encode, "sha256 1"),
        "folder of images": (Split((part,)), encode, "sha256 1"),
        "holdout": (Split((part.take(np.array([0, 2])),)), encode, "sha256 1"),
        "template": (Split((part,)), RowEncoder(tokenizer, "plain", N, 30), "sha256 1"),
        "image tokens": (Split((part,)), RowEncoder(tokenizer, "qa", 5, 30), "sha256 1"),
        "seq_len": (Split((part,)), RowEncoder(tokenizer, "qa", N, 29), "sha256 1"),
        "tokenizer": (Split((part,)), RowEncoder(byte_level(), "qa", N, 30), "sha256 1"),
    }  # fmt: skip
    for name, (split, encoder, data) in changes.items():
        found, walked = again(split, encoder, data)
        assert walked, name
        assert lengths_of(found) == lengths_of(walk(split, encoder)), name
        assert not again(split, encoder, data)[1], name


@pytest.mark.parametrize("template", ["qa", "plain"])
def test_captions_of_the_same_rows_are_something_else(part_of, bytes_only, again, template):
    encoder = RowEncoder(bytes_only, template, N, 30)
    part = dataclasses.replace(part_of(ROWS[:1]), captions=shorter)
    assert lengths_of(again(Split((part,)), encoder)[0]) == [(7 if template == "qa" else 4, 0)]
    found, walked = again(Split((part.as_captions(),)), encoder)
    assert walked and lengths_of(found) == [(4 if template == "qa" else 3, 0)]


def shorter(rows: Sequence) -> list:
    return [row(one["id"], "", "c") for one in rows]


def test_a_damaged_file_is_walked_anew(part_of, encode, again, tmp_path):
    split = Split((part_of(MIXED),))
    expected = lengths_of(again(split, encode)[0])
    path = tmp_path / "rows.npz"
    whole = path.read_bytes()
    np.save(tmp_path / "array.npy", np.arange(3))
    contents = [b"", b"PK\x03\x04", b"text", whole[:100], whole[:-1], (tmp_path / "array.npy").read_bytes()]
    rng = np.random.default_rng(0)
    for _ in range(60):
        changed = bytearray(whole)
        changed[int(rng.integers(len(whole)))] ^= 1 << int(rng.integers(8))
        contents.append(bytes(changed))
    for content in contents:
        path.write_bytes(content)
        assert lengths_of(again(split, encode)[0]) == expected
    path.unlink()
    path.mkdir()  # not even a file: the walk is made, and what is wrong with the folder is said
    with pytest.raises(OSError):
        again(split, encode)
