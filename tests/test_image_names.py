"""Where an image lies: names in folders and in buckets."""

import os

import pytest

from sparsecut_jax.data.images import resolve
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
    (folder / "loop.png").symlink_to("loop.png")
    assert resolve(folder, "in.png") == folder / "a.png"
    for name in ("out.png", "up/secret.png"):
        assert refusal(resolve, folder, name) == f"image {name!r} leaves its folder {folder}"
        assert resolve(folder, name, stat=False) == folder / name  # by its name alone it is inside
    assert cause(folder, "loop.png") == "missing_image"
    (folder.parent / "link").symlink_to(folder)
    assert resolve(folder.parent / "link", "a.png") == folder / "a.png"


@pytest.mark.parametrize("name", ["b.png", "deep", "", ".", "a.png/c.png", "~/a.png", "a" * 300])
def test_not_there(folder, name):
    assert refusal(resolve, folder, name) == f"image {folder / name} is not there"
    assert cause(folder, name) == "missing_image"
    assert resolve(folder, name, stat=False) == folder / name


@pytest.mark.parametrize("stat", [True, False])
@pytest.mark.parametrize("name", ["a\0.png", "\ud800.png"], ids=["nul", "surrogate"])
def test_names_that_no_file_can_have(folder, name, stat):
    assert refusal(resolve, folder, name, stat) == f"image {name!r} in {str(folder)!r} has a name that no file can have"
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
