"""The only file that knows mesh axes: logical axis names on one side, the mesh on the other.

Weights and activations name their axes in words (`"embed"`, `"batch"`); `RULES` says which mesh axes
split each of them. A word that is not in the table and two words that claim the same mesh axis raise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from sparsecut_jax.settings import Config
from sparsecut_jax.types import UserError

MESH_AXES = ("replica", "data", "fsdp", "tensor")  # those that say most to one another come last: fast links

RULES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": ("replica", "data", "fsdp"),
    "batch_of_copies": ("replica", "data"),  # where the embed axis is split as well
    "length": (),
    "act_embed": (),
    "act_heads": ("tensor",),
    "act_kv_heads": ("tensor",),
    "act_mlp": ("tensor",),
    "act_vocab": ("tensor",),
    "bank": (),
    # weights; none over replica or data, whose devices hold the same ones
    "layers": (),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "patch": (),
    "norm": (),
    "rank": ("tensor",),  # of an adapter's matrix that has embed
    "rank_alone": ("fsdp",),  # of one that has not
}
OR_WHOLE = ("kv_heads", "act_kv_heads")  # not split where the devices do not divide them (llm.replicate_kv)
SMALL = 2**24  # bytes; a parameter up to this size may be whole where no device count divides its axis


# --- meshes ---


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh over `devices` (default: all; those of `jax.experimental.topologies` need not be here).

    An axis that `sizes` leaves out has one device, and one size may be -1: what is left over. Where the devices are
    several slices, which slow links join, the replica axis runs over them.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or replica does not go with the slices.
    """
    try:
        devices = jax.devices() if devices is None else devices
    except RuntimeError as error:  # JAX_PLATFORMS names something that is not here
        raise UserError(f"no devices: {str(error).splitlines()[0]}") from error
    shape = list(mesh_sizes(sizes, len(devices), devices[0].platform).values())
    return Mesh(device_grid(shape, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def mesh_sizes(sizes: Mapping[str, int], count: int, platform: str) -> dict[str, int]:
    """The size of every mesh axis on `count` devices, which need not exist; see `make_mesh`. Raises UserError."""
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    asked = mesh_text(dict(zip(MESH_AXES, shape, strict=True)))
    if shape.count(-1) > 1 or any(size == 0 or size < -1 for size in shape):
        raise UserError(f"{asked}: sizes must be positive, and at most one of them -1 (what is left over)")
    known = math.prod(size for size in shape if size != -1)
    wanted = f"a multiple of {known}" if -1 in shape else str(known)
    if -1 in shape:
        shape[shape.index(-1)] = max(1, count // known)
    if math.prod(shape) != count:
        nearest = mesh_text(dict(zip(MESH_AXES, _nearest(shape, count), strict=True)))
        raise UserError(
            f"{asked} asks for {wanted} devices, but there are {count} {platform} devices; "
            f"change config.mesh so that its sizes multiply to {count}, for example {nearest}"
        )
    return dict(zip(MESH_AXES, shape, strict=True))


def device_grid(shape: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """Devices [replica, data, fsdp, tensor], laid so that the last axes have the fastest links."""
    slices, replica = len({getattr(device, "slice_index", 0) for device in devices}), shape[0]
    if slices > 1 and replica % slices == 0:
        inner, outer = (replica // slices, *shape[1:]), (slices, 1, 1, 1)
        return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    if slices > 1 and devices[0].platform == "tpu":  # the slices of GPUs are nodes, whose links bear other axes too
        raise UserError(
            f"config.mesh.replica={replica} does not go with {slices} slices of {len(devices) // slices} devices, which "
            f"slow links join; expected config.mesh.replica={slices} or a multiple of it"
        )
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def mesh_text(sizes: Mapping[str, int]) -> str:
    """ "mesh(data=4, fsdp=2, tensor=1)"; replica only where there are several."""
    return f"mesh({', '.join(f'{axis}={size}' for axis, size in sizes.items() if axis != 'replica' or size != 1)})"


def _nearest(shape: Sequence[int], count: int) -> tuple[int, ...]:
    """The sizes that multiply to `count` and are nearest to `shape`, by their ratios."""

    def factors(n: int, axes: int) -> list[tuple[int, ...]]:
        if axes == 1:
            return [(n,)]
        return [(d, *rest) for d in range(1, n + 1) if n % d == 0 for rest in factors(n // d, axes - 1)]

    off = lambda sizes: sum(abs(math.log(a / b)) for a, b in zip(sizes, shape, strict=True))
    return min(factors(count, len(shape)), key=off)


def ways(name: str, mesh: Mesh | None = None) -> int:
    """Devices that `mesh` splits an axis `name` over; of the mesh in use if none is given, and 1 where none is set."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return 1 if mesh.empty else _ways(RULES[name], mesh.shape)


def data_parallel(mesh: Mesh | None = None) -> int:
    """Number of ways the rows of a batch are split; on the mesh that is set, if none is given."""
    return ways("batch", mesh)


def check_mesh(cfg: Config, sizes: Mapping[str, int]) -> None:
    """What a mesh of these sizes (`mesh.shape`) asks of a model and its batches; no device is needed.

    Raises:
      UserError: heads, widths, the vocabulary (0: not known yet) or the rows of a batch cannot be split.
    """
    tensor, llm = sizes["tensor"], cfg.llm
    widths = {
        "config.vision.heads": cfg.vision.heads,
        "config.vision.mlp_dim": cfg.vision.mlp_dim,
        "config.llm.heads": llm.heads,
        "config.llm.mlp_dim": llm.mlp_dim,
        "config.llm.width": llm.width,  # of the fusion's hidden layer too
        "config.llm.vocab_size": llm.vocab_size,
    }
    if cfg.fusion.name == "cross_attention":
        widths["config.vision.width // 64"] = max(1, cfg.vision.width // 64)
    kv_heads = {} if llm.replicate_kv else {"config.llm.kv_heads": llm.kv_heads}
    most = math.gcd(*widths.values(), *kv_heads.values())
    fitting = f"tensor={' or '.join(str(n) for n in range(1, most + 1) if most % n == 0)}"
    for key, value in widths.items():
        if value % tensor:
            raise UserError(f"{key}={value} cannot be split over mesh axis tensor={tensor}; expected {fitting}")
    if kv_heads and llm.kv_heads % tensor:
        raise UserError(
            f"config.llm.kv_heads={llm.kv_heads} cannot be split over mesh axis tensor={tensor}; expected {fitting}, or "
            "config.llm.replicate_kv=True, which gives every device all of them"
        )
    split = _ways(RULES["batch"], sizes)
    for name in cfg.run_stages:
        stage = cfg.stages[name]
        rows, turn = stage.batch_size // stage.accumulate, split * stage.accumulate
        if rows % split == 0:
            continue
        below = stage.batch_size // turn * turn
        mended = f"batch_size={f'{below} or ' if below else ''}{below + turn}"
        fewer = next((n for n in range(stage.accumulate, 0, -1) if stage.batch_size % (split * n) == 0), 0)
        raise UserError(
            f"config.stages.{name}.batch_size / accumulate = {rows} rows cannot be split over the {split} devices of mesh "
            f"axes {' x '.join(RULES['batch'])}; expected {mended}{f', or accumulate={fewer}' if fewer else ''}"
        )


# --- layouts ---


def spec(names: tuple[str | None, ...]) -> PartitionSpec:
    """Logical names, one per axis -> PartitionSpec. Raises on an unknown name or a mesh axis used twice."""
    return _partition(_mesh_axes(names))


def _mesh_axes(names: tuple[str | None, ...]) -> list[tuple[str, ...]]:
    used: set[str] = set()
    found: list[tuple[str, ...]] = []
    for name in names:
        if name is not None and name not in RULES:
            raise KeyError(f"unknown logical axis {name!r} in {names}; known: {', '.join(RULES)}")
        axes = RULES[name] if name is not None else ()
        if used.intersection(axes):
            raise ValueError(f"logical axes {names} use mesh axis {sorted(used.intersection(axes))} twice")
        used.update(axes)
        found.append(axes)
    return found


def _partition(axes: Sequence[tuple[str, ...]]) -> PartitionSpec:
    return PartitionSpec(*(part if len(part) > 1 else part[0] if part else None for part in axes))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pin the layout of an activation; the identity where no mesh is set (plain single-device use)."""
    if len(names) != x.ndim:
        raise ValueError(f"{len(names)} axis names {names} for an array of shape {x.shape}")
    resolved = spec(tuple(None if n in OR_WHOLE and x.shape[i] % ways(n) else n for i, n in enumerate(names)))
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, resolved)


def constrain_weight(x: jax.Array, *names: str | None) -> jax.Array:
    """Pin a weight, cast for its use, to the split it is stored in; so is its gradient then.

    Collecting it and scattering its gradient thus happens in the dtype of x. Without it XLA sums whole gradients on
    every device, and takes its part of them only after a cast.
    """
    mesh = jax.sharding.get_abstract_mesh()
    found = None if mesh.empty else _weight_spec(x.shape, names, x.dtype.itemsize, mesh.shape)
    return x if found is None else jax.lax.with_sharding_constraint(x, found)


def param_shardings(boxed: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Tree of `nn.with_logical_partitioning` boxes (shapes are enough) -> tree of NamedSharding.

    Raises:
      UserError: a parameter that is not small cannot be split as its names say.
    """
    is_box = lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)

    def place(path: tuple, box: Any) -> NamedSharding:
        if not is_box(box):
            return NamedSharding(mesh, PartitionSpec())
        found = _box_spec(box, mesh.shape)
        if found is None:
            name, asked = "/".join(str(key.key) for key in path), dict(mesh.shape)
            boxes = jax.tree.leaves(boxed, is_leaf=is_box)
            raise UserError(
                f"{mesh_text(asked)} cannot split parameter {name} of shape {box.value.shape} as {spec(box.names)}; "
                f"{_mended(boxes, asked)}"
            )
        return NamedSharding(mesh, found)

    return jax.tree_util.tree_map_with_path(place, boxed, is_leaf=is_box)


def _box_spec(box: Any, sizes: Mapping[str, int]) -> PartitionSpec | None:
    return _weight_spec(box.value.shape, box.names, box.value.dtype.itemsize, sizes)


def _weight_spec(
    shape: tuple[int, ...], names: tuple[str | None, ...], itemsize: int, sizes: Mapping[str, int]
) -> PartitionSpec | None:
    """`spec`, with a mesh axis that does not divide its own axis moved to the largest other that it divides.

    Where there is none, a small parameter is whole, and for another one the result is None.
    """
    axes = _mesh_axes(names)
    for i, name in enumerate(names):
        if shape[i] % _ways(axes[i], sizes) == 0:
            continue
        homeless, axes[i] = axes[i], ()
        fits = [j for j, size in enumerate(shape) if j != i and size % _ways((*axes[j], *homeless), sizes) == 0]
        fits = [j for j in fits if names[j] != "layers"]  # a loop over layers would collect them all
        if name in OR_WHOLE:
            continue
        if fits:
            j = max(fits, key=lambda j: shape[j])
            axes[j] = (*axes[j], *homeless)
        elif math.prod(shape) * itemsize > SMALL:
            return None
    return _partition(axes)


def _mended(boxes: list[Any], sizes: dict[str, int]) -> str:
    """Mesh sizes that can split all parameters, as many devices and rows as before."""
    data, fsdp = sizes["data"], sizes["fsdp"]
    for fewer in range(fsdp - 1, 0, -1):
        tried = {**sizes, "data": data * fsdp // fewer, "fsdp": fewer}
        if fsdp % fewer == 0 and all(isinstance(b, nn.meta.AxisMetadata) and _box_spec(b, tried) for b in boxes):
            return f"{mesh_text(tried)} can"
    return "choose mesh sizes that divide its axes"


def _ways(axes: Sequence[str], sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[axis] for axis in axes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the data-parallel axes, everything else whole."""
    return NamedSharding(mesh, spec(("batch",)))


def platform(mesh: Mesh) -> str:
    """ "cpu", "gpu" or "tpu"."""
    return mesh.devices.flat[0].platform


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
