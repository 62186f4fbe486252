"""From rows to batches: order, epochs, processes, resuming."""

import dataclasses
import functools
import itertools
import multiprocessing
import os
import signal
import time

import grain
import jax
import numpy as np
import pytest
from absl import flags
from PIL import Image

from sparsecut_jax.checks import check_room
from sparsecut_jax.config import Config
from sparsecut_jax.data import pipeline, walk
from sparsecut_jax.data.batch_plan import BatchPlan, make_plan
from sparsecut_jax.data.batches import collate
from sparsecut_jax.data.parts import Folder, Part, Split
from sparsecut_jax.data.pipeline import Images, Reader, fixed_batches, train_batches
from sparsecut_jax.data.walk import RowEncoder
from sparsecut_jax.models import ways
from sparsecut_jax.models.losses import cross_entropy
from sparsecut_jax.settings import DataConfig, FusionConfig, StageConfig, VisionConfig
from sparsecut_jax.text import tokenizer as tokenizers
from sparsecut_jax.text.conversation import Example, encode_row
from sparsecut_jax.text.templates import get_template
from sparsecut_jax.types import Batch, batch_spec
from tiny import refusal

ROWS = 10
SIZE = 4
STAGE = StageConfig(template="qa", seq_len=64, batch_size=4, max_steps=20)
CONFIG = Config(
    seed=1,
    stages={"align": STAGE},
    vision=VisionConfig(image_size=SIZE, patch_size=2),
    data=DataConfig(threads=1),
)
FIELDS = ("tokens", "loss_mask", "segments", "branches", "positions", "views", "image_start")


def make_rows(folder) -> list[dict]:
    """Ten rows of two independent questions; the picture of row i is 20 * i bright on its left, 0 on its right."""
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
    return rows


def split_of(rows: list[dict], folder) -> Split:
    return Split((Part("rows.json", rows, Folder(str(folder), 10**6), 1),))


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    return split_of(make_rows(folder), folder)


@pytest.fixture(scope="module")
def words():
    return tokenizers.train(["which? really? row yes 0 1 2 3 4 5 6 7 8 9"], 300)


def reader_of(split: Split, words, cfg: Config = CONFIG, stage: StageConfig = STAGE) -> Reader:
    encoder = RowEncoder.of(stage, ways.positions(cfg), words)
    return Reader(split, encoder, Images(cfg), cfg.data.flip, cfg.data.shift)


def plan_of(reader: Reader, stage: StageConfig = STAGE, seed: int = 1) -> BatchPlan:
    lengths = walk.walk(reader.split, reader.encode).lengths
    return make_plan(lengths, reader.split.groups(lengths.usable), stage, 1, seed)


def iterate(split, words, cfg: Config = CONFIG, stage: StageConfig = STAGE, first: int = 0, **process):
    """Iterator of (Batch, bad rows)."""
    reader = reader_of(split, words, cfg, stage)
    return train_batches(reader, plan_of(reader, stage, cfg.seed), cfg, (cfg.seed, 0), first, **process)


@pytest.fixture
def batches(split, words):
    """Function: `count` batches of a new iterator."""

    def some(count: int, cfg: Config = CONFIG, stage: StageConfig = STAGE, first: int = 0, **process) -> list[Batch]:
        iterator = iterate(split, words, cfg, stage, first, **process)
        found = [batch for batch, _ in itertools.islice(iterator, count)]
        iterator.close()
        return found

    return some


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
    """Which rows of the split stand in the batches, in order."""
    said = [piece for batch in found for pieces in answers(batch, words) for piece in pieces]
    return [int(piece.split()[1]) for piece in said if piece.startswith("row")]


# ----------------------------------------------------------------------------------------------------------------------
# packing


def tiny_batch(sequences, length: int, slots: int) -> Batch:
    return collate(sequences, batch_spec(len(sequences), length, slots, (5, 12, 12, 3), branched=True))


def test_packed_equals_unpacked(tiny):
    """Loss and gradients of rows in one sequence are those of the same rows in sequences of their own."""
    rng = np.random.default_rng(0)
    examples = []
    for images, text in ((1, 5), (0, 7), (2, 4), (1, 3)):
        tokens, loss, start = [1], [0], []
        for _ in range(images):
            start.append(len(tokens))
            tokens += [0] * 9
            loss += [0] * 9
        tokens += rng.integers(2, 64, text).tolist()
        loss += [0] + [1] * (text - 1)
        branches = np.zeros(len(tokens), np.int32)
        example = Example(np.array(tokens), np.array(loss), branches, np.arange(len(tokens)), start)
        examples.append((example, list(rng.integers(0, 256, (images, 5, 12, 12, 3), np.uint8))))
    packed = tiny_batch([examples, []], 80, 5)
    apart = tiny_batch([[example] for example in examples], 40, 2)
    assert_same_loss_and_gradients(tiny, packed, apart)


def test_independent_questions_equal_rows_of_their_own(tiny, words):
    """Three questions that share an image, its encoding and its positions, and the same as three rows."""
    turns = [("<image>\nwhich?", "row 1"), ("\nreally?", "yes 2 row"), ("\nwhich row?", "3")]
    talk = lambda said: [
        {"from": who, "value": v} for pair in said for who, v in zip(("human", "gpt"), pair, strict=True)
    ]
    views = np.random.default_rng(0).integers(0, 256, (5, 12, 12, 3), np.uint8)

    def example(said: list[tuple[str, str]], independent: bool):
        row = {"image": "x", "conversations": talk(said), "independent": independent}
        found = encode_row(row, words, get_template("qa", words), 9, 96)
        small = dataclasses.replace(found, tokens=2 + found.tokens % 62)  # the tiny model knows 64 words
        return small, [views]

    shared = tiny_batch([[example(turns, True)], []], 80, 5)  # the shapes of the test above
    alone = [[(turns[0][0].split("\n")[0] + question.replace("<image>", ""), answer)] for question, answer in turns]
    apart = tiny_batch([*([example(said, False)] for said in alone), []], 40, 2)
    assert shared.loss_mask.sum() == apart.loss_mask.sum() == 9
    assert_same_loss_and_gradients(tiny, shared, apart)


@functools.cache
def gradient_of(model):
    def loss(params, batch):
        value, count = cross_entropy(model.apply({"params": params}, batch)[0], batch)
        return value / count

    return jax.jit(jax.value_and_grad(loss))


def assert_same_loss_and_gradients(tiny, one: Batch, other: Batch) -> None:
    gradient = gradient_of(tiny.model)
    (mean, grads), (other_mean, others) = (gradient(tiny.params, batch) for batch in (one, other))
    assert abs(mean - other_mean) < 1e-5
    for a, b in zip(*map(jax.tree.leaves, (grads, others)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batching", ["rows", "packed", "buckets"])
@pytest.mark.parametrize("independent", [True, False])
def test_what_is_not_trained_on_is_in_no_loss(words, tmp_path, batching, independent):
    """The first answer of every row, in every way of batching; a conversation keeps all of its tokens."""
    rows = [row | {"independent": independent} for row in make_rows(tmp_path)]
    stage = dataclasses.replace(STAGE, batching=batching, max_steps=0, epochs=1.0)
    without = [row | {"conversations": [dict(turn) for turn in row["conversations"]]} for row in rows]
    for row in without:
        row["conversations"][1]["loss"] = False
    found, expected = ([b for b, _ in iterate(split_of(r, tmp_path), words, stage=stage)] for r in (without, rows))
    said = [
        sorted(piece for batch in some for row in answers(batch, words) for piece in row) for some in (found, expected)
    ]
    yes = [f"yes {i}" for i in range(ROWS)]
    assert said == [yes, [f"row {i}" for i in range(ROWS)] + yes]
    if not independent:
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)


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


@pytest.fixture
def parsed_flags():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])


@pytest.mark.parametrize("batching", ["rows", "packed"])
def test_worker_processes_do_not_change_the_order(batches, parsed_flags, batching):
    stage = dataclasses.replace(STAGE, batching=batching)
    many = dataclasses.replace(CONFIG, data=DataConfig(threads=1, workers=2, flip=True))
    alone = dataclasses.replace(CONFIG, data=DataConfig(threads=1, flip=True))
    assert_equal(batches(7, many, stage), batches(7, alone, stage))


def test_signals_to_all_processes_are_left_to_the_first(split, words, parsed_flags):
    """Systems that end a job tell every process of it; the workers are still needed for the last steps."""
    cfg = dataclasses.replace(CONFIG, data=DataConfig(threads=1, workers=1))
    stage = dataclasses.replace(STAGE, max_steps=30)
    iterator = iterate(split, words, cfg, stage)
    found = [next(iterator)]
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGTERM)
        os.kill(child.pid, signal.SIGINT)
    found += iterator
    iterator.close()
    assert len(found) == 30


def test_a_dead_worker_ends_the_run_with_its_cause(split, words, parsed_flags):
    cfg = dataclasses.replace(CONFIG, data=DataConfig(threads=1, workers=1))
    iterator = iterate(split, words, cfg, dataclasses.replace(STAGE, max_steps=1000))
    next(iterator)
    began = time.monotonic()
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(RuntimeError, match="exit code -9"):
        for _ in iterator:
            pass
    assert time.monotonic() - began < 60
    iterator.close()


@pytest.mark.parametrize("batching", ["rows", "packed", "buckets"])
@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_global_batches(batches, count, batching):
    """Whatever their number, each reads the rows it is told to, and the batch is the same."""
    stage = dataclasses.replace(STAGE, batching=batching, buckets=(36,))
    cfg = dataclasses.replace(CONFIG, data=DataConfig(threads=1, flip=True, shift=1))
    whole = batches(8, cfg, stage)
    held = [np.arange(i, 4, count) for i in range(count)]
    for rows in held:
        assert_equal(
            batches(8, cfg, stage, here=rows),
            [jax.tree.map(lambda x, rows=rows: x[rows], batch) for batch in whole],
        )


@pytest.mark.parametrize("batching", ["rows", "packed", "buckets"])
@pytest.mark.parametrize("stop", [0, 1, 4])
def test_resume(batches, stop, batching):
    """Rows 10 to 19 are the second epoch: batch 2 holds the end of one and the beginning of the other."""
    stage = dataclasses.replace(STAGE, batching=batching, buckets=(36,))
    cfg = dataclasses.replace(CONFIG, data=DataConfig(threads=2, flip=True, shift=1))
    assert_equal(batches(5, cfg, stage, first=stop), batches(stop + 5, cfg, stage)[stop:])


def test_ten_kills_in_two_epochs_of_packed_rows(tmp_path, words):
    """Every row is seen twice, although each start reads ahead of the steps that count, and hosts come and go."""
    rng = np.random.default_rng(0)
    turns = lambda i: [{"from": "human", "value": "?"}, {"from": "gpt", "value": f"row {i}" + " yes" * (i % 7)}]
    split = split_of([{"id": i, "conversations": turns(i)} for i in range(200)], tmp_path)
    stage = dataclasses.replace(STAGE, batching="packed", epochs=2.0, max_steps=0)
    total = len(plan_of(reader_of(split, words, stage=stage), stage))
    kills = sorted(rng.choice(np.arange(1, total), 10, replace=False).tolist())
    seen = []
    for first, last in itertools.pairwise([0, *kills, total]):
        hosts = int(rng.choice([1, 2, 4]))
        for host in range(hosts):
            iterator = iterate(split, words, CONFIG, stage, first, here=np.arange(host, 4, hosts))
            seen += row_numbers([batch for batch, _ in itertools.islice(iterator, last - first)], words)
            iterator.close()
    assert np.bincount(seen).tolist() == [2] * 200


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
    found = [list(fixed_batches(reader_of(split, words, c), 4, 64, 1)) for c in (cfg, CONFIG)]
    assert_equal(*found)


# ----------------------------------------------------------------------------------------------------------------------
# fixed batches


def test_fixed_batches(split, words):
    found = list(fixed_batches(reader_of(split, words), 4, 64, 1))
    assert [len(batch.tokens) for batch in found] == [4, 4, 4]
    assert [pieces for batch in found for pieces in answers(batch, words)] == [
        *([f"row {i}", f"yes {i}"] for i in range(ROWS)),
        [],
        [],
    ]
    for field in FIELDS[:-1]:  # what fills up the last one counts for nothing
        assert not getattr(found[-1], field)[2:].any(), field
    assert found[-1].image_start.tolist() == [[1], [1], [-1], [-1]]


def test_fixed_batches_leave_out_what_is_broken(split, words, tmp_path):
    rows = make_rows(tmp_path)
    (tmp_path / "3.png").write_bytes(b"<html>")
    (batch,) = fixed_batches(reader_of(split_of(rows, tmp_path), words), ROWS, 64, 1)
    assert [pieces[:1] for pieces in answers(batch, words)] == [[f"row {i}"] if i != 3 else [] for i in range(ROWS)]


def test_fixed_batches_ask_all_kinds_of_questions(split, words):
    """Where an image is encoded with one question, the rows take turns: their first questions are of one kind."""
    reader = reader_of(split, words)
    reading = dataclasses.replace(reader, encode=dataclasses.replace(reader.encode, question=4))
    found = [pieces for batch in fixed_batches(reading, 4, 64, 1) for pieces in answers(batch, words)]
    assert found[:4] == [["row 0"], ["yes 1"], ["row 2"], ["yes 3"]]


def test_fixed_batches_of_two_processes(split, words, monkeypatch):
    """Each opens the pictures of its own rows."""
    opened = []
    read = Images.read
    monkeypatch.setattr(Images, "read", lambda self, part, entry: opened.append(entry) or read(self, part, entry))
    whole = list(fixed_batches(reader_of(split, words), 4, 64, 1))
    opened.clear()
    found = list(fixed_batches(reader_of(split, words), 4, 64, 1, np.array([1, 2])))
    assert_equal(found, [jax.tree.map(lambda x: x[1:3], batch) for batch in whole])
    assert opened == [f"{i}.png" for i in (1, 2, 5, 6, 9)]


def test_no_rows_no_batches(split, words):
    assert list(fixed_batches(reader_of(split_of([], "."), words), 4, 64, 1)) == []


# ----------------------------------------------------------------------------------------------------------------------
# broken rows


@pytest.mark.parametrize("batching", ["rows", "packed"])
def test_a_broken_image_leaves_a_hole_and_is_told(words, tmp_path, batching):
    rows = make_rows(tmp_path)
    (tmp_path / "3.png").write_bytes(b"<html>")
    stage = dataclasses.replace(STAGE, batching=batching, epochs=1.0, max_steps=0)
    found = list(iterate(split_of(rows, tmp_path), words, CONFIG, stage))
    assert sorted(row_numbers([batch for batch, _ in found], words)) == [i for i in range(ROWS) if i != 3]
    ((bad,),) = [bad for _, bad in found if bad]
    assert (bad.source, bad.row, bad.id, bad.cause) == ("rows.json", 3, "3", "broken_image")
    assert bad.reason.startswith("rows.json row 3 (id 3): image ")


def test_holes_change_nothing_else(split, words, tmp_path):
    rows = make_rows(tmp_path)
    (tmp_path / "3.png").unlink()
    broken = [batch for batch, _ in itertools.islice(iterate(split_of(rows, tmp_path), words), 6)]
    whole = [batch for batch, _ in itertools.islice(iterate(split, words), 6)]
    for a, b in zip(broken, whole, strict=True):
        for sequence in range(4):
            if "row 3" not in answers(b, words)[sequence]:
                np.testing.assert_array_equal(a.tokens[sequence], b.tokens[sequence])
                np.testing.assert_array_equal(a.views[sequence], b.views[sequence])
            else:
                assert not a.segments[sequence].any()


# ----------------------------------------------------------------------------------------------------------------------
# images


def test_an_image_is_read_once(split, monkeypatch):
    from sparsecut_jax.data import images

    opened = []
    read = images.read_image
    monkeypatch.setattr(images, "read_image", lambda path, limit: opened.append(path) or read(path, limit))
    pictures, part = Images(CONFIG), split.parts[0]
    assert pictures.read(part, "3.png") is pictures.read(part, "3.png")
    assert len(opened) == 1


def test_what_goes_to_a_worker_is_small(split, words):
    import cloudpickle

    reader = reader_of(split, words)
    read = pipeline.BatchReader(
        reader, plan_of(reader, dataclasses.replace(STAGE, max_steps=10_000)), (0,), np.arange(4)
    )
    reader.pictures.read(split.parts[0], "3.png")
    assert len(cloudpickle.dumps(grain.MapDataset.range(10).map(read))) < 40_000  # the tokenizer, and ten rows


def test_small_views_are_enlarged_for_the_tower():
    """Cut at 4 pixels, shown at 8: what is finer than the cut is gone, and each crop shows its own quarter alone."""
    cfg = dataclasses.replace(CONFIG, vision=VisionConfig(image_size=8, patch_size=2))
    small = Images(dataclasses.replace(cfg, data=DataConfig(view_size=4)))
    picture = Image.fromarray(np.kron(np.array([[10, 60], [110, 160]], np.uint8), np.ones((4, 4), np.uint8))).convert(
        "RGB"
    )
    views = small.views(picture)
    assert views.shape == small.shape == (5, 8, 8, 3)
    assert [set(view.ravel().tolist()) for view in views[1:]] == [{10}, {60}, {110}, {160}]
    stripes = Image.fromarray(np.tile(np.array([0, 255] * 4, np.uint8), (8, 1))).convert(
        "RGB"
    )  # two a pixel of the cut
    assert np.ptp(small.views(stripes)[0].astype(int)) < 64 < np.ptp(Images(cfg).views(stripes)[0].astype(int))


def test_views_larger_than_what_the_tower_reads_are_refused():
    text = refusal(check_room, dataclasses.replace(CONFIG, data=DataConfig(view_size=8)))
    assert text.startswith("config.data.view_size=8: expected at most config.vision.image_size=4")
