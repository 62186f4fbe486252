"""Which tower level enters which decoder layer, and the adding itself."""

import re

import jax
import numpy as np
import pytest

from sparsecut_jax.models.injecting.add import add
from sparsecut_jax.models.interfaces import Here
from sparsecut_jax.models.levels import wiring_of_shortcuts
from sparsecut_jax.models.shortcuts import evenly, wire_shortcuts
from sparsecut_jax.models.slots import belonging, read_slots, write_slots
from sparsecut_jax.settings import ShortcutConfig
from sparsecut_jax.types import UserError


def plan(vit_depth, llm_depth, select_layer=-2, **settings):
    return wire_shortcuts(ShortcutConfig(**settings), vit_depth, llm_depth, select_layer)


def route_of(shortcuts):
    """int32[L, A], as the LLM gets it."""
    return wiring_of_shortcuts(shortcuts, positions=9).route


# --- plans ---


@pytest.mark.parametrize(
    "settings, pairs",
    [
        ("dense bottom u", [(4, 0), (3, 1), (2, 2), (1, 3), (0, 4)]),
        ("dense uniform u", [(4, 0), (3, 2), (2, 3), (1, 5), (0, 6)]),
        ("sparse uniform u", [(4, 0), (2, 3), (0, 6)]),
        ("sparse bottom u", [(4, 0), (2, 1), (0, 2)]),
        ("sparse top u", [(4, 4), (2, 5), (0, 6)]),
        ("sparse uniform parallel", [(0, 0), (2, 3), (4, 6)]),
    ],
)
def test_pictures_of_the_paper(settings, pairs):
    """5 blocks, 7 layers, K = 3 where sparse."""
    density, distribution, order = settings.split()
    made = plan(5, 7, density=density, count=3, distribution=distribution, order=order)
    assert made.pairs == tuple(pairs)


@pytest.mark.parametrize(
    "llm_depth, layers", [(32, (0, 4, 9, 13, 18, 22, 27, 31)), (40, (0, 6, 11, 17, 22, 28, 33, 39))]
)
def test_plan_of_the_paper(llm_depth, layers):
    """The defaults: 8 of 24 levels, evenly, the deepest to the earliest layer."""
    made = plan(24, llm_depth)
    assert made.pairs == tuple(zip((23, 20, 16, 13, 10, 7, 3, 0), layers, strict=True))
    assert made.main_level == 22
    assert made.position == "pre"


RELEASED = dict(density="explicit", vit_levels=(0, 3, 6, 9, 12, 15, 18, 21), llm_layers=(4, 9, 14, 19, 24, 29, 34, 39))


def test_released_plan():
    made = plan(24, 40, **RELEASED)
    assert made.pairs == ((0, 4), (3, 9), (6, 14), (9, 19), (12, 24), (15, 29), (18, 34), (21, 39))
    assert made.main_level == 22


def test_feature_order_reverse():
    """The block list is reversed before levels are picked, and the main feature is block 0's."""
    made = plan(24, 40, feature_order_reverse=True, **RELEASED)
    assert made.pairs == ((23, 4), (20, 9), (17, 14), (14, 19), (11, 24), (8, 29), (5, 34), (2, 39))
    assert made.main_level == 0


@pytest.mark.parametrize(
    "count, n, picked",
    [
        (5, 7, [0, 2, 3, 5, 6]),
        (3, 5, [0, 2, 4]),
        (2, 7, [0, 6]),
        (1, 7, [0]),
        (7, 7, [0, 1, 2, 3, 4, 5, 6]),
        (4, 24, [0, 8, 15, 23]),
        (4, 2, [0, 0, 1, 1]),
    ],
)
def test_evenly(count, n, picked):
    assert evenly(count, n) == picked


def test_several_levels_meet_in_a_layer():
    """24 levels, 16 layers: 8 of the layers take two levels."""
    made = plan(24, 16, density="dense")
    expected = [
        {23}, {22, 21}, {20}, {19, 18}, {17}, {16, 15}, {14}, {13, 12},
        {11, 10}, {9}, {8, 7}, {6}, {5, 4}, {3}, {2, 1}, {0},
    ]  # fmt: skip
    assert [{level for level, at in made.pairs if at == layer} for layer in range(16)] == expected
    assert route_of(made).shape == (16, 2)
    assert [{made.levels[row] for row in rows if row >= 0} for rows in route_of(made)] == expected


def test_route():
    """A row for each layer: which rows of the bank enter it. The bank's rows follow `levels`."""
    made = plan(5, 7, count=3)
    assert made.levels == (4, 2, 0)
    assert route_of(made).tolist() == [[0], [-1], [-1], [1], [-1], [-1], [2]]
    assert route_of(made).dtype == np.int32


def test_route_of_a_level_that_enters_twice():
    """One row of the bank serves both layers."""
    made = plan(5, 4, density="explicit", vit_levels=(3, 1, 3), llm_layers=(3, 1, 1))
    assert made.pairs == ((1, 1), (3, 1), (3, 3))
    assert made.levels == (1, 3)
    assert route_of(made).tolist() == [[-1, -1], [0, 1], [-1, -1], [1, -1]]


def test_no_shortcuts():
    made = plan(5, 4, density="none")
    assert made.pairs == made.levels == ()
    assert route_of(made).tolist() == [[-1], [-1], [-1], [-1]]


@pytest.mark.parametrize("select_layer, main", [(-2, 3), (-1, 4), (-5, 0), (1, 0), (5, 4)])
def test_main_level(select_layer, main):
    """Hugging Face's hidden_states[select_layer], where 0 is the embedding and i the output of block i - 1."""
    assert plan(5, 7, select_layer, count=3).main_level == main


DEPTHS = "the vision tower has 5 blocks (0 to 4) and the LLM 7 layers (0 to 6)"


def explicit(*pairs):
    return dict(
        density="explicit", vit_levels=tuple(v for v, _ in pairs), llm_layers=tuple(layer for _, layer in pairs)
    )


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (explicit((0, 0), (2, 7)), f"shortcut (vit level 2, llm layer 7) can never fire: {DEPTHS}"),
        (explicit((5, 0)), f"shortcut (vit level 5, llm layer 0) can never fire: {DEPTHS}"),
        (explicit((-1, 0)), f"shortcut (vit level -1, llm layer 0) can never fire: {DEPTHS}"),
        (explicit((0, -1)), f"shortcut (vit level 0, llm layer -1) can never fire: {DEPTHS}"),
        (explicit((1, 2), (3, 4), (1, 2)), f"shortcut (vit level 1, llm layer 2) is there twice: {DEPTHS}"),
        (
            dict(density="explicit", vit_levels=(0, 1), llm_layers=(0,)),
            "shortcuts.vit_levels has 2 entries and shortcuts.llm_layers 1; expected two lists of equal length, "
            f"at least 1: {DEPTHS}",
        ),
        (dict(density="explicit"), "shortcuts.vit_levels has 0 entries and shortcuts.llm_layers 0; "),
        (dict(count=6), f"shortcuts.count=6 levels cannot be picked: {DEPTHS}; expected 1 to 5"),
        (dict(count=0), f"shortcuts.count=0 levels cannot be picked: {DEPTHS}; expected 1 to 5"),
        (
            dict(count=3, select_layer=0),
            f"vision.select_layer=0 is no block's output: {DEPTHS}; expected -5 to -1 or 1 to 5",
        ),
        (dict(count=3, select_layer=6), "vision.select_layer=6 is no block's output"),
        (dict(count=3, select_layer=-6), "vision.select_layer=-6 is no block's output"),
    ],
)
def test_impossible_plans(settings, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        plan(5, 7, **settings)


@pytest.mark.parametrize(("distribution", "which"), [("bottom", "first"), ("top", "last")])
def test_more_levels_than_layers(distribution, which):
    """The first or last 5 of 4 layers do not exist."""
    with pytest.raises(UserError) as error:
        plan(5, 4, density="dense", distribution=distribution)
    assert str(error.value) == (
        f"shortcuts.distribution={distribution!r} enters the {which} 5 layers, one level each: the vision tower has 5 "
        "blocks (0 to 4) and the LLM 4 layers (0 to 3); expected at most 4 levels, or shortcuts.distribution='uniform'"
    )


# --- slots ---

T, D, N = 7, 3, 2
START = np.array([[0, 4], [5, -1], [-1, -1], [-1, 5]], np.int32)  # 5 is the last place where N tokens fit


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((4, T, D)).astype(np.float32)
    values = rng.standard_normal((4, 2, N, D)).astype(np.float32)
    return hidden, values


def written(hidden, values, add):
    """By hand: position by position."""
    out = hidden.copy()
    for b in range(4):
        for m in range(2):
            for n in range(N if START[b, m] >= 0 else 0):
                out[b, START[b, m] + n] = values[b, m, n] + (out[b, START[b, m] + n] if add else 0)
    return out


@pytest.mark.parametrize("add", [False, True])
def test_write_slots(arrays, add):
    hidden, values = arrays
    out = jax.jit(write_slots, static_argnums=3)(hidden, values, START, add)
    np.testing.assert_array_equal(out, written(hidden, values, add))
    # rows of 1 where something was written
    assert (np.asarray(out) != hidden).any(-1).astype(int).tolist() == [
        [1, 1, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
        [0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]


def test_write_slots_keeps_the_dtype(arrays):
    hidden, values = arrays
    assert write_slots(hidden.astype(jax.numpy.bfloat16), values, START, True).dtype == jax.numpy.bfloat16


def test_write_slots_of_empty_slots_ignores_what_they_hold(arrays):
    hidden, values = arrays
    values = np.where((START == -1)[..., None, None], np.nan, values)
    np.testing.assert_array_equal(write_slots(hidden, values, START, True), written(hidden, values, True))


def test_gradient_of_write_slots(arrays):
    """Replaced positions pass nothing back to the row; empty slots pass nothing back to their values."""
    hidden, values = arrays
    weights = np.random.default_rng(1).standard_normal(hidden.shape).astype(np.float32)
    loss = lambda h, v: (write_slots(h, v, START, False) * weights).sum()
    to_hidden, to_values = jax.grad(loss, (0, 1))(hidden, values)
    inside = written(np.zeros((4, T, D)), np.ones((4, 2, N, D)), False)
    np.testing.assert_array_equal(to_hidden, weights * (1 - inside))
    for b in range(4):
        for m in range(2):
            s = START[b, m]
            np.testing.assert_array_equal(to_values[b, m], weights[b, s : s + N] if s >= 0 else np.zeros((N, D)))


def test_read_slots(arrays):
    hidden, _ = arrays
    out = read_slots(hidden, START, N)
    assert out.shape == (4, 2, N, D)
    for b in range(4):
        for m in range(2):
            s = START[b, m]
            np.testing.assert_array_equal(out[b, m], hidden[b, s : s + N] if s >= 0 else np.zeros((N, D)))


# --- add ---


def inject(hidden, bank, route, image_start):
    return add(hidden, Here(bank, route, image_start, None, None, {}, None))


@pytest.fixture(scope="module")
def bank():
    return np.random.default_rng(2).standard_normal((3, 4, 2, N, D)).astype(np.float32)


@pytest.mark.parametrize("route", [[-1], [0], [2], [-1, -1], [1, -1], [-1, 2], [0, 2], [2, 0, 1]])
def test_inject(arrays, bank, route):
    """Sources add up in the order of the route; -1 adds nothing."""
    hidden, _ = arrays
    out, _ = jax.jit(inject)(hidden, bank, np.array(route, np.int32), START)
    expected = hidden
    for source in route:
        if source >= 0:
            expected = written(expected, bank[source], True)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-6)


def test_ratio_of_inject(arrays, bank):
    """Norm of what was added over norm of what stood there, over the filled slots of the whole batch."""
    hidden, _ = arrays
    _, ratio = inject(hidden, bank, np.array([-1, 1], np.int32), START)
    filled = [(b, m) for b in range(4) for m in range(2) if START[b, m] >= 0]
    added = np.linalg.norm([bank[1, b, m] for b, m in filled])
    stood = np.linalg.norm([hidden[b, START[b, m] : START[b, m] + N] for b, m in filled])
    np.testing.assert_allclose(ratio, [0, added / stood], rtol=1e-6)


def test_ratio_literal():
    hidden = np.full((1, 5, 1), 2.0, np.float32)
    bank = np.full((1, 1, 1, 3, 1), 0.5, np.float32)
    _, ratio = inject(hidden, bank, np.array([0], np.int32), np.array([[1]], np.int32))
    assert ratio.tolist() == [0.25]


def test_ratio_of_a_batch_without_images(arrays, bank):
    hidden, _ = arrays
    out, ratio = inject(hidden, bank, np.array([1], np.int32), np.full_like(START, -1))
    assert ratio.tolist() == [0]
    np.testing.assert_array_equal(out, hidden)


def test_ratio_passes_no_gradient(arrays, bank):
    hidden, _ = arrays
    grads = jax.grad(lambda h, b: inject(h, b, np.array([1], np.int32), START)[1].sum(), (0, 1))(hidden, bank)
    assert not any(np.any(g) for g in grads)


# --- parts of a row ---


@pytest.mark.parametrize("adding", [False, True])
@pytest.mark.parametrize("size", [1, 5, 7])
def test_parts_of_rows_are_written_as_whole_rows(arrays, adding, size):
    """Wherever a part ends, also within an image."""
    hidden, values = arrays
    whole = written(hidden, values, adding)
    for first in range(0, hidden.shape[1], size):
        part = slice(first, first + size)
        out = write_slots(hidden[:, part], values, START, adding, np.int32(first))
        np.testing.assert_allclose(out, whole[:, part], rtol=0, atol=1e-6)


def test_belonging():
    """Two texts and padding in a row; image 0 of length 2 in the first text, image 1 in the second, slot 2 empty."""
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 0]], np.int32)
    own, behind = belonging(segments, np.array([[1, 4, -1]], np.int32), 2)
    rows = lambda x: np.asarray(x)[0].T.astype(int).tolist()
    assert rows(own) == [[1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 0], [0] * 8]
    assert rows(behind) == [[0, 0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1, 0], [0] * 8]
