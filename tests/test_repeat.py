"""`repeat` against the way that it stands beside, given equal levels: what differs between the two is the levels alone."""

import jax
import numpy as np
import pytest

from sparsecut_jax.config import asked, default
from sparsecut_jax.models.fusion import Fusion
from sparsecut_jax.models.ways import wiring_of
from tiny import params_of, refusal, tiny_config

BASES = ("channel", "cross_attention", "mlp")


def config_of(base="channel", shared=True, **groups):
    return tiny_config(fusion=dict(name="repeat", repeat=dict(base=base), shared=shared), **groups)


def test_enters_where_levels_would():
    """Also twice into a layer, where two levels would meet."""
    plan = dict(density="explicit", vit_levels=(4, 0, 1, 2), llm_layers=(0, 3, 3, 6), position="post")
    shared, apart = (wiring_of(config_of(shared=shared, shortcuts=plan)) for shared in (True, False))
    assert (shared.levels, shared.names) == ((3,), ("main",))
    assert shared.entering == ((0,), (), (), (0, 0), (), (), (0,))
    assert (apart.levels, apart.names) == ((3, 3, 3, 3, 3), ("main0", "main1", "main2", "main3"))
    assert apart.entering == ((0,), (), (), (1, 2), (), (), (3,))
    assert (shared.position, shared.grid, shared.positions) == ("post", (2, 2), 9)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("base", BASES)
def test_is_its_base_with_equal_levels(base, shared):
    """The same parameters make the same tokens and sources."""
    cfg = config_of(base, shared)
    like = tiny_config(fusion=dict(name=base, shared=shared))
    wiring, levels_wiring = wiring_of(cfg), wiring_of(like)
    views = 1 if base == "mlp" else 5
    main = np.random.default_rng(0).standard_normal((1, 2, views, 9, 24)).astype(np.float32)
    all_alike = np.repeat(main, 4, 0)
    module, beside = Fusion(cfg.fusion, wiring, cfg.llm), Fusion(like.fusion, levels_wiring, like.llm)
    params = params_of(beside, all_alike)
    fused = jax.jit(module.apply)({"params": params}, main if shared else all_alike)
    expected = jax.jit(beside.apply)({"params": params}, all_alike)
    np.testing.assert_allclose(fused.tokens, expected.tokens, rtol=1e-5, atol=1e-5)
    sources = [source for layer, rows in enumerate(wiring.entering) for source in fused.bank[np.array(rows, int)]]
    theirs = [source for rows in levels_wiring.entering for source in expected.bank[np.array(rows, int)]]
    assert len(sources) == len(theirs) == 3
    np.testing.assert_allclose(np.array(sources), np.array(theirs), rtol=1e-5, atol=1e-5)


def test_nothing_to_repeat():
    cfg = config_of(shortcuts=dict(density="none"))
    assert refusal(wiring_of, cfg) == (
        "config.fusion.name='repeat' repeats the main feature through shortcuts, but config.shortcuts.density='none'; "
        "choose another density, or config.fusion.name='channel'"
    )


def test_crops_that_only_some_bases_read():
    raw = default()
    raw.fusion.update(name="repeat", grid=(2, 3))
    assert wiring_of(asked(raw, ["fusion.grid"])).grid == (2, 3)
    raw.fusion.repeat.base = "mlp"
    assert refusal(asked, raw, ["fusion.grid"]) == (
        "config.fusion.grid=(2, 3) has no effect with config.fusion.name='repeat', which reads no crops; leave it out"
    )
