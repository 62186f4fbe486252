"""Shortcut plans by name: their pairs (vit level, llm layer), and depths that they refuse."""

import pytest

from sparsecut_jax.models.shortcuts import wire_shortcuts
from sparsecut_jax.settings import ShortcutConfig
from tiny import refusal


def plan(name, vit_depth, llm_depth, **settings):
    return wire_shortcuts(ShortcutConfig(density=name, **settings), vit_depth, llm_depth)


@pytest.mark.parametrize(
    "name, depths, settings, pairs",
    [
        ("qwen3vl", (24, 36), dict(count=3), ((5, 0), (11, 1), (17, 2))),  # as published
        ("qwen3vl", (5, 8), dict(count=4), ((0, 0), (1, 1), (2, 2), (3, 3))),
        ("deepstack", (24, 32), dict(count=4), ((22, 1), (22, 2), (22, 3), (22, 4))),  # as published, for 2 x 2 crops
        ("granite4", (27, 40), {}, ((26, 0), (20, 3), (14, 6), (8, 9))),  # as published
        ("granite4", (24, 32), {}, ((23, 0), (18, 2), (12, 5), (7, 7))),
        ("granite4", (5, 8), {}, ((4, 0), (3, 1), (2, 2), (1, 3))),
        ("lin_3_18_23", (24, 24), {}, ((2, 2), (17, 17), (22, 22))),  # as published
        ("lin_3_18_23", (24, 32), {}, ((2, 3), (17, 23), (22, 29))),
        ("lin_3_18_23", (5, 8), {}, ((0, 0), (3, 5), (4, 6))),
        ("lin_3_18_23", (24, 4), {}, ((2, 0), (17, 2), (22, 2))),
        ("random", (24, 32), dict(count=3), ((22, 0), (17, 27), (20, 28))),
    ],
)
def test_pairs(name, depths, settings, pairs):
    assert plan(name, *depths, **settings).pairs == pairs


def test_after_the_layer():
    """The others keep `shortcuts.position`."""
    names = ("random", "qwen3vl", "granite4", "lin_3_18_23")
    places = {name: [plan(name, 24, 32, position=place).position for place in ("pre", "post")] for name in names}
    assert places == {"random": ["pre", "post"], "qwen3vl": ["post", "post"], "granite4": ["pre", "post"],
                      "lin_3_18_23": ["pre", "post"]}  # fmt: skip


def test_random_levels_and_layers_are_different_ones():
    made = [plan("random", 5, 7, count=5, seed=seed).pairs for seed in range(50)]
    for pairs in made:
        levels, layers = zip(*pairs, strict=True)
        assert sorted(levels) == [0, 1, 2, 3, 4] and len(set(layers)) == 5
    assert len(set(made)) == 50
    assert {pairs[0][0] for pairs in made} == {0, 1, 2, 3, 4}  # any level may come first


SHALLOW = "the vision tower has 3 blocks (0 to 2) and the LLM 2 layers (0 to 1)"


@pytest.mark.parametrize(
    "name, count, reason",
    [
        ("random", 3, "cannot pick shortcuts.count=3 different levels and layers (expected 1 to 2)"),
        ("random", 0, "cannot pick shortcuts.count=0 different levels and layers (expected 1 to 2)"),
        ("qwen3vl", 3, "cannot add shortcuts.count=3 levels below the last one after as many layers (expected 1 to 2)"),
        ("deepstack", 2, "cannot enter shortcuts.count=2 layers from layer 1 on (expected 1 to 1 layers)"),
        ("granite4", 8, "needs 4 blocks and 4 layers or more"),
        ("lin_3_18_23", 8, "needs 4 blocks or more"),
    ],
)
def test_depths_that_cannot_be(name, count, reason):
    assert refusal(plan, name, 3, 2, count=count) == f"shortcuts.density={name!r} {reason}: {SHALLOW}"
