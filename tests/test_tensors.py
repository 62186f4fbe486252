"""Tensors in safetensors files: read as they are, slice by slice, and every kind of damage in one sentence."""

import json
import os
import pickle
import struct
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from sparsecut_jax.types import UserError
from sparsecut_jax.weights.tensors import INDEX, open_safetensors, read_json
from tiny import refusal

TABLE = np.arange(12, dtype=np.float32).reshape(4, 3)


def sentence(path) -> str:
    """What opening `path` says, with the folder it is in left out."""
    return refusal(open_safetensors, str(path)).replace(f"{os.path.dirname(path)}/", "")


def header(shape=(4, 3), dtype="F32", offsets=(0, 48), **more) -> dict:
    return {"table": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}, **more}


def raw(described: dict | bytes, body: bytes = TABLE.tobytes(), length: int | None = None) -> bytes:
    """A safetensors file with any header at all."""
    text = described if isinstance(described, bytes) else json.dumps(described).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def shards(folder, files: dict[str, dict[str, np.ndarray]], where: dict[str, str] | None = None) -> str:
    """A folder of shards and their index, which by default says where everything is."""
    for file, tensors in files.items():
        save_file(tensors, folder / file)
    where = {name: file for file, tensors in files.items() for name in tensors} if where is None else where
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return str(folder)


# ----------------------------------------------------------------------------------------------------------------------
# reading


@pytest.mark.parametrize(
    ("dtype", "name"), [(np.float64, "F64"), (np.float32, "F32"), (np.float16, "F16"), (jnp.bfloat16, "BF16")]
)
def test_a_tensor_reads_as_it_was_written(tmp_path, dtype, name):
    written = (TABLE / 7).astype(dtype)
    save_file({"table": written}, tmp_path / "model.safetensors")
    found = open_safetensors(str(tmp_path))
    assert list(found) == ["table"]
    tensor = found["table"]
    assert (tensor.file, tensor.name) == (str(tmp_path / "model.safetensors"), "table")
    assert (tensor.shape, tensor.dtype) == ((4, 3), name)
    assert tensor.read().dtype == dtype
    np.testing.assert_array_equal(tensor.read(), written)


@pytest.mark.parametrize("index", [np.s_[1:3, :], np.s_[:, 2:3], np.s_[3:4, 0:2], np.s_[0:4, 0:3], np.s_[:, :]])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_a_slice_is_that_part_of_the_whole(tmp_path, index, dtype):
    save_file({"table": TABLE.astype(dtype)}, tmp_path / "model.safetensors")
    part = open_safetensors(str(tmp_path))["table"].read(index)
    assert part.dtype == dtype
    np.testing.assert_array_equal(part, TABLE.astype(dtype)[index])


def test_a_scalar(tmp_path):
    save_file({"scale": np.full((), 4.5, np.float32)}, tmp_path / "model.safetensors")
    scale = open_safetensors(str(tmp_path))["scale"]
    assert scale.shape == () and scale.read() == 4.5


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, jnp.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_refused_where_they_are_read(tmp_path, dtype, value):
    written = TABLE.astype(dtype)
    written[2, 1] = value
    save_file({"table": written}, tmp_path / "model.safetensors")
    tensor = open_safetensors(str(tmp_path))["table"]
    np.testing.assert_array_equal(tensor.read(np.s_[:2, :]), written[:2])
    for index in (None, np.s_[:, 1:2]):
        with pytest.raises(UserError) as caught:
            tensor.read(index)
        assert str(caught.value) == f"{tensor.file}: tensor table has NaN or infinite values; get an intact copy"


@pytest.mark.parametrize(
    ("dtype", "size"), [("I64", 8), ("I32", 4), ("U16", 2), ("I8", 1), ("BOOL", 1), ("F8_E4M3", 1), ("C64", 8)]
)
def test_other_than_floating_point_is_refused_where_it_is_wanted(tmp_path, dtype, size):
    """Position ids are int64 in many files, and nobody reads them."""
    (tmp_path / "model.safetensors").write_bytes(raw(header(dtype=dtype, offsets=(0, 12 * size)), bytes(12 * size)))
    tensor = open_safetensors(str(tmp_path))["table"]
    for wanted in (tensor.check, tensor.read):
        with pytest.raises(UserError) as caught:
            wanted()
        assert str(caught.value) == (
            f"{tensor.file}: tensor table has dtype {dtype}; expected one of F64, F32, F16, BF16 "
            "(quantised weights are only read from GGUF)"
        )


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux's list of mapped files")
def test_the_file_does_not_stay_mapped(tmp_path):
    save_file({"table": TABLE}, tmp_path / "model.safetensors")
    kept = open_safetensors(str(tmp_path))["table"]
    value = kept.read()
    with open("/proc/self/maps") as maps:
        assert kept.file not in maps.read()
    np.testing.assert_array_equal(value, TABLE)


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"table": TABLE}, path)
    tensor = open_safetensors(str(path))["table"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"model\.safetensors is not a complete safetensors file: "):
        tensor.read()


# ----------------------------------------------------------------------------------------------------------------------
# which files


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["model.safetensors"], "model.safetensors"),
        (["mm_projector.safetensors"], "mm_projector.safetensors"),
        (["consolidated.safetensors", "model.safetensors"], "model.safetensors"),
        (["model.safetensors", "pytorch_model.bin"], "model.safetensors"),
    ],
)
def test_the_file_of_a_folder(tmp_path, files, chosen):
    for name in files:
        save_file({"of": np.zeros(files.index(name) + 1, np.float32)}, tmp_path / name)
    found = open_safetensors(str(tmp_path))
    assert found["of"].file == str(tmp_path / chosen)
    assert found["of"].shape == (files.index(chosen) + 1,)


def test_a_file_is_taken_whatever_is_beside_it(tmp_path):
    save_file({"a": TABLE}, tmp_path / "a.safetensors")
    shards(tmp_path, {"b.safetensors": {"b": TABLE}})
    assert list(open_safetensors(str(tmp_path / "a.safetensors"))) == ["a"]


def test_shards(tmp_path):
    folder = shards(
        tmp_path,
        {
            "model-00001-of-00002.safetensors": {"a": TABLE, "b": TABLE[:2]},
            "model-00002-of-00002.safetensors": {"c": TABLE[1:3]},
            "model.safetensors": {"old": TABLE},
        },
        {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00001-of-00002.safetensors",
            "c": "model-00002-of-00002.safetensors",
        },
    )
    found = open_safetensors(folder)
    assert {name: os.path.basename(tensor.file) for name, tensor in found.items()} == {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00001-of-00002.safetensors",
        "c": "model-00002-of-00002.safetensors",
    }
    np.testing.assert_array_equal(found["c"].read(), TABLE[1:3])


def test_a_tensor_that_the_index_forgot_is_there_all_the_same(tmp_path):
    """So that one too many is seen, and not passed over."""
    folder = shards(tmp_path, {"x.safetensors": {"a": TABLE, "b": TABLE}}, {"a": "x.safetensors"})
    assert sorted(open_safetensors(folder)) == ["a", "b"]


def test_links_as_in_the_cache_of_the_hub(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "c0ffee"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file({"a": TABLE}, blobs / "0a1b")
    save_file({"b": TABLE}, blobs / "2c3d")
    for link, blob in (("1.safetensors", "0a1b"), ("2.safetensors", "2c3d")):
        (snapshot / link).symlink_to(f"../../blobs/{blob}")
    (snapshot / INDEX).write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    found = open_safetensors(str(snapshot))
    assert sorted(found) == ["a", "b"]
    np.testing.assert_array_equal(found["b"].read(), TABLE)


def test_names_with_spaces_and_accents(tmp_path):
    path = tmp_path / "mes poids é ☃.safetensors"
    save_file({"gâteau": TABLE}, path)
    np.testing.assert_array_equal(open_safetensors(str(path))["gâteau"].read(), TABLE)


def test_what_holds_no_weights(tmp_path):
    assert sentence(tmp_path / "gone.safetensors") == "gone.safetensors does not exist"
    (tmp_path / "empty").mkdir()
    assert (
        sentence(tmp_path / "empty") == "empty has no .safetensors file; pickled weights (.bin) must be converted first"
    )
    (tmp_path / "link.safetensors").symlink_to("nowhere")
    assert sentence(tmp_path / "link.safetensors") == "link.safetensors does not exist"
    for name in ("a", "b"):
        save_file({name: TABLE}, tmp_path / "empty" / f"{name}.safetensors")
    assert sentence(tmp_path / "empty") == (
        "empty has 2 .safetensors files but no model.safetensors.index.json; add the index, or name one file"
    )


# ----------------------------------------------------------------------------------------------------------------------
# indices that lie


ONE, TWO = "model-1.safetensors", "model-2.safetensors"
NOT_ITS_OWN = f"{INDEX} names the file {{!r}}; expected a file in the same folder"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"a": "../model-1.safetensors"}, NOT_ITS_OWN.format("../model-1.safetensors")),
        ({"a": "./model-1.safetensors"}, NOT_ITS_OWN.format("./model-1.safetensors")),
        ({"a": "/etc/passwd"}, NOT_ITS_OWN.format("/etc/passwd")),
        ({"a": "sub/model-1.safetensors"}, NOT_ITS_OWN.format("sub/model-1.safetensors")),
        ({"a": ".."}, NOT_ITS_OWN.format("..")),
        ({"a": ""}, NOT_ITS_OWN.format("")),
        ({"a": "model-3.safetensors"}, "model-3.safetensors does not exist"),
        ({"a": TWO}, f"{INDEX} lists tensor a in {TWO}, which does not contain it"),
        ({"a": TWO, "b": ONE}, f"{INDEX} lists tensor a in {TWO}, which does not contain it"),
        ({"c": ONE}, f"{INDEX} lists tensor c in {ONE}, which does not contain it"),
        ({"a": 3}, f"{INDEX}: expected a 'weight_map' from tensor names to files"),
    ],
)
def test_an_index_that_says_what_is_not_so(tmp_path, changes, expected):
    (tmp_path / "model").mkdir()
    files = {ONE: {"a": TABLE}, TWO: {"b": TABLE}}
    shards(tmp_path / "model", files, {"a": ONE, "b": TWO} | changes)
    assert sentence(tmp_path / "model").replace("model/", "", 1) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", "expected a 'weight_map' from tensor names to files"),
        ('{"weight_map": ["model.safetensors"]}', "expected a 'weight_map' from tensor names to files"),
        ("[]", "expected a JSON object, got list"),
    ],
)
def test_an_index_without_a_map(tmp_path, text, expected):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(UserError) as caught:
        open_safetensors(str(tmp_path))
    assert str(caught.value) == f"{tmp_path / INDEX}: {expected}"


def test_a_tensor_in_two_shards(tmp_path):
    (tmp_path / "model").mkdir()
    shards(tmp_path / "model", {ONE: {"a": TABLE}, TWO: {"a": TABLE, "b": TABLE}}, {"a": ONE, "b": TWO})
    assert sentence(tmp_path / "model") == f"model/{TWO}: tensor a is also in model/{ONE}"


# ----------------------------------------------------------------------------------------------------------------------
# pickles


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def archive(folder, content: bytes) -> bytes:
    """As torch.save writes since 1.6."""
    with zipfile.ZipFile(folder / "zip", "w") as file:
        file.writestr("archive/data.pkl", content)
    return (folder / "zip").read_bytes()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "model.safetensors"])
def test_pickles_are_refused_unread(tmp_path, name, protocol, zipped):
    model = tmp_path / "model"
    model.mkdir()
    content = pickle.dumps(Trap(tmp_path / "sprung"), protocol=protocol)
    (model / name).write_bytes(archive(tmp_path, content) if zipped else content)
    for path in (model / name, model):
        with pytest.raises(UserError) as caught:
            open_safetensors(str(path))
        assert str(caught.value) == (
            f"{model / name} is a pickle, which can run any code when loaded, and is refused; if you trust "
            "it, convert it with torch: safetensors.torch.save_file(torch.load(FILE, weights_only=True), "
            "'model.safetensors')"
        )
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["a.pth", "a.ckpt", "a.pkl", "a.pickle"])
def test_other_names_of_pickles(tmp_path, name):
    (tmp_path / name).write_bytes(b"whatever it holds")
    assert sentence(tmp_path / name).startswith(f"{name} is a pickle, ")


def test_a_pickle_among_the_shards(tmp_path):
    (tmp_path / "model").mkdir()
    shards(tmp_path / "model", {ONE: {"a": TABLE}}, {"a": ONE, "b": "pytorch_model.bin"})
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    assert sentence(tmp_path / "model").startswith("model/pytorch_model.bin is a pickle, ")


# ----------------------------------------------------------------------------------------------------------------------
# damage


WHOLE = raw(header())
DAMAGE = {
    "nothing": b"",
    "four bytes": WHOLE[:4],
    "cut header": WHOLE[:40],
    "cut data": WHOLE[:-1],
    "more data": WHOLE + b"\0",
    "length of 2^60": raw(header(), length=2**60),
    "length of 2^64 - 1": raw(header(), length=2**64 - 1),
    "length of zero": raw(header(), length=0),
    "no JSON": raw(b'{"table": }'),
    "no UTF-8": raw(b'{"\xff": {}}'),
    "a list": raw(b"[]"),
    "shape as text": raw(header(shape="43")),
    "negative shape": raw(header(shape=(-4, -3))),
    "shape too small": raw(header(shape=(3, 3))),
    "shape too large": raw(header(shape=(4, 4))),
    "shape that overflows": raw(header(shape=(2**62, 8))),
    "offsets beyond the end": raw(header(offsets=(48, 96))),
    "offsets backwards": raw(header(offsets=(48, 0))),
    "negative offsets": raw(header(offsets=(-48, 0))),
    "offsets with a gap": raw(header(offsets=(4, 52)), b"\0" * 52),
    "two at one place": raw(header(other=header()["table"])),
    "unknown dtype": raw(header(dtype="Q4_0")),
    "no dtype": raw({"table": {"shape": [4, 3], "data_offsets": [0, 48]}}),
    "no offsets": raw({"table": {"dtype": "F32", "shape": [4, 3]}}),
    "metadata of numbers": raw(header(__metadata__={"format": 1})),
    "HTML": b"<!DOCTYPE html><html><body>404: Not Found</body></html>",
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0a1b2c\nsize 133\n",
}


def test_the_file_that_is_damaged_below_is_a_good_one(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(WHOLE)
    np.testing.assert_array_equal(open_safetensors(str(tmp_path))["table"].read(), TABLE)


@pytest.mark.parametrize("data", DAMAGE.values(), ids=DAMAGE)
def test_damaged_files_are_refused_at_once(tmp_path, data):
    (tmp_path / "model.safetensors").write_bytes(data)
    assert sentence(tmp_path / "model.safetensors").startswith("model.safetensors is not a complete safetensors file: ")


# ----------------------------------------------------------------------------------------------------------------------
# JSON


def test_read_json(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"size": 3, "name": "é"}', encoding="utf-8")
    assert read_json(str(path)) == {"size": 3, "name": "é"}


@pytest.mark.parametrize(
    ("data", "start"),
    [
        (b"", " is not valid JSON: Expecting value"),
        (b'{"a": 1', " is not valid JSON: Expecting ',' delimiter"),
        (b'{"a": "\xff"}', " is not valid JSON: 'utf-8' codec can't decode byte 0xff"),
        (b'{"a": ' + b"[" * 100_000, " is not valid JSON: maximum recursion depth exceeded"),
        (b"[1]", ": expected a JSON object, got list"),
        (b"null", ": expected a JSON object, got NoneType"),
        (b'"config"', ": expected a JSON object, got str"),
        (None, " does not exist"),
    ],
)
def test_what_is_no_json_object(tmp_path, data, start):
    path = tmp_path / "config.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_json(str(path))
    assert str(caught.value).startswith(f"{path}{start}") and "\n" not in str(caught.value)
