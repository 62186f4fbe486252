"""The initial state of a run: fresh parameters in their shardings, parts of another run, or shapes for a checkpoint."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import traverse_util
from jax.sharding import Mesh

from sparsecut_jax import sharding
from sparsecut_jax.models.fusion import views_of
from sparsecut_jax.models.lora import is_adapter
from sparsecut_jax.models.sparsecut import SparseCut
from sparsecut_jax.settings import Config
from sparsecut_jax.training import checkpoint
from sparsecut_jax.training import optimizer as opt
from sparsecut_jax.types import Batch, TrainState, UserError
from sparsecut_jax.weights import load

flatten = functools.partial(traverse_util.flatten_dict, sep="/")
unflatten = functools.partial(traverse_util.unflatten_dict, sep="/")


def example_batch(model: SparseCut, max_images: int) -> Batch:
    """The smallest batch that uses every parameter: one row of one image and one more token."""
    t, m = model.vision_config.tokens_per_image + 1, max_images
    size, views = model.vision_config.image_size, views_of(model.fusion_config)
    ints = np.zeros((1, t), np.int32)
    return Batch(
        tokens=ints,
        loss_mask=ints.astype(np.uint8),
        segments=ints,
        branches=None,
        positions=ints,
        views=np.zeros((1, m, views, size, size, 3), np.uint8),
        image_start=np.zeros((1, m), np.int32),
    )


@functools.lru_cache(maxsize=8)
def boxed_shapes(model: SparseCut, max_images: int) -> Any:
    """Shapes and logical axes of all parameters; cached, because tracing the model takes most of a second."""
    return jax.eval_shape(lambda: model.init(jax.random.key(0), example_batch(model, max_images)))["params"]


def stage_dtypes(cfg: Config, name: str) -> Callable[[str], jnp.dtype]:
    """Function from a parameter's path to its storage dtype from stage `name` on, for a resolved config.

    Matrices that are not trained any more are stored in the compute dtype, all else in float32.
    """
    names = cfg.run_stages[cfg.run_stages.index(name) :] if name in cfg.run_stages else (name,)
    trained = [pattern for n in names for pattern in cfg.stages[n].trainable]

    def dtype_of(path: str) -> jnp.dtype:
        if cfg.param_dtype != "auto":
            return jnp.dtype(cfg.param_dtype)
        whole = not opt.is_matrix(path) or any(re.fullmatch(pattern, path) for pattern in trained)
        return jnp.dtype("float32" if whole else cfg.dtype)

    return dtype_of


def abstract_params(
    model: SparseCut, cfg: Config, mesh: Mesh, dtype_of: Callable[[str], jnp.dtype] | None = None
) -> Any:
    """Tree of `jax.ShapeDtypeStruct` with the shapes, dtypes and shardings of all parameters.

    dtype_of: dtype of a path; default: `cfg.param_dtype`, float32 where that is "auto".

    Raises:
      UserError: a parameter cannot be sharded on the mesh.
    """
    boxed = boxed_shapes(model, cfg.data.max_images)
    shardings = sharding.param_shardings(boxed, mesh)
    dtype = jnp.bfloat16 if cfg.param_dtype == "bfloat16" else jnp.float32

    def leaf(path, array, placed):
        name = "/".join(str(k.key) for k in path)
        return jax.ShapeDtypeStruct(array.shape, dtype_of(name) if dtype_of else dtype, sharding=placed)

    return jax.tree_util.tree_map_with_path(leaf, nn.meta.unbox(boxed), shardings)


def init_params(model: SparseCut, cfg: Config, abstract: Any, skip: Collection[str] = ()) -> Any:
    """Fresh parameters, created in their shardings, with the same values on every mesh. Paths in `skip` are omitted."""
    example = example_batch(model, cfg.data.max_images)
    wanted = {path: leaf for path, leaf in flatten(abstract).items() if path not in skip}

    def init(key):
        # One row per data-parallel shard, so that the mesh can shard the batch; its values are never used.
        batch = jax.tree.map(lambda x: jnp.zeros((sharding.data_parallel(), *x.shape[1:]), x.dtype), example)
        made = flatten(nn.meta.unbox(model.init(key, batch)["params"]))
        return {path: made[path].astype(leaf.dtype) for path, leaf in wanted.items()}

    shardings = {path: leaf.sharding for path, leaf in wanted.items()}
    return unflatten(jax.jit(init, out_shardings=shardings)(jax.random.key(cfg.seed)) if wanted else {})


def initial_params(
    model: SparseCut, cfg: Config, abstract: Any, matched: tuple[dict[str, load.Filling], load.Report]
) -> tuple[Any, load.Report]:
    """Parameters from their pretrained sources, the rest fresh, and what came from where.

    matched: what `weights.load.match` found for `abstract`.

    Raises:
      UserError: a file that ends early, or a value that is not finite.
    """
    fillings, report = matched
    loaded = load.read(fillings, cfg)
    fresh = flatten(init_params(model, cfg, abstract, skip=loaded))
    return unflatten({**fresh, **loaded}), report


def abstract_state(
    abstract: Any, trainable: tuple[str, ...], tx: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The train state of a stage as shapes and shardings; moments are sharded like their parameters."""
    moving, _ = opt.split(abstract, trainable)
    whole = sharding.replicated(mesh)
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    opt_state = optax.tree_map_params(
        tx,
        lambda leaf, param: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=param.sharding),
        jax.eval_shape(tx.init, moving),
        moving,
        transform_non_params=lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
    )
    return TrainState(scalar, abstract, opt_state, scalar, scalar)


def begin_stage(
    abstract: TrainState, params: Any, trainable: tuple[str, ...], tx, step: int, skipped: int
) -> TrainState:
    """State at the first step of a stage: the given parameters in the stage's dtypes, and a fresh optimizer."""
    params = jax.tree.map(lambda leaf, target: leaf.astype(target.dtype), params, abstract.params)
    moving, _ = opt.split(params, trainable)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract.opt_state)
    opt_state = jax.jit(tx.init, out_shardings=shardings)(moving)
    place = lambda value: jax.device_put(jnp.int32(value), abstract.step.sharding)
    return TrainState(place(step), params, opt_state, place(skipped), place(0))


# Settings of a part that leave its function as it is: `init_from` does not compare them. A tower has no blocks above the
# highest one that is needed, so their number is compared by shape.
NO_FUNCTION = {
    "vision": ("family", "layers", "select_layer", "scan_layers", "remat"),
    "fusion": ("remat",),
    "llm": ("family", "vocab_size", "max_positions", "scan_layers", "remat", "replicate_kv"),
}


class Origin:
    """The run that cfg.init_from names, to be checked first and then read.

    Attributes:
      run, step, config: its checkpoints, the latest one's step, and its resolved config.
      saved: {path: "float32[3, 4]"} of its parameters; wanted: the paths that cfg.init_parts match.

    Raises:
      UserError: it is no run, or a regex matches nothing in it.
    """

    def __init__(self, cfg: Config):
        self.run, self.step, self.config, _ = checkpoint.open_run(cfg.init_from, setting="config.init_from")
        shapes = self.run.shapes(self.step)
        self.saved = {k.removeprefix("params/"): v for k, v in shapes.items() if k.startswith("params/")}
        for pattern in cfg.init_parts:
            if not any(re.fullmatch(pattern, path) for path in self.saved):
                raise UserError(
                    f"config.init_parts={pattern!r} matches no parameter of {cfg.init_from}; paths look like "
                    f"{', '.join(list(self.saved)[:3])}"
                )
        self.wanted = {path for path in self.saved if any(re.fullmatch(p, path) for p in cfg.init_parts)}

    def check_settings(self, cfg: Config) -> None:
        """Raises UserError if the parts that are taken would compute another function here, and no flag says so."""
        differing = []
        for part, left in NO_FUNCTION.items():
            ours, theirs = vars(getattr(cfg, part)), vars(getattr(self.config, part))
            taken = any(path.startswith(f"{part}/") for path in self.wanted)
            for name in ours if taken else ():
                kept = any(f"{key}.".startswith(f"{part}.{name}.") for key in cfg.init.keep)
                if name not in left and ours[name] != theirs[name] and not kept:
                    differing.append(f"config.{part}.{name}={theirs[name]!r}, here {ours[name]!r}")
        if differing:
            raise UserError(
                f"{cfg.init_from} has {'; '.join(differing)}; with another value its weights would compute something "
                "else: set the same, or leave that part out of config.init_parts"
            )

    def target(self, cfg: Config, flat: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
        """{path: what is to be read} of those that `flat` has too. Raises UserError for other shapes or lost adapters."""
        adapters, lora = {path for path in self.wanted if is_adapter(path)}, self.config.lora
        if adapters - flat.keys() or adapters and cfg.lora.alpha != lora.alpha:
            raise UserError(
                f"{cfg.init_from} has LoRA adapters with config.lora.rank={lora.rank}, .alpha={lora.alpha:g} and "
                f".targets={lora.targets}, without which its LLM is another; set the same, or merge them first: "
                "convert to-hf --merge, then config.init.model"
            )
        dtype = lambda path: jnp.dtype(self.saved[path].partition("[")[0])
        taken = {path: leaf for path, leaf in flat.items() if path in self.wanted}
        found = {path: jax.ShapeDtypeStruct(x.shape, dtype(path), sharding=x.sharding) for path, x in taken.items()}
        self.run.compare(self.step, {"params": unflatten(found)})
        return found

    def load(self, cfg: Config, params: Any) -> tuple[Any, str]:
        """Parameters with cfg.init_parts taken from the run, which is closed, and a report of loaded, fresh and unused
        arrays.

        Raises:
          UserError: as `target`.
        """
        flat = flatten(params)
        with contextlib.closing(self.run):
            target = self.target(cfg, flat)
            loaded = flatten(self.run.restore_params(self.step, unflatten(target)))
        flat |= {path: leaf.astype(flat[path].dtype) for path, leaf in loaded.items()}
        fresh, unused = sorted(set(flat) - set(target)), sorted(set(self.saved) - set(target))
        counts = f"{len(target)} arrays loaded, {len(fresh)} fresh, {len(unused)} unused"
        report = [f"init_from {cfg.init_from} step {self.step}: {counts}"]
        report += [f"  fresh:  {path} {list(flat[path].shape)}" for path in fresh]
        report += [f"  unused: {path} {self.saved[path]}" for path in unused]
        report += [f"  differs: config.{key}={ours!r}, there {theirs!r}" for key, ours, theirs in self.around(cfg)]
        return unflatten(flat), "\n".join(report)

    def around(self, cfg: Config) -> list[tuple[str, Any, Any]]:
        """(setting, its value here, there) of what differs in how parts are joined and pictures are shown to them."""
        settings = lambda c: {
            **{f"shortcuts.{name}": value for name, value in vars(c.shortcuts).items()},
            "vision.select_layer": c.vision.select_layer,
            "data.image_fit": c.data.image_fit,
        }
        ours, theirs = settings(cfg), settings(self.config)
        return [(key, ours[key], theirs[key]) for key in ours if ours[key] != theirs[key]]
