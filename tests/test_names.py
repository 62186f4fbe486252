"""Where in a tensor the numbers of a parameter stand."""

import dataclasses
import itertools

import numpy as np
import pytest

from sparsecut_jax.models.rules import HEADS_BIAS, HEADS_IN, HEADS_OUT, LINEAR, Rule
from sparsecut_jax.weights.names import Place, places, their_shape, to_theirs

PATCHES = Rule("x", "x", "o i y x -> (y x i) o", (("y", 4), ("x", 4)))


def test_a_query_kernel_by_its_numbers():
    """Row q * 8 + h of torch's matrix is head q, element h."""
    theirs = np.arange(32 * 32).reshape(32, 32)
    ours = Place(Rule("x", "x", HEADS_IN), (32, 4, 8)).to_ours(theirs)
    assert ours.shape == (32, 4, 8)
    assert ours[5, 3, 2] == theirs[3 * 8 + 2, 5]


def test_a_patch_kernel_by_its_numbers():
    """Of a patch, pixel (y, x) and channel c is input (y * 4 + x) * 3 + c."""
    theirs = np.arange(24 * 3 * 4 * 4).reshape(24, 3, 4, 4)
    ours = Place(PATCHES, (48, 24)).to_ours(theirs)
    assert ours.shape == (48, 24)
    assert ours[(2 * 4 + 3) * 3 + 1, 7] == theirs[7, 1, 2, 3]


def test_rules_with_one_name_share_the_rows_of_a_tensor():
    """As phi3 packs 4 query heads and 2 of keys and values each; what the model lacks has no rows."""
    rules = [Rule(f"{n}", "qkv.{i}", HEADS_IN) for n in "qkvw"] + [Rule("alone", "alone")]
    shapes = {"q": (3, 32, 4, 8), "k": (3, 32, 2, 8), "v": (3, 32, 2, 8), "alone": (5,), "other": (1,)}
    placed = places(rules, shapes)
    assert {path: (place.shape, place.first, place.rows, place.tensor_shape) for path, place in placed.items()} == {
        "q": ((32, 4, 8), 0, 64, (64, 32)),
        "k": ((32, 2, 8), 32, 64, (64, 32)),
        "v": ((32, 2, 8), 48, 64, (64, 32)),
        "alone": ((5,), 0, 0, (5,)),
    }
    assert placed["v"].slices((slice(None),) * 3)[0] == (slice(48, 64), slice(0, 32))


def test_a_size_that_nothing_gives():
    with pytest.raises(ValueError, match=r"the sizes of axes \['y', 'x', 'i'\], 48 together, cannot be determined"):
        their_shape((48, 24), dataclasses.replace(PATCHES, sizes=()))


PLACES = {
    "linear": Place(Rule("x", "x", LINEAR), (32, 48)),
    "heads_in": Place(Rule("x", "x", HEADS_IN), (32, 4, 8)),
    "heads_out": Place(Rule("x", "x", HEADS_OUT), (4, 8, 32)),
    "heads_bias": Place(Rule("x", "x", HEADS_BIAS), (4, 8)),
    "patches": Place(PATCHES, (48, 24)),
    "packed": Place(Rule("x", "x", HEADS_IN), (32, 2, 8), first=32, rows=64),
    "token": Place(Rule("x", "x", "1 1 c -> c"), (24,)),
    "same": Place(Rule("x", "x"), (6, 32)),
    "scalar": Place(Rule("x", "x"), ()),
}


@pytest.mark.parametrize("layout", PLACES)
def test_every_slice_is_read_as_cut_from_the_whole(layout):
    """For each axis all, the first half or the second, in every combination; and nothing more is read than asked
    for where an axis of ours is one of theirs."""
    place = PLACES[layout]
    theirs = np.random.default_rng(0).standard_normal(place.tensor_shape)
    own = their_shape(place.shape, place.rule)
    alone = theirs[place.first : place.first + own[0]] if place.rows else theirs
    whole = place.to_ours(alone)
    assert whole.shape == place.shape
    np.testing.assert_array_equal(to_theirs(whole, place.rule), alone)
    halves = [(slice(None), slice(0, n // 2), slice(n // 2, n)) for n in place.shape]
    for index in itertools.product(*halves):
        where, keep = place.slices(index)
        np.testing.assert_array_equal(place.to_ours(theirs[where])[keep], whole[index])


@pytest.mark.parametrize(
    "layout, index, expected",
    [
        ("linear", (slice(0, 4), slice(8, 16)), (slice(8, 16), slice(0, 4))),
        ("heads_in", (slice(0, 4), slice(2, 3), slice(None)), (slice(16, 24), slice(0, 4))),
        ("heads_out", (slice(2, 3), slice(None), slice(0, 4)), (slice(0, 4), slice(16, 24))),
        ("patches", (slice(None), slice(0, 3)), (slice(0, 3), slice(0, 3), slice(0, 4), slice(0, 4))),
        ("packed", (slice(0, 4), slice(1, 2), slice(None)), (slice(40, 48), slice(0, 4))),
    ],
)
def test_what_a_device_reads(layout, index, expected):
    """embed (fsdp) and heads or mlp (tensor) are cut in the file: no device reads its neighbour's part."""
    assert PLACES[layout].slices(index)[0] == expected
