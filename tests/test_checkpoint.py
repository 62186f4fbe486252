"""Checkpoints: what comes back is what went in, on any mesh; what is half-written or of another model is not read."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from sparsecut_jax import config as config_lib
from sparsecut_jax.runs.checkpoint import METRIC, Checkpoints, NotFinite, check_resumable, open_run
from sparsecut_jax.runs.parameters import abstract_params
from sparsecut_jax.runtime import sharding
from sparsecut_jax.settings import StageConfig
from sparsecut_jax.tasks.registry import build_model
from sparsecut_jax.training import optimizer as opt
from sparsecut_jax.training import state as state_lib
from sparsecut_jax.types import UserError
from tiny import tiny_config

TRAINABLE = ("fusion/.*", "llm/.*")
TX = opt.adamw(StageConfig(), {})


def mesh_of(data: int, fsdp: int, tensor: int) -> Mesh:
    count = data * fsdp * tensor
    return sharding.make_mesh({"data": data, "fsdp": fsdp, "tensor": tensor}, jax.devices()[:count])


def states(mesh: Mesh, **groups):
    """(abstract state, a state with every value of its own) on a mesh."""
    cfg = tiny_config(**groups)
    model = build_model(cfg)
    abstract = state_lib.abstract_state(abstract_params(model, cfg, mesh), TRAINABLE, TX, mesh)
    rng = np.random.default_rng(0)
    fill = lambda leaf: jax.device_put(
        rng.standard_normal(leaf.shape).astype(leaf.dtype) if leaf.dtype == jnp.float32 else leaf.dtype.type(7),
        leaf.sharding,
    )
    return abstract, jax.tree.map(fill, abstract)


def save(folder, state, step: int, loss=None, keep: int = 1) -> None:
    run = Checkpoints(str(folder), keep)
    run.save(state.replace(step=jnp.int32(step)), {"stage": "align"}, loss)
    run.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    _, state = states(mesh_of(2, 2, 2))
    save(folder, state, 3)
    return folder, state


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (1, 8, 1)])
def test_restored_on_any_mesh_bit_for_bit(saved, shape):
    folder, state = saved
    run = Checkpoints(str(folder), read_only=True)
    abstract, _ = states(mesh_of(*shape))
    back = run.restore_state(3, abstract)
    assert int(back.step) == 3
    for one, other, want in zip(*map(jax.tree.leaves, (back.params, state.params, abstract.params)), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.sharding == want.sharding
    for one, other in zip(*map(jax.tree.leaves, (back.opt_state, state.opt_state)), strict=True):
        np.testing.assert_array_equal(one, other)
    params = run.restore_params(3, abstract.params)
    for one, other in zip(*map(jax.tree.leaves, (params, state.params)), strict=True):
        np.testing.assert_array_equal(one, other)
    run.close()


def test_only_what_is_trained_has_moments(saved):
    _, state = saved
    moments = state.opt_state[1].mu
    assert moments and all(path.split("/")[0] in ("fusion", "llm") for path in moments)


def test_another_model_is_named(saved):
    folder, _ = saved
    abstract, _ = states(mesh_of(1, 1, 1), llm={"mlp_dim": 64})
    run = Checkpoints(str(folder), read_only=True)
    with pytest.raises(UserError, match=r"gate/kernel: expected float32\[7, 32, 64\], got float32\[7, 32, 48\]"):
        run.restore_params(3, abstract.params)


def test_not_finite_is_refused(tmp_path):
    _, state = states(mesh_of(1, 1, 1))
    state.params["llm"]["head"] = state.params["llm"]["head"].at[0, 0].set(jnp.nan)
    with pytest.raises(NotFinite, match="not finite"):
        save(tmp_path, state, 1)
    assert Checkpoints(str(tmp_path), read_only=True).latest is None


def test_latest_and_best_are_kept(tmp_path):
    _, state = states(mesh_of(1, 1, 1))
    for step, loss in ((1, 0.9), (2, 0.3), (3, 0.5), (4, None)):
        save(tmp_path, state, step, loss)
    run = Checkpoints(str(tmp_path), read_only=True)
    assert sorted(run.manager.all_steps()) == [2, 4]
    assert (run.latest, run.best) == (4, 2)
    assert METRIC == "holdout_loss"


def test_a_half_written_checkpoint_is_not_seen(saved, tmp_path):
    folder, state = saved
    shutil.copytree(folder, tmp_path / "run")
    done = tmp_path / "run" / "checkpoints" / "3"
    shutil.copytree(done, done.with_name("4.orbax-checkpoint-tmp"))
    shutil.rmtree(done.with_name("4.orbax-checkpoint-tmp") / "state")
    run = Checkpoints(str(tmp_path / "run"))
    assert run.latest == 3
    run.save(state.replace(step=jnp.int32(4)), {"stage": "align"}, None)  # the same step again
    run.close()
    assert sorted(path.name for path in done.parent.iterdir()) == ["4"]


def test_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        open_run(str(tmp_path))
    with pytest.raises(UserError, match="nowhere' does not exist$"):
        open_run(str(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


def test_what_earlier_versions_did_not_save_is_filled_in(tmp_path):
    """And what they saved must be there."""
    _, state = states(mesh_of(1, 1, 1))
    whole = {"stage": "align", "asked": {}, "config": {}, "tokenizer": "", "data": "d", "seconds": 2.5}
    for step, meta in ((1, whole), (2, whole | {"supervised_tokens": 7}), (3, {"stage": "align"})):
        run = Checkpoints(str(tmp_path), keep=3)
        run.save(state.replace(step=jnp.int32(step)), meta, None)
        run.close()
    run = Checkpoints(str(tmp_path), read_only=True)
    assert run.meta(1) == whole | {"supervised_tokens": 0}
    assert run.meta(2) == whole | {"supervised_tokens": 7}
    with pytest.raises(UserError, match="checkpoints/3 cannot be read"):
        run.meta(3)


def test_settings_that_a_run_did_not_know_yet_have_their_defaults():
    check_resumable({"stage": "align", "asked": {}, "config": {}}, config_lib.check({}), "runs/x")
    with pytest.raises(UserError, match=r"runs/x holds a run with config.seed=0, now it is 3"):
        check_resumable({"stage": "align", "asked": {}, "config": {}}, config_lib.check({"seed": 3}), "runs/x")


def test_what_may_change_on_resume():
    import json

    from sparsecut_jax.config import check, default, to_json

    raw = default()
    old = dict.fromkeys(("asked", "config"), json.loads(to_json(check(raw)))) | {"stage": "align"}
    raw.mesh.data, raw.log_every, raw.data.threads = 4, 3, 1
    check_resumable(old, check(raw), "runs/x")
    raw.stages.align.lr = 0.5
    with pytest.raises(UserError, match=r"runs/x holds a run with config.stages.align.lr=2e-05, now it is 0.5"):
        check_resumable(old, check(raw), "runs/x")


def test_flags_of_a_resumption_that_the_files_overruled_at_the_start():
    """The config file said 12 layers, config.json 6: the run has 6, and no flag changes that now."""
    began = {"stage": "align", "asked": {"init": {"llm": "DIR"}}, "config": {"llm": {"layers": 6, "vocab_size": 64}}}
    resumed = lambda **llm: config_lib.asked({"init": {"llm": "DIR"}, "llm": llm}, [f"llm.{key}" for key in llm])
    check_resumable(began, resumed(), "runs/x")
    check_resumable(began, resumed(vocab_size=0, remat="full"), "runs/x")
    with pytest.raises(UserError) as error:
        check_resumable(began, resumed(layers=12), "runs/x")
    assert str(error.value) == (
        "runs/x holds a run with config.llm.layers=6 from the files of config.init, now 12 is given; leave it out, or "
        "give another --config.workdir"
    )
    began["config"]["llm"]["layers"] = 12
    check_resumable(began, resumed(layers=12), "runs/x")
