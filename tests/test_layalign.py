"""LayAlign against a reference in float64, and the attention that it adds: masked, gated, and there for generated tokens."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import reference
from sparsecut_jax.inference.decoding import encode_images, generate
from sparsecut_jax.models.attention import Packed
from sparsecut_jax.models.fusion import Fusion
from sparsecut_jax.models.llm import empty_cache
from sparsecut_jax.models.lora import merge
from sparsecut_jax.models.parameters import flatten, unflatten
from sparsecut_jax.models.ways import wiring_of
from sparsecut_jax.planning.collectives import collectives_of, gathered_activations, weight_shapes
from sparsecut_jax.planning.memory import Parameters
from sparsecut_jax.runtime import sharding
from sparsecut_jax.tasks.registry import build_model
from tiny import IMAGE, N, Tiny, make_batch, random_params, refusal, tiny_config

ROWS = [[1, 5, IMAGE, 7, IMAGE, 8, 9], [1, 2, 3, 4], [6, 1, IMAGE, 3, 2]]


def config_of(rows="after", llm=None, **settings):
    settings = dict(layers=(1, 3)) | settings
    injecting = dict(llm_kv=dict(rows=rows))
    llm = dict(layers=4) | (llm or {})
    return tiny_config(fusion=dict(name="layalign", layalign=settings), injecting=injecting, llm=llm)


def model_of(cfg):
    model = build_model(cfg)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), batch_of(cfg, [[1, IMAGE, 2]])))["params"]
    return Tiny(cfg, model, jax.device_put(random_params(shapes)))


def batch_of(cfg, rows=ROWS, **more):
    return make_batch(rows, positions=wiring_of(cfg).positions, **more)


def fused(params, levels, cfg):
    """Levels [K, I, N, C] -> prefix [I, N + 1, D], sources [2J, I, N, D]; one mixture, image and token at a time."""
    p, mix = reference.double(params), np.asarray(params["align"]["mix"], np.float64)
    sources = []
    for r in range(mix.shape[1]):
        x = np.maximum(sum(mix[k, r] * levels[k] for k in range(len(levels))), 0)
        x = reference.linear(p["align"]["fc1"], x)
        sources.append(reference.linear(p["align"]["fc2"], np.maximum(x, 0)) if "fc2" in p["align"] else x)
    hidden = np.maximum(reference.linear(p["prefix"]["fc1"], levels[-1]), 0)
    end = np.broadcast_to(p["prefix"]["end"], (levels.shape[1], 1, cfg.llm.width))
    return np.concatenate([reference.linear(p["prefix"]["fc2"], hidden), end], 1), np.array(sources)


def logits_of(model, batch):
    """The whole model in float64: text rows are read position by position."""
    cfg, layers = model.cfg, model.cfg.fusion.layalign.layers
    b, m, v = batch.views.shape[:3]
    pixels = (np.asarray(batch.views[:, :, 0], np.float64) / 255 - cfg.vision.mean) / cfg.vision.std
    levels = np.array(reference.tower(model.params["vision"], pixels.reshape(b * m, *pixels.shape[2:]), cfg.vision, 5))
    prefix, sources = fused(model.params["fusion"], levels, cfg)
    length, gates = prefix.shape[1], np.asarray(model.params["fusion"]["inject"]["gate"], np.float64)
    x = np.asarray(model.params["llm"]["embedding"], np.float64)[batch.tokens]
    for row, slot in np.argwhere(batch.image_start >= 0):
        start = batch.image_start[row, slot]
        x[row, start : start + length] = prefix[row * m + slot]

    def inside(layer, attention, q, row):
        out = np.zeros(q.shape)
        if layer not in layers:
            return out
        site = layers.index(layer)
        for t in range(len(q)):
            keys, values = [], []
            for slot, start in enumerate(batch.image_start[row]):
                same = start >= 0 and batch.segments[row, t] == batch.segments[row, start] > 0
                if same and (t >= start + length or cfg.injecting.llm_kv.rows == "all"):
                    keys.append(sources[2 * site, row * m + slot])
                    values.append(sources[2 * site + 1, row * m + slot])
            if keys:
                k, v = (
                    reference.projected(attention, name, np.concatenate(tokens), cfg.llm)
                    for tokens, name in ((keys, "k"), (values, "v"))
                )
                out[t] = gates[site] * reference.attend(q[t : t + 1], k, v)[0]
        return out

    mask = reference.visible(batch.segments, batch.branches)
    return reference.decoder(model.params["llm"], x, batch.positions, mask, cfg.llm, inside=inside)[0]


@pytest.fixture(scope="module")
def model():
    return model_of(config_of())


@pytest.mark.parametrize(
    "rows, structure, llm", [("after", "linear", {}), ("all", "mlp", dict(qk_norm=True, qkv_bias=True))]
)
def test_equals_the_reference(rows, structure, llm):
    """Two images in a row, a row of text, and two texts in one sequence, each with an image."""
    model = model_of(config_of(rows, llm, structure=structure))
    batch = batch_of(model.cfg, [*ROWS, [1, IMAGE, 2, 4, IMAGE, 3]])
    batch.segments[3] = np.where(np.arange(32) < 13, 1, 2) * (batch.segments[3] > 0)
    batch.positions[3] = np.where(np.arange(32) < 13, np.arange(32), np.arange(32) - 13)
    batch.image_start[3, 1] = 13
    batch.tokens[3, 13:24] = [0] * 10 + [3]
    batch.segments[3, 24:] = 0
    expected, real = logits_of(model, batch), batch.segments > 0
    np.testing.assert_allclose(model(batch)[real], expected[real], rtol=1e-5, atol=1e-5)


def test_positions_before_the_image(model):
    """Untouched by default, as by the prefix; with rows="all" the image reaches them."""
    batch = batch_of(model.cfg)
    change = lambda model: np.abs(model(batch) - model(batch.replace(views=255 - batch.views))).max(-1)
    before, text = change(model)[0, :2], change(model)[1]
    assert before.max() == 0 and text.max() == 0
    assert change(Tiny(model.cfg, build_model(config_of("all")), model.params))[0, :2].min() > 1e-4


def test_a_gate_of_zero_adds_nothing_and_is_the_first_to_learn(model):
    batch, fusion = batch_of(model.cfg), model.params["fusion"]
    closed = {**fusion, "inject": {"gate": jnp.zeros(2)}}
    other = {**closed, "align": jax.tree.map(lambda x: 2 * x + 1, fusion["align"])}
    logits = [model.apply({**model.params, "fusion": f}, batch)[0] for f in (closed, other, fusion)]
    np.testing.assert_array_equal(logits[0], logits[1])
    assert np.abs(logits[0] - logits[2]).max() > 1e-3

    one, params = batch_of(model.cfg, [[1, IMAGE, 2]], length=13), {"params": {**model.params, "fusion": closed}}
    encoded = encode_images(model.model, params["params"], one.views)

    def hidden(module, encoded):
        x, sight = module.embed(one.tokens, one.image_start, encoded), Packed(one.segments, None, one.positions, 1)
        return module.llm(x, one.positions, sight, module.sources(encoded, one.image_start, one.segments))[0]

    with jax.disable_jit():  # compiled, the two are different programs, which may round differently
        of = lambda encoded: model.model.apply(params, encoded, method=hidden)
        np.testing.assert_array_equal(of(encoded), of(encoded.replace(bank=None)))

    def loss(fusion):
        params = {**model.params, "fusion": fusion}
        return model.model.apply({"params": params}, batch, 32, method="loss")[0]

    gradient = flatten(jax.jit(jax.grad(loss))(closed))
    moves = {path for path, leaf in gradient.items() if np.asarray(leaf).any()}
    assert moves == {"inject/gate", "prefix/end", *(f"prefix/fc{i}/{x}" for i in (1, 2) for x in ("kernel", "bias"))}


@pytest.mark.parametrize(
    "rows, llm, prefix",
    [
        ("after", dict(qk_norm=True, qkv_bias=True, kv_heads=1), True),
        ("all", {}, False),
        ("after", dict(sliding_window=4, scan_layers=False), False),
    ],
    ids=["norms and biases", "without a prefix", "window"],
)
def test_generated_tokens_see_the_image(rows, llm, prefix):
    """A prompt and its answer, token by token and in chunks, as one forward pass has them; a prompt may end in an image."""
    model = model_of(config_of(rows, llm, prefix=prefix))
    batch = batch_of(model.cfg, [[1, 5, IMAGE, 7, IMAGE, 8], [1, 2, 3], [1, 4, IMAGE]])
    length, steps = (batch.segments > 0).sum(1), 4
    encoded = encode_images(model.model, model.params, batch.views)
    inputs = (model.model, model.params, batch.tokens, length, batch.image_start, encoded, steps)
    ids, logits = generate(*inputs, return_logits=True)
    same, near = generate(*inputs, return_logits=True, chunk=5)
    np.testing.assert_array_equal(same, ids)
    np.testing.assert_allclose(near, logits, rtol=0, atol=1e-5)
    for row, n in enumerate(length):
        batch.tokens[row, n : n + steps] = ids[row]
        batch.segments[row, : n + steps] = 1
    forward = model(batch)
    for row, n in enumerate(length):
        np.testing.assert_allclose(logits[row], forward[row, n - 1 : n - 1 + steps], rtol=0, atol=1e-5)
    blind = model.params["fusion"] | {"inject": {"gate": jnp.zeros(2)}}
    assert np.abs(model.apply({**model.params, "fusion": blind}, batch)[0][0] - forward[0]).max() > 1e-3


def test_what_is_kept_beside_the_cache():
    """Keys and values of the two chosen layers alone, computed once, in the dtype of the computation."""
    cfg = config_of()
    model = build_model(cfg, jnp.dtype("bfloat16"))
    batch = batch_of(cfg, [[1, IMAGE, 3]])
    params = jax.eval_shape(lambda: nn.meta.unbox(model.init(jax.random.key(0), batch))["params"])

    def read(params):
        encoded = model.apply({"params": params}, batch.views, method="encode")
        cache = empty_cache(cfg.llm, 1, 40, model.dtype)
        inputs = (batch.tokens, jnp.array([12]), batch.image_start, encoded, cache)
        return model.apply({"params": params}, *inputs, method="prefill")[1]

    kept = jax.eval_shape(read, params).sources
    expected = jax.ShapeDtypeStruct((2, 1, 2 * N, 2, 8), jnp.bfloat16)  # two image slots, two KV heads of width 8
    assert kept == {"k": expected, "v": expected}


def test_adapters_of_keys_and_values_act_on_the_sources():
    """As if they were merged into the matrices."""
    lora = dict(rank=2, alpha=3.0, targets=("llm/layers/attention/[kv]",))
    raw = config_of()
    cfg = dataclasses.replace(raw, lora=dataclasses.replace(raw.lora, **lora))
    adapted = model_of(cfg)
    merged = unflatten(merge(flatten(adapted.params), cfg.lora))
    batch = batch_of(cfg)
    plain = Tiny(raw, build_model(raw), merged)
    np.testing.assert_allclose(adapted(batch), plain(batch), rtol=1e-5, atol=1e-5)
    without = {path: 0 * leaf if path.endswith("lora_b") else leaf for path, leaf in flatten(adapted.params).items()}
    assert np.abs(adapted(batch) - adapted.apply(unflatten(without), batch)[0]).max() > 1e-2


@pytest.mark.parametrize(
    "structure, llm",
    [("linear", {}), ("mlp", dict(kv_heads=1, replicate_kv=True, qk_norm=True, qkv_bias=True))],
    ids=["split KV heads", "whole KV heads"],
)
def test_on_a_mesh(structure, llm):
    """Data, fsdp and tensor axes of two devices each, also where devices hold copies of the only KV head.

    Scores are split by rows and heads, and no activation is gathered.
    """
    model = model_of(config_of(llm=llm, structure=structure))
    batch = batch_of(model.cfg, [*ROWS, ROWS[0]])

    def step(params, batch):
        total, count, _ = model.model.apply({"params": params}, batch, 32, method="loss")
        return total / count

    expected, gradients = jax.jit(jax.value_and_grad(step))(model.params, batch)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    boxed = jax.eval_shape(lambda: model.model.init(jax.random.key(0), batch))["params"]
    with jax.set_mesh(mesh):
        params = jax.device_put(model.params, sharding.param_shardings(boxed, mesh))
        rows = jax.device_put(batch, sharding.batch_sharding(mesh))
        compiled = jax.jit(jax.value_and_grad(step)).lower(params, rows).compile()
        loss, sharded = compiled(params, rows)
    text = compiled.as_text()
    weights = weight_shapes(Parameters(model.cfg, "instruct"), mesh.shape)
    assert gathered_activations(collectives_of(text), weights) == []
    rows, heads, words, tokens = 1, 2, 32, 2 * N  # of a device
    sizes = {math.prod(map(int, shape.split(","))) for shape in re.findall(rf"f32\[([\d,]+),{tokens}\]", text)}
    assert rows * heads * words in sizes and 2 * rows * heads * words not in sizes
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), sharded, gradients)


def test_wiring():
    wiring = wiring_of(config_of(layers=(3, 0)))
    assert wiring.entering == ((2, 3), (), (), (0, 1))
    assert (wiring.names, wiring.levels) == (("keys3", "values3", "keys0", "values0"), (0, 1, 2, 3, 4))
    assert (wiring.positions, wiring_of(config_of(prefix=False)).positions) == (N + 1, 0)
    assert wiring_of(config_of(layers=())).site_count == 4
    for layers in ((4,), (1, 1), (-1,)):
        assert refusal(lambda layers=layers: wiring_of(config_of(layers=layers))) == (
            f"config.fusion.layalign.layers={layers}: expected different layers of the LLM, from 0 to 3"
        )


def test_parameters_of_the_original():
    """At C = 1024 and D = 4096: 4.2 million, 16.8 more with the second matrix, 10.5 for the prefix."""
    vision = dict(width=1024, heads=16, layers=24)
    cfg = config_of(llm=dict(width=4096), layers=(0, 1), structure="mlp")
    cfg = dataclasses.replace(cfg, vision=dataclasses.replace(cfg.vision, **vision))
    module = Fusion(cfg.fusion, wiring_of(cfg), cfg.llm)
    shapes = nn.meta.unbox(jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((24, 1, 1, 9, 1024)))))
    count = lambda *path: sum(leaf.size for name, leaf in flatten(shapes["params"]).items() if name.startswith(path))
    assert count("align/mix", "align/fc1") == 24 * 4 + 1024 * 4096 + 4096
    assert count("align/fc2") == 4096 * 4096 + 4096
    assert count("prefix") == 1024 * 2048 + 2048 + 2048 * 4096 + 4096 + 4096
