"""docs/fusions.md has a row for every way of fusing, which says what its wiring and its settings are."""

import dataclasses
import re

import pytest

from runs import ROOT
from sparsecut_jax.models.ways import FUSING, INJECTING, positions, wiring_of
from tiny import tiny_config

PAGE = (ROOT / "docs/fusions.md").read_text()
ROWS = {row[0]: row[1:] for row in re.findall(r"^\| `(\w+)`" + r" \|([^|\n]*)" * 7 + r"\|$", PAGE, re.M)}
WORDS = re.compile(r"`(\w+)`")
SIZES = {
    "1": 1,
    "N": 64,
    "N + 1": 65,
    "N / 4": 16,
    "N / 16": 4,
    "V N, V views": 320,
    "`tokens`, 4 by default": 4,
}  # of 8 x 8 tokens a view


def test_every_way_has_a_row():
    assert sorted(ROWS) == sorted(FUSING)


@pytest.mark.parametrize("name", FUSING)
def test_rows(name):
    reads, size, _, injected_by, in_decode, settings, source = map(str.strip, ROWS[name])
    cfg = tiny_config(fusion=dict(name=name), vision=dict(image_size=32, width=32))
    wiring = wiring_of(cfg)
    assert positions(cfg) == SIZES[size.partition(";")[0]]
    assert WORDS.findall(injected_by) == ([wiring.injecting] if wiring.names else [])
    assert in_decode == ("yes" if wiring.names and INJECTING[wiring.injecting].in_decode else "no")
    assert ("question" in reads) == bool(wiring.question)
    own = getattr(FUSING[name], "Settings", None)
    assert WORDS.findall(settings) == ([field.name for field in dataclasses.fields(own)] if own else [])
    assert ("crops" in reads or reads == "the same") == bool(wiring.grid)
    assert source
