"""Checkpoints of a run: everything needed to resume, evaluate or generate, written by Orbax in the background.

A checkpoint holds the train state, and as JSON the resolved config, the tokenizer and the position in the
stages; the step alone determines the position in the data. Orbax writes to a temporary folder and renames it, so a
half-written one is never seen.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import traverse_util
from orbax.checkpoint import checkpoint_managers as policies

from sparsecut_jax import config as config_lib
from sparsecut_jax.runs.workdir import no_run
from sparsecut_jax.settings import Config
from sparsecut_jax.text import tokenizer as tokenizer_lib
from sparsecut_jax.text.tokenizer import Tokenizer
from sparsecut_jax.types import TrainState, UserError, first_line

METRIC = "holdout_loss"
CONVERTED = "converted"  # the "stage" of parameters that convert from-hf has joined
META = ("stage", "asked", "config", "tokenizer", "data", "seconds")  # what a checkpoint holds besides its arrays
META_SINCE = {"supervised_tokens": 0}  # what checkpoints of earlier versions lack, and how it is filled in

# Settings that may change on resume. Those of the first line compute the same function with another order of
# additions: losses and parameters of the resumed steps can differ in their last bits from an uninterrupted run.
# The others only affect file locations, output and reading speed: parameters stay bit-identical.
FREE_ON_RESUME = (
    "mesh", "attention", "loss_chunk", "llm.remat", "llm.replicate_kv", "vision.remat", "fusion.remat",
    "workdir", "log_every", "profile", "checkpoint", "eval", "data.threads", "data.workers", "data.images",
    "data.follow_links", "data.test", "data.test_images", "data.max_bad_fraction", "init.keep",
)  # fmt: skip


def meta_of(stage: str, asked: Config, cfg: Config, tokenizer: Tokenizer | None, data: str) -> dict[str, Any]:
    """What a checkpoint holds besides its arrays and its figures (META).

    asked, cfg: the config as it was given, and with all that is known by now; data: the rows' fingerprint.
    """
    return {
        "stage": stage,
        "asked": json.loads(config_lib.to_json(asked)),
        "config": json.loads(config_lib.to_json(cfg)),
        "tokenizer": tokenizer and tokenizer.to_json(),
        "data": data,
    }


class NotFinite(Exception):
    """A parameter is NaN or infinite."""


class Checkpoints:
    """The folder `workdir`/checkpoints: the latest ones and the best one by held-out loss."""

    def __init__(self, workdir: str, keep: int = 1, read_only: bool = False):
        self.workdir = workdir
        self.folder = os.path.abspath(os.path.join(workdir, "checkpoints"))
        best = policies.BestN(
            get_metric_fn=lambda m: m[METRIC], reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        options = ocp.CheckpointManagerOptions(
            best_fn=lambda m: m[METRIC],  # without it Orbax writes no metrics
            best_mode="min",
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
        )
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        }
        usable = not read_only or os.path.isdir(self.folder)
        self.manager = None
        if os.path.exists(self.folder) and not os.path.isdir(self.folder):
            raise UserError(f"{self.folder} is a file; expected a folder of checkpoints")
        if usable:
            try:
                self.manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)
            except (ValueError, KeyError, TypeError) as error:
                raise self._damaged("*", error) from error

    @property
    def latest(self) -> int | None:
        return None if self.manager is None else self.manager.latest_step()

    @property
    def best(self) -> int | None:
        """Step with the lowest held-out loss; the latest where nothing was evaluated."""
        try:
            best = None if self.manager is None else self.manager.best_step()
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged("*/metrics", error) from error
        return self.latest if best is None else best

    def save(self, state: TrainState, meta: dict[str, Any], holdout_loss: float | None) -> None:
        """Writes in the background. Raises NotFinite instead of saving a parameter that is not finite."""
        step = int(state.step)
        if step == self.latest:
            return
        if not bool(_all_finite(state.params)):
            raise NotFinite(f"step {step} has parameters that are not finite")
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            meta=ocp.args.JsonSave(meta),
        )
        self.manager.save(
            step, args=items, metrics=None if holdout_loss is None else {METRIC: holdout_loss}, force=True
        )

    def save_params(self, params: Any, meta: dict[str, Any]) -> None:
        """Saves untrained parameters as step 0."""
        items = ocp.args.Composite(state=ocp.args.StandardSave({"params": params}), meta=ocp.args.JsonSave(meta))
        self.manager.save(0, args=items, force=True)

    def meta(self, step: int) -> dict[str, Any]:
        try:
            meta = self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
            return META_SINCE | meta | {key: meta[key] for key in META}
        except (
            Exception
        ) as error:  # Orbax and TensorStore raise many kinds of errors, all of which mean that it cannot be read
            raise self._damaged(step, error) from error

    def restore_state(self, step: int, target: Any) -> TrainState:
        """The train state, in the shapes, dtypes and shardings of `target` (a tree of ShapeDtypeStruct).

        Raises:
          UserError: the checkpoint holds other parameters or shapes, or cannot be read.
        """
        self.compare(step, target)
        try:
            return self.manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))["state"]
        except Exception as error:
            raise self._damaged(step, error) from error

    def restore_params(self, step: int, target: Any) -> Any:
        """The parameters alone, for evaluation: no optimizer state is read."""
        folder = os.path.join(self.folder, str(step), "state")
        item = {"params": target}
        restore_args = ocp.checkpoint_utils.construct_restore_args(item)
        self.compare(step, item)
        try:
            with ocp.PyTreeCheckpointer() as reader:
                args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
                return reader.restore(folder, args=args)["params"]
        except Exception as error:
            raise self._damaged(step, error) from error

    def close(self) -> None:
        if self.manager is not None:
            self.manager.wait_until_finished()
            self.manager.close()

    def shapes(self, step: int) -> dict[str, str]:
        """{"params/llm/head": "float32[64, 384]", ...}: what the checkpoint holds, without reading it."""
        try:
            arrays = self.manager.item_metadata(step)["state"]
            return _shapes(getattr(arrays, "tree", arrays))
        except Exception as error:
            raise self._damaged(step, error) from error

    def dtypes(self, step: int) -> Callable[[str], jnp.dtype]:
        """Function from a parameter's path to the dtype that the checkpoint holds it in; float32 for what it lacks."""
        saved = self.shapes(step)
        return lambda path: jnp.dtype(saved.get(f"params/{path}", "float32[").partition("[")[0])

    def compare(self, step: int, target: Any) -> None:
        """Raises UserError naming the first arrays that are not as expected; Orbax itself would flood the log."""
        saved = self.shapes(step)
        if not saved:
            raise self._damaged(step, ValueError("its list of arrays is missing"))
        wrong = [
            f"{path}: expected {want}, got {saved.get(path, 'nothing')}"
            for path, want in _shapes(target).items()
            if saved.get(path) != want
        ]
        if wrong:
            raise UserError(f"checkpoint {self.folder}/{step} belongs to a different model: {'; '.join(wrong[:3])}")

    def _damaged(self, step: int | str, error: Exception) -> UserError:
        reason = first_line(error)
        return UserError(
            f"checkpoint {self.folder}/{step} cannot be read ({reason[:200]}); restore it from a copy, or remove that "
            "folder to resume from what is left"
        )


def open_run(
    workdir: str, which: str = "latest", setting: str = ""
) -> tuple[Checkpoints, int, Config, Tokenizer | None]:
    """A finished or running run, to read from: its checkpoints, a step, its config and its tokenizer.

    The tokenizer is None only for converted weights that came without one.

    Args:
      which: "latest", "best" or a step.
      setting: the one that names the workdir, for error messages; "": a flag.

    Raises:
      UserError: `workdir` holds no checkpoint, or not that one.
    """
    checkpoints = Checkpoints(workdir, read_only=True)
    if checkpoints.latest is None:
        raise UserError(no_run(workdir, setting))
    if which in ("latest", "best"):
        step = checkpoints.latest if which == "latest" else checkpoints.best
    else:
        steps = checkpoints.manager.all_steps()
        if not which.isdecimal() or int(which) not in steps:
            raise UserError(
                f"checkpoint {which!r} is not in {workdir}; expected latest, best or one of {sorted(steps)}"
            )
        step = int(which)
    meta = checkpoints.meta(step)
    tokenizer = tokenizer_lib.from_json(meta["tokenizer"]) if meta["tokenizer"] else None
    return checkpoints, step, config_lib.check(meta["config"]), tokenizer


def check_same_data(saved: str, now: str, cfg: Config) -> None:
    """Raises UserError if the rows differ from those the run began with; both are `Source.fingerprint`s."""
    if saved != now:
        raise UserError(
            f"{cfg.workdir} holds a run on {saved} of {cfg.data.source!r}, now there are {now}; "
            "resume with the same data, or give another --config.workdir"
        )


def check_resumable(meta: dict[str, Any], cfg: Config, workdir: str) -> None:
    """Raises UserError naming the first setting that differs from the run's and would change its results."""
    if meta["stage"] == CONVERTED:
        raise UserError(
            f"{workdir} holds converted weights, not a run; give another --config.workdir, and "
            f"--config.init_from={workdir} to start from them"
        )
    # Settings added after the checkpoint have their defaults.
    new, old, resolved = (_flat(c) for c in (cfg, config_lib.check(meta["asked"]), config_lib.check(meta["config"])))
    free = lambda key: any(key == name or key.startswith(name + ".") for name in FREE_ON_RESUME)
    for key in sorted(set(new) | set(old)):
        if free(key):
            continue
        if key.startswith("data.mix.") and key.endswith((".images", ".data_dir")):
            continue
        if new.get(key) != old.get(key):
            raise UserError(
                f"{workdir} holds a run with config.{key}={old.get(key)!r}, now it is {new.get(key)!r}; resume with the "
                "same value, or give another --config.workdir (and --config.init_from to start from this run's parts)"
            )
    for key in cfg.init.keep:
        if not free(key) and new[key] != resolved[key] and (key, new[key]) != ("llm.vocab_size", 0):
            raise UserError(
                f"{workdir} holds a run with config.{key}={resolved[key]!r} from the files of config.init, now "
                f"{new[key]!r} is given; leave it out, or give another --config.workdir"
            )


def as_saved(cfg: Config, saved: dict) -> Config:
    """The config of a resumed run, with the sizes that its pretrained parts determined at the start."""
    old = config_lib.check(saved)
    data = dataclasses.replace(cfg.data, image_fit=old.data.image_fit)
    vision = dataclasses.replace(old.vision, remat=cfg.vision.remat)
    fusion = dataclasses.replace(old.fusion, remat=cfg.fusion.remat)
    llm = dataclasses.replace(old.llm, remat=cfg.llm.remat, replicate_kv=cfg.llm.replicate_kv)
    return dataclasses.replace(cfg, vision=vision, fusion=fusion, shortcuts=old.shortcuts, llm=llm, data=data)


def _flat(cfg: Config) -> dict[str, Any]:
    """{"stages.align.lr": 1e-3, ...}"""
    return traverse_util.flatten_dict(dataclasses.asdict(cfg), sep=".")


@jax.jit
def _all_finite(params: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]))


def _shapes(tree: Any) -> dict[str, str]:
    """{path: "float32[3, 4]"} of a tree of arrays, ShapeDtypeStructs or Orbax metadata."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))[0]
    key = lambda k: str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))))
    return {
        "/".join(key(k) for k in path): f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}"
        for path, leaf in leaves
        if hasattr(leaf, "shape") and leaf.shape is not None
    }
