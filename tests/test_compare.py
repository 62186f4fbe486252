"""`compare`: runs side by side, from what they have left in their folders."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from PIL import Image

import runs
from sparsecut_jax import config as config_lib
from sparsecut_jax.config import Config
from sparsecut_jax.data.sources import open_tests
from sparsecut_jax.evaluation import comparison, comparison_page
from sparsecut_jax.evaluation.answered import Answered, write_answers
from sparsecut_jax.settings import DataConfig, ScenesConfig
from sparsecut_jax.types import UserError
from tiny import refusal

SETTINGS = {
    "workdir": "runs/a", "seed": 0, "run_stages": ["instruct"], "shortcuts": {"density": "sparse"},
    "stages": {"instruct": {"lr": 0.1}, "align": {"lr": 0.1}},
}  # fmt: skip


def answered(i: int, answer: str, **fields) -> Answered:
    """Question `i` about picture `i`; its expected answer is "red"."""
    given = {"row": str(i), "kind": "", "images": (), "expected": "red", "references": (), "cut": False, "step": 5}
    return Answered(**{"test": "set/test", "question": f"what {i}?", "answer": answer, **given, **fields})


def finished(folder: Path, answers: list[Answered], settings: dict = SETTINGS, losses: tuple[float, ...] = ()) -> str:
    """The folder of a run that has given these answers."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    lines = [{"step": step, "stage": "instruct", "loss": loss} for step, loss in enumerate(losses, start=1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_answers(str(folder), answers)
    return str(folder)


def right(count: int, of: int, **fields) -> list[Answered]:
    """Answers to `of` questions, the first `count` of them right."""
    return [answered(i, "red" if i < count else "blue", **fields) for i in range(of)]


def test_settings_that_differ(tmp_path):
    other = {**SETTINGS, "workdir": "b", "shortcuts": {"density": "none"}, "new": [1, 2]}
    other["stages"] = {"instruct": {"lr": 0.2}, "align": {"lr": 0.3}}  # of a stage that neither run has
    loaded = comparison.load([finished(tmp_path / "a", right(1, 2)), finished(tmp_path / "b", right(1, 2), other)])
    assert [run.name for run in loaded] == ["a", "b"]
    assert comparison.settings_that_differ(loaded) == {
        "new": ["-", "1, 2"],
        "shortcuts.density": ["sparse", "none"],
        "stages.instruct.lr": ["0.1", "0.2"],
    }


def test_the_same_questions_are_paired(tmp_path):
    """Of 100 questions the second run has 10 more right: too few to see unpaired, enough where the rest is the same."""
    loaded = comparison.load([finished(tmp_path / "a", right(50, 100)), finished(tmp_path / "b", right(60, 100))])
    accuracy, normalized = comparison.compare(loaded)
    assert (accuracy.score, normalized.score) == ("accuracy", "normalized_accuracy")
    assert [value.mean for value in accuracy.values] == [0.5, 0.6]
    (difference,) = accuracy.differences
    assert difference.paired and difference.score.count == 100
    assert difference.score.mean == pytest.approx(0.1) and 0.03 < difference.score.low < difference.score.high < 0.17
    assert re.fullmatch(r"\+10\.0 \(\+\d\.\d to \+1\d\.\d\)", str(difference))
    assert comparison.notes([accuracy, normalized], loaded) == []


def test_other_questions_are_said_to_be_others(tmp_path):
    some, rest = right(10, 20), [dataclasses.replace(item, row=f"b{item.row}") for item in right(5, 20)]
    folders = [
        finished(tmp_path / "a", some),
        finished(tmp_path / "b", rest),
        finished(tmp_path / "c", some[:15] + rest),
    ]
    folders.append(finished(tmp_path / "d", [dataclasses.replace(item, test="other/test") for item in some]))
    loaded = comparison.load(folders)
    lines = comparison.compare(loaded)
    first = lines[0]
    assert [d and (d.paired, d.score.count) for d in first.differences] == [(False, 20), (True, 15), None]
    assert str(first.differences[0]).endswith(" unpaired")
    assert comparison.notes(lines, loaded) == [
        "set/test: a and b were asked different questions; their difference is not paired",
        "set/test: a and c share 15 of 20 and 35 questions; the difference is over these",
    ]


def test_the_same_question_with_another_expected_answer_is_another(tmp_path):
    changed = [dataclasses.replace(item, expected="blue") for item in right(1, 2)]
    loaded = comparison.load([finished(tmp_path / "a", right(1, 2)), finished(tmp_path / "b", changed)])
    assert not comparison.compare(loaded)[0].differences[0].paired


def test_kinds_and_repeated_questions(tmp_path):
    """The same question of a row twice is two questions; of kinds there is the accuracy."""
    items = [answered(0, "red", kind="color"), answered(0, "blue", kind="color"), answered(1, "red", kind="shape")]
    loaded = comparison.load([finished(tmp_path / "a", items), finished(tmp_path / "b", items)])
    found = {
        (line.kind, line.score): (line.values[0].mean, line.values[0].count) for line in comparison.compare(loaded)
    }
    assert found == {
        ("", "accuracy"): (pytest.approx(2 / 3), 3), ("", "normalized_accuracy"): (pytest.approx(2 / 3), 3),
        ("color", "accuracy"): (0.5, 2), ("shape", "accuracy"): (1.0, 1),
    }  # fmt: skip


def test_what_cannot_be_compared_is_one_sentence(tmp_path):
    good = finished(tmp_path / "good", right(1, 2))
    (tmp_path / "empty").mkdir()
    bare = finished(tmp_path / "bare", right(1, 2))
    (tmp_path / "bare" / "config.json").unlink()
    load = lambda *folders: refusal(comparison.load, folders)
    assert load(good).startswith("expected two or more runs to compare, got 1")
    assert load(good, good + "/") == f"{good}/ is named twice"
    assert load(good, str(tmp_path / "no")) == f"{tmp_path}/no is not a folder; expected the workdir of a run"
    assert f"`python -m sparsecut_jax.evaluate --workdir={tmp_path}/empty` writes them" in load(
        good, f"{tmp_path}/empty"
    )
    assert load(good, bare) == f"{bare} has no config.json; expected the workdir of a run"
    step = tmp_path / "good" / "step_3"  # of another checkpoint
    step.mkdir()
    write_answers(str(step), right(2, 2, step=3))
    assert [(run.name, run.settings["step"]) for run in comparison.load([good, str(step)])] == [
        ("good", 5), ("good/step_3", 3),
    ]  # fmt: skip


def test_the_page_shows_what_differs_and_what_is_wrong(tmp_path):
    Image.new("RGB", (900, 600), "red").save(tmp_path / "p.png")
    where = {"images": (str(tmp_path / "p.png"),)}
    evil = "<script>alert(1)</script>"
    a = [answered(0, "red", **where), answered(1, "red"), answered(2, "blue"), answered(3, "Red.")]
    b = [answered(0, evil, cut=True, **where), answered(1, "red"), answered(2, "blue"), answered(3, "red")]
    loaded = comparison.load([finished(tmp_path / "a", a), finished(tmp_path / "b", b)])
    keys = comparison_page.interesting(loaded)
    assert [(key[1], apart) for key, apart in keys.items()] == [("0", 1.0), ("2", 0.0), ("3", 0.0)]
    assert [key[1] for key in comparison_page.pick(keys, 1)] == ["0"]
    assert len(comparison_page.pick(keys, 9)) == 3
    assert comparison_page.tally(loaded) == [
        (["right", "right"], 2), (["right", "wrong"], 1), (["wrong", "wrong"], 1),
    ]  # fmt: skip
    html = comparison_page.page(loaded, {}, comparison.compare(loaded), ["a note"], str(tmp_path / "no.png"), 200)
    assert "what 0?" in html and "what 2?" in html and "what 1?" not in html
    assert evil not in html and "&lt;script&gt;" in html and "wrong, cut" in html and "a note." in html
    assert html.count("data:image/jpeg;base64,") == 1 and "http" not in html  # nothing is loaded from elsewhere


def test_pictures_that_are_not_files_come_from_the_data(tmp_path):
    """Scenes are drawn; an answer says which row it is about."""
    cfg = Config(data=DataConfig(source="scenes", scenes=ScenesConfig(train=40, test=8), holdout=4))
    (part,) = open_tests(cfg).values()
    cfg = json.loads(config_lib.to_json(cfg))
    cfg["stages"]["instruct"]["lr_of"] = {"fusion/.*": 1e-3}  # a name with a dot
    rows = [str(part.row(i).get("id", part.number(i))) for i in range(2)]
    items = [answered(0, "blue", test="scenes/test", row=rows[1], images=(None,))]
    lost = [answered(0, "blue", test="scenes/test", row="unknown", images=(None,))]
    loaded = comparison.load([finished(tmp_path / "a", items + lost, cfg), finished(tmp_path / "b", items, cfg)])
    pictures = [card.pictures for card in comparison_page.cards(loaded, list(comparison_page.interesting(loaded)))]
    assert pictures[0][0].startswith("data:image/jpeg;base64,") and pictures[1] == [None]


def test_the_command(tmp_path):
    first = finished(tmp_path / "a", right(5, 10), losses=(3.0, 2.0, 1.0))
    second = finished(tmp_path / "b", right(7, 10), {**SETTINGS, "seed": 1}, losses=(3.0, 1.0, 0.5))
    out = tmp_path / "out"
    found = runs.each(
        ["compare", first, second, f"--out={out}"],
        ["compare", first, f"{tmp_path}/nowhere"],
        ["compare", first, second, "--limit=0"],
    )
    assert [code for code, _, _ in found] == [0, 2, 2], found
    text = found[0][1]
    for line in ("seed", "50.00% (23.7% to 76.3%)", "+20.0 (+0.0 to +50.0)", "b - a"):
        assert line in text, text
    assert sorted(path.name for path in out.iterdir()) == ["compare.html", "compare.json", "curves.png"]
    figures = json.loads((out / "compare.json").read_text())
    assert figures["settings"] == {"seed": ["0", "1"]}
    assert figures["scores"][0]["differences"][0]["paired"] is True
    with Image.open(out / "curves.png") as curves:
        assert curves.size == (1080, 600)
    assert found[1][2].count("\n") == 1 and "nowhere is not a folder" in found[1][2]
    assert "--limit=0: expected at least 1 question" in found[2][2]


def test_answers_of_an_earlier_version_are_named(tmp_path):
    good = finished(tmp_path / "a", right(1, 2))
    old = finished(tmp_path / "b", right(1, 2))
    (tmp_path / "b" / "answers.jsonl").write_text(
        '{"row": "1", "kind": "", "question": "q", "expected": "a", "answer": "b"}\n'
    )
    with pytest.raises(UserError, match="line 1 is not in the format"):
        comparison.load([good, old])
