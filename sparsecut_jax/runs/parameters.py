"""The parameters of a run: their shapes and shardings, fresh ones, and those read from files."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from sparsecut_jax.models.parameters import flatten, unflatten
from sparsecut_jax.models.sparsecut import SparseCut
from sparsecut_jax.models.ways import view_count
from sparsecut_jax.runtime import sharding
from sparsecut_jax.settings import Config
from sparsecut_jax.types import Batch, batch_spec, empty_batch
from sparsecut_jax.weights import load


def example_batch(model: SparseCut, max_images: int) -> Batch:
    """The smallest batch that uses every parameter: one row of one image and one more token."""
    size = model.vision_config.image_size
    image_shape = (view_count(model.wiring), size, size, 3)
    batch = empty_batch(batch_spec(1, model.wiring.positions + 1, max_images, image_shape, extras=model.extras))
    return batch.replace(image_start=np.zeros_like(batch.image_start))


@functools.lru_cache(maxsize=8)
def boxed_shapes(model: SparseCut, max_images: int) -> Any:
    """Shapes and logical axes of all parameters; cached, because tracing the model takes most of a second."""
    return jax.eval_shape(lambda: _init(model, jax.random.key(0), example_batch(model, max_images)))


def _init(model: SparseCut, key: jax.Array, batch: Batch) -> Any:
    """Parameters with their logical axes: all that the loss uses. The values of the batch are never used."""
    rows = sharding.data_parallel()  # one for each shard, so that the mesh can shard the batch
    batch = jax.tree.map(lambda x: jnp.zeros((rows, *x.shape[1:]), x.dtype), batch)
    return model.init(key, batch, batch.tokens.shape[1], method="loss")["params"]


def stage_dtypes(cfg: Config, name: str, matrices: Mapping[str, bool]) -> Callable[[str], jnp.dtype]:
    """Function from a parameter's path to its storage dtype from stage `name` on, for a resolved config.

    Matrices that are not trained any more are stored in the compute dtype, all else in float32.
    matrices: {path: whether the parameter is one}, see `models.parameters.matrices`.
    """
    names = cfg.run_stages[cfg.run_stages.index(name) :] if name in cfg.run_stages else (name,)
    trained = [pattern for n in names for pattern in cfg.stages[n].trainable]

    def dtype_of(path: str) -> jnp.dtype:
        if cfg.param_dtype != "auto":
            return jnp.dtype(cfg.param_dtype)
        whole = not matrices[path] or any(re.fullmatch(pattern, path) for pattern in trained)
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
        fresh = flatten(nn.meta.unbox(_init(model, key, example)))
        return {path: fresh[path].astype(leaf.dtype) for path, leaf in wanted.items()}

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
