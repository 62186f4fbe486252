"""`concat` against a reference in float64."""

import jax
import numpy as np

import reference
from configs import fusion
from sparsecut_jax.config import check
from sparsecut_jax.models.fusion import Fusion
from sparsecut_jax.models.ways import positions, views, wiring_of
from tiny import params_of, tiny_config


def test_equals_the_reference():
    """Two rows of three crops: seven views of nine tokens, one view after the other."""
    cfg = tiny_config(fusion=dict(name="concat", grid=(2, 3)))
    assert (views(cfg), positions(cfg), wiring_of(cfg).levels) == (7, 63, (3,))
    module = Fusion(cfg.fusion, wiring_of(cfg), cfg.llm)
    levels = np.random.default_rng(0).standard_normal((1, 2, 7, 9, 24)).astype(np.float32)
    params = params_of(module, levels)
    fused = jax.jit(module.apply)({"params": params}, levels)
    weights = reference.double(params)["fuse"]["projector"]
    for image in range(2):
        expected = np.concatenate([reference.project(weights, view) for view in levels[0, image]])
        np.testing.assert_allclose(fused.tokens[image], expected, rtol=1e-5, atol=1e-5)
    assert fused.bank is None


def test_tiles_are_one_picture_with_a_vector_after_each_row():
    """Three crops side by side, twice: six rows of nine tokens. The token of row 4, column 7 is the last crop's (1, 1)."""
    cfg = tiny_config(fusion=dict(name="concat", grid=(2, 3), concat=dict(layout="tiles")))
    assert (views(cfg), positions(cfg)) == (7, 9 + 6 * 10)
    module = Fusion(cfg.fusion, wiring_of(cfg), cfg.llm)
    levels = np.random.default_rng(0).standard_normal((1, 2, 7, 9, 24)).astype(np.float32)
    params = params_of(module, levels)
    tokens = np.asarray(jax.jit(module.apply)({"params": params}, levels).tokens)
    weights = reference.double(params)["fuse"]
    for image in range(2):
        seen = [reference.project(weights["projector"], view) for view in levels[0, image]]
        expected = [*seen[0]]
        for y in range(6):
            expected += [seen[1 + y // 3 * 3 + x // 3][y % 3 * 3 + x % 3] for x in range(9)] + [weights["newline"]]
        np.testing.assert_allclose(tokens[image], expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(tokens[image, 9 + 4 * 10 + 7], seen[6][4], rtol=1e-5, atol=1e-5)


def test_longer_sequences_for_the_views():
    """Of 16 tokens each: four more of them, as much text as others have. Few positions more or less change nothing."""
    lengths = {
        way: [stage.seq_len for stage in check(fusion.get_config(f"way={way}")).stages.values()]
        for way in ("concat", "channel", "layalign", "gemel")
    }
    assert lengths == {"concat": [104, 224], "channel": [40, 160], "layalign": [40, 160], "gemel": [40, 160]}
