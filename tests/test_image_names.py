"""Where an image lies: names in folders and in buckets."""

import os
import socket

import pytest

from sparsecut_jax.data.image_names import resolve
from sparsecut_jax.types import BadSample
from tiny import refusal


def cause(*inputs, **options) -> str:
    with pytest.raises(BadSample) as caught:
        resolve(*inputs, **options)
    return caught.value.cause


@pytest.fixture
def folder(tmp_path):
    """images/a.png, images/deep/b.png, and secret.png beside the folder."""
    (tmp_path / "images" / "deep").mkdir(parents=True)
    for name in ("images/a.png", "images/deep/b.png", "secret.png", "images-2.png"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path / "images"


@pytest.mark.parametrize("stat", [True, False])
@pytest.mark.parametrize("name", ["a.png", "deep/b.png", "./a.png", "deep/../a.png", "deep//b.png"])
def test_inside(folder, name, stat):
    assert resolve(folder, name, stat).samefile(folder / name)
    assert resolve(str(folder) + "/", name, stat).is_absolute()
    assert resolve(folder, str(folder / name), stat).samefile(folder / name)


@pytest.mark.parametrize("stat", [True, False])
@pytest.mark.parametrize("name", ["../secret.png", "deep/../../secret.png", "..", "../images-2.png", "/etc/hostname"])
def test_outside(folder, name, stat):
    assert refusal(resolve, folder, name, stat) == f"image {name!r} leaves its folder {folder}"
    assert cause(folder, name, stat) == "path"


def test_a_folder_relative_to_the_current_one(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    for stat in (True, False):
        assert resolve("images", "a.png", stat) == folder / "a.png"
        assert resolve("", "secret.png", stat) == folder.parent / "secret.png"
        assert cause("images", "../secret.png", stat) == "path"


def test_links(folder):
    (folder / "in.png").symlink_to(folder / "a.png")
    (folder / "out.png").symlink_to(folder.parent / "secret.png")
    (folder / "up").symlink_to(folder.parent)
    assert resolve(folder, "in.png") == folder / "a.png"
    (folder / "chain").symlink_to("up")
    leads = {"out.png": ("out.png", "secret.png"), "up/secret.png": ("up", ""), "chain/secret.png": ("chain", "")}
    for name, (link, target) in leads.items():
        assert refusal(resolve, folder, name) == (
            f"image {name!r} leaves its folder {folder}: {folder / link} is a link to {folder.parent / target}; "
            "set config.data.follow_links=True (--follow_links of evaluate) to follow such links"
        )
        assert cause(folder, name) == "path"
        assert resolve(folder, name, stat=False) == folder / name  # by its name alone it is inside
        assert resolve(folder, name, follow_links=True) == folder.parent / "secret.png"
    assert cause(folder, "../secret.png", follow_links=True) == "path"  # that is no link
    assert resolve(folder, "up/images/a.png") == folder / "a.png"  # out of it and in again
    (folder.parent / "link").symlink_to(folder)
    assert resolve(folder.parent / "link", "a.png") == folder / "a.png"


def test_links_to_nothing(folder):
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "gone").symlink_to("nowhere")
    assert refusal(resolve, folder, "loop.png") == (
        f"image {folder}/loop.png: {folder}/loop.png is a link to loop.png, which does not exist"
    )
    assert refusal(resolve, folder, "gone/a.png") == (
        f"image {folder}/gone/a.png: {folder}/gone is a link to nowhere, which does not exist"
    )
    assert cause(folder, "gone/a.png") == cause(folder, "loop.png") == "missing_image"


@pytest.mark.parametrize("follow_links", [False, True])
def test_what_is_no_file(folder, follow_links):
    os.mkfifo(folder / "pipe.png")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(folder / "socket.png"))  # its whole path may be too long for a socket
    (folder / "link").symlink_to("deep")
    (folder / "null.png").symlink_to("/dev/null")
    kinds = {"deep": "folder", ".": "folder", "link": "folder", "pipe.png": "named pipe", "socket.png": "socket"}
    for name, kind in kinds.items():
        at = folder / name.replace("link", "deep")
        assert refusal(resolve, folder, name, True, follow_links) == f"image {at} is a {kind}, not a file"
        assert cause(folder, name, True, follow_links) == "missing_image"
    assert refusal(resolve, folder, "null.png", True, True) == "image /dev/null is a device, not a file"


@pytest.mark.parametrize("name", ["b.png", "a.png/c.png", "~/a.png", "a" * 300])
def test_not_there(folder, name):
    assert refusal(resolve, folder, name) == f"image {folder / name} does not exist"
    assert cause(folder, name) == "missing_image"
    assert resolve(folder, name, stat=False) == folder / name


@pytest.mark.parametrize("stat", [True, False])
@pytest.mark.parametrize("name", ["a\0.png", "\ud800.png"], ids=["nul", "surrogate"])
def test_names_that_no_file_can_have(folder, name, stat):
    assert refusal(resolve, folder, name, stat) == f"image {name!r} in {str(folder)!r} is not a valid file name"
    assert cause(folder, name, stat) == "path"


# ----------------------------------------------------------------------------------------------------------------------
# gs://


def test_names_in_a_bucket():
    for stat in (True, False):
        assert os.fspath(resolve("gs://bucket/images", "deep/../a.png", stat)) == "gs://bucket/images/a.png"
        for name in ("../a.png", "/a.png", "deep/../../a.png", "gs://other/a.png", ".."):
            assert refusal(resolve, "gs://bucket/images", name, stat) == (
                f"image {name!r} leaves its folder gs://bucket/images"
            )
