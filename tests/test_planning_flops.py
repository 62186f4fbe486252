"""Model FLOPs against what XLA counts in the compiled, unrolled step, where nothing is in a loop and counted once."""

import jax
import jax.numpy as jnp
import pytest

from sparsecut_jax import config
from sparsecut_jax.models.sparsecut import build_model
from sparsecut_jax.planning import flops
from sparsecut_jax.planning.compile import abstract_batch, lower_step
from sparsecut_jax.planning.memory import Parameters
from sparsecut_jax.runtime.sharding import make_mesh

NAME = "instruct"


def config_of(stage=(), **groups):
    """A tower of 2 blocks and an LLM of 2 layers with the proportions of a real one, unrolled, nothing computed again.

    The loss is one chunk, as long as a row.
    """
    raw = config.default()
    raw.update(attention="xla", loss_chunk=256, dtype="float32")
    raw.vision.update(image_size=112, patch_size=14, width=192, layers=2, heads=3, mlp_dim=768, select_layer=-1)
    raw.llm.update(vocab_size=1024, width=384, layers=2, heads=6, kv_heads=6, head_dim=64, mlp_dim=1032)
    raw.shortcuts.update(density="explicit", vit_levels=(1, 0), llm_layers=(0, 1))
    for group in (raw.vision, raw.llm):
        group.update(scan_layers=False, remat="none")
    raw.stages.instruct.update(seq_len=256, batch_size=2, **dict(stage))
    for group, values in groups.items():
        raw[group].update(values)
    return config.check(raw)


def counted(cfg, batch_size=None):
    stage = cfg.stages[NAME]
    shapes = Parameters(cfg, NAME).shapes
    return flops.work(flops.products(cfg, NAME, shapes, batch_size or stage.batch_size, stage.seq_len))


ALONE = dict(density="none", vit_levels=(), llm_layers=())
CASES = {  # changes of the stage, and of the model
    "fusion and LLM trained": ((), {}),
    "fusion trained, cross attention": (dict(trainable=("fusion/.*",)), dict(fusion=dict(name="cross_attention"))),
    "all trained, mlp, no shortcuts, grouped heads, q and k normed": (
        dict(trainable=(".*",)),
        dict(fusion=dict(name="mlp"), shortcuts=ALONE, llm=dict(kv_heads=2, qk_norm=True)),
    ),
    "adapters trained, a fusion for each level": (
        dict(trainable=("fusion/.*", ".*lora_[ab]")),
        dict(lora=dict(rank=32), fusion=dict(shared=False)),
    ),
    "one matrix trained, two turns": (dict(trainable=("llm/layers/mlp/down/kernel",), accumulate=2), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_counted_within_three_percent(case):
    """The whole optimizer step. A scan over turns is counted once by XLA, so the figure is that of one turn."""
    stage, groups = CASES[case]
    cfg = config_of(stage, **groups)
    compiled = lower_step(cfg, NAME, jax.devices()[:1]).compile().cost_analysis()["flops"]
    ours = counted(cfg, cfg.stages[NAME].batch_size // cfg.stages[NAME].accumulate)["total"].model
    assert ours == pytest.approx(compiled, rel=0.03)


def test_forward_is_counted_within_three_percent():
    cfg = config_of(llm=dict(tie_embeddings=True))
    model = build_model(cfg)
    mesh = make_mesh({}, jax.devices()[:1])
    batch = abstract_batch(cfg, NAME, mesh)
    params = jax.eval_shape(lambda batch: model.init(jax.random.key(0), batch), batch)
    logits = lambda params, batch: jnp.sum(model.apply(params, batch)[0])
    compiled = jax.jit(logits).lower(params, batch).compile().cost_analysis()["flops"]
    assert counted(cfg)["total"].forward == pytest.approx(compiled, rel=0.03)


# --- by hand ---

N, C, D, P = 64, 192, 384, 65  # tokens, widths, tokens with the class token
IMAGES, VIEWS, T = 2, 10, 512  # of two rows: images, views, positions
LLM_LAYER = 2 * T * (4 * D * D + 3 * D * 1032) + 4 * 2 * 256 * 256 * D


def test_parts_by_hand():
    """Two rows, 5 views each; the tower's last block is the main feature and a level, the first the other level."""
    work = counted(config_of())
    block = 2 * VIEWS * P * (4 * C * C + 2 * C * 768) + 4 * VIEWS * P * P * C
    assert work["vision"].forward == 2 * VIEWS * N * (14 * 14 * 3) * C + 2 * block
    assert work["vision"].backward == 0
    assert work["fusion"].forward == 3 * 2 * IMAGES * N * (5 * C * D + D * D)
    assert work["llm"].forward == 2 * LLM_LAYER
    assert work["loss"].forward == 2 * T * D * 1024
    assert work["total"].forward == sum(work[part].forward for part in flops.PARTS)


def test_backward_by_hand():
    """The fusion's first matrix has an input without a gradient; of the LLM all is twice forward."""
    work = counted(config_of())
    assert work["fusion"].backward == 3 * 2 * IMAGES * N * (5 * C * D + 2 * D * D)
    assert work["llm"].backward == 2 * work["llm"].forward
    assert work["loss"].backward == 2 * work["loss"].forward
    fusion_alone = counted(config_of(dict(trainable=("fusion/.*",))))
    assert fusion_alone["llm"].backward == fusion_alone["llm"].forward + 2 * 4 * 2 * 256 * 256 * D
    assert fusion_alone["loss"].backward == fusion_alone["loss"].forward


def test_what_is_computed_again():
    scores = 4 * 2 * 256 * 256 * D
    down = 2 * T * D * 1032
    again = lambda remat: counted(config_of(llm=dict(remat=remat)))["llm"].again
    assert [again(remat) for remat in ("none", "dots", "full", "offload")] == [
        0, 2 * scores, 2 * (LLM_LAYER - down), 2 * (LLM_LAYER - down),
    ]  # fmt: skip
    assert counted(config_of(vision=dict(remat="full")))["vision"].again == 0
    assert counted(config_of())["loss"].again == 0


def test_every_parameter_has_its_place():
    """Also of towers and decoders with all options."""
    cfg = config_of(
        vision=dict(layer_scale=True, patch_bias=True),
        llm=dict(qkv_bias=True, qk_norm=True),
        fusion=dict(name="cross_attention"),
        lora=dict(rank=4, targets=(".*",)),
    )
    shapes = Parameters(cfg, NAME).shapes
    assert len([flops.place_of(path) for path in shapes]) == len(shapes) > 50
    assert counted(cfg)["llm"].forward > counted(config_of())["llm"].forward
