"""Test rows: an example for the user, and samples of answers."""

from sparsecut_jax.data.parts import Folder, Part
from sparsecut_jax.evaluation.testing import example, samples


def test_samples_are_spread():
    assert samples(list(range(100)), 4) == [0, 33, 66, 99]
    assert samples([5, 6], 12) == [5, 6]


def turns(*said: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]


def test_an_example_asks_a_short_question_about_a_file(tmp_path):
    (tmp_path / "a b.png").write_bytes(b"")
    part = lambda *rows: Part("mine", rows, Folder(str(tmp_path), 1, "config.data.images"), 2)
    row = lambda image, *said: {"image": image, "conversations": turns(*said)}
    long, lost = row("a b.png", "<image>\n" + "why? " * 50, "so"), row("lost.png", "<image>\nwho?", "me")
    good = row("a b.png", "what?\n<image>", "red")
    text, two = {"conversations": turns("how?", "so")}, row(["a b.png"] * 2, "<image> or <image>?", "x")
    assert example([part({}, text, lost, long, good)]) == ("what?", [f"{tmp_path}/a b.png"])
    assert example([part(two)]) == ("<image> or <image>?", [f"{tmp_path}/a b.png"] * 2)
    assert example([part(text)]) == ("how?", [])
    assert example([part(lost)]) == ("who?", [f"{tmp_path}/lost.png"])
    assert example([part(row(b"x", "<image>", "a dog"))]) == ("<image>", ["PATH"])
    assert example([part({})]) == ("what is in the image?", ["PATH"])
