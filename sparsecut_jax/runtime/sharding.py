"""Maps logical axis names to mesh axes; no other file knows the mesh axes.

Weights and activations have named axes (`"embed"`, `"batch"`). `RULES` says which mesh axes shard each of them. An unknown
name, or two names of one array that use the same mesh axis, raise.
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

from sparsecut_jax.types import UserError

# The axes that communicate most come last, on the fastest interconnect.
MESH_AXES = ("replica", "data", "fsdp", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": ("replica", "data", "fsdp"),
    "batch_of_copies": ("replica", "data"),  # where the embed axis is sharded as well
    "length": (),
    "act_embed": (),
    "act_heads": ("tensor",),
    "act_kv_heads": ("tensor",),
    "act_mlp": ("tensor",),
    "act_vocab": ("tensor",),
    "bank": (),
    # weights; replicated over replica and data
    "layers": (),
    "sites": (),  # layers that have sources
    "levels": (),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "patch": (),
    "norm": (),
    "rank": ("tensor",),  # of a LoRA matrix with an embed axis
    "rank_alone": ("fsdp",),  # of one without
}
ONE_AT_A_TIME = ("layers", "sites")  # the scan over layers takes one of them, and would gather all
OR_WHOLE = ("kv_heads", "act_kv_heads")  # replicated if the devices do not divide them (llm.replicate_kv)
SMALL = 2**24  # bytes; a parameter up to this size may be replicated if the devices divide none of its axes


# --- meshes ---


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh over `devices` (default: all; devices of `jax.experimental.topologies` work too).

    An axis missing from `sizes` has size 1. One size may be -1: all remaining devices. If the devices form several
    slices, the replica axis spans them, because the network between slices is slow.

    Raises:
      UserError: the product of the sizes is not the number of devices, or replica is not a multiple of the slices.
    """
    try:
        devices = jax.devices() if devices is None else devices
    except RuntimeError as error:  # JAX_PLATFORMS names a platform without devices
        raise UserError(f"no devices: {str(error).splitlines()[0]}") from error
    shape = list(mesh_sizes(sizes, len(devices), devices[0].platform).values())
    return Mesh(device_grid(shape, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def mesh_sizes(sizes: Mapping[str, int], count: int, platform: str) -> dict[str, int]:
    """{mesh axis: size} on `count` devices, which need not exist. Raises UserError; see `make_mesh`."""
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    asked = mesh_text(dict(zip(MESH_AXES, shape, strict=True)))
    if shape.count(-1) > 1 or any(size == 0 or size < -1 for size in shape):
        raise UserError(f"{asked}: sizes must be positive, and at most one of them -1 (all remaining devices)")
    known = math.prod(size for size in shape if size != -1)
    wanted = f"a multiple of {known}" if -1 in shape else str(known)
    if -1 in shape:
        shape[shape.index(-1)] = max(1, count // known)
    if math.prod(shape) != count:
        nearest = mesh_text(dict(zip(MESH_AXES, _nearest(shape, count), strict=True)))
        raise UserError(
            f"{asked} asks for {wanted} devices, but there are {count} {platform} devices; "
            f"change config.mesh so that the product of its sizes is {count}, for example {nearest}"
        )
    return dict(zip(MESH_AXES, shape, strict=True))


def device_grid(shape: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """Devices [replica, data, fsdp, tensor], arranged so that the last axes have the fastest interconnect."""
    slices, replica = len({getattr(device, "slice_index", 0) for device in devices}), shape[0]
    if slices > 1 and replica % slices == 0:
        inner, outer = (replica // slices, *shape[1:]), (slices, 1, 1, 1)
        return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    if slices > 1 and devices[0].platform == "tpu":  # GPU "slices" are nodes, whose network can carry other axes too
        raise UserError(
            f"config.mesh.replica={replica} does not fit {slices} slices of {len(devices) // slices} devices, between which "
            f"the network is slow; expected config.mesh.replica={slices} or a multiple of it"
        )
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def mesh_text(sizes: Mapping[str, int]) -> str:
    """The mesh as text, for example "mesh(data=4, fsdp=2, tensor=1)"; replica is shown if it is not 1."""
    return f"mesh({', '.join(f'{axis}={size}' for axis, size in sizes.items() if axis != 'replica' or size != 1)})"


def _nearest(shape: Sequence[int], count: int) -> tuple[int, ...]:
    """The sizes with product `count` that are nearest to `shape`, by their ratios."""

    def factors(n: int, axes: int) -> list[tuple[int, ...]]:
        if axes == 1:
            return [(n,)]
        return [(d, *rest) for d in range(1, n + 1) if n % d == 0 for rest in factors(n // d, axes - 1)]

    off = lambda sizes: sum(abs(math.log(a / b)) for a, b in zip(sizes, shape, strict=True))
    return min(factors(count, len(shape)), key=off)


def ways(name: str, mesh: Mesh | None = None) -> int:
    """Number of shards of logical axis `name` on `mesh`; default: the mesh that is set, 1 if there is none."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return 1 if mesh.empty else shards(name, mesh.shape)


def shards(name: str, sizes: Mapping[str, int]) -> int:
    """Number of shards of logical axis `name` on a mesh of these sizes (`mesh.shape`); no device is needed."""
    return _ways(RULES[name], sizes)


def data_parallel(mesh: Mesh | None = None) -> int:
    """Number of data-parallel shards of a batch on `mesh`; default: the mesh that is set, 1 if there is none."""
    return ways("batch", mesh)


# --- layouts ---


def spec(names: tuple[str | None, ...]) -> PartitionSpec:
    """PartitionSpec of logical names, one per axis.

    Raises:
      KeyError: unknown name. ValueError: two names use the same mesh axis.
    """
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
    """Constrains the sharding of an activation; returns x unchanged if no mesh is set (plain single-device use)."""
    if len(names) != x.ndim:
        raise ValueError(f"{len(names)} axis names {names} for an array of shape {x.shape}")
    resolved = spec(tuple(None if n in OR_WHOLE and x.shape[i] % ways(n) else n for i, n in enumerate(names)))
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, resolved)


def constrain_weight(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrains a weight, cast to the compute dtype, to the sharding in which it is stored, and with it its gradient.

    The all-gather of the weight and the reduce-scatter of its gradient then run in the dtype of x. Without the constraint
    XLA reduces whole gradients on every device and slices them only after a cast.
    """
    mesh = jax.sharding.get_abstract_mesh()
    layout = None if mesh.empty else _weight_spec(x.shape, names, x.dtype.itemsize, mesh.shape)
    return x if layout is None else jax.lax.with_sharding_constraint(x, layout)


def param_shardings(boxed: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Tree of NamedSharding for a tree of `nn.with_logical_partitioning` boxes (shapes are enough).

    Raises:
      UserError: a parameter larger than SMALL cannot be sharded as its axis names say.
    """
    is_box = lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)

    def place(path: tuple, box: Any) -> NamedSharding:
        if not is_box(box):
            return NamedSharding(mesh, PartitionSpec())
        layout = _box_spec(box, mesh.shape)
        if layout is None:
            name, asked = "/".join(str(key.key) for key in path), dict(mesh.shape)
            boxes = jax.tree.leaves(boxed, is_leaf=is_box)
            raise UserError(
                f"{mesh_text(asked)} cannot shard parameter {name} of shape {box.value.shape} as {spec(box.names)}; "
                f"{_mended(boxes, asked)}"
            )
        return NamedSharding(mesh, layout)

    return jax.tree_util.tree_map_with_path(place, boxed, is_leaf=is_box)


def _box_spec(box: Any, sizes: Mapping[str, int]) -> PartitionSpec | None:
    return _weight_spec(box.value.shape, box.names, box.value.dtype.itemsize, sizes)


def _weight_spec(
    shape: tuple[int, ...], names: tuple[str | None, ...], itemsize: int, sizes: Mapping[str, int]
) -> PartitionSpec | None:
    """As `spec`, but a mesh axis that does not divide its own axis moves to the largest other axis that it divides.

    If there is no such axis, a small parameter is replicated; for a larger one the result is None.
    """
    axes = _mesh_axes(names)
    for i, name in enumerate(names):
        if shape[i] % _ways(axes[i], sizes) == 0:
            continue
        homeless, axes[i] = axes[i], ()
        fits = [j for j, size in enumerate(shape) if j != i and size % _ways((*axes[j], *homeless), sizes) == 0]
        fits = [j for j in fits if names[j] not in ONE_AT_A_TIME]
        if name in OR_WHOLE:
            continue
        if fits:
            j = max(fits, key=lambda j: shape[j])
            axes[j] = (*axes[j], *homeless)
        elif math.prod(shape) * itemsize > SMALL:
            return None
    return _partition(axes)


def _mended(boxes: list[Any], sizes: dict[str, int]) -> str:
    """Advice: mesh sizes that can shard all parameters, with as many devices and data-parallel shards as before."""
    data, fsdp = sizes["data"], sizes["fsdp"]
    for fewer in range(fsdp - 1, 0, -1):
        tried = {**sizes, "data": data * fsdp // fewer, "fsdp": fewer}
        if fsdp % fewer == 0 and all(isinstance(b, nn.meta.AxisMetadata) and _box_spec(b, tried) for b in boxes):
            return f"{mesh_text(tried)} can"
    return "choose mesh sizes that divide its axes"


def _ways(axes: Sequence[str], sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[axis] for axis in axes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch: rows over the data-parallel axes, all other axes replicated."""
    return NamedSharding(mesh, spec(("batch",)))


def platform(mesh: Mesh) -> str:
    """Platform of the mesh's devices: "cpu", "gpu" or "tpu"."""
    return mesh.devices.flat[0].platform


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding that replicates an array on every device."""
    return NamedSharding(mesh, PartitionSpec())
