"""The controls of Scenes: the commands, and what they report."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from runs import ROOT
from sparsecut_jax.data import images, scenes
from sparsecut_jax.evaluation import scenes_controls
from sparsecut_jax.evaluation.scenes_gallery import gallery
from sparsecut_jax.runtime.figures import plt
from sparsecut_jax.settings import ScenesConfig
from sparsecut_jax.types import UserError


def controls(*flags):
    command = [sys.executable, "-m", "sparsecut_jax.evaluation.scenes_controls", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_control_from_end_to_end(tmp_path):
    out = tmp_path / "low.json"
    sizes = ["--train=24", "--test=40", "--steps=2", "--batch_size=16"]
    done = controls("--control=cnn_low", *sizes, f"--out={out}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "train 2/2" in done.stdout and lines[-1] == f"written {out}"
    assert [line.split()[0] for line in lines if line.startswith("  ")] == [
        *("questions", "low_coarse_stripes", "low_coarse_color", "low_coarse_edge"),
        *("high_coarse_shape", "high_coarse_discs", "high_coarse_box"),
        *("low_fine_lines", "low_fine_dots", "low_fine_grain"),
        *("high_fine_letter", "high_fine_marks", "high_fine_order"),
        *("low", "high", "low", "high", "coarse", "fine", "all"),
    ]
    written = json.loads(out.read_text())
    assert (written["control"], written["train"], written["steps"]) == ("cnn_low", 24, 2)
    figures = written["figures"]
    assert figures["low_fine_dots"]["chance"] == 0.25 and figures["high_fine_order"]["chance"] == 0.5
    assert figures["fine"]["questions"] == 6 * 40 and figures["all"]["questions"] == 12 * 40
    assert figures["all"]["chance"] == (9 * 0.25 + 3 * 0.5) / 12
    both = [figures["all"][part] for part in ("test", "heldout", "both")]
    assert both[2] == pytest.approx((both[0] + both[1]) / 2)


def test_a_bad_flag_is_one_sentence():
    done = controls("--control=cnn")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: --control=cnn: expected one of text_only, shuffled, cnn_low, cnn_full, speed, or --gallery=FILE\n"
    )


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"control": ""}, "--control=: expected one of"),
        ({"steps": 0}, "--steps=0: expected 1 or more"),
        ({"seed": -1}, "--seed=-1: expected 0 or more"),
        ({"test": 2}, "--test=2: expected 4 or more"),
        ({"low": 33}, "--low=33: the CNN halves it three times; expected a multiple of 8"),
    ],
)
def test_settings_that_cannot_be(given, sentence):
    good = {"control": "cnn_low", "size": 0, "low": 32, "train": 1, "test": 4, "steps": 1, "batch_size": 1, "seed": 0}
    scenes_controls.check(good)
    with pytest.raises(UserError, match=sentence):
        scenes_controls.check(good | given)


def test_what_each_control_sees():
    """The whole picture or its low-res view; black where there is the question alone."""
    rows = scenes.rows(ScenesConfig(train=2), "train", 64, 32)
    seen = {control: next(scenes_controls.views(rows, control, "draw")) for control in scenes_controls.CONTROLS[:4]}
    assert {control: picture.shape for control, (picture, _) in seen.items()} == {
        "text_only": (32, 32, 3),
        "shuffled": (64, 64, 3),
        "cnn_low": (32, 32, 3),
        "cnn_full": (64, 64, 3),
    }
    assert seen["text_only"][0].max() == 0
    image = rows.open("train/0")
    np.testing.assert_array_equal(seen["cnn_full"][0], np.asarray(image))
    np.testing.assert_array_equal(seen["cnn_low"][0], images.views(image, 32, (2, 2), "pad")[0])


def test_summary():
    right = {"test": np.zeros((10, 12), bool), "heldout": np.ones((30, 12), bool)}
    right["test"][:, 9:] = True  # letter, marks, order
    found = scenes_controls.summary(right)
    assert found["high_fine_letter"] == {"questions": 40, "chance": 0.25, "test": 1.0, "heldout": 1.0, "both": 1.0}
    assert found["high fine"] == {
        "questions": 120,
        "chance": pytest.approx(1 / 3),
        "test": 1.0,
        "heldout": 1.0,
        "both": 1.0,
    }
    assert found["fine"] == {
        "questions": 240,
        "chance": pytest.approx(1 / 3),
        "test": 0.5,
        "heldout": 1.0,
        "both": 0.875,
    }
    assert found["coarse"]["test"] == 0.0 and found["all"]["test"] == 0.25


def test_gallery(tmp_path, monkeypatch):
    """A picture per line; fine questions beside the full picture, which shows their answers, coarse ones beside the other."""
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    gallery(tmp_path / "scenes.png", 64, 32, count=3)
    said = [axes.get_title() or axes.texts[0].get_text().splitlines()[0] for axes in figures[0].axes]
    assert said[:4] == [
        "train/0: full picture, 64 x 64", "low level, fine", "low-res view, 32 x 32", "low level, coarse",
    ]  # fmt: skip
    assert len(said) == 12 and "which letter is written?" in figures[0].axes[1].texts[0].get_text()
    image = Image.open(tmp_path / "scenes.png")
    assert image.format == "PNG" and image.width > 1000 and np.asarray(image.convert("L")).std() > 10
