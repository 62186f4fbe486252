"""Granite Docling's connector against a reference in float64, and against transformers' own with the text model behind it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import reference
from parity_cases import FOLDER, join, last_hidden, numbers
from sparsecut_jax.models.fusion import Fusion
from sparsecut_jax.models.ways import wiring_of
from tiny import params_of, refusal, tiny_config


def config_of(path="coarse", levels=(), depth=5, size=32, **llm):
    """8 x 8 tokens of 24 channels, if nothing else is said."""
    fusion = dict(name="docling", docling=dict(path=path, levels=levels))
    return tiny_config(fusion=fusion, vision=dict(image_size=size, layers=depth), llm=llm)


def wiring_with(*given, **named):
    return wiring_of(config_of(*given, **named))


def shuffled(x, size):
    """[64, C] -> [S, size^2 * C], token by token."""
    corners = [(y, x) for y in range(0, 8, size) for x in range(0, 8, size)]
    inside = [(y, x) for y in range(size) for x in range(size)]
    return np.array([np.concatenate([x[8 * (top + y) + left + i] for y, i in inside]) for top, left in corners])


def positions(grid, width):
    table = np.zeros((grid, grid, width))
    for row, column, j in np.ndindex(grid, grid, width // 4):
        frequency = 10000 ** (-4 * j / width)
        for half, place in ((0, column), (width // 2, row)):
            table[row, column, half + j] = np.sin(place * frequency)
            table[row, column, half + width // 4 + j] = np.cos(place * frequency)
    return table.reshape(grid * grid, width)


@pytest.mark.parametrize("path, size", [("coarse", 4), ("fine", 2)])
def test_equals_the_reference(path, size):
    cfg = config_of(path, (4, 0))
    module = Fusion(cfg.fusion, wiring_of(cfg), cfg.llm)
    levels = np.random.default_rng(0).standard_normal((3, 2, 1, 64, 24)).astype(np.float32)
    params = params_of(module, levels)
    fused = jax.jit(module.apply)({"params": params}, levels)
    assert fused.tokens.shape == (2, 64 // size**2, 32)
    p, exact = reference.double(params), levels[:, :, 0].astype(np.float64)
    own, norm = p["connector"], lambda p, x: reference.layer_norm(p, x, 1e-5)
    for image in range(2):
        x = reference.linear(own[path], shuffled(norm(own["norm1"], exact[0, image]), size))
        x = reference.gelu(norm(own["norm2"], x + positions(8 // size, 32)))
        expected = norm(own["norm3"], reference.linear(own["out"], x))
        np.testing.assert_allclose(fused.tokens[image], expected, rtol=1e-5, atol=1e-5)
        for k in range(2):
            merger = reference.layer_of(p[f"{path}_mergers"], k)
            expected = reference.project(merger, norm(merger["norm"], shuffled(exact[1 + k, image], size)))
            np.testing.assert_allclose(fused.bank[k, image], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", ["coarse", "fine"])
def test_equals_transformers(path, tmp_path):
    """The connector by its released names; and its sources after the layers of `GraniteDoclingTextModel`."""
    folder, io = FOLDER / "docling", numbers("docling")
    other = {"coarse": "fine", "fine": "coarse"}[path]
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if f".connector.{other}." not in name}
    save_file(kept, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    own = {"fusion.docling.path": path, "fusion.docling.levels": (0, 2)}
    settings = {"fusion.name": "docling", "vision.image_size": 56, "vision.width": 8, **own}
    loaded = join(llm=tmp_path, fusion=tmp_path, settings=settings)
    assert set(loaded.report.loaded) == {"fusion", "llm"}
    module = Fusion(loaded.cfg.fusion, wiring_of(loaded.cfg), loaded.cfg.llm)
    fused = jax.jit(module.apply)({"params": loaded.params["fusion"]}, io["levels"][:, :, None])
    np.testing.assert_allclose(fused.tokens, io[f"tokens_{path}"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(fused.bank, io[f"sources_{path}"], rtol=0, atol=1e-5)
    rows = io[f"input_ids_{path}"], io[f"image_start_{path}"]
    hidden = last_hidden(loaded, *rows, fused.tokens, fused.bank)
    np.testing.assert_allclose(hidden, io[f"hidden_{path}"], rtol=0, atol=1e-5)


def test_parameters_of_the_original():
    """With CLIP-L/336 and a 7B LLM: 335,685,632 for three levels on the coarse path."""
    vision = dict(image_size=336, patch_size=14, width=1024, heads=16, layers=24)
    cfg = tiny_config(fusion=dict(name="docling"), vision=vision, llm=dict(width=4096))
    module = Fusion(cfg.fusion, wiring_of(cfg), cfg.llm)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((4, 1, 1, 576, 1024))))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == 335_685_632


def test_layers():
    wiring = wiring_with("fine", (4, 0, 3))
    assert wiring.levels == (3, 4, 0, 3)
    assert wiring.entering == ((0,), (1,), (2,), (), (), (), ())
    assert (wiring.names, wiring.positions, wiring.position) == (("vit4", "vit0", "vit3"), 16, "post")


@pytest.mark.parametrize("depth, levels", [(12, (3, 7, 10)), (24, (7, 15, 21)), (5, (0, 2, 3)), (4, (0, 1, 2))])
def test_levels_that_nobody_chose(depth, levels):
    assert wiring_with(depth=depth).levels[1:] == levels


@pytest.mark.parametrize(
    "named, text",
    [
        (dict(levels=(5,)), "config.fusion.docling.levels=(5,): expected different blocks of the vision tower, from 0 to 4"),
        (dict(layers=2), "config.fusion.docling.levels=(0, 2, 3): 3 levels enter after one LLM layer each, but the LLM has 2 layers"),
        (dict(size=24), "config.fusion.docling.path='coarse' joins blocks of 4 x 4 tokens, which do not fill the 6 x 6 tokens of a view"),
        (dict(width=30), "config.fusion.name='docling' needs a multiple of 4 for its table of positions; config.llm.width=30"),
    ],
)  # fmt: skip
def test_what_cannot_be(named, text):
    assert refusal(wiring_with, **named) == text
