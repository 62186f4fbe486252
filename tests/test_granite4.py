"""Granite 4 Vision's projectors against a reference in float64, and against transformers' own with the text model behind them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import reference
from parity_cases import FOLDER, join, last_hidden, numbers
from sparsecut_jax.models import rules
from sparsecut_jax.models.fusion import Fusion
from sparsecut_jax.models.parameters import flatten, unflatten
from sparsecut_jax.models.ways import wiring_of
from sparsecut_jax.weights.names import Place
from tiny import params_of, refusal, tiny_config


def config_of(size=32, depth=5, layers=8, width=24, own=None):
    """8 x 8 tokens of 24 channels, if nothing else is said. own: settings of granite4."""
    vision = dict(image_size=size, layers=depth, width=width)
    return tiny_config(fusion=dict(name="granite4", granite4=own or {}), vision=vision, llm=dict(layers=layers))


def project(p, x, q, w, group=None):
    """One projector on [h * h, C], window by window; group: of the spatial ones."""
    norm = lambda name, x: reference.layer_norm(p[name], x, 1e-12)
    h = math.isqrt(len(x))
    f = reference.layer_norm(p["norm"], x, 1e-6).reshape(h, h, -1)
    out = np.zeros((h // w * q, h // w * q, p["out"]["kernel"].shape[1]))
    for top, left in np.ndindex(h // w, h // w):
        window, reduced = f[top * w :, left * w :][:w, :w], []
        for y, x in np.ndindex(q, q):
            if group is None:  # every token that the area touches, as adaptive average pooling has it
                rows, columns = (slice(i * w // q, math.ceil((i + 1) * w / q)) for i in (y, x))
                reduced.append(window[rows, columns].mean((0, 1)))
            else:
                reduced.append(window[2 * y + group // 2, 2 * x + group % 2])
        u = norm("norm1", p["query"] + np.array(reduced))
        u = norm("norm2", u + reference.biased_attention(p["self_attention"], u, u))
        memory = window.reshape(w * w, -1) + p["image_positions"]
        u = norm("norm3", u + reference.biased_attention(p["cross_attention"], u, memory))
        u = norm("norm4", u + reference.project(p, u))
        out[top * q :, left * q :][:q, :q] = reference.linear(p["out"], u).reshape(q, q, -1)
    return out.reshape(-1, out.shape[-1])


@pytest.mark.parametrize(
    "rate, spatial, width, q, w",
    [("2/4", True, 128, 2, 4), ("", True, 24, 4, 8), ("3/8", False, 24, 3, 8), ("1/4", False, 24, 1, 4)],
)
def test_equals_the_reference(rate, spatial, width, q, w):
    cfg = config_of(width=width, own=dict(rate=rate, spatial=spatial, levels=(4, 0)))
    module = Fusion(cfg.fusion, wiring_of(cfg), cfg.llm)
    levels = np.random.default_rng(0).standard_normal((2 + spatial, 2, 1, 64, width)).astype(np.float32)
    params = params_of(module, levels)
    fused = jax.jit(module.apply)({"params": params}, levels)
    assert fused.bank.shape == (6 if spatial else 2, 2, (8 // w * q) ** 2, 32)
    assert fused.tokens.shape == fused.bank.shape[1:] and not fused.tokens.any()
    p, exact = reference.double(params), levels[:, :, 0].astype(np.float64)
    for image in range(2):
        expected = [project(reference.layer_of(p["levels"], k), exact[k, image], q, w) for k in range(2)]
        if spatial:
            groups = [reference.layer_of(p["spatial"], group) for group in range(4)]
            expected += [project(own, exact[2, image], q, w, group) for group, own in enumerate(groups)]
        np.testing.assert_allclose(fused.bank[:, image], expected, rtol=1e-5, atol=3e-5)


def theirs_of(path, prefix):
    """The rules of one stack of projectors, "levels" or "spatial", by their released names."""
    layer = f"{prefix}.{{i}}.qformer.encoder.layer.0"
    within = dict(q="attention.query", k="attention.key", v="attention.value", out="output.dense")
    named = lambda kind: {ours: f"{layer}.{kind}.{name}" for ours, name in within.items()}
    return [
        *rules.norm(f"{path}/norm", f"{prefix}.{{i}}.norm"),
        rules.Rule(f"{path}/query", f"{prefix}.{{i}}.query", "1 q c -> q c"),
        rules.Rule(f"{path}/image_positions", f"{prefix}.{{i}}.image_positions", "1 w c -> w c"),
        *rules.norm(f"{path}/norm1", f"{prefix}.{{i}}.qformer.layernorm"),
        *rules.attention(f"{path}/self_attention", named("attention")),
        *rules.norm(f"{path}/norm2", f"{layer}.attention.output.LayerNorm"),
        *rules.attention(f"{path}/cross_attention", named("crossattention")),
        *rules.norm(f"{path}/norm3", f"{layer}.crossattention.output.LayerNorm"),
        *rules.linear(f"{path}/fc1", f"{layer}.intermediate_query.dense"),
        *rules.linear(f"{path}/fc2", f"{layer}.output_query.dense"),
        *rules.norm(f"{path}/norm4", f"{layer}.output_query.LayerNorm"),
        *rules.linear(f"{path}/out", f"{prefix}.{{i}}.out_linear"),
    ]


def test_equals_transformers():
    """Every projector by itself; and, before layers in any order of `Granite4VisionTextModel`, on rows that are empty."""
    folder, io = FOLDER / "granite4", numbers("granite4")
    layers = tuple(map(int, io["layers"]))
    own = dict(rate="2/4", levels=(3, 1), layers=layers[:2], spatial_layers=layers[2:], mlp_dim=20)
    settings = {"fusion.name": "granite4", "vision.image_size": 56, "vision.width": 12}
    settings |= {f"fusion.granite4.{name}": value for name, value in own.items()}
    loaded = join(llm=folder / "model.safetensors", settings=settings)
    tensors, params = load_file(folder / "projectors.safetensors"), flatten(loaded.params["fusion"])
    table = theirs_of("levels", "layerwise_projectors") + theirs_of("spatial", "spatial_projectors")
    assert {rule.path for rule in table} == params.keys()
    for rule in table:
        place, count = Place(rule, params[rule.path].shape[1:]), len(params[rule.path])
        params[rule.path] = np.stack([place.to_ours(tensors.pop(rule.name.format(i=i))) for i in range(count)])
    assert not tensors
    module = Fusion(loaded.cfg.fusion, wiring_of(loaded.cfg), loaded.cfg.llm)
    fused = jax.jit(module.apply)({"params": unflatten(params)}, io["levels"][:, :, None])
    np.testing.assert_allclose(fused.tokens, io["tokens"], rtol=0, atol=0)
    np.testing.assert_allclose(fused.bank, io["sources"], rtol=0, atol=1e-5)
    whole = dataclasses.replace(loaded, params=loaded.params | {"fusion": unflatten(params)})
    hidden = last_hidden(whole, io["input_ids"], io["image_start"], fused.tokens, fused.bank)
    np.testing.assert_allclose(hidden, io["hidden"], rtol=0, atol=1e-5)


def test_parameters_of_the_original():
    """With CLIP-L/336 and a 7B LLM: 151,863,296, without the newline vector."""
    vision = dict(image_size=336, patch_size=14, width=1024, heads=16, layers=24)
    cfg = tiny_config(fusion=dict(name="granite4"), vision=vision, llm=dict(width=4096, layers=8))
    module = Fusion(cfg.fusion, wiring_of(cfg), cfg.llm)
    assert module.wiring.positions == 144
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((5, 1, 1, 576, 1024))))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == 8 * 18_982_912 == 151_863_296


def entered(wiring):
    """{layer: name of its source}."""
    return {layer: wiring.names[rows[0]] for layer, rows in enumerate(wiring.entering) if rows}


@pytest.mark.parametrize(
    "depth, layers, levels, enters",
    [
        (27, 40, (26, 20, 14, 8), (0, 3, 6, 9, 12, 15, 18, 21)),  # the released map
        (24, 32, (23, 18, 12, 7), (0, 2, 5, 7, 10, 12, 14, 17)),
        (5, 8, (4, 3, 2, 1), (0, 1, 2, 3, 4, 5, 6, 7)),
        (5, 6, (4, 3), (0, 1, 2, 3, 4, 5)),
        (3, 8, (2, 1, 0), (0, 1, 2, 3, 4, 5, 6)),
    ],
)
def test_the_map_that_nobody_chose(depth, layers, levels, enters):
    wiring = wiring_of(config_of(depth=depth, layers=layers))
    assert wiring.levels == (*levels, depth - 1)  # the last one is for the groups
    names = [f"vit{level}" for level in levels] + ["spatial0", "spatial1", "spatial2", "spatial3"]
    assert entered(wiring) == dict(zip(enters, names, strict=True))


def test_any_map():
    wiring = wiring_of(config_of(own=dict(levels=(1, 1, 4))))
    assert entered(wiring) == {0: "vit1", 1: "vit1", 2: "vit4", **{3 + g: f"spatial{g}" for g in range(4)}}
    own = dict(levels=(0, 4), layers=(5, 2), spatial_level=3, spatial_layers=(7, 0, 3, 1))
    wiring = wiring_of(config_of(own=own))
    assert entered(wiring) == {5: "vit0", 2: "vit4", 7: "spatial0", 0: "spatial1", 3: "spatial2", 1: "spatial3"}
    assert (wiring.levels, wiring.position, wiring.positions) == ((0, 4, 3), "pre", 16)


TWICE = "config.fusion.granite4 names LLM layer 4 twice, in layers=(0, 4) and spatial_layers=(1, 2, 3, 4); each layer adds one source"


@pytest.mark.parametrize(
    "named, own, text",
    [
        ({}, dict(levels=(0, 4), layers=(0, 4), spatial_layers=(1, 2, 3, 4)), TWICE),
        ({}, dict(levels=(0, 5)), "config.fusion.granite4.levels=(0, 5): expected blocks of the vision tower, from 0 to 4"),
        (dict(layers=4), {}, "config.fusion.granite4 puts 5 sources into LLM layers (0, 1, 2, 3, 4), but the LLM "
         "has 0 to 3; name fewer levels, other layers, or set spatial=False"),
        ({}, dict(layers=(0, 1)), "config.fusion.granite4 has 2 layers for 4 levels and 4 for 4 spatial groups; name one for each"),
        ({}, dict(rate="3/8"), "config.fusion.granite4.rate='3/8': the spatial groups need a rate of one half; set spatial=False"),
        ({}, dict(rate="3/6"), "config.fusion.granite4.rate='3/6': windows of 6 x 6 do not fill the 8 x 8 tokens of a view"),
        ({}, dict(rate="8/4"), "config.fusion.granite4.rate='8/4': expected two sides such as '4/8', the first no larger"),
        ({}, dict(rate="0.5"), "config.fusion.granite4.rate='0.5': expected two sides such as '4/8', the first no larger"),
        (dict(size=12), {}, "config.fusion.granite4.rate: no window of 8, 4 or 2 fills the 3 x 3 tokens of a view; set it"),
        (dict(width=194), {}, "config.fusion.name='granite4' has width // 64 heads, which does not divide config.vision.width=194"),
        ({}, dict(spatial_level=5), "config.fusion.granite4.spatial_level=5: expected a block of the vision tower, from 0 to 4, or -1"),
        ({}, dict(spatial=False, spatial_level=2), "config.fusion.granite4.spatial_level=2 has no effect with spatial=False; leave one out"),
        ({}, dict(spatial=False, spatial_layers=(1,)), "config.fusion.granite4.spatial_layers=(1,) has no effect with spatial=False; leave one out"),
    ],
)  # fmt: skip
def test_what_cannot_be(named, own, text):
    assert refusal(lambda: wiring_of(config_of(**named, own=own))) == text
