"""What is shown and written while a run goes on."""

import json
import os
import pty
import re

import pytest

from sparsecut_jax.models.interfaces import Wiring
from sparsecut_jax.models.levels import wiring_of_shortcuts
from sparsecut_jax.models.shortcuts import Shortcuts
from sparsecut_jax.runtime import progress
from sparsecut_jax.runtime.progress import Progress, busy
from sparsecut_jax.runtime.tables import table
from sparsecut_jax.training.report import MetricsWriter, read_metrics, source_names, wiring_table

WIRING = wiring_of_shortcuts(Shortcuts(((4, 0), (2, 3), (0, 6), (1, 6)), main_level=3, vit_depth=5, llm_depth=7), 9)


def test_wiring_table():
    assert wiring_table(WIRING).splitlines() == [
        "shortcuts  4, added before the layer; main feature: output of ViT block 3",
        "  ViT block (of 5)  4  2  0  1",
        "  LLM layer (of 7)  0  3  6  6",
    ]
    assert (
        wiring_table(wiring_of_shortcuts(Shortcuts((), 3, 5, 7), 9))
        == "shortcuts  none; main feature: output of ViT block 3 of 5"
    )


def test_a_wiring_that_reads_the_question():
    wiring = Wiring(levels=(3,), positions=16, entering=((), ()), question=5)
    assert wiring_table(wiring) == (
        "fusion     reads ViT blocks 3 and up to 5 tokens of the question; 16 positions per image; nothing is injected"
    )


def test_many_sources_take_several_lines():
    entering = tuple((2 * layer, 2 * layer + 1) for layer in range(5))
    names = [f"{what}{layer}" for layer in range(5) for what in "kv"]
    assert wiring_table(Wiring((0,), 16, entering, tuple(names), injecting="llm_kv")).splitlines() == [
        "fusion     reads ViT blocks 0; 16 positions per image; injected by 'llm_kv'",
        "  source            k0  v0  k1  v1  k2  v2  k3  v3",
        "  LLM layer (of 5)   0   0   1   1   2   2   3   3",
        "  source            k4  v4",
        "  LLM layer (of 5)   4   4",
    ]


def test_table_aligns():
    assert table(["kind", "n"], [["all", "12,000"], ["color", "5"]]).splitlines() == [
        "  kind        n", "  all    12,000", "  color       5",
    ]  # fmt: skip


def test_source_names_follow_the_route():
    assert source_names(WIRING) == [(0, 0, "vit4_llm0"), (3, 0, "vit2_llm3"), (6, 0, "vit0_llm6"), (6, 1, "vit1_llm6")]


def test_metrics_of_a_killed_run_are_taken_back(tmp_path):
    writer = MetricsWriter(str(tmp_path), 0)
    for step in (1, 2, 3):
        writer.write(step, {"loss": step / 2, "norms": {"llm": 1.0}})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('[1]\n{"a": 1}\n\x00\x00\n{"step": 4, "lo')  # a bad disk, and killed while writing
    MetricsWriter(str(tmp_path), 2).close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": s, "loss": s / 2, "norms": {"llm": 1.0}} for s in (1, 2)]
    assert read_metrics(str(tmp_path)) == lines and read_metrics(str(tmp_path / "nowhere")) == []


def test_progress_without_a_terminal_is_lines(capsys):
    progress = Progress(total=3, initial=1, name="align", seconds=1000)
    progress.note("loss 0.5")
    progress.update()
    progress.write("step 2: held-out loss 0.4")
    progress.update()
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("align 2/3 [") and out[0].endswith("] loss 0.5")  # the figures of the first step, at once
    assert out[1] == "step 2: held-out loss 0.4"
    assert out[2].startswith("align 3/3 [") and out[2].endswith("loss 0.5")


def test_what_takes_long_is_told_before_and_after(capsys):
    progress = Progress(total=3, initial=0, name="align")
    with progress.busy("compiling the step") as remarks:
        assert capsys.readouterr().out == "compiling the step ...\n"
        remarks.append("from the cache")
    assert re.fullmatch(r"compiling the step: \d+\.\d s, from the cache\n", capsys.readouterr().out)
    assert list(progress.awaiting("asking", iter("abc"))) == ["a", "b", "c"]
    assert re.fullmatch(r"asking \.\.\.\nasking: \d+\.\d s\n", capsys.readouterr().out)
    with pytest.raises(KeyError), progress.busy("compiling the step"):
        raise KeyError
    assert capsys.readouterr().out == "compiling the step ...\n"


def test_on_a_terminal_the_seconds_are_counted_on_one_line(monkeypatch):
    monkeypatch.setattr(progress, "TICK", 0.01)
    ours, theirs = pty.openpty()
    said = b""
    with open(theirs, "w") as terminal, busy("compiling", terminal) as remarks:
        while not said.endswith(b" s"):
            said += os.read(ours, 1000)
        remarks.append("done")
    said += os.read(ours, 10_000)
    assert re.fullmatch(rb"(\r\x1b\[Kcompiling \.\.\.( \d s)?)+\r\x1b\[Kcompiling: \d\.\d s, done\r\n", said)
