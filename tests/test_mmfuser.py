"""`mmfuser` against a reference in float64, which reads one point at a time."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import save_file

import reference
from parity_cases import join
from sparsecut_jax.exporting import export
from sparsecut_jax.models.fusion import Fusion
from sparsecut_jax.models.levels import Projector
from sparsecut_jax.models.ways import wiring_of
from sparsecut_jax.runs.run import Run
from sparsecut_jax.runtime import sharding
from sparsecut_jax.training.report import count
from tiny import N, params_of, refusal, tiny_config

HEADS, SIDE = 4, 3


def config_of(levels=(2, 0), heads=HEADS, **groups):
    return tiny_config(fusion=dict(name="mmfuser", mmfuser=dict(levels=levels, heads=heads)), **groups)


def module_of(cfg):
    return Fusion(cfg.fusion, wiring_of(cfg), cfg.llm)


def drawn(images=2):
    return np.random.default_rng(0).standard_normal((3, images, 1, N, 24)).astype(np.float32)


def initial(module, *inputs):
    return jax.jit(lambda: nn.meta.unbox(module.init(jax.random.key(0), *inputs)["params"]))()


def read(tokens, x, y):
    """tokens [SIDE * SIDE, E] at any place: linear between four tokens, zero beyond the edge."""
    out = np.zeros(tokens.shape[1])
    for row in range(math.floor(y), math.floor(y) + 2):
        for column in range(math.floor(x), math.floor(x) + 2):
            if 0 <= row < SIDE and 0 <= column < SIDE:
                out += (1 - abs(y - row)) * (1 - abs(x - column)) * tokens[row * SIDE + column]
    return out


def deformable(p, queries, levels):
    """queries [N, C], levels [K, N, C] -> [N, C]."""
    out = np.zeros_like(queries)
    for n, query in enumerate(queries):
        for head in range(HEADS):
            offset = query @ p["offset_kernel"][:, head] + p["offset_bias"][head]
            share = np.exp(query @ p["share_kernel"][:, head] + p["share_bias"][head])
            share /= share.sum()
            total = 0.0
            for k, level in enumerate(levels):
                value = level @ p["value_kernel"][:, head] + p["value_bias"][head]
                for point in range(4):
                    dx, dy = offset.reshape(len(levels), 4, 2)[k, point]
                    total = total + share[k * 4 + point] * read(value, n % SIDE + dx, n // SIDE + dy)
            out[n] += total @ p["out_kernel"][head]
    return out + p["out_bias"]


def test_equals_the_reference():
    module, levels = module_of(config_of()), drawn()
    params = params_of(module, levels)
    for name in ("look", "look_again"):  # points up to some tokens away
        params["fuse"][name]["offset_bias"] *= 10
    fused = jax.jit(module.apply)({"params": params}, levels)
    p = reference.double(params)["fuse"]
    for image in range(2):
        x, *others = levels[:, image, 0].astype(np.float64)
        query = reference.layer_norm(p["query_norm"], x, 1e-6)
        a = deformable(p["look"], query, [reference.layer_norm(p["level_norm"], level, 1e-6) for level in others])
        normed = reference.layer_norm(p["norm"], a, 1e-6)
        b = deformable(p["look_again"], normed, [normed])
        expected = reference.project(p["projector"], x + p["scale1"] * (a + p["scale2"] * b))
        np.testing.assert_allclose(fused.tokens[image], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_projector_alone_before_the_first_step(dtype):
    module, levels = module_of(config_of()), jnp.asarray(drawn(), dtype)
    params = initial(module, levels)
    alone = jax.jit(Projector(32).apply)({"params": params["fuse"]["projector"]}, levels[0, :, 0])
    np.testing.assert_array_equal(jax.jit(module.apply)({"params": params}, levels).tokens, alone)


def test_points_of_the_first_step():
    """Head by head to the right, down, left and up, 1 to 4 tokens away."""
    params = initial(module_of(config_of()), drawn(1))["fuse"]["look"]
    points = params["offset_bias"].reshape(HEADS, 2, 4, 2)
    for head, direction in enumerate([(1, 0), (0, 1), (-1, 0), (0, -1)]):
        for level in range(2):
            np.testing.assert_allclose(points[head, level], [np.array(direction) * i for i in (1, 2, 3, 4)], atol=1e-6)
    assert not params["offset_kernel"].any() and not params["share_kernel"].any()


@pytest.mark.parametrize(
    "depth, levels",
    [
        (24, (22, 2, 7, 12, 17)),
        (27, (25, 2, 7, 13, 19)),
        (12, (10, 1, 3, 6, 8)),
        (5, (3, 0, 1, 2, 3)),
        (4, (2, 0, 1, 2, 2)),
    ],
)
def test_levels(depth, levels):
    """With 24 blocks hidden states -22, -17, -12 and -7 of Hugging Face's 25."""
    assert wiring_of(config_of((), vision=dict(layers=depth))).levels == levels


def test_parameters_of_the_original():
    """With CLIP-L and a 7B LLM: 5,190,592 beside the projector."""
    cfg = config_of((), 16, vision=dict(width=1024, heads=16, layers=24), llm=dict(width=4096))
    module = module_of(cfg)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((5, 1, 1, N, 1024))))
    assert count(shapes["params"]) == 26_170_304


def test_begins_with_the_projector_of_llava_and_is_not_written_as_one(tmp_path):
    file = tmp_path / "projector.safetensors"
    names = [f"multi_modal_projector.linear_{i}.{part}" for i in (1, 2) for part in ("weight", "bias")]
    theirs = {name: np.ones((32,) * (1 + name.endswith("weight")), np.float32) for name in names}
    save_file(theirs, file)
    settings = {"fusion.name": "mmfuser", "init.fresh": ("fusion/fuse/(?!projector/).*",)}
    begun = join(fusion=file, settings=settings)
    assert all(np.all(leaf == 1) for leaf in jax.tree.leaves(begun.params["fusion"]["fuse"]["projector"]))
    run = Run("runs/x", 7, begun.cfg, sharding.make_mesh({}, jax.devices()[:1]), begun.model, begun.params, None, None)
    assert refusal(export.write, run, str(tmp_path), "llava", False) == (
        "this model cannot be written as llava: its fusion 'mmfuser' has parameters that LLaVA's projector does not have, as "
        "fusion/fuse/level_norm/bias; use --as=sparsecut"
    )


def test_settings_that_cannot_be():
    assert refusal(config_of, heads=5) == (
        "config.fusion.mmfuser.heads=5: expected a number that divides config.vision.width=24"
    )
    assert refusal(lambda: wiring_of(config_of((0, 5)))) == (
        "config.fusion.mmfuser.levels=(0, 5): expected blocks of the vision tower, from 0 to 4"
    )
