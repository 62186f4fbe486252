"""Scenes: what is asked, what is drawn, and that nothing fine is left in the low-res view."""

import hashlib
import pickle
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from configs import scenes as scenes_config
from sparsecut_jax import config
from sparsecut_jax.data import scenes
from sparsecut_jax.data.canonical import canonical
from sparsecut_jax.data.scenes import TEMPLATES
from sparsecut_jax.models import ways
from sparsecut_jax.settings import ScenesConfig
from sparsecut_jax.text import tokenizer
from sparsecut_jax.types import UserError

CELLS = {
    "low_coarse": ["stripes", "color", "edge"],
    "high_coarse": ["shape", "discs", "box"],
    "low_fine": ["lines", "dots", "grain"],
    "high_fine": ["letter", "marks", "order"],
}
BLOCK = 168  # pictures
CAPTION = "a blurred red square on vertical stripes, a black box above, 3 white discs"


def rows(split="train", size=64, low=32, **settings):
    return scenes.rows(ScenesConfig(**settings), split, size, low)


def pixels(scenes_rows, name, **how):
    return np.asarray(scenes_rows.open(name, **how)).astype(int)


def resized(picture, size):
    image = Image.fromarray(picture.astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).astype(int)


def answers(split_rows):
    """int[pictures, questions]"""
    return np.stack([split_rows.answers(split_rows.name(i)) for i in split_rows.indices])


# ----------------------------------------------------------------------------------------------------------------------
# rows


def test_a_row():
    assert rows()[17] == {
        "id": "train/17",
        "image": "train/17",
        "independent": True,
        "caption": CAPTION,
        "conversations": [
            {"from": "human", "value": "<image>\nwhich way do the wide stripes run?"},
            {"from": "gpt", "value": "vertical", "kind": "low_coarse_stripes"},
            {"from": "human", "value": "\nwhat color is the big shape?"},
            {"from": "gpt", "value": "red", "kind": "low_coarse_color"},
            {"from": "human", "value": "\nis the edge of the big shape sharp or blurred?"},
            {"from": "gpt", "value": "blurred", "kind": "low_coarse_edge"},
            {"from": "human", "value": "\nwhat is the big shape?"},
            {"from": "gpt", "value": "square", "kind": "high_coarse_shape"},
            {"from": "human", "value": "\nhow many white discs are there?"},
            {"from": "gpt", "value": "3", "kind": "high_coarse_discs"},
            {"from": "human", "value": "\non which side of the big shape is the black box?"},
            {"from": "gpt", "value": "above", "kind": "high_coarse_box"},
            {"from": "human", "value": "\nwhich way do the fine lines run?"},
            {"from": "gpt", "value": "falling", "kind": "low_fine_lines"},
            {"from": "human", "value": "\nwhat color are the tiny dots?"},
            {"from": "gpt", "value": "red", "kind": "low_fine_dots"},
            {"from": "human", "value": "\nis the grainy patch made of checks or specks?"},
            {"from": "gpt", "value": "checks", "kind": "low_fine_grain"},
            {"from": "human", "value": "\nwhich letter is written?"},
            {"from": "gpt", "value": "K", "kind": "high_fine_letter"},
            {"from": "human", "value": "\nhow many tiny crosses are there?"},
            {"from": "gpt", "value": "3", "kind": "high_fine_marks"},
            {"from": "human", "value": "\nis the letter left or right of the digit?"},
            {"from": "gpt", "value": "right", "kind": "high_fine_order"},
        ],
    }


def test_a_caption_says_what_is_coarse():
    assert scenes.captions(rows())[17] == {
        "id": "train/17/caption",
        "image": "train/17",
        "conversations": [
            {"from": "human", "value": "<image>"},
            {
                "from": "gpt",
                "value": CAPTION,
            },
        ],
    }


def test_captions_of_some_rows():
    train = rows(train=10)
    made = scenes.captions([train[7], train[2]])
    assert len(made) == 2 and [row["id"] for row in made] == ["train/7/caption", "train/2/caption"]
    assert pickle.loads(pickle.dumps(scenes.captions(train)))[7] == made[0]
    with pytest.raises(IndexError):
        scenes.captions(train)[10]


def test_captions_agree_with_the_answers():
    made = rows(train=200)
    for row, caption in zip(made, scenes.captions(made), strict=True):
        assert canonical(row, row["id"], max_images=1) is row
        assert canonical(caption, caption["id"], max_images=1) is caption
        text = caption["conversations"][1]["value"]
        for turn in row["conversations"][1::2]:
            if "_coarse_" in turn["kind"]:
                assert turn["value"] in text


def test_the_four_cells():
    found = {}
    for template in TEMPLATES:
        found.setdefault(f"{template.level}_{template.scale}", []).append(template.name)
        assert template.kind == f"{template.level}_{template.scale}_{template.name}"
    assert found == CELLS


@pytest.mark.parametrize(
    ("levels", "scales", "cells"),
    [
        (("low",), ("coarse",), ["low_coarse"]),
        (("high",), ("coarse", "fine"), ["high_coarse", "high_fine"]),
        (("low", "high"), ("fine",), ["low_fine", "high_fine"]),
    ],
)
def test_which_questions_are_asked(levels, scales, cells):
    row = rows(levels=levels, scales=scales)[3]
    assert canonical(row, "row", max_images=1) is row
    kinds = [turn["kind"] for turn in row["conversations"][1::2]]
    assert kinds == [f"{cell}_{name}" for cell in cells for name in CELLS[cell]]
    everything = {turn["kind"]: turn["value"] for turn in rows()[3]["conversations"][1::2]}
    assert all(everything[turn["kind"]] == turn["value"] for turn in row["conversations"][1::2])


def test_a_sequence():
    train = rows(train=100)
    assert len(train) == len(list(train)) == 100
    assert train[-1] == train[99] and train[99]["id"] == "train/99"
    assert len(train[10:20]) == 10 and train[10:20][3] == train[13]
    assert len(pickle.dumps(train)) < 1000
    again = pickle.loads(pickle.dumps(train))
    assert again[5] == train[5] and again.open("train/5").tobytes() == train.open("train/5").tobytes()
    with pytest.raises(IndexError):
        train[100]


def test_the_second_half_of_the_test_pictures_is_held_out():
    test = rows("test", test=10)
    names = [f"test/{i}" for i in range(6)] + [f"heldout/{i}" for i in range(4)]  # pairs stay together
    assert [row["id"] for row in test] == [row["image"] for row in test] == names
    assert {turn["kind"].split("_")[0] for row in test[6:] for turn in row["conversations"][1::2]} == {"heldout"}
    assert test[6]["conversations"][1]["kind"] == "heldout_low_coarse_stripes"


# ----------------------------------------------------------------------------------------------------------------------
# answers


@pytest.mark.parametrize("part", ["train", "test", "heldout"])
def test_answers_are_equally_frequent(part):
    made = rows("train", train=20 * BLOCK) if part == "train" else rows("test", test=40 * BLOCK)
    made = made[made.first_heldout :] if part == "heldout" else made[: 20 * BLOCK]
    found = answers(made)
    for k, template in enumerate(TEMPLATES):
        n = len(template.answers)
        assert Counter(found[:, k].tolist()) == dict.fromkeys(range(n), 20 * BLOCK // n)
        assert Counter(found[:BLOCK, k].tolist()) == dict.fromkeys(range(n), BLOCK // n)  # and in every block


def test_answers_to_other_questions_tell_nothing():
    """Mutual information, in bits, of any two questions that are not coupled; 9 degrees of freedom give 0.0005."""
    found = answers(rows(train=80 * BLOCK))
    coupled = {(cell + a, cell + b) for cell in (0, 3, 6, 9) for a, b in ((0, 1),)}
    for a in range(12):
        for b in range(a):
            table = np.zeros((4, 4))
            np.add.at(table, (found[:, a], found[:, b]), 1 / len(found))
            expected = np.outer(table.sum(1), table.sum(0))
            there = table > 0
            bits = (table[there] * np.log2(table[there] / expected[there])).sum()
            assert bits > 0.3 if (b, a) in coupled else bits < 0.003


def test_a_pair_differs_in_every_answer():
    found = answers(rows(train=10 * BLOCK))
    assert (found[::2] != found[1::2]).all()
    found = answers(rows("test", test=10 * BLOCK))
    assert (found[::2] != found[1::2]).all()


def test_held_out_combinations():
    assert sorted({tuple(pair) for pair in scenes._couples(True)[:, 0].tolist()}) == [(0, 0), (1, 3), (2, 2), (3, 1)]
    test = rows("test", test=20 * BLOCK)
    ordinary, heldout = answers(test[: test.first_heldout]), answers(test[test.first_heldout :])
    train = answers(rows(train=10 * BLOCK))
    for cell in (0, 3, 6, 9):
        for found, expected in ((train, {1, 2, 3}), (ordinary, {1, 2, 3}), (heldout, {0})):
            assert set(((found[:, cell] + found[:, cell + 1]) % 4).tolist()) == expected


def test_another_seed_is_another_world():
    assert (answers(rows(train=BLOCK)) != answers(rows(train=BLOCK, seed=1))).mean() > 0.5
    assert rows().open("train/0").tobytes() != rows(seed=1).open("train/0").tobytes()


# ----------------------------------------------------------------------------------------------------------------------
# pictures


def test_a_picture():
    image = rows().open("train/17")
    assert image.size == (64, 64) and image.mode == "RGB"
    assert image.getpixel((0, 0)) == (127, 129, 131)
    assert hashlib.sha256(image.tobytes()).hexdigest()[:16] == "fc440b916371b212"


def test_a_pair_shares_what_is_not_asked():
    """Left without its fine part, and where neither has a shape, only the stripes differ: the noise is the same."""
    train = rows()
    flat = [pixels(train, f"train/{i}", fine=False)[:2, 20:44] for i in (0, 1)]
    noise = [part - np.rint(part.mean(2, keepdims=True)) for part in flat]
    assert np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1] > 0.9


@pytest.mark.parametrize(("size", "low"), [(64, 32), (96, 32), (100, 33), (672, 336)])
def test_what_is_fine_is_not_in_the_low_res_view(size, low):
    made = rows(size=size, low=low)
    for name in ("train/0", "train/1", "heldout/7")[: 3 if size < 600 else 1]:
        whole, without = pixels(made, name), pixels(made, name, fine=False)
        assert whole.shape == (size, size, 3) and whole.min() > 0 and whole.max() < 255
        assert abs(resized(whole, low) - resized(without, low)).max() <= 2
        assert abs(whole - without).max() > 40
        assert abs(resized(whole, 2 * low) - resized(without, 2 * low)).max() > 30  # what the crops are cut from


def test_rounding_does_not_depend_on_what_is_fine():
    """What rounding leaves in the low-res view has no mean: over many pictures it is 0 where the lines are."""
    made = rows()
    left = [
        resized(pixels(made, f"train/{i}"), 32) - resized(pixels(made, f"train/{i}", fine=False), 32)
        for i in range(100)
    ]
    assert abs(np.mean(left)) < 0.01 and np.std(left) < 0.5


def test_every_answer_is_drawn():
    """Two pictures of which one answer differs are never the same."""
    from sparsecut_jax.data.scenes_drawing import draw

    facts = {template.name: template.answers[0] for template in TEMPLATES}
    drawn = {}
    for template in TEMPLATES:
        for answer in template.answers:
            drawn[template.name, answer] = draw({**facts, template.name: answer}, (0,), 64, 32).tobytes()
    assert len(set(drawn.values())) == 1 + sum(len(template.answers) - 1 for template in TEMPLATES)


# ----------------------------------------------------------------------------------------------------------------------
# the config


def test_the_config_leaves_left_and_right_alone_and_has_room_for_every_question():
    cfg = config.check(scenes_config.get_config("smoke"))
    assert (cfg.data.source, cfg.data.flip, cfg.data.shift) == ("scenes", False, 0)
    train = rows(train=cfg.data.scenes.train)
    everything = [*train, *scenes.captions(train)]
    words = tokenizer.train((turn["value"] for row in everything for turn in row["conversations"]), 512)
    length = lambda text: len(words.encode(text))
    turns = train[17]["conversations"]
    asked = sum(length(h["value"]) + length(" " + g["value"]) + 1 for h, g in zip(turns[::2], turns[1::2], strict=True))
    around = ways.positions(cfg) + 2
    assert around + length(CAPTION) <= cfg.stages["align"].seq_len
    assert around + asked <= cfg.stages["instruct"].seq_len


# ----------------------------------------------------------------------------------------------------------------------
# what cannot be


def test_too_small():
    with pytest.raises(UserError, match="scenes.size=48: expected at least 64, twice the low-res view of 32 pixels"):
        rows(size=48)
    with pytest.raises(UserError, match="at least 32 pixels, got 16"):
        rows(size=64, low=16)


@pytest.mark.parametrize("name", ["17", "train/x", "other/1", "train/-1", ""])
def test_no_such_picture(name):
    with pytest.raises(UserError, match="scenes have no picture"):
        rows().open(name)
