"""The whole model against the reference, and what laws for every way of fusing (test_ways.py) do not say."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
from sparsecut_jax.models.attention import Packed
from sparsecut_jax.tasks.registry import build_model
from tiny import IMAGE, LONGROPE, PLAN, N, Tiny, make_batch, params_of, tiny_config

ROWS = [
    [1, 5, IMAGE, 7, 8, 9, 10],
    [1, IMAGE, 11, 12, IMAGE, 13, 14, 15],
    [1, 20, 21, 22, 23],
]
LENGTHS = [6 + N, 6 + 2 * N, 5]


@pytest.fixture(scope="module")
def batch():
    """One image, two images, text only."""
    return make_batch(ROWS)


@pytest.fixture(scope="module")
def logits(tiny, batch):
    return tiny(batch)


def close(got, expected, atol=1e-5):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=atol)


# --- against the reference ---


def real(batch):
    return batch.segments > 0


def test_logits_equal_the_reference(tiny, batch, logits):
    expected = reference.model(tiny.params, batch, tiny.cfg, PLAN, main=3)
    close(logits[real(batch)], expected[real(batch)], 1e-4)


@pytest.mark.parametrize(
    "groups, pairs, main",
    [
        # the block list is reversed before levels are picked, and the main feature is block 0's
        (dict(shortcuts=dict(feature_order_reverse=True)), ((0, 0), (2, 3), (4, 6)), 0),
        # a level twice, two levels in a layer, the main level as a shortcut, after the layer
        (
            dict(
                shortcuts=dict(density="explicit", vit_levels=(2, 0, 2, 3), llm_layers=(0, 5, 5, 3), position="post"),
                fusion=dict(name="cross_attention"),
            ),
            ((2, 0), (3, 3), (0, 5), (2, 5)),
            3,
        ),
        # LLaVA-1.5: no shortcuts, the low-res view alone
        (dict(shortcuts=dict(density="none"), fusion=dict(name="mlp"), vision=dict(select_layer=-1)), (), 4),
    ],
)
def test_other_models_equal_the_reference(groups, pairs, main, batch):
    other = Tiny.build(**groups)
    assert other.model.wiring.shortcuts.pairs == pairs
    expected = reference.model(other.params, batch, other.cfg, pairs, main)
    close(other(batch)[real(batch)], expected[real(batch)], 1e-4)


# --- gradients into the tower, ratios ---


@pytest.fixture(scope="module")
def scaled(tiny, batch):
    """Jitted function (params, scale[1 + K]) -> logits, main feature and each row of the bank times its scale."""

    def forward(model, batch, scale):
        encoded = model.encode(batch.views)
        bank = encoded.bank * scale[1:, None, None, None, None]
        encoded = encoded.replace(tokens=encoded.tokens * scale[0], bank=bank)
        x = model.embed(batch.tokens, batch.image_start, encoded)
        sight = Packed(batch.segments, batch.branches, batch.positions, most=1)
        x, _, _ = model.llm(x, batch.positions, sight, model.sources(encoded, batch.image_start, batch.segments))
        return model.llm.logits(x)

    return lambda params, scale: tiny.model.apply({"params": params}, batch, jnp.asarray(scale), method=forward)


def test_every_level_has_a_gradient_into_the_tower(tiny, scaled):
    """Each path alone: it reaches the blocks up to its level, all of them, and none above."""
    weights = np.random.default_rng(0).standard_normal((3, 32, 64))
    loss = lambda vision, scale: (scaled(tiny.params | {"vision": vision}, scale) * weights).sum()
    gradient = jax.jit(jax.grad(loss))
    for k, level in enumerate([3, 4, 2, 0]):  # the main feature, then the shortcuts' levels
        grads = gradient(tiny.params["vision"], [float(i == k) for i in range(4)])["blocks"]
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
            if "k_bias" in str(path):
                continue  # softmax does not see it: its gradient is rounding
            reached = np.abs(leaf).reshape(len(leaf), -1).max(1) > 0
            assert reached.tolist() == [block <= level for block in range(5)], f"source {k}, {path}"
    nothing = gradient(tiny.params["vision"], [0.0, 0, 0, 0])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(nothing))


def test_shortcut_ratios(tiny, batch):
    """Something of the size of what stands there enters layers 0, 3 and 6, and nothing the others."""
    _, seen = tiny.apply(tiny.params, batch)
    assert seen["shortcut_ratio"].shape == (7, 1)
    assert (np.asarray(seen["shortcut_ratio"][:, 0]) > 0.01).tolist() == [True, False, False, True, False, False, True]
    assert seen["aux_loss"] == 0


# --- other shapes of the same rows ---


def test_a_row_alone_equals_the_row_in_a_batch(tiny, logits):
    """Row 1 without neighbours, padding or empty slots; row 0 with one slot."""
    batch = make_batch(ROWS)
    for b, slots in [(1, 2), (0, 1)]:
        alone = jax.tree.map(operator.itemgetter(slice(b, b + 1)), batch)
        cut = {name: getattr(alone, name)[:, : LENGTHS[b]] for name in ("tokens", "segments", "branches", "positions")}
        alone = alone.replace(**cut, views=alone.views[:, :slots], image_start=alone.image_start[:, :slots])
        close(tiny(alone)[0], logits[b, : LENGTHS[b]])


def test_ids_at_image_positions_do_not_matter(tiny, batch, logits):
    tokens = batch.tokens.copy()
    for b, m in np.argwhere(batch.image_start >= 0):
        start = batch.image_start[b, m]
        tokens[b, start : start + N] = 63
    close(tiny(batch.replace(tokens=tokens)), logits, 0)


# --- rows that hold several texts ---


def test_branches_equal_separate_rows(tiny):
    """Three questions about one image in one row, and each in a row of its own."""
    prefix, questions = [1, 5, IMAGE, 7], [[30, 31, 32], [33, 34], [35, 36, 37, 38]]
    together = make_batch([[*prefix, *sum(questions, [])]] + [ROWS[2]] * 2)
    shared = len(prefix) - 1 + N
    at = shared
    slices = []
    for branch, question in enumerate(questions, 1):
        here = slice(at, at + len(question))
        together.branches[0, here] = branch
        together.positions[0, here] = shared + np.arange(len(question))
        slices.append(here)
        at += len(question)
    packed = tiny(together)[0]
    apart = make_batch([[*prefix, *question] for question in questions])
    separate = tiny(apart.replace(views=np.repeat(together.views[:1], 3, 0)))
    for row, (here, question) in enumerate(zip(slices, questions, strict=True)):
        close(packed[here], separate[row, shared : shared + len(question)])
    close(packed[:shared], separate[0, :shared])


def test_longrope_looks_at_each_text_alone():
    """A text within the original length (12) beside one beyond it, in a row and in a batch, and each by itself."""
    model = Tiny.build(llm=dict(layers=3, rope=LONGROPE))
    short, long = [1, 40, 5, 6, 9], [1, *range(20, 33)]
    packed, batch = make_batch([[*short, *long]]), make_batch([short, long])
    packed.segments[0, 5:19], packed.positions[0, 5:19] = 2, np.arange(14)
    batch.positions[:] *= batch.segments  # as in training: padding has position 0
    together, separate = model(packed)[0], model(batch)
    for n, here, row in ((5, together[:5], 0), (14, together[5:19], 1)):
        close(here, separate[row, :n])
        close(here, model(make_batch([(short, long)[row]], length=n))[0])
    cut = make_batch([long[:12]])
    assert np.abs(model(cut)[0, :12] - separate[1, :12]).max() > 0.1  # the two sets of factors differ


# --- pixels, parameters ---


def test_uint8_views_are_normalised(tiny, batch):
    cfg = tiny.cfg.vision
    levels = jax.jit(lambda views: tiny.model.apply({"params": tiny.params}, views, method="levels"))
    normalised = (batch.views / 255.0 - np.array(cfg.mean)) / np.array(cfg.std)
    assert batch.views.dtype == np.uint8
    out = levels(batch.views)
    assert out.shape == (4, 6, 5, N, 24)
    close(out, levels(normalised.astype(np.float32)), 2e-5)
    # black is -mean / std, and a float is taken as it is
    black = np.broadcast_to(-np.array(cfg.mean) / np.array(cfg.std), (1, 1, 5, 12, 12, 3))
    close(levels(np.zeros((1, 1, 5, 12, 12, 3), np.uint8)), levels(black.astype(np.float32)), 2e-5)


def test_levels_with_the_main_feature_first(tiny, batch):
    """Row 0 is block 3's output, then the levels 4, 2 and 0; view v of image m of row b."""
    out = tiny.model.apply({"params": tiny.params}, batch.views, method="levels")
    view = batch.views[1, 1, 3] / 255.0
    image = (view - tiny.cfg.vision.mean) / tiny.cfg.vision.std
    expected = reference.tower(tiny.params["vision"], image[None], tiny.cfg.vision, 5)
    close(out[:, 1 * 2 + 1, 3], [expected[i][0] for i in (3, 4, 2, 0)], 2e-5)


def test_initial_parameters(tiny, batch):
    params = jax.eval_shape(lambda: tiny.model.init(jax.random.key(0), batch))["params"]
    assert set(params) == {"vision", "fusion", "llm"}
    shapes = jax.tree.map(lambda leaf: leaf.shape, params_of(tiny.model, batch))
    assert shapes["fusion"] == {
        "fuse": {"projector": {"fc1": {"kernel": (120, 32), "bias": (32,)}, "fc2": {"kernel": (32, 32), "bias": (32,)}}}
    }
    assert shapes["llm"] == {
        "embedding": (64, 32),
        "head": (32, 64),
        "norm": {"scale": (32,)},
        "layers": {
            "norm1": {"scale": (7, 32)},
            "norm2": {"scale": (7, 32)},
            "attention": {"q": (7, 32, 4, 8), "k": (7, 32, 2, 8), "v": (7, 32, 2, 8), "out": (7, 4, 8, 32)},
            "mlp": {"gate": {"kernel": (7, 32, 48)}, "up": {"kernel": (7, 32, 48)}, "down": {"kernel": (7, 48, 32)}},
        },
    }
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_only_blocks_that_are_needed_exist(batch):
    """Without shortcuts the main feature of select_layer -2 needs 4 of 5 blocks; with -4 and level 2, 3."""

    def blocks(**groups):
        params = params_of(build_model(tiny_config(**groups)), batch)
        return params["vision"]["blocks"]["fc1"]["bias"].shape[0]

    assert blocks(shortcuts=dict(density="none")) == 4
    plan = dict(density="explicit", vit_levels=(2,), llm_layers=(0,))
    assert blocks(shortcuts=plan, vision=dict(select_layer=-4)) == 3


def test_encoded_rows(tiny, batch):
    """Encode once, ask often: rows of an encoding are picked by index."""
    encoded = jax.jit(lambda views: tiny.model.apply({"params": tiny.params}, views, method="encode"))(batch.views)
    assert encoded.tokens.shape == (3, 2, N, 32)
    assert encoded.bank.shape == (3, 3, 2, N, 32)
    picked = encoded.rows(np.array([2, 0, 0, 1]))
    np.testing.assert_array_equal(picked.tokens, encoded.tokens[np.array([2, 0, 0, 1])])
    np.testing.assert_array_equal(picked.bank[:, 3], encoded.bank[:, 1])


def test_bfloat16(tiny, batch, logits):
    """Computed in bfloat16: logits stay float32 and near."""
    model = build_model(tiny.cfg, jnp.bfloat16)
    out, _ = jax.jit(model.apply)({"params": tiny.params}, batch)
    assert out.dtype == jnp.float32
    off = np.abs(out - logits)[real(batch)]
    assert 1e-4 < off.mean() < 0.05 * np.abs(logits[real(batch)]).mean()
