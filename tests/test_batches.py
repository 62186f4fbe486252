"""Batches: their shapes, those of a config, and how examples fill them."""

import jax
import numpy as np

from sparsecut_jax.data.batches import collate, image_shape, spec_of
from sparsecut_jax.text.conversation import Example
from sparsecut_jax.types import Extra, batch_spec, empty_batch
from tiny import tiny_config


def shapes(batch) -> dict[str, str]:
    """{field: "int32[2, 5]"} of its arrays."""
    leaves = jax.tree_util.tree_flatten_with_path(batch)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): f"{x.dtype}{list(x.shape)}" for path, x in leaves}


def test_arrays_of_a_batch():
    spec = batch_spec(
        2, 40, 3, image_shape(tiny_config()), extras={"question": Extra((4,), "int32")}, branched=True, most_segments=6
    )
    expected = {
        "tokens": "int32[2, 40]",
        "loss_mask": "uint8[2, 40]",
        "segments": "int32[2, 40]",
        "branches": "int32[2, 40]",
        "positions": "int32[2, 40]",
        "views": "uint8[2, 3, 5, 12, 12, 3]",
        "image_start": "int32[2, 3]",
        "extras.question": "int32[2, 3, 4]",
    }
    assert shapes(spec) == shapes(empty_batch(spec)) == expected
    assert (spec.most_segments, empty_batch(spec).most_segments) == (6, 6)
    plain = spec_of(tiny_config(fusion=dict(name="mlp")), 2, 40, 3)
    left_out = ("branches", "extras.question")
    one_view = {name: shape for name, shape in expected.items() if name not in left_out}
    assert shapes(plain) == one_view | {"views": "uint8[2, 3, 1, 12, 12, 3]"}


def test_an_empty_batch_has_no_image_and_no_question():
    batch = empty_batch(batch_spec(1, 2, 1, (1, 1, 1, 3), extras={"question": Extra((2,), "int32")}))
    assert (batch.image_start.tolist(), batch.extras["question"].tolist()) == ([[-1]], [[[-1, -1]]])
    assert not any(x.any() for x in (batch.tokens, batch.loss_mask, batch.segments, batch.positions, batch.views))


def test_an_abstract_batch_has_a_sharding():
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    spec = batch_spec(1, 2, 1, (1, 1, 1, 3), extras={"question": Extra((2,), "int32")}, sharding=here)
    assert {leaf.sharding for leaf in jax.tree.leaves(spec)} == {here}


def test_collate():
    view = np.arange(2 * 2 * 3, dtype=np.uint8).reshape(1, 2, 2, 3)
    short = Example(np.array([7]), np.array([1]), np.array([0]), np.array([0]), [])
    long = Example(np.array([1, 0, 5, 6]), np.array([0, 0, 1, 1]), np.array([0, 0, 1, 2]), np.array([0, 1, 2, 2]), [1])
    batch = collate([[(short, [])], [(long, [view])]], batch_spec(2, 5, 2, (1, 2, 2, 3), branched=True))
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
    batch = collate([[(example, [one, two])]], batch_spec(1, 6, 2, (1, 2, 2, 3)))
    assert batch.image_start.tolist() == [[1, 4]]
    assert (batch.views[0, 0] == 1).all() and (batch.views[0, 1] == 2).all()


def test_examples_of_a_sequence_follow_one_another():
    """Segments tell them apart, positions restart, an image start counts from the start of the sequence."""
    view = lambda value: np.full((1, 2, 2, 3), value, np.uint8)
    one = Example(np.array([1, 0, 5]), np.array([0, 0, 1]), np.array([0, 0, 0]), np.array([0, 1, 2]), [1])
    two = Example(np.array([7, 8]), np.array([0, 1]), np.array([0, 1]), np.array([0, 1]), [])
    three = Example(np.array([0, 9]), np.array([0, 1]), np.array([0, 0]), np.array([0, 1]), [0])
    batch = collate(
        [[(one, [view(1)]), (two, []), (three, [view(3)])], []], batch_spec(2, 8, 3, (1, 2, 2, 3), branched=True)
    )
    assert batch.tokens.tolist() == [[1, 0, 5, 7, 8, 0, 9, 0], [0] * 8]
    assert batch.loss_mask.tolist() == [[0, 0, 1, 0, 1, 0, 1, 0], [0] * 8]
    assert batch.segments.tolist() == [[1, 1, 1, 2, 2, 3, 3, 0], [0] * 8]
    assert batch.branches.tolist() == [[0, 0, 0, 0, 1, 0, 0, 0], [0] * 8]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0, 1, 0], [0] * 8]
    assert batch.image_start.tolist() == [[1, 5, -1], [-1, -1, -1]]
    assert (batch.views[0, 0] == 1).all() and (batch.views[0, 1] == 3).all() and not batch.views[0, 2].any()


def test_the_question_of_each_image_is_padded():
    view = np.zeros((1, 2, 2, 3), np.uint8)
    example = Example(*(np.zeros(6, np.int32),) * 4, image_start=[1, 4], extras={"question": [[7, 8], []]})
    batch = collate(
        [[(example, [view, view])], []], batch_spec(2, 6, 3, (1, 2, 2, 3), extras={"question": Extra((3,), "int32")})
    )
    none = [-1, -1, -1]
    assert batch.extras["question"].tolist() == [[[7, 8, -1], none, none], [none, none, none]]
