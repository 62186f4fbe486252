"""Stored features: training on them equals training on pixels, they are shared, and nothing half-written is read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import runs
from sparsecut_jax import config as config_lib
from sparsecut_jax.data import features
from sparsecut_jax.data.parts import Folder, Part
from sparsecut_jax.data.pipeline import Images
from sparsecut_jax.planning.memory import Parameters
from sparsecut_jax.planning.residuals import Residuals
from sparsecut_jax.planning.work import by_part, products
from sparsecut_jax.runs.features import check_frozen, converted, tower_digests
from sparsecut_jax.runs.run import load_run
from sparsecut_jax.runs.setup import open_data, open_weights
from sparsecut_jax.runtime import backends
from sparsecut_jax.settings import StageConfig
from sparsecut_jax.train import train
from sparsecut_jax.training import loop
from sparsecut_jax.training.report import read_metrics
from sparsecut_jax.types import BadSample, Exit
from tiny import refusal, tiny_config

FROZEN = {f"stages.{name}.trainable": ("fusion/.*", "llm/.*") for name in ("align", "instruct")}
FILES = 2 * 3  # low-res view and crops of the main feature's block and two shortcuts'


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    runs.draw_rows_behind_broken_ones(folder, "page.png")
    return folder


def config_of(pictures: Path, workdir: Path, **settings):
    changed = {**FROZEN, "eval.test": False, "fusion.norm_levels": True}
    changed |= {name.replace("__", "."): value for name, value in settings.items()}
    return config_lib.check(runs.small(pictures, workdir, set=changed))


def stored(pictures: Path, workdir: Path, dtype: str = "float32", **settings):
    here = {"data__features_dir": str(workdir.parent / "features"), "data__cache_features": dtype}
    return config_of(pictures, workdir, **here, **settings)


def logged(workdir: Path) -> list[tuple]:
    names = ("step", "loss", "grad_norm", "holdout_loss", "holdout_accuracy")
    lines = [line for line in read_metrics(str(workdir)) if "stage" in line]
    return [tuple(line.get(name) for name in names) for line in lines]


@pytest.fixture(scope="module")
def both(pictures, tmp_path_factory):
    """Workdirs of two runs that differ in nothing but what they read, pixels or stored features."""
    folder = tmp_path_factory.mktemp("both")
    with pytest.MonkeyPatch.context() as patch:
        runs.take_one_device(patch)
        train(config_of(pictures, folder / "pixels"))
        train(stored(pictures, folder / "stored"))
    return folder


def test_training_on_features_equals_training_on_pixels(both):
    """But for rounding: the tests' own compiler flags round a tower differently within a larger program."""
    one, other = (np.array(logged(both / name), float) for name in ("stored", "pixels"))
    assert len(one) > 12
    np.testing.assert_allclose(one, other, rtol=2e-4)
    causes = [(both / name / "bad_samples.jsonl").read_text() for name in ("stored", "pixels")]
    assert causes[0] == causes[1] and "broken_image" in causes[0]


def test_with_the_flags_of_users_it_is_bit_equal(pictures, tmp_path):
    """The commands, with a tower of the width of configs/base.py."""
    sizes = {"vision.image_size": 32, "vision.width": 64, "vision.mlp_dim": 256, "eval.test": False, **FROZEN}
    for name, dtype in (("pixels", "none"), ("stored", "float32")):
        changed = {**sizes, "fusion.norm_levels": True, "run_stages": ("instruct",), "data.cache_features": dtype}
        config = runs.small(pictures, tmp_path / name, set=changed)
        path = runs.write_config(tmp_path / f"{name}.py", config)
        code, _, err = runs.finish(runs.command("train", f"--config={path}", XLA_FLAGS=""))
        assert code == 0, err
    assert logged(tmp_path / "stored") == logged(tmp_path / "pixels")
    runs.assert_same(runs.parameters(tmp_path / "stored"), runs.parameters(tmp_path / "pixels"))


def test_levels_are_standardised(both):
    """Mean and standard deviation are those of the training pictures, and are not trained."""
    norm = load_run(str(both / "stored")).params["fusion"]["norm_levels"]
    assert norm["mean"].shape == norm["std"].shape == (3, 16)
    assert float(norm["std"].min()) > 0.01
    run = load_run(str(both / "pixels"))
    data = open_data(open_weights(run.config), meta=None)
    part = data.source.train[""]
    rows = [i for i in range(len(part)) if part.row(i)["image"] != "page.png"]
    views = np.stack([data.pictures.read(part, part.row(i)["image"]) for i in rows])[:, None]
    levels = np.asarray(jax.jit(lambda p, v: run.model.apply({"params": p}, v, method="levels"))(run.params, views))
    np.testing.assert_allclose(norm["mean"], levels.mean((1, 2, 3)), atol=1e-5)
    np.testing.assert_allclose(norm["std"], levels.std((1, 2, 3)), rtol=1e-3)


def test_others_share_what_is_stored(both, pictures, one_device):
    """Another way of fusing stores only what is missing; a killed writer's file is never read."""
    folder = both / "features"
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.npy")}
    assert len(before) == FILES
    lost = min(path for path in before if "-low-" in str(path))
    lost.rename(lost.with_suffix(".npy.1234.tmp"))
    del before[lost]
    few = dict(stages__align__max_steps=1, stages__instruct__max_steps=1)
    train(stored(pictures, both / "other", fusion__name="mlp", **few))
    after = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.npy")}
    assert set(after) == {*before, lost} and before.items() <= after.items()
    np.testing.assert_allclose(np.load(lost), np.load(lost.with_suffix(".npy.1234.tmp")), atol=1e-5)


def test_a_stopped_run_goes_on_with_them(both, pictures, one_device, monkeypatch):
    """Stopped after its sixth step, it reaches what the undisturbed run did."""
    cfg = stored(pictures, both / "stopped")
    with monkeypatch.context() as patch:
        patch.setattr(loop.StopSignal, "asked", lambda self, step: step == 6)
        with pytest.raises(Exit):
            train(cfg)
    assert len(logged(both / "stopped")) < len(logged(both / "stored"))
    train(cfg)
    assert logged(both / "stopped") == logged(both / "stored")
    runs.assert_same(runs.parameters(both / "stopped"), runs.parameters(both / "stored"))


def test_a_trained_tower_is_refused(pictures, tmp_path):
    cfg = stored(pictures, tmp_path / "run", stages__instruct__trainable=("vision/.*", "fusion/.*"))
    text = refusal(check_frozen, cfg, ["vision/patch_embedding/kernel", "fusion/x"])
    assert text == (
        "config.data.cache_features='float32' needs a frozen tower, but config.stages.instruct.trainable has 'vision/.*', "
        "which trains it; take that out or set config.data.cache_features=none"
    )


def test_random_changes_of_pictures_are_refused(pictures, tmp_path):
    text = refusal(stored, pictures, tmp_path / "run", data__flip=True)
    assert text == (
        "config.data.cache_features='float32' stores each picture once, but config.data.flip=True and "
        "config.data.shift=0 change it at random; set these to False and 0"
    )


def test_values_beyond_float16_are_refused():
    of = features.Stored("", 3, slice(0, 1), 1, (1, 1, 2), "float16")
    assert refusal(converted, np.array([1.0, 1e5]), of) == (
        "block 3 of the tower has values that float16 cannot hold (the largest is 1e+05); "
        "set config.data.cache_features=float32"
    )


def test_what_a_level_depends_on():
    """A later block changes only the levels from it on; a change of the embedding changes all."""
    rng = np.random.default_rng(0)
    weights = {"patch": rng.random((2, 3)), "blocks": {"fc": rng.random((4, 5))}}
    before = tower_digests(weights, (0, 2, 3, -1))
    weights["blocks"]["fc"][2] += 1
    after = tower_digests(weights, (0, 2, 3, -1))
    assert {level: before[level] == after[level] for level in before} == {0: True, 2: False, 3: False, -1: True}
    weights["patch"][0, 0] += 1
    assert not set(tower_digests(weights, (0, 2, 3, -1)).values()) & set(after.values())


def test_pictures_are_told_apart(tmp_path):
    """The same name in two folders is two pictures, the same bytes are one; a changed file changes the digest."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        runs.draw_rows(tmp_path / name, 2)
    part = lambda name: Part(name, [{"image": "0.png"}, {"image": "1.png"}], Folder(str(tmp_path / name), 1000), 1)
    one, two = part("rows"), part("rows")
    two = dataclasses.replace(two, pictures=Folder(str(tmp_path / "two"), 1000))
    one = dataclasses.replace(one, pictures=Folder(str(tmp_path / "one"), 1000))
    assert features.key_of(one, "0.png") != features.key_of(two, "0.png")
    assert features.key_of(one, b"bytes") == features.key_of(two, b"bytes")


def test_the_name_of_what_is_stored_says_how_views_are_cut():
    cfg = tiny_config(data=dict(cache_features="float16"))
    names = {}
    for label, groups in {
        "plain": {},
        "small": dict(data=dict(cache_features="float16", view_size=6)),
        "float32": dict(data=dict(cache_features="float32")),
        "grid": dict(fusion=dict(grid=(1, 2))),
    }.items():
        cfg = tiny_config(**{"data": dict(cache_features="float16"), **groups})
        levels = {level: str(level) for level in range(-1, 5)}
        names[label] = {s.folder: s for s in features.stored_of(cfg, levels, 3, "pictures")}
    shared = lambda a, b: len(names[a].keys() & names[b].keys())
    assert len(names["plain"]) == 8  # four blocks, low-res and crops
    assert [shared("plain", other) for other in ("small", "float32", "grid")] == [0, 0, 4]  # the low-res views
    one = next(iter(names["plain"].values()))
    assert (one.shape, one.bytes) == ((1, 9, 24), 3 * 9 * 24 * 2)


def test_a_picture_without_features_is_a_bad_sample(both, pictures):
    cfg = stored(pictures, both / "stored")
    data = open_data(open_weights(cfg))
    part = data.source.train[""]
    numbers = {key: i for i, key in enumerate(features.pictures_of(data.source.train.values()))}
    folder = both / "features"
    found = [features.Stored(str(p), 0, slice(0, 1), 25, (1, 4, 16), "float32") for p in folder.glob("*-low-*")][:1]
    mlp = dataclasses.replace(cfg, fusion=dataclasses.replace(cfg.fusion, name="mlp"))
    reading = features.Features(mlp, Images(mlp), numbers, found)
    with pytest.raises(BadSample, match="cannot be read as an image"):
        reading.read(part, "page.png")


def test_a_plan_leaves_the_tower_out():
    frozen = {"align": {"trainable": ("fusion/.*", "llm/.*"), "seq_len": 32, "batch_size": 2}}
    cfg = {}
    for dtype in ("none", "float16"):
        raw = tiny_config(data=dict(cache_features=dtype))
        cfg[dtype] = backends.resolve(
            dataclasses.replace(raw, stages={**raw.stages, "align": StageConfig(**frozen["align"])}), "cpu"
        )
    of = {dtype: by_part(products(c, "align", Parameters(c, "align").shapes, 2, 32)) for dtype, c in cfg.items()}
    assert of["none"]["vision"].model > 0 == of["float16"]["vision"].model
    assert of["none"]["llm"] == of["float16"]["llm"] and of["none"]["fusion"] == of["float16"]["fusion"]
    kept = {dtype: Residuals(c, "align") for dtype, c in cfg.items()}
    assert kept["float16"].block == kept["none"].block == 0  # a frozen tower keeps nothing
    assert kept["float16"].encoder.each == pytest.approx(kept["none"].encoder.each)
