"""WebDataset tars: which members make a row, and tars that are cut, joined, or hold what cannot be read."""

import io
import json
import pickle
import tarfile

import pytest

from formats import tar_of
from sparsecut_jax.data.canonical import canonical
from sparsecut_jax.data.opening import open_rows
from sparsecut_jax.settings import SourceConfig
from sparsecut_jax.types import BadSample, UserError

TURNS = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
TEXT = json.dumps({"conversations": TURNS}).encode()


@pytest.fixture
def opened(tmp_path):
    """Function that writes members to a tar and opens it."""

    def write(members, **settings):
        content = members if isinstance(members, bytes) else tar_of(members)
        (tmp_path / "x.tar").write_bytes(content)
        return open_rows(SourceConfig(path=str(tmp_path / "x.tar"), **settings))

    return write


@pytest.fixture
def refused(opened, tmp_path):
    def sentence(members) -> str:
        with pytest.raises(UserError) as caught:
            opened(members)
        return str(caught.value).replace(repr(str(tmp_path / "x.tar")), "FILE")

    return sentence


def asked(question: str, answer: str) -> list:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([("a.jpg", b"J"), ("a.json", TEXT)], [{"id": "a", "image": b"J", "conversations": TURNS}]),
        ([("./d/a.b.PNG", b"J"), ("./d/a.txt", b"a cat\n")], [{"id": "d/a", "image": b"J", "conversations": asked("<image>", "a cat")}]),
        (
            [("a.webp", b"W"), ("a.json", b'{"id": 7, "image": "x/a.webp", "question": "q", "answer": "a", "n": 1}')],
            [{"id": 7, "n": 1, "image": b"W", "conversations": asked("<image>\nq", "a")}],
        ),
        (
            [("a.10.jpg", b"10"), ("a.9.jpg", b"9"), ("a.json", json.dumps(asked("<image> <image>", "a")).encode())],
            [{"id": "a", "images": [b"9", b"10"], "conversations": asked("<image> <image>", "a")}],
        ),
        ([("1.json", TEXT), ("2.json", TEXT), ("1.jpg", b"1"), ("2.jpg", b"2")],
         [{"id": i, "image": i.encode(), "conversations": TURNS} for i in "12"]),
        (
            [("README", b"x"), (".DS_Store", b"x"), ("__MACOSX/._a.jpg", b"x"), ("a.jpg", b"J"), ("a.json", TEXT), ("a.npy", b"x")],
            [{"id": "a", "image": b"J", "conversations": TURNS}],
        ),
        (
            [("\u00e9 \u65e5.jpg", b"J"), ("\u00e9 \u65e5.json", TEXT), ("n" * 300 + ".txt", b"t"), ("n" * 300 + ".jpg", b"J")],
            [
                {"id": "\u00e9 \u65e5", "image": b"J", "conversations": TURNS},
                {"id": "n" * 300, "image": b"J", "conversations": asked("<image>", "t")},
            ],
        ),
        ([("a.json", b'\xef\xbb\xbf{"question": "q", "answer": "a"}')], [{"id": "a", "conversations": asked("q", "a")}]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_make_rows(opened, members, expected, form, monkeypatch):
    monkeypatch.setattr(tarfile.TarFile, "format", form)
    rows = opened(members)
    assert [rows[i] for i in range(len(rows))] == expected
    assert list(pickle.loads(pickle.dumps(rows))) == expected


def test_columns_are_chosen(opened):
    members = [("a.seg.png", b"S"), ("a.png", b"P"), ("a.cls", b"3"), ("a.txt", b"t")]
    assert opened(members, image="png", answer="cls", question="Which is it?")[0] == {
        "id": "a", "txt": "t", "image": b"P", "conversations": asked("<image>\nWhich is it?", "3"),
    }  # fmt: skip
    assert opened(members, image="", question="Which?")[0]["conversations"] == asked("Which?", "t")


@pytest.mark.parametrize(
    ("members", "cause", "expected"),
    [
        ([("a.json", b"{")], "text", "member .json is not valid JSON: "),
        ([("a.json", b"\xff{")], "text", "member .json is not UTF-8: "),
        ([("a.json", b"7")], "format", "member .json: expected an object, got int"),
        ([("a.jpg", b"J")], "format", "x: key 'conversations' must be a list with at least one turn"),
        ([("a.mp4", b"M"), ("a.txt", b"t")], "unsupported", "x: key 'video' is present, but only text and images"),
    ],
)
def test_bad_row(opened, members, cause, expected):
    rows = opened([*members, ("b.json", TEXT), ("b.jpg", b"J")])
    with pytest.raises(BadSample) as caught:
        canonical(rows[0], "x", 1)
    assert caught.value.cause == cause and str(caught.value).startswith(expected)
    assert rows[1]["id"] == "b"


def test_a_cut_tar_is_never_taken_for_a_whole_one(refused):
    whole = tar_of([("a.jpg", b"J" * 700), ("a.json", TEXT), ("b.jpg", b"J"), ("b.json", TEXT)])
    end = whole.rindex(TEXT) // 512 * 512 + 512
    assert not any(whole[end:])
    for cut in range(1, end + 512, 101):
        sentence = refused(whole[:cut])
        assert "\n" not in sentence
        if cut > 512:
            assert sentence.startswith("data source FILE cannot be read as a tar: ")
    assert refused(whole[:end]) == (
        "data source FILE cannot be read as a tar: it has no end marker; it may be truncated or damaged: download or write it again"
    )


def test_damage_in_a_header_is_not_taken_for_the_end(refused):
    whole = bytearray(tar_of([("a.jpg", b"J"), ("a.json", TEXT), ("b.jpg", b"J"), ("b.json", TEXT)]))
    whole[2048 + 5] ^= 1
    assert refused(bytes(whole)).startswith("data source FILE cannot be read as a tar: ")


def test_joined_tars(refused):
    one = tar_of([("a.jpg", b"J"), ("a.json", TEXT)])
    assert refused(one + one).startswith(
        "data source FILE continues after its end marker: it is damaged, or tars were joined with `cat`"
    )


def test_two_members_of_one_name(refused):
    members = [("a.jpg", b"J"), ("b.jpg", b"J"), ("./a.JPG", b"K")]
    assert refused(members) == "data source FILE: two members are named './a.JPG'; expected one"


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_a_link(refused, kind):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    what = "not a regular file" if kind == tarfile.FIFOTYPE else "a link"
    assert refused(file.getvalue()).startswith(
        f"data source FILE: member 'a.jpg' is {what}; pack the files themselves, with"
    )


def test_nothing_in_it(refused):
    assert (
        refused([("README", b"x")])
        == "data source FILE has no members NAME.jpg, NAME.json, ...; expected at least one row"
    )
    assert refused(tar_of([])).startswith("data source FILE begins with zeros: an empty tar, or an incomplete download")


def test_fingerprint(opened):
    members = [("a.jpg", b"J"), ("a.json", TEXT)]
    first = opened(members).fingerprint()
    assert opened(members).fingerprint() == first
    assert opened([("a.jpg", b"K"), ("a.json", TEXT)]).fingerprint() != first
    assert opened(members, image="").fingerprint() != first
