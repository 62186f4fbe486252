"""Which rows stand in which batch: every row as often as it should, full sequences, nothing that a restart changes."""

import dataclasses

import numpy as np
import pytest

from sparsecut_jax.data import batch_plan as plans
from sparsecut_jax.data.batch_plan import BatchPlan, Lengths, make_plan, pack
from sparsecut_jax.settings import StageConfig
from tiny import refusal

STAGE = StageConfig(seq_len=100, batch_size=4, epochs=1.0)


def lengths_of(tokens: list[int] | np.ndarray, images: list[int] | np.ndarray | int = 1) -> Lengths:
    tokens = np.array(tokens, np.int32)
    return Lengths(tokens, np.broadcast_to(np.array(images, np.int32), tokens.shape))


def plan_of(lengths: Lengths, groups=None, seed: int = 0, max_images: int = 1, **stage) -> BatchPlan:
    return make_plan(lengths, groups or [(lengths.usable, 1.0)], dataclasses.replace(STAGE, **stage), max_images, seed)


def drawn(count: int, seed: int = 0) -> Lengths:
    rng = np.random.default_rng(seed)
    return lengths_of(rng.integers(5, 100, count), rng.integers(0, 2, count))


def batches(plan: BatchPlan) -> list[list[list[int]]]:
    return [[plan.sequence(k, i) for i in range(plan.batch_size)] for k in range(len(plan))]


def rows_of(plan: BatchPlan) -> list[int]:
    return [row for batch in batches(plan) for sequence in batch for row in sequence]


# ----------------------------------------------------------------------------------------------------------------------
# pack


def packed(tokens: list[int], images: list[int], seq_len: int, slots: int) -> list[list[int]]:
    return [sorted(rows) for rows in pack(np.array(tokens), np.array(images), seq_len, slots)]


def test_pack_literal():
    assert packed([60, 50, 40, 30, 20], [0] * 5, 100, 1) == [[0, 2], [1, 3, 4]]


def test_three_of_a_middling_length_go_together():
    """Longest first and best fit would be 40 + 40, 30 + 30 + 30, 30."""
    assert packed([40, 40, 30, 30, 30, 30], [1] * 6, 100, 3) == [[1, 4, 5], [0, 2, 3]]


def test_pack_keeps_to_the_image_slots():
    assert packed([10, 10, 10, 10], [1, 1, 1, 0], 100, 2) == [[1, 2, 3], [0]]


def test_pack_row_that_fills_a_sequence():
    assert packed([100, 1, 100], [1, 0, 1], 100, 1) == [[2], [0], [1]]


@pytest.mark.parametrize("seed", range(5))
def test_packed_sequences_hold_every_row_once_and_never_too_much(seed):
    rng = np.random.default_rng(seed)
    tokens, images = rng.integers(1, 201, 500), rng.integers(0, 4, 500)
    found = pack(tokens, images, 200, 5)
    assert sorted(sum(found, [])) == list(range(500))
    assert max(tokens[rows].sum() for rows in found) <= 200
    assert max(images[rows].sum() for rows in found) <= 5


def mix_665k(count: int, image_tokens: int) -> Lengths:
    """Rows with the shape of the public 665k mix: 6 % text only; text of a row with an image log-normal around 180
    tokens, 84 % of it between 50 and 400; text alone around 500 with a tail beyond 2048, where it is cut."""
    rng = np.random.default_rng(0)
    images = (rng.random(count) >= 0.06).astype(np.int32)
    seen = np.exp(rng.normal(np.log(180), 0.7, count)).clip(20, 1400)
    alone = np.exp(rng.normal(np.log(500), 0.9, count)).clip(20, 2048)
    text = np.where(images, seen, alone).astype(np.int32)
    shown = text[images == 1]
    assert 0.80 < np.mean((shown >= 50) & (shown <= 400)) < 0.88
    return Lengths(np.minimum(text + image_tokens * images, 2048), images)


@pytest.mark.parametrize("image_tokens", [576, 256, 144])
def test_nine_tenths_of_packed_positions_are_useful(image_tokens):
    lengths = mix_665k(30_000, image_tokens)
    plan = plan_of(lengths, batching="packed", seq_len=2048, batch_size=128)
    assert plan.useful >= 0.91
    assert sorted(rows_of(plan)) == list(range(30_000))
    assert plan_of(lengths, batching="rows", seq_len=2048, batch_size=128).useful < 0.45


# ----------------------------------------------------------------------------------------------------------------------
# order


@pytest.mark.parametrize("batching", ["rows", "packed", "buckets"])
def test_two_epochs_have_every_row_twice(batching):
    plan = plan_of(drawn(333), batching=batching, epochs=2.0)
    assert np.bincount(rows_of(plan)).tolist() == [2] * 333


def test_every_epoch_has_an_order_of_its_own():
    order = rows_of(plan_of(drawn(40), epochs=3.0))
    epochs = [order[i : i + 40] for i in (0, 40, 80)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(40))] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_last_batch_ends_in_empty_sequences():
    plan = plan_of(drawn(10))
    assert [len(sequence) for sequence in batches(plan)[-1]] == [1, 1, 0, 0]
    assert len(plan) == 3


def test_part_of_an_epoch():
    assert len(rows_of(plan_of(drawn(100), epochs=0.25))) == 25
    assert np.bincount(rows_of(plan_of(drawn(100), epochs=1.5)), minlength=100).tolist().count(2) == 50


@pytest.mark.parametrize("batching", ["rows", "packed", "buckets"])
def test_steps_go_on_over_the_epochs(batching):
    plan = plan_of(drawn(10), batching=batching, max_steps=30)
    assert len(plan) == 30
    assert all(sequence for batch in batches(plan) for sequence in batch)


def test_more_steps_change_nothing_before_them(monkeypatch):
    monkeypatch.setattr(plans, "WINDOW", 16)
    for batching in ("rows", "packed", "buckets"):
        few, many = (batches(plan_of(drawn(50), batching=batching, max_steps=steps)) for steps in (7, 40))
        assert few == many[:7]


def test_same_seed_same_plan_and_another_seed_another():
    one, same, other = (rows_of(plan_of(drawn(50), batching="packed", seed=seed)) for seed in (0, 0, 1))
    assert one == same != other


def test_rows_that_are_left_out_never_come():
    lengths = lengths_of([10, 0, 20, 0, 30])
    assert sorted(rows_of(plan_of(lengths))) == [0, 2, 4]


# ----------------------------------------------------------------------------------------------------------------------
# weights


@pytest.mark.parametrize(("weight", "counts"), [(2.0, [2, 2, 2, 2]), (1.0, [1, 1, 1, 1])])
def test_a_weight_says_how_often_an_epoch_has_a_row(weight, counts):
    plan = plan_of(lengths_of([10] * 10), [(np.arange(6), 1.0), (np.arange(6, 10), weight)])
    assert np.bincount(rows_of(plan)).tolist() == [1] * 6 + counts


def test_half_a_weight_draws_one_half_after_the_other():
    groups = [(np.arange(4), 1.0), (np.arange(4, 12), 0.5)]
    once = np.bincount(rows_of(plan_of(lengths_of([10] * 12), groups)), minlength=12)
    assert once[:4].tolist() == [1] * 4 and sorted(once[4:].tolist()) == [0] * 4 + [1] * 4
    twice = np.bincount(rows_of(plan_of(lengths_of([10] * 12), groups, epochs=2.0)), minlength=12)
    assert twice.tolist() == [2] * 4 + [1] * 8


def test_a_source_whose_rows_are_all_left_out():
    plan = plan_of(lengths_of([10, 10]), [(np.arange(2), 1.0), (np.zeros(0, np.int64), 1.0)])
    assert sorted(rows_of(plan)) == [0, 1]


# ----------------------------------------------------------------------------------------------------------------------
# lengths and slots


def test_rows_are_padded_to_seq_len():
    assert plan_of(drawn(10)).lengths.values.tolist() == [100, 100, 100]


def test_buckets_hold_rows_of_a_like_length():
    plan = plan_of(lengths_of([10, 90] * 8), batching="buckets", buckets=(20, 50))
    assert sorted(plan.lengths.values.tolist()) == [20, 20, 100, 100]
    for batch, length in zip(batches(plan), plan.lengths.values, strict=True):
        assert {row % 2 for (row,) in batch} == {0 if length == 20 else 1}
    assert plan.useful == pytest.approx((8 * 10 + 8 * 90) / (4 * 240))


def test_buckets_of_a_window_that_is_no_whole_number_of_batches(monkeypatch):
    monkeypatch.setattr(plans, "WINDOW", 10)  # two batches of four and a half one
    plan = plan_of(drawn(50), batching="buckets", epochs=2.0)
    tokens = drawn(50).tokens
    assert np.bincount(rows_of(plan)).tolist() == [2] * 50
    for batch, length in zip(batches(plan), plan.lengths.values, strict=True):
        assert max(tokens[row] for sequence in batch for row in sequence) <= length


def test_buckets_by_themselves_are_a_quarter_and_a_half():
    plan = plan_of(lengths_of([25] * 4 + [50] * 4 + [51] * 4), batching="buckets")
    assert sorted(plan.lengths.values.tolist()) == [25, 50, 100]


def test_slots():
    assert plan_of(drawn(20), max_images=3).slots == 3
    assert plan_of(drawn(20), slots=5).slots == 5
    assert plan_of(lengths_of([20] * 10), batching="packed").slots == 5
    assert plan_of(lengths_of([20] * 10, 0), batching="packed", max_images=2).slots == 2


# ----------------------------------------------------------------------------------------------------------------------
# what cannot be planned


def test_nothing_to_train_on():
    assert (
        refusal(lambda: plan_of(lengths_of([0, 0]))) == "there is no usable row to train on; run data check to see why"
    )


@pytest.mark.parametrize("stage", [{"epochs": 1e12}, {"max_steps": 2**31}])
def test_a_stage_without_end(stage):
    assert refusal(lambda: plan_of(drawn(10), **stage)).startswith("the stage would draw ")


@pytest.mark.parametrize("stage, weight", [({"epochs": 1e-9}, 1.0), ({"max_steps": 5}, 1e-9)])
def test_a_stage_that_draws_nothing(stage, weight):
    sentence = refusal(lambda: plan_of(drawn(10), [(np.arange(10), weight)], **stage))
    assert " would draw 1e-08 rows, expected at least 1; raise " in sentence
