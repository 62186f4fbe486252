"""What shortcuts cost: next to nothing of a step's FLOPs and bytes, no position of the LLM and no byte of its cache."""

import jax
import pytest

from planning_configs import load
from sparsecut_jax.models import ways
from sparsecut_jax.models.llm import empty_cache
from sparsecut_jax.planning import memory, work
from sparsecut_jax.planning.compiling import abstract_batch, lower_step
from sparsecut_jax.runtime.sharding import make_mesh

ARGUMENTS = "size=7b,stage=finetune"
LEVELS, LAYERS = (0, 3, 7, 10, 13, 16, 20, 21), (31, 27, 22, 18, 13, 9, 4, 2)
MESH = dict(replica=1, data=1, fsdp=64, tensor=1)


def joined(count, **changes):
    """The 7B config with the first `count` of eight explicit shortcuts, each of a level of its own."""
    shortcuts = dict(shortcuts__density="explicit", shortcuts__vit_levels=LEVELS[:count])
    return load("sparsecut", ARGUMENTS, **shortcuts, shortcuts__llm_layers=LAYERS[:count], **changes)


def step_work(file, arguments=ARGUMENTS, seq_len=2048, **changes):
    cfg, stage = load(file, arguments, **changes) if file != "joined" else joined(**changes)
    shapes = memory.Parameters(cfg, stage).shapes
    return work.by_part(work.products(cfg, stage, shapes, 1, seq_len))


@pytest.mark.parametrize("count", [1, 4, 7])
def test_one_more_costs_a_hundredth_of_the_flops_at_most(count):
    fewer, more = (step_work("joined", count=n)["total"].model for n in (count, count + 1))
    assert 0 < more / fewer - 1 < 0.01


@pytest.mark.parametrize("count", [1, 4, 7])
def test_one_more_costs_a_hundredth_of_the_bytes_at_most(count):
    fewer, more = (
        joined(n, stage__batch_size=64, attention="splash", vision__remat="full", llm__remat="full")
        for n in (count, count + 1)
    )
    totals = [memory.estimate(cfg, stage, MESH, "tpu").total for cfg, stage in (fewer, more)]
    assert 0 < totals[1] / totals[0] - 1 < 0.01


def test_no_position_and_no_byte_of_the_cache():
    """Neither the batch nor the cache of generation knows of shortcuts."""

    def shapes(count):
        cfg, stage = joined(count)
        batch = abstract_batch(cfg, stage, make_mesh({}, jax.devices()[:1]))
        cache = jax.eval_shape(lambda: empty_cache(cfg.llm, 1, 2048, cfg.dtype))
        assert ways.positions(cfg) == 576
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (batch, cache))

    assert shapes(1) == shapes(8)


@pytest.fixture(scope="module")
def compiled():
    """XLA's costs of a step of a two-layer model with one and with two shortcuts, unrolled: a quarter of the 7B model's
    widths, text and image tokens."""

    def costs(count):
        cfg, stage = load(
            "sparsecut", ARGUMENTS, attention="xla", dtype="float32", loss_chunk=512, mesh__fsdp=1,
            vision__width=256, vision__heads=4, vision__mlp_dim=1024, vision__layers=2, vision__select_layer=-1,
            vision__image_size=168, vision__scan_layers=False, vision__remat="none",
            llm__width=1024, llm__heads=8, llm__kv_heads=8, llm__mlp_dim=2752, llm__layers=2, llm__vocab_size=8000,
            llm__scan_layers=False, llm__remat="none", stage__batch_size=1, stage__seq_len=512, stage__buckets=(),
            shortcuts__density="explicit", shortcuts__vit_levels=(0, 1)[:count], shortcuts__llm_layers=(1, 0)[:count],
        )  # fmt: skip
        found = lower_step(cfg, stage, jax.devices()[:1]).compile().cost_analysis()
        ours = work.by_part(work.products(cfg, stage, memory.Parameters(cfg, stage).shapes, 1, 512))["total"].model
        return found["bytes accessed"], found["flops"], ours

    return costs(1), costs(2)


def test_compiled_bytes_of_one_more(compiled):
    """At most a hundredth of a model of two layers, which is a sixteenth of the real one."""
    (fewer, *_), (more, *_) = compiled
    assert 0 < more / fewer - 1 < 0.01


def test_compiled_flops_of_one_more(compiled):
    """Those that are counted analytically, in which a shortcut of the whole model costs a thousandth."""
    (_, fewer, ours_fewer), (_, more, ours_more) = compiled
    assert more - fewer == pytest.approx(ours_more - ours_fewer, rel=0.03)


# --- against others ---


def test_at_most_twelve_percent_above_llava():
    """At LLaVA-1.5's own text lengths and at full length; the tower's four more views stand apart."""
    for seq_len in (776, 2048):
        ours, llava = step_work("sparsecut", seq_len=seq_len), step_work("llava", seq_len=seq_len)
        views = ours["vision"].model * 4 / 5
        assert 1 < (ours["total"].model - views) / llava["total"].model < 1.12
        # LLaVA runs the tower up to block 22 on one view, we up to block 23 on five
        assert ours["vision"].model / llava["vision"].model == pytest.approx(5 * 24 / 23, rel=2e-3)


def test_five_times_the_image_tokens_cost_more_than_three_times_the_llm():
    few, many = (step_work("llava", seq_len=200 + tokens)["llm"].model for tokens in (576, 2880))
    assert many / few >= 3.5
