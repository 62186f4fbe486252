"""Qwen3-VL's mergers against a reference in float64, and against transformers' own with the text model behind them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
from parity_cases import FOLDER, join, last_hidden, numbers
from sparsecut_jax.models.fusion import Fusion
from sparsecut_jax.models.ways import wiring_of
from sparsecut_jax.weights.families import fusion_rules
from tiny import params_of, refusal, tiny_config


def config_of(levels=(), merge=2, depth=5, layers=7, size=16, **fusion):
    fusion = dict(name="qwen3vl", qwen3vl=dict(levels=levels, merge=merge), **fusion)
    return tiny_config(fusion=fusion, vision=dict(image_size=size, layers=depth), llm=dict(layers=layers))


def wiring_with(*given, **named):
    return wiring_of(config_of(*given, **named))


def merged(x, merge):
    """[h * h, C] -> [S, merge^2 * C], token by token."""
    h = int(len(x) ** 0.5)
    corners = [(y, x) for y in range(0, h, merge) for x in range(0, h, merge)]
    inside = [(y, x) for y in range(merge) for x in range(merge)]
    return np.array([np.concatenate([x[(top + y) * h + left + i] for y, i in inside]) for top, left in corners])


@pytest.mark.parametrize("merge", [2, 3])
def test_equals_the_reference(merge):
    cfg = config_of((4, 0), merge, size=24)  # 6 x 6 tokens
    module = Fusion(cfg.fusion, wiring_of(cfg), cfg.llm)
    levels = np.random.default_rng(0).standard_normal((3, 2, 1, 36, 24)).astype(np.float32)
    params = params_of(module, levels)
    fused = jax.jit(module.apply)({"params": params}, levels)
    assert fused.tokens.shape == (2, 36 // merge**2, 32)
    p, exact = reference.double(params), levels[:, :, 0].astype(np.float64)
    for image in range(2):
        normed = reference.layer_norm(p["merger"]["norm"], exact[0, image], 1e-6)
        expected = reference.project(p["merger"], merged(normed, merge))
        np.testing.assert_allclose(fused.tokens[image], expected, rtol=1e-5, atol=1e-5)
        for k in range(2):
            own = reference.layer_of(p["level_mergers"], k)
            normed = reference.layer_norm(own["norm"], merged(exact[1 + k, image], merge), 1e-6)
            np.testing.assert_allclose(fused.bank[k, image], reference.project(own, normed), rtol=1e-5, atol=1e-5)


def test_equals_transformers():
    """The mergers by their released names; and their sources after the layers of `Qwen3VLTextModel`."""
    folder, io = FOLDER / "qwen3vl", numbers("qwen3vl")
    settings = {"fusion.name": "qwen3vl", "fusion.qwen3vl.levels": (0, 2), "vision.image_size": 42, "vision.width": 8}
    loaded = join(llm=folder, fusion=folder, settings=settings)
    assert set(loaded.report.loaded) == {"fusion", "llm"}
    module = Fusion(loaded.cfg.fusion, wiring_of(loaded.cfg), loaded.cfg.llm)
    fused = jax.jit(module.apply)({"params": loaded.params["fusion"]}, io["levels"][:, :, None])
    np.testing.assert_allclose(fused.tokens, io["tokens"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(fused.bank, io["sources"], rtol=0, atol=1e-5)
    hidden = last_hidden(loaded, io["input_ids"], io["image_start"], fused.tokens, fused.bank)
    np.testing.assert_allclose(hidden, io["hidden"], rtol=0, atol=1e-5)


def test_parameters_of_the_original():
    """With CLIP-L/336 and a 7B LLM: 134,277,120 for three levels."""
    vision = dict(image_size=336, patch_size=14, width=1024, heads=16, layers=24)
    cfg = tiny_config(fusion=dict(name="qwen3vl"), vision=vision, llm=dict(width=4096))
    module = Fusion(cfg.fusion, wiring_of(cfg), cfg.llm)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((4, 1, 1, 576, 1024))))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == 134_277_120


def test_layers():
    wiring = wiring_with((4, 0, 3))
    assert wiring.levels == (3, 4, 0, 3)
    assert wiring.entering == ((0,), (1,), (2,), (), (), (), ())
    assert (wiring.names, wiring.positions, wiring.position) == (("vit4", "vit0", "vit3"), 4, "post")


def test_names_do_not_depend_on_a_setting_without_effect():
    """`fusion.shared` is ignored: a file may say either."""
    cfg = config_of(shared=False)
    paths = ["fusion/merger/norm/scale", "fusion/level_mergers/norm/scale"]
    named = {rule.path: rule.name for rule in fusion_rules(cfg, paths)}
    assert [named[path] for path in paths] == [
        "visual.merger.norm.weight",
        "visual.deepstack_merger_list.{i}.norm.weight",
    ]


@pytest.mark.parametrize("depth, levels", [(24, (5, 11, 17)), (4, (0, 1, 2)), (5, (0, 1, 2)), (8, (1, 3, 5))])
def test_levels_that_nobody_chose(depth, levels):
    assert wiring_with(depth=depth).levels[1:] == levels


@pytest.mark.parametrize(
    "named, text",
    [
        (dict(levels=(1, 5)), "config.fusion.qwen3vl.levels=(1, 5): expected different blocks of the vision tower, from 0 to 4"),
        (dict(levels=(1, -1)), "config.fusion.qwen3vl.levels=(1, -1): expected different blocks of the vision tower, from 0 to 4"),
        (dict(levels=(1, 1)), "config.fusion.qwen3vl.levels=(1, 1): expected different blocks of the vision tower, from 0 to 4"),
        (dict(layers=2), "config.fusion.qwen3vl.levels=(0, 1, 2): 3 levels enter after one LLM layer each, but the LLM has 2 layers"),
        (dict(size=12), "config.fusion.qwen3vl.merge=2: expected a divisor of the 3 rows and columns of tokens in a view"),
        (dict(merge=0), "config.fusion.qwen3vl.merge=0: expected a divisor of the 4 rows and columns of tokens in a view"),
    ],
)  # fmt: skip
def test_what_cannot_be(named, text):
    assert refusal(wiring_with, **named) == text
