"""What `data preview` draws: tokens as words, characters with fonts or labels, images within the page."""

import os
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from matplotlib import font_manager
from PIL import Image, ImageDraw
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from sparsecut_jax.data import glyphs, preview
from sparsecut_jax.text.tokenizer import train, wrap
from sparsecut_jax.types import batch_spec, empty_batch

FONTS = os.path.join(matplotlib.get_data_path(), "fonts/ttf")
STIX = os.path.join(FONTS, "STIXGeneral.ttf")


@pytest.fixture
def only(monkeypatch):
    """Function of paths: these are the fonts that are installed, beside DejaVu Sans."""
    caches = (glyphs._fonts, glyphs.font_of, glyphs.runs_of)

    def installed(*paths):
        monkeypatch.setattr(font_manager, "findSystemFonts", lambda: list(paths))
        for cache in caches:
            cache.cache_clear()

    yield installed
    for cache in caches:
        cache.cache_clear()


def drawn(text: str) -> list[str]:
    return [f"[{run.text}]" if run.small else run.text for run in glyphs.runs_of(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("plain, Grüße Ωя ∑", ["plain, Grüße Ωя ∑"]),
        ("مرحبا", ["مرحبا"]),
        ("a猫b", ["a", "[U+732B]", "b"]),
        ("क🧠", ["[U+0915]", "[U+1F9E0]"]),
        ("e\u0301", ["e\u0301"]),
        ("a\tb\u200d\u00a0", ["a", "[U+0009]", "b", "[U+200D]", "[U+00A0]"]),
        ("\U000e0001\ue000", ["[U+E0001]", "[U+E000]"]),
    ],
)
def test_what_no_font_shows_is_a_code_point(only, text, expected):
    only()
    assert drawn(text) == expected


def test_another_font_helps_out_where_it_has_the_character(only):
    """STIX has U+2A60, DejaVu Sans not; what both have is DejaVu's. A file that is no font is passed over."""
    only(__file__, STIX)
    assert drawn("a \u2a60b") == ["a ", "\u2a60", "b"]
    assert [os.path.basename(run.path) for run in glyphs.runs_of("a\u2a60")] == ["DejaVuSans.ttf", "STIXGeneral.ttf"]
    only()
    assert drawn("\u2a60") == ["[U+2A60]"]


def test_every_run_leaves_ink(only):
    only()
    for run in glyphs.runs_of("a猫\t😀") + (glyphs.label("x3"),):
        page = Image.new("L", (100, 30), 255)
        glyphs.draw_runs(ImageDraw.Draw(page), 5, 5, (run,))
        left, _, right, _ = Image.fromarray(255 - np.asarray(page)).getbbox()
        assert 4 <= left < right <= 6 + run.width


def words_of(tokenizer, ids, colors=None, edges=None) -> list[str]:
    colors, edges = colors or ["p"] * len(ids), edges or [""] * len(ids)
    words = preview.token_words(tokenizer, list(zip(ids, colors, edges, strict=True)))
    return ["".join(f"[{run.text}]" if run.small else run.text for run in word.runs) + word.edge for word in words]


@pytest.fixture(scope="module")
def byte_level():
    return train([], 259)  # no merges: a token for each byte


def test_tokens_of_one_character_are_joined(byte_level, only):
    only()
    assert words_of(byte_level, byte_level.encode("a \n")) == ["a", "·", "⏎"]
    assert words_of(byte_level, byte_level.encode("é猫!")) == ["é[x2]", "[U+732B][x3]", "!"]
    assert words_of(byte_level, byte_level.encode("\ufffd.")) == ["\ufffd[x3]", "."]  # the user's own
    assert words_of(byte_level, [byte_level.bos, *byte_level.encode("é"), byte_level.eos]) == ["<s>", "é[x2]", "</s>"]


def test_parts_of_a_character_are_bytes(byte_level):
    """At the end, before another character, and where prompt and target or two rows meet."""
    cat = byte_level.encode("猫")  # E7 8C AB
    assert words_of(byte_level, cat[:2]) == ["[E7 8C]"]
    assert words_of(byte_level, (*cat[:2], *byte_level.encode("a"))) == ["[E7 8C]", "a"]
    assert words_of(byte_level, cat[1:]) == ["[8C]", "[AB]"]
    assert words_of(byte_level, cat, ["p", "p", "t"]) == ["[E7 8C]", "[AB]"]
    assert words_of(byte_level, cat, edges=["", "|", ""]) == ["[E7]", "[8C]|", "[AB]"]


def test_bytes_of_sentencepiece(only):
    only()
    names = ["<s>", "</s>", "▁a", "<0xC3>", "<0xA9>"]
    backend = Backend(models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    assert words_of(wrap(backend, 0, 0, 1), [2, 3, 4, 3, 2]) == ["·a", "é[x2]", "[C3]", "·a"]


def test_a_token_wider_than_the_page_is_cut(byte_level):
    backend = Backend(models.WordLevel({"</s>": 0, "=" * 400: 1}, unk_token="</s>"))
    words = preview.token_words(wrap(backend, 0, -1, 0), [(1, "p", "|")])
    assert "".join(run.text for word in words for run in word.runs) == "=" * 400
    assert len(words) > 1 and max(word.width for word in words) < preview.WIDTH
    assert [word.edge for word in words] == ["|"] + [""] * (len(words) - 1)


@pytest.mark.parametrize("grid", [(2, 2), (1, 8), (8, 1), (3, 5)])
def test_all_images_fit_the_page(grid):
    views = np.zeros((1 + grid[0] * grid[1], 12, 12, 3), np.uint8)
    groups = [preview._group(views, grid) for _ in range(20)]
    lines = preview._lines(groups)
    assert sum(map(len, lines)) == 20
    assert max(x + group.width for line in lines for x, group in line) <= preview.WIDTH
    assert {group.height for group in groups} == {preview.SIDE}
    assert (len(lines) == 20) == (grid == (1, 8))  # only the widest ones have a line of their own


def test_images_that_take_no_position(byte_level):
    """Two in a row, before the words that follow; each is drawn once."""
    batch = empty_batch(batch_spec(1, 8, 2, (1, 4, 4, 3)))
    ids = byte_level.encode("ab")
    batch.tokens[0, : len(ids)], batch.segments[0, : len(ids)], batch.image_start[0] = ids, 1, 0
    reader = SimpleNamespace(encode=SimpleNamespace(tokenizer=byte_level))
    words = preview._words(batch, 0, reader, image_tokens=0)
    said = ["".join(run.text for run in word.runs) for word in words]
    assert said[:2] == ["image, 0 tokens"] * 2 and "".join(said[2:]) == "ab"
