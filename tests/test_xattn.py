"""Gated cross-attention layers against a reference in float64; test_ways.py has the laws that they keep like all ways."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import reference
from sparsecut_jax.models.fusion import Fusion
from sparsecut_jax.models.parameters import flatten
from sparsecut_jax.models.ways import wiring_of
from sparsecut_jax.tasks.registry import build_model
from tiny import IMAGE, Tiny, make_batch, random_params, refusal, tiny_config


def config_of(sees="all", **settings):
    settings = dict(layers=(1, 3), levels=(0, 2, 4)) | settings
    injecting = dict(cross=dict(sees=sees))
    return tiny_config(fusion=dict(name="xattn", xattn=settings), injecting=injecting, llm=dict(layers=4))


def model_of(cfg):
    model = build_model(cfg)
    batch = make_batch([[1, IMAGE, 2]], positions=1)
    return Tiny(cfg, model, random_params(jax.eval_shape(lambda: model.init(jax.random.key(0), batch))["params"]))


def logits_of(model, batch):
    cfg, layers = model.cfg, model.cfg.fusion.xattn.layers
    b, m = batch.views.shape[:2]
    pixels = (np.asarray(batch.views[:, :, 0], np.float64) / 255 - cfg.vision.mean) / cfg.vision.std
    levels = reference.tower(model.params["vision"], pixels.reshape(b * m, *pixels.shape[2:]), cfg.vision, 5)
    fusion = reference.double(model.params["fusion"])
    bank = reference.linear(fusion["projector"], np.concatenate([levels[i] for i in cfg.fusion.xattn.levels], -1))
    x = np.asarray(model.params["llm"]["embedding"], np.float64)[batch.tokens]
    for row, slot in np.argwhere(batch.image_start >= 0):
        x[row, batch.image_start[row, slot]] = fusion["place"]

    def before(layer, x, row):
        if layer not in layers:
            return x
        w = reference.layer_of(fusion["inject"], layers.index(layer))
        norm = lambda name, x: reference.rms_norm({"scale": w[name]}, x, 1e-5)
        x = x.copy()
        for t in range(len(x)):
            seen = [slot for slot, start in enumerate(batch.image_start[row]) if 0 <= start < t]
            seen = seen if cfg.injecting.cross.sees == "all" else seen[-1:]
            if not seen or not batch.segments[row, t]:
                continue
            tokens = np.concatenate([bank[row * m + slot] for slot in seen])
            k, v = (np.einsum("sd,dgh->sgh", tokens, w[name]) for name in "kv")
            q = norm("q_norm", np.einsum("d,dqh->qh", norm("norm1", x[t]), w["q"]))
            out = reference.attend(q[None], norm("k_norm", k), v)[0]
            x[t] += np.tanh(w["gate_attention"]) * np.einsum("qh,qhd->d", out, w["out"])
            y = norm("norm2", x[t])
            gate = y @ w["mlp_gate"]
            x[t] += np.tanh(w["gate_mlp"]) * ((gate * reference.sigmoid(gate) * (y @ w["mlp_up"])) @ w["mlp_down"])
        return x

    mask = reference.visible(batch.segments, batch.branches)
    return reference.decoder(model.params["llm"], x, batch.positions, mask, cfg.llm, before=before)[0]


@pytest.mark.parametrize("sees", ["all", "last"])
def test_equals_the_reference(sees):
    """Two images in a row, a row of text, one image."""
    model = model_of(config_of(sees))
    batch = make_batch([[1, 5, IMAGE, 7, IMAGE, 8, 9], [1, 2, 3, 4], [6, 1, IMAGE, 3, 2]], positions=1)
    expected, real = logits_of(model, batch), batch.segments > 0
    np.testing.assert_allclose(model(batch)[real], expected[real], rtol=1e-4, atol=1e-4)


def test_closed_gates_add_nothing_and_are_the_first_to_learn():
    model = model_of(config_of())
    batch, fusion = make_batch([[1, 5, IMAGE, 7, 8]], positions=1), model.params["fusion"]
    inject = fusion["inject"]
    closed = {**fusion, "inject": {**inject, "gate_attention": jnp.zeros(2), "gate_mlp": jnp.zeros(2)}}
    logits = lambda batch: model.apply({**model.params, "fusion": closed}, batch)[0]
    np.testing.assert_array_equal(logits(batch), logits(batch.replace(views=255 - batch.views)))

    def loss(fusion):
        params = {**model.params, "fusion": fusion}
        return model.model.apply({"params": params}, batch, 32, method="loss")[0]

    gradient = flatten(jax.jit(jax.grad(loss))(closed))
    moves = {path for path, leaf in gradient.items() if np.asarray(leaf).any()}
    assert moves == {"place", "inject/gate_attention", "inject/gate_mlp"}


def test_wiring():
    """By default before every fourth layer and from four blocks, as far as there are so many."""
    wiring = wiring_of(tiny_config(fusion=dict(name="xattn"), llm=dict(layers=9)))
    assert [layer for layer, rows in enumerate(wiring.entering) if rows] == [3, 7]
    assert (wiring.levels, wiring.positions, wiring.grid) == ((0, 1, 3, 4), 1, None)
    assert wiring_of(tiny_config(fusion=dict(name="xattn"), llm=dict(layers=2))).entering == ((), (0,))
    assert refusal(lambda: wiring_of(config_of(layers=(4,)))) == (
        "config.fusion.xattn.layers=(4,): expected different layers of the LLM, from 0 to 3"
    )
    assert refusal(lambda: wiring_of(config_of(levels=(1, 1)))) == (
        "config.fusion.xattn.levels=(1, 1): expected different blocks of the vision tower, from 0 to 4"
    )


def test_parameters_of_a_layer():
    """Of Vicuna-7B's shape 202.4 million: four square matrices, three of the MLP, norms and gates."""
    cfg = config_of(layers=(0,))
    llm = dict(width=4096, heads=32, kv_heads=32, head_dim=128, mlp_dim=11008)
    cfg = dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, **llm))
    module = Fusion(cfg.fusion, wiring_of(cfg), cfg.llm)
    shapes = nn.meta.unbox(jax.eval_shape(lambda: module.init(jax.random.key(0), method="site_weights")))["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes["inject"]))
    assert count == 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096 + 2 * 128 + 2 == 202_383_618
