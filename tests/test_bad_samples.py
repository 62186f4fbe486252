"""bad_samples.jsonl: every bad row once, over all starts of a run, and the limit above which it stops."""

import json

import pytest

from sparsecut_jax.data.walk import Bad
from sparsecut_jax.training.bad_samples import BadSamples
from sparsecut_jax.types import UserError


def bad(row: int, cause: str = "broken_image", source: str = "a.json") -> Bad:
    return Bad(source, row, f"r{row}", cause, f"{source} row {row} (id 'r{row}'): it is bad")


@pytest.fixture
def start(tmp_path):
    """Function: what a start of the run reads and notes."""
    return lambda fraction=1.0, **more: BadSamples(str(tmp_path), fraction, **more)


@pytest.fixture
def lines(tmp_path):
    """Function: what the file says, as (stage, row)."""

    def read() -> list[tuple[str, int]]:
        text = (tmp_path / "bad_samples.jsonl").read_text()
        return [(found["stage"], found["row"]) for found in map(json.loads, text.splitlines())]

    return read


# ----------------------------------------------------------------------------------------------------------------------
# the file


def test_a_line_says_what_is_wrong_with_which_row(start, tmp_path):
    start().add("align", [bad(17)], 100)
    (line,) = (tmp_path / "bad_samples.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "stage": "align",
        "source": "a.json",
        "row": 17,
        "id": "r17",
        "cause": "broken_image",
        "reason": "a.json row 17 (id 'r17'): it is bad",
    }


def test_nothing_bad_no_file(start, tmp_path):
    samples = start(0.0)
    samples.add("align", [], 0)
    assert list(tmp_path.iterdir()) == [] and samples.counts() == {}


def test_every_row_once_per_stage(start, lines):
    samples = start()
    samples.add("align", [bad(1), bad(2), bad(1)], 100)
    samples.add("align", [bad(2), bad(3)], 100)
    samples.add("instruct", [bad(3)], 100)
    samples.add("instruct", [bad(3, source="b.json")], 100)
    assert lines() == [("align", 1), ("align", 2), ("align", 3), ("instruct", 3), ("instruct", 3)]


def test_counts_are_of_rows(start):
    samples = start()
    samples.add("align", [bad(1, "text"), bad(2), bad(3, "too_long")], 100)
    samples.add("instruct", [bad(1, "text"), bad(2), bad(4), bad(2, source="b.json")], 100)
    assert samples.counts() == {"broken_image": 3, "text": 1, "too_long": 1}
    assert list(samples.counts()) == ["broken_image", "text", "too_long"]


def test_names_in_any_script(start, tmp_path):
    odd = Bad("ä\n.json", 1, "\ud800", "path", "image '\udcff\x1b[1m'")
    start().add("align", [odd], 10)
    assert (tmp_path / "bad_samples.jsonl").read_bytes().isascii()
    assert start().noted["align"] == {("ä\n.json", 1): odd}


# ----------------------------------------------------------------------------------------------------------------------
# starts of a run


def test_a_later_start_goes_on(start, lines):
    start().add("align", [bad(1), bad(2)], 100)
    again = start()
    assert again.counts() == {"broken_image": 2}
    again.add("align", [bad(2), bad(3)], 100)
    assert lines() == [("align", 1), ("align", 2), ("align", 3)]
    assert start().counts() == {"broken_image": 3}


@pytest.mark.parametrize("kept", [0, 1, 20, -2, -1])
def test_a_last_line_that_was_cut(start, lines, tmp_path, kept):
    """Also where only the end of the line is missing: the next line starts on its own."""
    path = tmp_path / "bad_samples.jsonl"
    start().add("align", [bad(1)], 100)
    whole = len(path.read_text())
    start().add("align", [bad(2)], 100)
    text = path.read_text()
    path.write_text(text[: whole + kept] if kept >= 0 else text[:kept])
    again = start()
    read = {-1: 2}.get(kept, 1)  # the whole line without its end is a line
    assert again.counts() == {"broken_image": read}
    again.add("align", [bad(3)], 100)
    again.add("align", [bad(4)], 100)
    assert start().counts() == {"broken_image": read + 2}


@pytest.mark.parametrize(
    "line", [b"\xff\xfe\x00", b"null", b"[1]", b"7", b"{}", b'{"stage": "align"}', b'{"stage": ["align"]}', b"{" * 9]
)
def test_a_damaged_line_takes_nothing_else_with_it(start, tmp_path, line):
    start().add("align", [bad(1)], 100)
    path = tmp_path / "bad_samples.jsonl"
    path.write_bytes(line + b"\n" + path.read_bytes())
    assert start().counts() == {"broken_image": 1}


def test_a_run_that_begins_anew_forgets(start, lines, tmp_path):
    """What was mended since, a folder of images for one, is no longer bad."""
    start().add("align", [bad(1), bad(2)], 100)
    anew = start(fresh=True)
    assert anew.counts() == {} and not (tmp_path / "bad_samples.jsonl").exists()
    anew.add("align", [bad(2)], 100)
    assert lines() == [("align", 2)]
    assert start(fresh=True).counts() == {}


def test_a_file_for_every_process(start, tmp_path):
    start(process_index=0).add("align", [bad(1)], 100)
    start(process_index=3).add("align", [bad(2)], 100)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad_samples-3.jsonl", "bad_samples.jsonl"]
    assert start(process_index=3).noted["align"] == {("a.json", 2): bad(2)}
    start(process_index=3, fresh=True)
    assert [path.name for path in tmp_path.iterdir()] == ["bad_samples.jsonl"]


# ----------------------------------------------------------------------------------------------------------------------
# the limit


def test_the_sentence(start, tmp_path):
    samples = start(0.001)
    samples.add("instruct", [bad(7), bad(8, "text")], 2000)
    with pytest.raises(UserError) as caught:
        samples.add("instruct", [bad(9), bad(10, "too_long")], 2000)
    assert str(caught.value) == (
        "a.json row 7 (id 'r7'): it is bad (3 of 2,000 rows of stage instruct are broken so far: 2 broken_image, 1 text; "
        f"config.data.max_bad_fraction=0.001 allows 2; all are in {tmp_path}/bad_samples.jsonl, and "
        "`python -m sparsecut_jax.data check` finds them before a run)"
    )


@pytest.mark.parametrize(
    ("fraction", "rows", "allowed"),
    [(0.0, 1000, 0), (0.001, 999, 0), (0.001, 1000, 1), (0.001, 1999, 1), (0.5, 5, 2), (1.0, 3, 3)],
)
def test_the_limit(start, lines, fraction, rows, allowed):
    samples = start(fraction)
    for i in range(allowed):
        samples.add("align", [bad(i)], rows)
    with pytest.raises(UserError, match=rf"max_bad_fraction={fraction:g} allows {allowed}; "):
        samples.add("align", [bad(allowed), bad(allowed + 1)], rows)
    assert lines() == [("align", i) for i in range(allowed + 2)]  # those that went too far are in the file as well


def test_rows_that_are_too_long_do_not_count(start):
    samples = start(0.0)
    samples.add("align", [bad(i, "too_long") for i in range(50)], 100)
    assert samples.counts() == {"too_long": 50}
    with pytest.raises(UserError, match=r"^a.json row 50 \(id 'r50'\): it is bad \(1 of 100 rows"):
        samples.add("align", [bad(50)], 100)


def test_stages_are_counted_apart(start):
    samples = start(0.01)
    samples.add("align", [bad(1)], 100)
    samples.add("instruct", [bad(2)], 100)
    with pytest.raises(UserError, match="2 of 100 rows of stage instruct"):
        samples.add("instruct", [bad(3)], 100)


def test_another_start_does_not_pass_the_limit(start):
    """It meets the same rows, and stops again; not so once the limit is higher, or the rows are no longer bad."""
    with pytest.raises(UserError, match="2 of 100 rows"):
        start(0.01).add("align", [bad(1), bad(2)], 100)
    with pytest.raises(UserError, match="2 of 100 rows"):
        start(0.01).add("align", [bad(1), bad(2)], 100)
    with pytest.raises(UserError, match="3 of 100 rows"):
        start(0.01).add("align", [bad(3)], 100)
    start(0.03).add("align", [bad(1), bad(2)], 100)
    start(0.01).add("align", [], 100)
    start(0.01).add("align", [bad(9, "too_long")], 100)
    start(0.01, fresh=True).add("align", [bad(3)], 100)
