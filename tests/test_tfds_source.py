"""Rows of TFDS datasets that others prepared, by the features that the config names; what is wrong is one sentence."""

import io
import json
import os
import pickle
import re
import shutil

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from sparsecut_jax.data.build import build
from sparsecut_jax.data.tfds_source import open_tfds
from sparsecut_jax.settings import SourceConfig
from sparsecut_jax.types import BadSample, UserError

F = tfds.features
FEATURES = (
    "caption, captions, count, good, image, label, meta/note, meta/picture, objects/box, objects/name, pages, raw, size"
)


def png(red: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3, 2), (red, 0, 0)).save(file, "PNG")
    return file.getvalue()


class Foreign(tfds.core.GeneratorBasedBuilder):
    """Six examples in "train", two in "test", which has no labels and no captions."""

    VERSION = tfds.core.Version("1.2.0")

    def _info(self):
        features = {
            "image": F.Image(),
            "label": F.ClassLabel(names=["cat", "dog"]),
            "caption": F.Text(),
            "captions": F.Sequence(F.Text()),
            "count": np.int64,
            "size": np.float32,
            "good": np.bool_,
            "pages": F.Sequence(F.Image()),
            "meta": {"picture": F.Image(), "note": F.Text()},
            "objects": F.Sequence({"box": F.BBoxFeature(), "name": F.ClassLabel(names=["a", "b"])}),
            "raw": F.Tensor(shape=(2, 2, 3), dtype=np.uint8),
        }
        return tfds.core.DatasetInfo(builder=self, features=F.FeaturesDict(features), disable_shuffling=True)

    def _split_generators(self, _):
        return {"train": self._generate_examples(6, True), "test": self._generate_examples(2, False)}

    def _generate_examples(self, count, labelled):
        for i in range(count):
            yield (
                i,
                {
                    "image": io.BytesIO(png(i) + b"\0"),
                    "label": i % 2 if labelled else -1,
                    "caption": f"caption {i} \u65e5" if i != 4 else b"\xff",
                    "captions": [f"first {i}", "second"] if labelled else [],
                    "count": i,
                    "size": i + 0.1,
                    "good": i % 2 == 0,
                    "pages": [png(10), png(11)],
                    "meta": {"picture": png(100 + i), "note": "<image>\nlook" if i else "note"},
                    "objects": [{"box": F.BBox(0.0, 0.0, 1.0, 1.0), "name": "b"}],
                    "raw": np.zeros((2, 2, 3), np.uint8),
                },
            )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Folder that holds foreign/1.2.0."""
    folder = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    Foreign(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture
def load(prepared):
    """Function that opens the foreign dataset with some of the config's settings changed."""

    def open_it(**settings):
        given = {"path": "tfds:foreign", "data_dir": str(prepared), "answer": "caption"} | settings
        return open_tfds(SourceConfig(**given), max_pixels=100)

    return open_it


def texts(row) -> list[str]:
    return [turn["value"] for turn in row["conversations"]]


def test_a_row_has_the_encoded_picture_a_question_and_an_answer(load):
    rows = load()
    assert len(rows) == 6
    assert rows[3] == {
        "id": "train/3",
        "image": png(3) + b"\0",
        "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "caption 3 \u65e5"}],
    }
    picture = rows.open(rows[3]["image"])
    assert (picture.mode, picture.size, picture.getpixel((0, 0))) == ("RGB", (3, 2), (3, 0, 0))
    with pytest.raises(BadSample) as raised:
        open_tfds(SourceConfig(path=rows.folder), max_pixels=2).open(rows[3]["image"])
    assert raised.value.cause == "too_large_image"


@pytest.mark.parametrize(
    "settings, first",
    [
        (dict(answer="label"), ["<image>", "cat"]),
        (dict(answer="captions"), ["<image>", "first 0"]),
        (dict(answer="count"), ["<image>", "0"]),
        (dict(answer="size"), ["<image>", "0.1"]),
        (dict(answer="good"), ["<image>", "True"]),
        (dict(answer="meta/note"), ["<image>", "note"]),
        (dict(answer="objects/name"), ["<image>", "b"]),
        (dict(question="meta/note"), ["<image>\nnote", "caption 0 \u65e5"]),
        (dict(question="label", answer="count"), ["<image>\ncat", "0"]),
        (dict(question="What is it?"), ["<image>\nWhat is it?", "caption 0 \u65e5"]),
        (dict(question="Here: <image> What?"), ["Here: <image> What?", "caption 0 \u65e5"]),
        (dict(image="pages"), ["<image><image>", "caption 0 \u65e5"]),
        (dict(image="", question="Say it."), ["Say it.", "caption 0 \u65e5"]),
    ],
)
def test_features_become_texts(load, settings, first):
    assert texts(load(**settings)[0]) == first


def test_a_question_with_a_place_for_the_picture_keeps_it(load):
    assert texts(load(question="meta/note")[1])[0] == "<image>\nlook"


def test_pictures_elsewhere_several_or_none(load):
    assert load(image="meta/picture")[2]["image"] == png(102)
    assert load(image="pages")[2]["images"] == [png(10), png(11)]
    assert not {"image", "images"} & set(load(image="", question="caption", answer="label")[0])


@pytest.mark.parametrize("split, ids", [("test", [0, 1]), ("train[4:]", [4, 5]), ("train[:50%]", [0, 1, 2])])
def test_splits(load, split, ids):
    rows = load(split=split, answer="count")
    assert len(rows) == len(ids)
    assert [texts(row)[1] for row in rows] == [str(i) for i in ids]


@pytest.mark.parametrize(
    "settings, i, cause, sentence",
    [
        (dict(split="test", answer="label"), 0, "no_answer", "feature 'label' has no label"),
        (dict(split="test", answer="captions"), 1, "no_answer", "feature 'captions' is an empty list"),
        (dict(split="test", question="captions"), 1, "format", "feature 'captions' is an empty list"),
        (dict(), 4, "text", "feature 'caption' is not UTF-8: "),
    ],
)
def test_examples_that_make_no_row(load, settings, i, cause, sentence):
    with pytest.raises(BadSample, match=re.escape(sentence)) as raised:
        load(**settings)[i]
    assert raised.value.cause == cause


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (dict(answer="captoin"), f"has no feature answer='captoin'; did you mean 'caption'?; known: {FEATURES}"),
        (dict(answer=""), f"has no feature answer=''; known: {FEATURES}"),
        (dict(image="meta/pictures"), "has no feature image='meta/pictures'; did you mean 'meta/picture'?; known: "),
        (dict(image="meta"), "has no feature image='meta'; "),
        (dict(question="meta/notes"), "has no feature question='meta/notes'; did you mean 'meta/note'?; known: "),
        (dict(image="caption", answer="image"), "answer='image' is Image("),
        (dict(image="label"), "image='label' is ClassLabel("),
        (
            dict(image="raw"),
            "image='raw' is Tensor(shape=(2, 2, 3), dtype=uint8); expected an encoded picture or a list",
        ),
        (dict(answer="raw"), "expected a text, a label, a number or a list of them"),
        (dict(answer="objects/box"), "expected a text, a label, a number or a list of them"),
        (dict(image=""), "question='' asks about a picture, but image='' names no feature"),
        (dict(image="", question="<image> Why?"), "asks about a picture, but image='' names no feature"),
        (dict(split="trian"), "tfds:foreign has no split 'trian'; did you mean 'train'?; known: test, train"),
        (dict(split="train["), "tfds:foreign: split 'train[' cannot be read: "),
        (dict(split="train[6:]"), "tfds:foreign: split 'train[6:]' cannot be read: "),
        (dict(path="tfds:foreigner"), "tfds:foreigner is not prepared in "),
        (dict(path="tfds:foreign:3.0.0"), "tfds:foreign:3.0.0 is not prepared in "),
        (
            dict(path="tfds:mnist"),
            "and nothing is downloaded here; set data_dir to its folder, or run `tfds build mnist ",
        ),
        (dict(path="tfds:a b"), "tfds:a b cannot be read as a TFDS dataset: "),
        (
            dict(path="/not/there"),
            "/not/there is not the folder of a prepared TFDS dataset: it has no dataset_info.json",
        ),
    ],
)
def test_settings_that_do_not_fit(load, settings, sentence):
    with pytest.raises(UserError) as raised:
        load(**settings)
    assert sentence in str(raised.value) and "\n" not in str(raised.value)


def test_paths_of_a_dataset(load, prepared):
    for path in ("tfds:foreign:1.2.0", str(prepared / "foreign" / "1.2.0")):
        assert texts(load(path=path)[1])[1] == "caption 1 \u65e5"
    with pytest.raises(UserError, match="it has no dataset_info.json; did you mean '.*/foreign/1.2.0'"):
        load(path=str(prepared / "foreign"))


@pytest.fixture
def copy(prepared, tmp_path):
    """A copy of the dataset, to be damaged."""
    return shutil.copytree(prepared / "foreign" / "1.2.0", tmp_path / "copy")


def test_a_dataset_of_tfrecords_is_refused(load, copy):
    info = json.loads((copy / "dataset_info.json").read_text())
    (copy / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(
        UserError, match="is stored as tfrecord, which has no random access; .* run `tfds convert_format"
    ):
        load(path=str(copy))


def test_damaged_datasets(load, copy):
    shard = copy / "foreign-train.array_record-00000-of-00001"
    whole = shard.read_bytes()
    middle = len(whole.rstrip(b"\0")) // 3
    shard.write_bytes(whole[:300] + bytes(2000) + whole[2300:])
    rows = load(path=str(copy))
    with pytest.raises(BadSample, match="the record cannot be read: ") as raised:
        [rows[i] for i in range(6)]
    assert raised.value.cause == "format"
    shard.write_bytes(whole[:middle])
    with pytest.raises(UserError, match="foreign-train.array_record-00000-of-00001 cannot be read: "):
        load(path=str(copy))
    shard.unlink()
    with pytest.raises(UserError, match="is incomplete: .*foreign-train.array_record-00000-of-00001 does not exist"):
        load(path=str(copy))
    (copy / "features.json").unlink()
    with pytest.raises(UserError, match="cannot be read as a TFDS dataset: "):
        load(path=str(copy))


@pytest.mark.parametrize("own", [False, True])
def test_rows_cross_to_other_processes(load, tmp_path, own):
    rows = load(image="meta/picture", answer="label")
    if own:
        plain = [{"id": i, "conversations": []} for i in range(9)]
        build(plain, str.encode, str(tmp_path / "out"), shard_rows=4)
        rows = open_tfds(SourceConfig(path=str(tmp_path / "out"), image="unused"), 100)
    before = [rows[i] for i in range(len(rows))]
    there = pickle.loads(pickle.dumps(rows))
    assert there.records._readers == [None] * (3 if own else 1)  # files are opened anew
    assert [there[i] for i in range(len(there))] == before
    assert there.fingerprint() == rows.fingerprint()
    assert len(pickle.dumps(rows)) < 3000
    assert list(grain.MapDataset.source(rows).to_iter_dataset()) == before


def test_fingerprint_knows_the_data_and_how_they_are_read(load, copy):
    first = load().fingerprint()
    assert re.fullmatch("6 rows, sha256 [0-9a-f]{16}", first)
    assert load(path=str(copy)).fingerprint() == first  # wherever they lie
    for other in (dict(split="train[:6]"), dict(answer="label"), dict(question="Why?")):
        assert load(**other).fingerprint() != first
    (copy / "label.labels.txt").write_text("dog\ncat\n")
    assert load(path=str(copy)).fingerprint() != first


def test_fingerprint_knows_each_byte_of_what_build_wrote(tmp_path):
    row = {"id": 1, "image": "a", "conversations": []}
    build([row], lambda name: b"one", str(tmp_path / "one"))
    build([row], lambda name: b"two", str(tmp_path / "two"))
    one, two = (open_tfds(SourceConfig(path=str(tmp_path / name)), 100).fingerprint() for name in ("one", "two"))
    assert one != two


def test_metadata_that_are_no_json(load, copy):
    (copy / "metadata.json").write_text("{")
    with pytest.raises(UserError, match="metadata.json cannot be read"):
        load(path=str(copy))


def test_a_pipe_in_the_folder_is_not_waited_for(load, copy):
    os.mkfifo(copy / "pipe")
    with pytest.raises(UserError, match="pipe is not a regular file"):
        load(path=str(copy))


def test_a_later_shard_that_was_cut_has_broken_rows(tmp_path):
    build([{"id": str(i), "conversations": []} for i in range(4)], bytes, str(tmp_path / "built"), shard_rows=2)
    file = tmp_path / "built" / "rows-train.array_record-00001"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    rows = open_tfds(SourceConfig(path=str(tmp_path / "built")), 100)
    assert rows[1]["id"] == "1"
    with pytest.raises(BadSample, match="the record cannot be read"):
        rows[2]
