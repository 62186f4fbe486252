"""Model FLOPs against what XLA counts in the compiled, unrolled step, where nothing is in a loop and counted once."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from sparsecut_jax import config
from sparsecut_jax.models.layers import fan_in, weight, zeros
from sparsecut_jax.models.llm import Mlp
from sparsecut_jax.planning import work
from sparsecut_jax.planning.compiling import abstract_batch, lower_step
from sparsecut_jax.planning.memory import Parameters
from sparsecut_jax.runtime.sharding import make_mesh
from sparsecut_jax.tasks.registry import build_model

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
    return work.by_part(work.products(cfg, NAME, shapes, batch_size or stage.batch_size, stage.seq_len))


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
    flops = counted(config_of())
    block = 2 * VIEWS * P * (4 * C * C + 2 * C * 768) + 4 * VIEWS * P * P * C
    assert flops["vision"].forward == 2 * VIEWS * N * (14 * 14 * 3) * C + 2 * block
    assert flops["vision"].backward == 0
    assert flops["fusion"].forward == 3 * 2 * IMAGES * N * (5 * C * D + D * D)
    assert flops["llm"].forward == 2 * LLM_LAYER
    assert flops["loss"].forward == 2 * T * D * 1024
    assert flops["total"].forward == sum(flops[part].forward for part in work.PARTS)


def test_backward_by_hand():
    """The fusion's first matrix has an input without a gradient; of the LLM all is twice forward."""
    flops = counted(config_of())
    assert flops["fusion"].backward == 3 * 2 * IMAGES * N * (5 * C * D + 2 * D * D)
    assert flops["llm"].backward == 2 * flops["llm"].forward
    assert flops["loss"].backward == 2 * flops["loss"].forward
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


# --- modules that nobody knows ---


class Odd(nn.Module):
    """A fusion with parameters of odd names and ranks: a matmul of each of three groups of channels, one of tokens with
    one another, one with a weight that is made of two, and a convolution."""

    width: int
    grid: tuple[int, ...]

    @nn.compact
    def __call__(self, level):
        x = level[:, 0]
        count, n, c = x.shape
        of = lambda name, *shape: weight(self, name, shape, (None,) * len(shape), fan_in(shape[-2]))
        x = jnp.einsum("INgc,gcd->INgd", x.reshape(count, n, 3, c // 3), of("θ", 3, c // 3, 256)).reshape(count, n, -1)
        x += jnp.einsum("INC,IMC->INM", x, x) @ x
        x = x @ (of("made_of", 768, 32) @ of("two", 32, 512))
        side = round(n**0.5)
        kernel = of("window", 3, 3, 512, 128)
        x = jax.lax.conv_general_dilated(
            x.reshape(count, side, side, 512), kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return (of("gain", 1, 1)[0, 0] * x).reshape(count, n, 128) @ of("last", 128, self.width)


def test_an_unknown_fusion_is_counted_within_three_percent(monkeypatch):
    monkeypatch.setattr("sparsecut_jax.models.fusing.channel.Channel", Odd)
    cfg = config_of(llm=dict(vocab_size=1088))
    compiled = lower_step(cfg, NAME, jax.devices()[:1]).compile().cost_analysis()["flops"]
    flops = counted(cfg)
    assert flops["total"].model == pytest.approx(compiled, rel=0.03)
    assert flops["fusion"].model > 0.1 * compiled  # so that it matters


class Twisted(Mlp):
    """The LLM's MLP with one more matrix and one more gate."""

    @nn.compact
    def __call__(self, x):
        twist = weight(self, "twist", (x.shape[-1], x.shape[-1]), (None, None), fan_in(x.shape[-1]))
        return self.param("opening", nn.with_logical_partitioning(zeros, ()), ()) * (super().__call__(x) @ twist)


def test_an_unknown_parameter_of_the_llm(monkeypatch):
    before = counted(config_of(llm=dict(vocab_size=1152)))
    monkeypatch.setattr("sparsecut_jax.models.llm.Mlp", Twisted)
    cfg = config_of(llm=dict(vocab_size=1216))
    flops = counted(cfg)
    assert flops["llm"].forward - before["llm"].forward == 2 * 2 * T * D * D
    assert flops["llm"].backward - before["llm"].backward == 2 * 2 * 2 * T * D * D
    shapes = Parameters(cfg, NAME).shapes
    assert work.flops_of_batch(cfg, NAME, shapes, slots=1)(256) == flops["total"].model
