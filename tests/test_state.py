"""Where a stage begins: which parameters are float32 masters, and which are kept as they are computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import runs
from sparsecut_jax import config as config_lib
from sparsecut_jax.models.parameters import flatten
from sparsecut_jax.runs.checkpoint import Checkpoints
from sparsecut_jax.runs.parameters import abstract_params, stage_dtypes
from sparsecut_jax.runs.run import load_run
from sparsecut_jax.runtime import backends, sharding
from sparsecut_jax.settings import StageConfig
from sparsecut_jax.tasks.registry import build_model
from sparsecut_jax.train import train
from sparsecut_jax.training import optimizer as opt
from sparsecut_jax.training import state
from tiny import matrices_of, tiny_config

STAGES = {"align": StageConfig(trainable=("fusion/.*",)), "instruct": StageConfig(trainable=("fusion/.*", "llm/.*"))}


def dtypes(name, stages=("align", "instruct"), **top):
    """{path: dtype} of the tiny model in stage `name`, computing in bfloat16."""
    cfg = tiny_config(top=dict(dtype="bfloat16", run_stages=stages, **top))
    cfg = backends.resolve(cfg.__class__(**{**vars(cfg), "stages": STAGES}), "cpu")
    model = build_model(cfg, backends.compute_dtype(cfg))
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    abstract = abstract_params(model, cfg, mesh, stage_dtypes(cfg, name, matrices_of(model)))
    return {path: leaf.dtype.name for path, leaf in flatten(abstract).items()}


def test_frozen_matrices_are_kept_in_the_dtype_of_the_computation():
    found = dtypes("instruct")
    assert {path for path, dtype in found.items() if dtype == "bfloat16"} == {
        "vision/blocks/attention/k_kernel",
        "vision/blocks/attention/out_kernel",
        "vision/blocks/attention/q_kernel",
        "vision/blocks/attention/v_kernel",
        "vision/blocks/fc1/kernel",
        "vision/blocks/fc2/kernel",
        "vision/patch_embedding/kernel",
        "vision/position_embedding",
    }
    assert set(found.values()) == {"bfloat16", "float32"}


def test_what_a_later_stage_trains_keeps_its_precision():
    """The LLM is frozen in the first stage: as a run of its own that rounds it, before a second stage it must not."""
    assert dtypes("align")["llm/layers/mlp/gate/kernel"] == "float32"
    alone = dtypes("align", stages=("align",))
    assert alone["llm/layers/mlp/gate/kernel"] == alone["llm/embedding"] == "bfloat16"
    assert alone["llm/layers/norm1/scale"] == alone["fusion/fuse/projector/fc1/kernel"] == "float32"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dtype_that_is_asked_for_is_that_of_all(dtype):
    assert set(dtypes("align", param_dtype=dtype).values()) == {dtype}


def test_a_run_in_bfloat16(tmp_path, one_device):
    """LLM frozen in both stages: stored in bfloat16, resumed with the same bits, and asked as it was trained."""
    runs.draw_rows(tmp_path)
    only = {f"stages.{name}.trainable": ("fusion/.*",) for name in ("align", "instruct")}
    steps = {"stages.align.max_steps": 2, "stages.instruct.max_steps": 2, "eval.test": False, "eval.every": 0}
    cut = {**only, **steps, "dtype": "bfloat16"}
    whole = config_lib.check(runs.small(tmp_path, tmp_path / "whole", set=cut))
    train(whole)
    first = runs.small(tmp_path, tmp_path / "parts", set={**cut, "run_stages": ("align",)})
    train(config_lib.check(first))
    shapes = Checkpoints(str(tmp_path / "whole"), read_only=True).shapes(4)
    assert shapes["params/llm/layers/mlp/gate/kernel"] == "bfloat16[3, 16, 32]"
    assert shapes["params/llm/layers/norm1/scale"] == "float32[3, 16]"
    assert shapes["params/fusion/fuse/projector/fc1/kernel"] == "float32[80, 16]"
    moments = [path for path in shapes if path.startswith("opt_state") and path.split("/")[-1] != "count"]
    assert moments and all("fusion/" in path for path in moments)
    flat = flatten(load_run(str(tmp_path / "whole")).params)
    assert flat["llm/head"].dtype == jnp.bfloat16 and flat["fusion/fuse/projector/fc1/kernel"].dtype == jnp.float32
    frozen = flatten(load_run(str(tmp_path / "parts")).params)["llm/layers/mlp/up/kernel"]
    np.testing.assert_array_equal(np.asarray(flat["llm/layers/mlp/up/kernel"]), np.asarray(frozen))


def test_a_stage_takes_parameters_over_in_its_own_dtypes():
    """From a stage that trained them: rounded where the next one only reads them."""
    stage = StageConfig(trainable=("fusion/.*",))
    params = {"fusion": {"w": jnp.full((2,), 1 / 3)}, "llm": {"w": jnp.full((2,), 1 / 3)}}
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    whole = sharding.replicated(mesh)
    struct = lambda dtype: jax.ShapeDtypeStruct((2,), dtype, sharding=whole)
    tx = opt.adamw(stage, {})
    target = state.abstract_state(
        {"fusion": {"w": struct(jnp.float32)}, "llm": {"w": struct(jnp.bfloat16)}}, stage.trainable, tx, mesh
    )
    begun = state.begin_stage(target, params, stage.trainable, tx, 3, 0)
    assert begun.params["fusion"]["w"].dtype == jnp.float32
    assert begun.params["llm"]["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(begun.params["llm"]["w"], np.float32), 0.333984375)
