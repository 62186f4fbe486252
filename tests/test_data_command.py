"""`python -m sparsecut_jax.data` and training on data with every kind of fault: found before, skipped and counted after."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from PIL import Image

import runs
from sparsecut_jax import config as config_lib
from sparsecut_jax.data.__main__ import open_data
from sparsecut_jax.data.batch_plan import make_plan
from sparsecut_jax.data.check import check_rows
from sparsecut_jax.data.pipeline import BatchReader, closing, train_batches
from sparsecut_jax.data.preview import preview
from sparsecut_jax.data.speed import speed
from sparsecut_jax.data.stats import bin_edges, stats
from sparsecut_jax.data.walk import walk
from sparsecut_jax.runtime.figures import plt
from sparsecut_jax.settings import StageConfig
from sparsecut_jax.train import train
from sparsecut_jax.training.bad_samples import BadSamples
from sparsecut_jax.training.inputs import make_stage_plan, print_data
from sparsecut_jax.training.loop import StageSpan
from sparsecut_jax.types import Exit, UserError

STAGE = StageConfig(template="qa", seq_len=32, batch_size=8, epochs=1.0)
GOOD = 200
EACH = 2  # rows of each fault: 1 % of the good ones
# cause -> how many of the faults below have it
IMAGE_FAULTS = {"broken_image": 4 * EACH, "too_large_image": EACH, "missing_image": EACH, "path": EACH}
ROW_FAULTS = {"text": EACH, "roles": EACH, "no_answer": EACH, "image_count": EACH, "format": EACH, "too_long": EACH}


def row(i: int, image: str | None, question: str = "<image>\nwhat color?", answer: str = "red") -> dict:
    turns = [{"from": "human", "value": f"{question} {i}"}, {"from": "gpt", "value": answer}]
    return {"id": str(i), "conversations": turns} | ({"image": image} if image else {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A JSONL file of GOOD rows and EACH rows of every fault, mixed, and its pictures."""
    folder = tmp_path_factory.mktemp("faulty")
    pictures = folder / "pictures"
    pictures.mkdir()
    Image.new("RGB", (20, 16), "red").save(pictures / "good.jpg")
    Image.new("RGB", (400, 400), "red").save(pictures / "bomb.png")
    whole = (pictures / "good.jpg").read_bytes()
    (pictures / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (pictures / "zero.jpg").write_bytes(b"")
    (pictures / "page.jpg").write_bytes(b"<html><body>404</body></html>")
    (pictures / "noise.jpg").write_bytes(bytes(range(256)))
    (folder / "secret.jpg").write_bytes(whole)
    faults = [
        row(0, "truncated.jpg"), row(0, "zero.jpg"), row(0, "page.jpg"), row(0, "noise.jpg"), row(0, "bomb.png"),
        row(0, "nowhere.jpg"), row(0, "../secret.jpg"),
        {"id": "0", "conversations": [{"from": "alien", "value": "?"}, {"from": "gpt", "value": "red"}]},
        {"id": "0", "conversations": [{"from": "human", "value": "?"}]},
        row(0, None), {"id": "0"}, row(0, "good.jpg", answer="red " * 60), b'{"id": "\xff\xfe", "conversations": []}',
    ]  # fmt: skip
    rows = [row(i, "good.jpg") for i in range(GOOD)]
    for k in range(EACH):
        for n, fault in enumerate(faults):
            rows.insert(1 + (k * len(faults) + n) * 6, fault)
    written = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in rows]
    (folder / "rows.jsonl").write_bytes(b"\n".join(written) + b"\n")
    return folder


def config_of(folder: Path, workdir: Path, **settings):
    settings = {
        "data.source": str(folder / "rows.jsonl"), "data.images": str(folder / "pictures"), "data.holdout": 0,
        "data.max_pixels": 100_000, "eval.every": 0, "run_stages": ("instruct",), "stages.instruct.batch_size": 64,
        "stages.instruct.max_steps": 0, "stages.instruct.epochs": 2.0, "stages.instruct.seq_len": 40, **settings,
    }  # fmt: skip
    return runs.small(folder, workdir, set=settings)


@pytest.fixture(scope="module")
def opened(folder, tmp_path_factory):
    return open_data(config_lib.check(config_of(folder, tmp_path_factory.mktemp("opened") / "run")))


# ----------------------------------------------------------------------------------------------------------------------
# check


def test_check_finds_every_fault(folder, tmp_path):
    config = runs.write_config(tmp_path / "config.py", config_of(folder, tmp_path / "run"))
    code, out, err = runs.finish(runs.command("data", "check", f"--config={config}"))
    assert code == 2
    wrong = 13 * EACH
    told = json.loads((tmp_path / "run" / "data_check.json").read_text())
    # The good rows differ in a number; the faults that can be read as rows are written EACH times.
    assert told["counts"] == {**IMAGE_FAULTS, **ROW_FAULTS}
    assert (told["warnings"], told["cut_answers"]) == ({"duplicate": 7 * (EACH - 1)}, 0)
    assert err == f"error: {wrong} of {GOOD + wrong} rows are bad\n"
    assert told["rows"] == GOOD + wrong
    first = {}
    for bad in told["bad"]:
        first.setdefault(bad["cause"], bad)
    assert first["broken_image"]["row"] == 1 and first["too_large_image"]["row"] == 25
    byte = (folder / "rows.jsonl").read_bytes().index(b"\xff")
    assert first["text"]["reason"] == f"{folder}/rows.jsonl row 73: it is not UTF-8: byte {byte} of the file"
    for cause, count in {**told["counts"], **told["warnings"]}.items():
        assert f"{cause}, first {min(3, count)} of {count}:" in out


def test_a_setting_that_is_refused_is_not_called_kept(folder, tmp_path, capsys):
    config = config_of(folder, tmp_path / "run", **{"init.llm": "tests/parity/qwen3", "llm.layers": 9})
    with pytest.raises(
        UserError, match="config.llm.layers=9 contradicts the weights of tests/parity/qwen3/config.json"
    ):
        open_data(config_lib.asked(config, ["llm.layers"]))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("look", "counts"),
    [("none", {**ROW_FAULTS, "path": EACH}), ("stat", {**ROW_FAULTS, "path": EACH, "missing_image": EACH})],
)
def test_check_without_opening_images(opened, tmp_path, look, counts):
    with pytest.raises(Exit):
        check_rows(opened.readers, look, str(tmp_path))
    assert json.loads((tmp_path / "data_check.json").read_text())["counts"] == counts


def test_check_of_good_rows(tmp_path, capsys):
    runs.draw_rows(tmp_path)
    opened = open_data(config_lib.check(runs.small(tmp_path, tmp_path / "run")))
    check_rows(opened.readers, "decode", str(tmp_path))
    assert "nothing is wrong" in capsys.readouterr().out
    assert json.loads((tmp_path / "data_check.json").read_text())["rows"] == 24


@pytest.fixture(scope="module")
def warned(tmp_path_factory):
    """Three rows: one loses two of its three answers, one is there twice."""
    folder = tmp_path_factory.mktemp("warned")
    long = {"id": "long", "conversations": row(0, None, "q")["conversations"] * 3}
    long["conversations"][2] = {"from": "human", "value": "a word " * 20}
    (folder / "rows.json").write_text(json.dumps([long, row(1, None, "q"), row(1, None, "q")]))
    settings = {"data.holdout": 0, "run_stages": ("instruct",)}
    return open_data(config_lib.check(runs.small(folder, folder, set=settings)))


@pytest.mark.parametrize("strict", [False, True])
def test_warnings_are_errors_on_request(warned, tmp_path, capsys, strict):
    source = warned.readers["instruct"].split.parts[0].name
    if strict:
        with pytest.raises(Exit) as caught:
            check_rows(warned.readers, "none", str(tmp_path), strict=True)
        assert (caught.value.code, str(caught.value)) == (2, "2 of 3 rows are bad")
    else:
        check_rows(warned.readers, "none", str(tmp_path))
    out = capsys.readouterr().out
    assert f"  {source} row 0 (id 'long'): 2 of 3 answers do not fit into seq_len=32 of stage instruct\n" in out
    assert f"  {source} row 2 (id '1'): the same as {source} row 1\n" in out
    assert ("only warnings; --strict turns them into errors" in out) is not strict
    told = json.loads((tmp_path / "data_check.json").read_text())
    one, none = {"cut": 1, "duplicate": 1}, {}
    assert (told["counts"], told["warnings"]) == ((one, none) if strict else (none, one))
    assert (told["rows"], told["cut_answers"]) == (3, 2)
    assert [(bad["cause"], bad["row"]) for bad in told["bad"]] == [("cut", 0), ("duplicate", 2)]


def test_stats_tell_what_is_cut(warned, capsys):
    stats(warned.readers, warned.config)
    assert "cut: 2 answers, of 1 rows, do not fit into seq_len and are dropped\n" in capsys.readouterr().out
    told = json.loads(Path(warned.config.workdir, "data_stats.json").read_text())["instruct"]
    assert (told["cut_answers"], told["cut_rows"], told["left_out"]) == (2, 1, 0)


# ----------------------------------------------------------------------------------------------------------------------
# stats and preview


def test_stats(opened, tmp_path, capsys):
    cfg = opened.config.__class__(**{**vars(opened.config), "workdir": str(tmp_path)})
    stats(opened.readers, cfg)
    told = json.loads((tmp_path / "data_stats.json").read_text())["instruct"]
    assert told["rows"] == GOOD + 13 * EACH
    assert told["left_out"] == 7 * EACH  # what can be told without opening images
    assert told["text_only"] == 0
    assert told["images"] == {"mean": 1, "min": 1, "median": 1, "p95": 1, "max": 1}
    assert 0 < told["batching"]["rows"]["useful"] < told["batching"]["packed"]["useful"] <= 1
    assert Image.open(tmp_path / "data_stats.png").size[0] > 1000
    assert "packed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("longest", "edges"),
    [
        (0, [-0.5, 0.5]),
        (2, [-0.5, 0.5, 1.5, 2.5]),
        (59, [i - 0.5 for i in range(61)]),
        (60, [2 * i - 0.5 for i in range(32)]),
    ],
)
def test_bins_of_stats_hold_whole_numbers(longest, edges):
    assert bin_edges(longest).tolist() == edges


def test_stats_draw_rows_of_one_length(tmp_path, monkeypatch):
    """The bar is a token wide on an axis from 0 to that length, not a hair within seq_len."""
    rows = [row(i, "good.png", answer="red") for i in range(10)]
    Image.new("RGB", (8, 8), "red").save(tmp_path / "good.png")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    opened = open_data(config_lib.check(runs.small(tmp_path, tmp_path / "run", set={"data.mix": {}})))
    figures = []
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(plt, "close", figures.append)
    stats(opened.readers, opened.config)
    axes = figures[0].axes[0]
    bars = [bar for bar in axes.patches if bar.get_height()]
    assert [(bar.get_height(), bar.get_width()) for bar in bars] == [(10, 1), (10, 1)]  # with images, text alone
    longest = max(bar.get_x() + 0.5 for bar in bars)
    assert axes.get_xlim() == pytest.approx((-0.5, longest + 0.5), abs=1)


@pytest.mark.parametrize("batching", ["rows", "packed"])
def test_preview(folder, tmp_path, capsys, batching):
    settings = {"stages.instruct.batching": batching, "stages.instruct.seq_len": 64}
    opened = open_data(config_lib.check(config_of(folder, tmp_path, **settings)))
    preview(opened.readers["instruct"], opened.config, "instruct", 3)
    assert "3 sequences of stage instruct" in capsys.readouterr().out
    assert Image.open(tmp_path / "data_preview.png").size[0] == 1220


def test_speed(opened, tmp_path, capsys):
    cfg = opened.config.__class__(**{**vars(opened.config), "workdir": str(tmp_path)})
    speed(opened.readers["instruct"], cfg, "instruct", [0], 0.2)
    (told,) = json.loads((tmp_path / "data_speed.json").read_text())
    assert told["workers"] == 0 and told["images_per_second"] > 0 and told["tokens_per_second"] > 0
    assert "images/s" in capsys.readouterr().out


def test_rows_of_which_none_can_be_used(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([row(0, None, "<image>\nwhat?"), row(1, None, "a word " * 40)]))
    opened = open_data(config_lib.check(runs.small(tmp_path, tmp_path / "run", set={"data.mix": {}})))
    reader = opened.readers["instruct"]
    for command in (
        lambda: preview(reader, opened.config, "instruct", 1),
        lambda: speed(reader, opened.config, "instruct", [0], 1.0),
        lambda: stats(opened.readers, opened.config),
    ):
        with pytest.raises(UserError, match="none of the 2 rows of stage .* can be used: .*rows.json row 0 "):
            command()


# ----------------------------------------------------------------------------------------------------------------------
# build


def test_build_keeps_every_row_and_picture(tmp_path):
    runs.draw_rows(tmp_path)
    told = runs.finish(
        runs.command(
            "data", "build", f"--source={tmp_path}/rows.json", f"--images={tmp_path}", f"--out={tmp_path}/dataset"
        )
    )
    assert told[0] == 0 and told[2] == "", told[2]
    assert "24 rows, 24 images" in told[1]
    found = []
    for source, images in ((f"{tmp_path}/rows.json", str(tmp_path)), (f"{tmp_path}/dataset", "")):
        settings = {"data.source": source, "data.images": images}
        opened = open_data(config_lib.check(runs.small(tmp_path, tmp_path / "run", set=settings)))
        reader = opened.readers["instruct"]
        plan = make_plan(walk(reader.split, reader.encode).lengths, [(np.arange(24), 1.0)], STAGE, 1, 0)
        read = BatchReader(reader, plan, (0,), np.arange(plan.batch_size))
        found.append([read(k) for k in range(3)])
    for (one, bad), (other, _) in zip(*found, strict=True):
        assert not bad
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_build_packs_no_picture_that_cannot_be_opened(folder, tmp_path):
    config = f"--config=configs/own.py:source={folder}/rows.jsonl,images={folder}/pictures"
    build = ("data", "build", config, "--config.data.max_pixels=100000", f"--out={tmp_path}/dataset")
    first, second = runs.each(build, (*build, "--skip_bad"))
    assert first[0] == 2 and "truncated.jpg cannot be read as an image" in first[2]
    assert second[0] == 0, second[2]
    left_out = 12 * EACH  # all but the rows that are too long for a stage
    assert second[1].count("left out: ") == left_out and f"\n{GOOD + EACH:,} rows" in second[1]
    assert second[1].count("cannot be read as an image") == IMAGE_FAULTS["broken_image"]


# ----------------------------------------------------------------------------------------------------------------------
# while it runs


def test_faults_are_skipped_and_counted_exactly(opened, tmp_path):
    """Two epochs, packed, read by two worker processes: every faulty row is met twice and counted once, and all good
    rows are seen twice. (tests/test_train.py has faults in a whole run.)"""
    flags.FLAGS(["test"])
    reader = opened.readers["instruct"]
    stage = dataclasses.replace(STAGE, batching="packed", seq_len=40, epochs=2.0, max_steps=0)
    walked = walk(reader.split, reader.encode)
    usable = walked.lengths.usable
    plan = make_plan(walked.lengths, reader.split.groups(usable), stage, 1, 0)
    cfg = dataclasses.replace(opened.config, data=dataclasses.replace(opened.config.data, workers=2))
    bad_samples = BadSamples(str(tmp_path), 0.2)
    bad_samples.add("instruct", walked.bad, len(reader.split))
    batches, rows = train_batches(reader, plan, cfg, (0, 0)), 0
    with closing(batches):
        for batch, bad in batches:
            bad_samples.add("instruct", bad, len(reader.split))
            rows += int((np.diff(batch.segments, axis=1, prepend=0) > 0).sum())
    assert rows == 2 * GOOD
    assert bad_samples.counts() == dict(sorted({**IMAGE_FAULTS, **ROW_FAULTS}.items()))
    lines = [json.loads(line) for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()]
    assert collections.Counter(line["cause"] for line in lines) == {**IMAGE_FAULTS, **ROW_FAULTS}


def test_above_the_limit_the_run_stops(folder, tmp_path):
    with pytest.raises(UserError) as caught:
        train(config_lib.check(config_of(folder, tmp_path, **{"data.max_bad_fraction": 0.001})))
    sentence = str(caught.value)
    assert sentence.startswith(f"{folder}/rows.jsonl row 37 ")
    assert "12 of 226 rows of stage instruct are broken so far" in sentence
    assert "config.data.max_bad_fraction=0.001 allows 0; all are in " in sentence


def test_a_run_says_at_its_start_what_is_cut(warned, tmp_path, capsys):
    cfg, samples = dataclasses.replace(warned.config, workdir=str(tmp_path)), BadSamples(str(tmp_path), 0.0)
    plan = make_stage_plan("instruct", warned.readers["instruct"], dataclasses.replace(warned, config=cfg), samples)
    assert samples.cut == {"instruct": (2, 1)} and samples.counts() == {}
    span = StageSpan("instruct", cfg.stages["instruct"], 0, 1)
    print_data(warned.source, [span], {"instruct": plan}, samples)
    assert (
        "\ncut        instruct: 2 answers, of 1 rows, do not fit into seq_len=32 and are dropped\n"
        in capsys.readouterr().out
    )


# ----------------------------------------------------------------------------------------------------------------------
# from a shell

SMALL = ["--config.data.scenes.train=8", "--config.data.scenes.test=2", "--config.data.holdout=1"]


WRONG = [
    (["check", "--source=x"], "--source is a flag of build, not of check; check reads --config.data.source"),
    (["stats", "--strict"], "--strict is a flag of check, not of stats"),
    (["speed", "--workers=1,a"], "--workers='1,a': expected numbers from 0 to 256"),
    (["speed", "--workers=-1"], "--workers='-1': expected numbers from 0 to 256"),
    (["check", "--config=configs/base.py"], "--config is given 2 times"),
    (["check", "--config.data.threads=300"], "config.data.threads=300: expected at most 256"),
    (["check", "--config.workdir=README.md"], "config.workdir='README.md' cannot be written to"),
    (["check", "--config.data.mix.a.path=x"], "config.data.mix.a is not a source in 'configs/scenes.py'"),
]


def test_what_is_wrong_with_the_command():
    cases = [(("data", args[0], "--config=configs/scenes.py", *args[1:], *SMALL), said) for args, said in WRONG]
    cases.append((("data", "chekc"), "unknown command 'chekc'; did you mean 'check'?"))
    found = runs.each(*(args for args, _ in cases))
    for (_, sentence), (code, out, err) in zip(cases, found, strict=True):
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("error: ") and sentence in err


def test_no_process_outlives_a_check_that_is_killed(tmp_path):
    runs.draw_rows(tmp_path)
    rows = [row(i, "0.png") for i in range(30_000)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    config = runs.write_config(tmp_path / "config.py", runs.small(tmp_path, tmp_path / "run"))
    process = runs.command("data", "check", f"--config={config}")
    found = lambda: [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and _parent(pid) == process.pid]
    wait(lambda: len(found()) >= 2, 60)
    time.sleep(2)
    children = found()
    process.kill()
    process.communicate()
    wait(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in children), 60)


def _parent(pid: str) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0


def wait(until, seconds: float) -> None:
    began = time.monotonic()
    while not until():
        assert time.monotonic() - began < seconds
        time.sleep(0.1)
