"""From rows to batches: order, epochs, processes, resuming."""

import dataclasses
import itertools
import re

import numpy as np
import pytest
from PIL import Image

from sparsecut_jax.config import check
from sparsecut_jax.data import tokenizer as tokenizers
from sparsecut_jax.data.conversation import Example
from sparsecut_jax.data.pipeline import Images, collate, encoder, fixed_batches, train_batches
from sparsecut_jax.data.sources import Split
from sparsecut_jax.settings import Config, DataConfig, FusionConfig, StageConfig, VisionConfig
from sparsecut_jax.types import UserError

ROWS = 10
SIZE = 4
STAGE = StageConfig(template="qa", seq_len=64, batch_size=4)
CONFIG = Config(
    seed=1,
    stages={"align": STAGE},
    vision=VisionConfig(image_size=SIZE, patch_size=2),
    data=DataConfig(threads=1),
)
FIELDS = ("tokens", "loss_mask", "segments", "branches", "positions", "views", "image_start")


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Ten rows of two independent questions; the picture of row i is 20 * i bright on its left, 0 on its right."""
    folder = tmp_path_factory.mktemp("images")
    rows = []
    for i in range(ROWS):
        pixels = np.zeros((2 * SIZE, 2 * SIZE, 3), np.uint8)
        pixels[:, :SIZE] = 20 * i
        Image.fromarray(pixels).save(folder / f"{i}.png")
        turns = [
            {"from": "human", "value": "<image>\nwhich?"},
            {"from": "gpt", "value": f"row {i}"},
            {"from": "human", "value": "\nreally?"},
            {"from": "gpt", "value": f"yes {i}"},
        ]
        rows.append({"id": i, "image": f"{i}.png", "independent": True, "conversations": turns})
    return Split(rows, str(folder))


@pytest.fixture(scope="module")
def words():
    return tokenizers.train(["which? really? row yes 0 1 2 3 4 5 6 7 8 9"], 300)


@pytest.fixture
def batches(split, words):
    """Function: the first `count` batches of a new iterator."""

    def first(count: int, cfg: Config = CONFIG, stage: StageConfig = STAGE, **process):
        iterator = train_batches(split, stage, cfg, words, Images(cfg), **process)
        return list(itertools.islice(iterator, count))

    return first


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        for field in FIELDS:
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field), err_msg=field)


def answers(batch, words) -> list[list[str]]:
    """For every row the texts that are to be predicted, in their order in the row."""
    rows = []
    for tokens, mask in zip(batch.tokens, batch.loss_mask, strict=True):
        pieces, piece = [], []
        for token in tokens[mask == 1]:
            if token == words.eos:
                pieces.append(words.decode(piece).strip())
                piece = []
            else:
                piece.append(token)
        assert not piece
        rows.append(pieces)
    return rows


def row_numbers(found, words) -> list[int]:
    """Which row of the split stands in each row of the batches."""
    return [int(pieces[0].split()[1]) for batch in found for pieces in answers(batch, words)]


# ----------------------------------------------------------------------------------------------------------------------
# collate


def test_collate():
    view = np.arange(2 * 2 * 3, dtype=np.uint8).reshape(1, 2, 2, 3)
    short = Example(np.array([7]), np.array([1]), np.array([0]), np.array([0]), [])
    long = Example(np.array([1, 0, 5, 6]), np.array([0, 0, 1, 1]), np.array([0, 0, 1, 2]), np.array([0, 1, 2, 2]), [1])
    batch = collate([(short, []), (long, [view])], seq_len=5, slots=2, image_shape=(1, 2, 2, 3))
    assert batch.tokens.tolist() == [[7, 0, 0, 0, 0], [1, 0, 5, 6, 0]]
    assert batch.loss_mask.tolist() == [[1, 0, 0, 0, 0], [0, 0, 1, 1, 0]]
    assert batch.segments.tolist() == [[1, 0, 0, 0, 0], [1, 1, 1, 1, 0]]
    assert batch.branches.tolist() == [[0, 0, 0, 0, 0], [0, 0, 1, 2, 0]]
    assert batch.positions.tolist() == [[0, 0, 0, 0, 0], [0, 1, 2, 2, 0]]
    assert batch.image_start.tolist() == [[-1, -1], [1, -1]]
    assert batch.views.shape == (2, 2, 1, 2, 2, 3)
    assert not batch.views[0].any() and not batch.views[1, 1].any()
    np.testing.assert_array_equal(batch.views[1, 0], view)
    assert batch.extras == {}


def test_two_images_of_a_row():
    one, two = np.full((1, 2, 2, 3), 1, np.uint8), np.full((1, 2, 2, 3), 2, np.uint8)
    example = Example(*(np.zeros(6, np.int32),) * 4, image_start=[1, 4])
    batch = collate([(example, [one, two])], seq_len=6, slots=2, image_shape=(1, 2, 2, 3))
    assert batch.image_start.tolist() == [[1, 4]]
    assert (batch.views[0, 0] == 1).all() and (batch.views[0, 1] == 2).all()


def test_shapes_and_types(batches):
    (batch,) = batches(1)
    shapes = {field: getattr(batch, field).shape for field in FIELDS}
    assert shapes == {
        **dict.fromkeys(FIELDS[:5], (4, 64)),
        "views": (4, 1, 5, SIZE, SIZE, 3),
        "image_start": (4, 1),
    }
    types = {field: getattr(batch, field).dtype.name for field in FIELDS}
    assert types == {**dict.fromkeys(FIELDS, "int32"), "loss_mask": "uint8", "views": "uint8"}


def test_a_fusion_of_one_view_reads_one_view(batches):
    cfg = dataclasses.replace(CONFIG, fusion=FusionConfig(name="mlp"))
    assert batches(1, cfg)[0].views.shape == (4, 1, 1, SIZE, SIZE, 3)


def test_a_row_has_its_own_image(batches, words):
    for batch in batches(3):
        for i, views, start in zip(row_numbers([batch], words), batch.views, batch.image_start, strict=True):
            assert start.tolist() == [1]
            top_left, top_right = views[0, 1], views[0, 2]
            assert (top_left == 20 * i).all() and not top_right.any()


# ----------------------------------------------------------------------------------------------------------------------
# order


def test_same_seed_same_batches(batches):
    assert_equal(batches(6), batches(6))


def test_another_seed_another_order(batches, words):
    other = batches(5, dataclasses.replace(CONFIG, seed=2))
    assert row_numbers(other, words) != row_numbers(batches(5), words)


def test_every_row_once_per_epoch(batches, words):
    numbers = row_numbers(batches(15), words)  # 60 rows: 6 epochs
    epochs = [numbers[i : i + ROWS] for i in range(0, 60, ROWS)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(ROWS))] * 6
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_questions_are_taken_in_another_order_now_and_then(batches, words):
    seen = {}
    for batch in batches(15):
        for pieces in answers(batch, words):
            seen.setdefault(pieces[0].split()[1], set()).add(tuple(piece.split()[0] for piece in pieces))
    assert set().union(*seen.values()) == {("row", "yes"), ("yes", "row")}
    assert sum(len(orders) == 2 for orders in seen.values()) >= 5


def test_threads_do_not_change_the_order(batches):
    many = dataclasses.replace(CONFIG, data=DataConfig(threads=8))
    assert_equal(batches(8, many), batches(8))


def test_two_processes_share_the_global_batches(batches):
    whole = batches(8)
    parts = [batches(8, process_index=i, process_count=2) for i in range(2)]

    def rows(batch):
        return [b"".join(getattr(batch, field)[i].tobytes() for field in FIELDS) for i in range(len(batch.tokens))]

    for batch, first, second in zip(whole, *parts, strict=True):
        assert len(rows(first)) == len(rows(second)) == 2
        assert sorted(rows(first) + rows(second)) == sorted(rows(batch))


def test_batch_that_processes_cannot_share(batches):
    with pytest.raises(UserError, match="^batch_size=4 cannot be split over 3 processes$"):
        batches(1, process_index=0, process_count=3)


@pytest.mark.parametrize("stop", [0, 1, 4])
@pytest.mark.parametrize("process", [{}, {"process_index": 1, "process_count": 2}])
def test_resume(batches, split, words, stop, process):
    """Rows 10 to 19 are the second epoch: batch 2 holds the end of one and the beginning of the other."""
    cfg = dataclasses.replace(CONFIG, data=DataConfig(threads=2, flip=True, shift=1))
    expected = batches(stop + 5, cfg, **process)[stop:]
    iterator = train_batches(split, STAGE, cfg, words, Images(cfg), **process)
    for _ in range(stop):
        next(iterator)
    state = iterator.get_state()
    next(iterator)  # what is read after the state was taken changes nothing
    again = train_batches(split, STAGE, cfg, words, Images(cfg), **process)
    again.set_state(state)
    assert_equal([next(again) for _ in range(5)], expected)
    iterator.set_state(state)
    assert_equal([next(iterator) for _ in range(5)], expected)


def test_batch_larger_than_the_data(batches, words):
    (batch,) = batches(1, stage=dataclasses.replace(STAGE, batch_size=25))
    numbers = row_numbers([batch], words)
    assert sorted(numbers[:10]) == sorted(numbers[10:20]) == list(range(ROWS))


# ----------------------------------------------------------------------------------------------------------------------
# augmentation


def test_training_images_are_mirrored_now_and_then(batches, words):
    cfg = dataclasses.replace(CONFIG, data=DataConfig(flip=True))
    mirrored = []
    for batch in batches(10, cfg):
        for i, views in zip(row_numbers([batch], words), batch.views[:, 0], strict=True):
            bright, dark = (views[1], views[2]) if views[1, 0, 0, 0] else (views[2], views[1])
            assert (bright == 20 * i).all() and not dark.any()
            if i:
                mirrored.append(not views[1].any())
    assert 0.2 < np.mean(mirrored) < 0.8


def test_evaluation_images_are_never_augmented(split, words):
    cfg = dataclasses.replace(CONFIG, data=DataConfig(flip=True, shift=2))
    assert_equal(
        fixed_batches(split, STAGE, cfg, words, Images(cfg)), fixed_batches(split, STAGE, CONFIG, words, Images(CONFIG))
    )


# ----------------------------------------------------------------------------------------------------------------------
# fixed batches


def test_fixed_batches(split, words):
    found = fixed_batches(split, STAGE, CONFIG, words, Images(CONFIG))
    assert [len(batch.tokens) for batch in found] == [4, 4, 4]
    assert [pieces for batch in found for pieces in answers(batch, words)] == [
        *([f"row {i}", f"yes {i}"] for i in range(ROWS)),
        [],
        [],
    ]


def test_rows_that_fill_up_count_for_nothing(split, words):
    last = fixed_batches(split, STAGE, CONFIG, words, Images(CONFIG))[-1]
    for field in FIELDS[:-1]:
        assert not getattr(last, field)[2:].any(), field
    assert last.image_start.tolist() == [[1], [1], [-1], [-1]]


def test_fixed_batches_are_as_large_as_a_micro_batch(split, words):
    stage = dataclasses.replace(STAGE, accumulate=2)
    found = fixed_batches(split, stage, CONFIG, words, Images(CONFIG))
    assert [len(batch.tokens) for batch in found] == [2] * 5


def test_no_rows_no_batches(split, words):
    assert fixed_batches(Split([], split.images), STAGE, CONFIG, words, Images(CONFIG)) == []


# ----------------------------------------------------------------------------------------------------------------------
# what the user can mend


def test_a_broken_image_stops_training_with_a_sentence(split, words, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"<html>")
    rows = [{**split.rows[0], "image": "broken.png"}]
    iterator = train_batches(Split(rows, str(tmp_path)), STAGE, CONFIG, words, Images(CONFIG))
    with pytest.raises(UserError) as caught:
        next(iterator)
    path = tmp_path.resolve() / "broken.png"
    assert str(caught.value) == f"image {path} cannot be read as an image: cannot identify image file {str(path)!r}"


def test_a_row_that_is_too_long_stops_training_with_a_sentence(split, words):
    stage = dataclasses.replace(STAGE, seq_len=6)
    with pytest.raises(UserError) as caught:
        next(train_batches(split, stage, CONFIG, words, Images(CONFIG)))
    assert re.fullmatch(r"row [0-9]: its first answer ends at position 11, but seq_len=6", str(caught.value))


def test_unknown_template(split, words):
    stage = dataclasses.replace(STAGE, template="vicuna")
    cfg = dataclasses.replace(CONFIG, stages={"align": stage}, run_stages=("align",))
    with pytest.raises(UserError, match="'vicuna'.*vicuna_v1"):
        encoder(split, stage, check(dataclasses.asdict(cfg)), words, Images(cfg))


def test_an_image_is_read_once(split, monkeypatch):
    from sparsecut_jax.data import images

    opened = []
    read = images.read_image
    monkeypatch.setattr(images, "read_image", lambda path, limit: opened.append(path) or read(path, limit))
    pictures = Images(CONFIG)
    assert pictures.read(split.images, "3.png") is pictures.read(split.images, "3.png")
    assert len(opened) == 1
