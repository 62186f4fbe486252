"""From files into shardings: who reads what, what is reported, and what is refused."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from parity_cases import FOLDER, join
from sparsecut_jax.runs.parameters import abstract_params, init_params, initial_params
from sparsecut_jax.runtime import sharding
from sparsecut_jax.tasks.registry import build_model
from sparsecut_jax.types import UserError
from sparsecut_jax.weights import load, pretrained

ROOT = FOLDER.parents[1]


def flat(tree) -> dict:
    return traverse_util.flatten_dict(tree, sep="/")


def copy(tmp_path, name: str, change=lambda tensors: tensors):
    """A fixture as one file of its own, its tensors changed."""
    tensors = {}
    for file in (FOLDER / name).glob("*.safetensors"):
        tensors |= load_file(file)
    save_file(change(tensors), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((FOLDER / name / "config.json").read_text())
    return tmp_path


@pytest.fixture(scope="module")
def llama():
    return join(llm=FOLDER / "llama2")


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (8, 1, 1), (1, 4, 2)])
def test_sharded_equals_whole_and_every_number_is_read_once(llama, sizes, monkeypatch):
    read = []
    original = load._one

    def counted(filling, tensor, index, cfg):
        value = original(filling, tensor, index, cfg)
        read.append(value.size)
        return value

    monkeypatch.setattr(load, "_one", counted)
    mesh = sharding.make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    loaded = join(mesh, llm=FOLDER / "llama2")
    for path, leaf in flat(loaded.params["llm"]).items():
        np.testing.assert_array_equal(leaf, flat(llama.params["llm"])[path], err_msg=path)
    kernel = loaded.params["llm"]["layers"]["attention"]["q"]
    assert kernel.addressable_shards[0].data.shape == (3, 32 // sizes[1], 4 // sizes[2], 8)
    assert sum(read) == sum(leaf.size for leaf in jax.tree.leaves(loaded.params["llm"]))


def test_a_device_reads_no_more_of_a_file_than_its_slice(tmp_path):
    """fsdp=8: of every matrix each device reads an eighth of the columns or rows, as counted at the file."""
    loaded = join(llm=FOLDER / "llama2")
    mesh = sharding.make_mesh({"data": 1, "fsdp": 8, "tensor": 1})
    found = pretrained.open_sources(loaded.cfg.init)
    seen = {}

    def counting(tensor):
        def slices(index):
            value = tensor.slices(index)
            seen.setdefault(tensor.name, []).append(value.shape)
            return value

        return dataclasses.replace(tensor, slices=slices)

    parts = found["llm"].tensors
    parts["llm"] = {name: counting(tensor) for name, tensor in parts["llm"].items()}
    fillings, _ = load.match(abstract_params(build_model(loaded.cfg), loaded.cfg, mesh), loaded.cfg, found)
    load.read(fillings, loaded.cfg)
    assert seen["model.layers.1.self_attn.q_proj.weight"] == [(32, 4)] * 8
    assert seen["model.layers.1.mlp.down_proj.weight"] == [(4, 48)] * 8
    assert seen["model.embed_tokens.weight"] == [(96, 4)] * 8
    assert seen["model.norm.weight"] == [(32,)]  # the same on all: read once


PROCESS = """
import json, sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
sys.path.insert(0, "tests")
from parity_cases import FOLDER, join
from sparsecut_jax.runtime import sharding
from sparsecut_jax.training import state
from sparsecut_jax.weights import load
read = []
original = load._one
load._one = lambda *args: read.append(value := original(*args)) or value
loaded = join(sharding.make_mesh({"data": 1, "fsdp": 8, "tensor": 1}), llm=FOLDER / "llama2")
leaf = loaded.params["llm"]["embedding"]
shards = sorted((s.index[1].start or 0, s.data.shape[1]) for s in leaf.addressable_shards)
print(json.dumps({"numbers": sum(v.size for v in read), "embedding": shards}))
"""


def test_each_of_two_processes_reads_its_half(llama):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(i)],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    told = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        told.append(json.loads(out.splitlines()[-1]))
    assert [t["embedding"] for t in told] == [[[0, 4], [4, 4], [8, 4], [12, 4]], [[16, 4], [20, 4], [24, 4], [28, 4]]]
    whole = sum(leaf.size for path, leaf in flat(llama.params["llm"]).items() if "norm" in path)  # not split
    split = sum(leaf.size for leaf in jax.tree.leaves(llama.params["llm"])) - whole
    assert [t["numbers"] for t in told] == [whole + split // 2] * 2


def test_bfloat16_is_read_as_bfloat16(tmp_path):
    """Straight into bfloat16 parameters, and exactly into float32 ones."""
    to_bf16 = lambda tensors: {k: v.astype(jnp.bfloat16) for k, v in tensors.items() if "inv_freq" not in k}
    copy(tmp_path, "llama2", to_bf16)
    expected = load_file(tmp_path / "model.safetensors")["model.layers.2.mlp.gate_proj.weight"].T
    half = join(llm=tmp_path, settings={"param_dtype": "bfloat16"})
    gate = half.params["llm"]["layers"]["mlp"]["gate"]["kernel"]
    assert gate.dtype == jnp.bfloat16
    assert np.asarray(gate[2]).tobytes() == np.ascontiguousarray(expected).tobytes()
    single = join(llm=tmp_path).params["llm"]["layers"]["mlp"]["gate"]["kernel"]
    assert single.dtype == jnp.float32
    np.testing.assert_array_equal(single[2], expected.astype(np.float32))


def test_the_report(llama):
    report = str(llama.report)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(llama.params["llm"]))
    assert f"loaded     llm: 12 arrays, {numbers:,} parameters from {FOLDER / 'llama2'}" in report
    assert "fusion/fuse/projector/fc1/kernel [160, 32]" in report
    assert "rotary frequencies: 3, model.layers.0.self_attn.rotary_emb.inv_freq ..." in report
    assert set(llama.report.fresh) == {p for p in flat(llama.params) if not p.startswith("llm/")}
    assert llama.report.unused == {"rotary frequencies": [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(3)]}  # fmt: skip


def test_what_a_whole_clip_model_leaves_unused():
    report = join(vision=FOLDER / "clip", settings={"vision.select_layer": -2, "shortcuts.density": "none"}).report
    assert {what: len(names) for what, names in report.unused.items()} == {
        "blocks above 2, the highest one used": 16,
        "norm after the last block": 2,
        "position ids": 1,
        "text tower": 24,
    }


def drop(*names):
    return lambda tensors: {k: v for k, v in tensors.items() if k not in names}


@pytest.mark.parametrize(
    "change, expected",
    [
        (drop("model.layers.1.mlp.up_proj.weight"), "{}: model.layers.1.mlp.up_proj.weight is missing, for llm/layers/mlp/up/kernel [3, 32, 48]"),
        (drop("model.norm.weight", "lm_head.weight"), "{}: lm_head.weight is missing, for llm/head [32, 96]; {}: model.norm.weight is missing, for llm/norm/scale [32]"),
        (lambda t: t | {"model.layers.0.self_attn.q_proj.bias": np.ones(32, np.float32)}, "{}/model.safetensors: the model has no parameter for tensor model.layers.0.self_attn.q_proj.bias [32]"),
        (lambda t: t | {"surprise": np.ones((2, 3), np.float32)}, "{}/model.safetensors: the model has no parameter for tensor surprise [2, 3]"),
        (lambda t: t | {"model.norm.weight": np.ones(31, np.float32)}, "{}/model.safetensors: tensor model.norm.weight has shape [31], expected [32] for llm/norm/scale"),
        (lambda t: t | {"model.layers.3.mlp.up_proj.weight": np.ones((48, 32), np.float32)}, "{}/model.safetensors: the model has no parameter for tensor model.layers.3.mlp.up_proj.weight [48, 32]"),
        (lambda t: t | {"model.norm.weight": np.full(32, np.nan, np.float32)}, "{}/model.safetensors: tensor model.norm.weight has NaN or infinite values; get an intact copy"),
        (lambda t: t | {"model.norm.weight": np.ones(32, np.int8)}, "{}/model.safetensors: tensor model.norm.weight has dtype I8; expected one of F64, F32, F16, BF16 (quantised weights are only read from GGUF)"),
    ],
)  # fmt: skip
def test_what_does_not_fit(tmp_path, change, expected):
    copy(tmp_path, "llama2", change)
    with pytest.raises(UserError) as error:
        join(llm=tmp_path)
    assert str(error.value) == expected.replace("{}", str(tmp_path))


def test_a_long_list_is_cut(tmp_path):
    copy(tmp_path, "llama2", lambda tensors: {"model.norm.weight": tensors["model.norm.weight"]})
    with pytest.raises(UserError) as error:
        join(llm=tmp_path)
    assert "model.layers.0.self_attn.v_proj.weight and 2 more are missing" in str(error.value)
    assert str(error.value).endswith("; and 5 more")


@pytest.mark.parametrize("dtype, value, target", [(np.float64, 1e300, "float32"), (np.float32, 3.4e38, "bfloat16")])
def test_values_too_large_for_the_parameters_are_refused(tmp_path, dtype, value, target):
    copy(tmp_path, "llama2", lambda t: t | {"model.norm.weight": np.full(32, value, dtype)})
    with pytest.raises(UserError, match=f"tensor model.norm.weight has values too large for {target}"):
        join(llm=tmp_path, settings={"param_dtype": target})


@pytest.mark.parametrize("rows", [0, 1])
def test_a_table_without_positions(tmp_path, rows):
    """Nothing to interpolate: a shape that is wrong, not a crash."""
    name = "vision_model.embeddings.position_embedding.weight"
    copy(tmp_path, "clip_vision", lambda t: t | {name: np.ones((rows, 32), np.float32)})
    with pytest.raises(
        UserError, match=rf"has shape \[{rows}, 32\], expected \[17, 32\] for vision/position_embedding"
    ):
        join(vision=tmp_path, image_size=28)


def test_a_head_of_its_own_does_not_vanish(tmp_path):
    """config.json says that the head is tied: one with the embedding's values is left, another is an error."""
    tied = lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"]}
    report = join(llm=copy(tmp_path, "smollm2", tied)).report
    assert report.unused == {"head tied to the embedding": ["lm_head.weight"]}
    copy(tmp_path, "smollm2", lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + np.float32(0.1)})
    with pytest.raises(UserError, match=r"the model has no parameter for tensor lm_head.weight \[96, 32\]"):
        join(llm=tmp_path)


def test_only_what_the_config_names_may_be_fresh(tmp_path):
    copy(tmp_path, "llama2", drop("lm_head.weight"))
    loaded = join(llm=tmp_path, fresh=("llm/head",))
    assert loaded.report.fresh["llm/head"] == (32, 96)
    copy(tmp_path, "llama2", drop("model.layers.1.mlp.up_proj.weight"))  # of a stack all or none
    with pytest.raises(UserError, match="model.layers.1.mlp.up_proj.weight is missing"):
        join(llm=tmp_path, fresh=("llm/.*",))


def test_fresh_parts_are_those_of_a_run_without_sources(llama):
    """The same seed gives the fusion its values, whether the LLM is loaded or not."""
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, devices=jax.devices()[:1])
    model, cfg = build_model(llama.cfg), llama.cfg
    abstract = abstract_params(model, cfg, mesh)
    matched = load.match(abstract, cfg, pretrained.open_sources(cfg.init))
    params, _ = initial_params(model, cfg, abstract, matched)
    alone = init_params(model, cfg, abstract)
    for path, leaf in flat(params).items():
        same = np.array_equal(leaf, flat(llama.params if path.startswith("llm/") else alone)[path])
        assert same, path


def test_the_one_set_of_an_official_projector_serves_every_level(tmp_path):
    """Where the model has a set for each: all begin with the file's."""
    rng, shapes = (
        np.random.default_rng(0),
        {"0.weight": (32, 32), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)},
    )
    tensors = {f"mm_projector.{k}": rng.standard_normal(shape).astype(np.float32) for k, shape in shapes.items()}
    save_file(tensors, tmp_path / "mm_projector.safetensors")
    settings = {"fusion.name": "mlp", "fusion.shared": False, "llm.vocab_size": 96}
    loaded = flat(join(fusion=tmp_path / "mm_projector.safetensors", settings=settings).params["fusion"])
    assert loaded["fuse/projector/fc1/kernel"].shape == (3, 32, 32)
    for level in range(3):
        np.testing.assert_array_equal(loaded["fuse/projector/fc1/kernel"][level], tensors["mm_projector.0.weight"].T)
        np.testing.assert_array_equal(loaded["fuse/projector/fc2/bias"][level], tensors["mm_projector.2.bias"])


def test_vocabulary_grows_only_where_asked(tmp_path):
    copy(tmp_path, "llama2")
    found = pretrained.open_sources(dataclasses.replace(join(llm=tmp_path).cfg.init))
    for grow in (False, True):
        cfg = join(llm=tmp_path, grow_vocab=grow).cfg
        cfg = dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, vocab_size=128))
        model = build_model(cfg)
        mesh = sharding.make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
        abstract = abstract_params(model, cfg, mesh)
        if not grow:
            with pytest.raises(UserError, match=r"embed_tokens.weight has shape \[96, 32\], expected \[128, 32\] for llm/embedding; to add rows set config.init.grow_vocab=True"):  # fmt: skip
                load.match(abstract, cfg, found)
            continue
        params = load.read(load.match(abstract, cfg, found)[0], cfg)
    tensors = load_file(tmp_path / "model.safetensors")
    for path, name in {"llm/embedding": "model.embed_tokens.weight", "llm/head": "lm_head.weight"}.items():
        rows = np.asarray(params[path]) if path == "llm/embedding" else np.asarray(params[path]).T
        np.testing.assert_array_equal(rows[:96], tensors[name])
        np.testing.assert_allclose(rows[96:], np.tile(tensors[name].mean(0), (32, 1)), atol=1e-7)


def test_another_picture_size_only_where_asked():
    found = pretrained.open_sources(join(vision=FOLDER / "clip").cfg.init)
    cfg = join(vision=FOLDER / "clip").cfg
    cfg = dataclasses.replace(cfg, vision=dataclasses.replace(cfg.vision, image_size=42))
    abstract = abstract_params(build_model(cfg), cfg, sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}))
    with pytest.raises(UserError, match=r"has shape \[17, 32\], expected \[37, 32\] .*; for another image size set config.init.image_size"):  # fmt: skip
        load.match(abstract, cfg, found)


MEMORY = """
import resource, sys
sys.path.insert(0, "tests")
import jax
from parity_cases import join
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
from sparsecut_jax.weights import load
before = []
original = load.read
load.read = lambda *args: before.append(peak()) or original(*args)
params = join(llm=sys.argv[1], settings={"param_dtype": "bfloat16"}).params["llm"]
jax.block_until_ready(params)
print(before[0], peak(), sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


def test_memory_stays_near_the_size_of_the_parameters(tmp_path):
    """What reading adds to the peak is at most 1.25 times what is read: nothing is held twice."""
    width, mlp, words = 1024, 4096, 4096
    settings = dict(model_type="llama", hidden_size=width, intermediate_size=mlp, vocab_size=words,
                    num_hidden_layers=6, num_attention_heads=8)  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(settings))
    shapes = {"model.embed_tokens.weight": (words, width), "lm_head.weight": (words, width), "model.norm.weight": (width,)}  # fmt: skip
    for i in range(6):
        at = f"model.layers.{i}."
        shapes |= {f"{at}self_attn.{n}_proj.weight": (width, width) for n in "qkvo"}
        shapes |= {f"{at}mlp.{n}_proj.weight": (mlp, width) for n in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj.weight": (width, mlp)}
        shapes |= {f"{at}{n}_layernorm.weight": (width,) for n in ("input", "post_attention")}
    save_file({name: np.ones(shape, jnp.bfloat16) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    done = subprocess.run([sys.executable, "-c", MEMORY, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, peak, size = map(int, done.stdout.split())
    assert size == 2 * sum(math.prod(shape) for shape in shapes.values()) > 200e6
    assert peak - before <= 1.25 * size
