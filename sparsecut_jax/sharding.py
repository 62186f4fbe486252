"""The only file that knows mesh axes: logical axis names on one side, the mesh on the other.

Weights and activations name their axes in words (`"embed"`, `"batch"`); `RULES` says which mesh axes
split each of them. A word that is not in the table and two words that claim the same mesh axis raise.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sparsecut_jax.types import UserError

MESH_AXES = ("data", "fsdp", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": ("data", "fsdp"),
    "length": (),
    "act_embed": (),
    "act_heads": ("tensor",),
    "act_mlp": ("tensor",),
    "act_vocab": ("tensor",),
    "bank": (),
    # weights
    "layers": (),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "patch": (),
    "norm": (),
}


def make_mesh(sizes: dict[str, int], devices: list | None = None) -> Mesh:
    """Mesh over `devices` (default: all). One size may be -1: what is left over.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    try:
        devices = jax.devices() if devices is None else devices
    except RuntimeError as error:  # JAX_PLATFORMS names something that is not here
        raise UserError(f"no devices: {str(error).splitlines()[0]}") from error
    shape = [sizes[axis] for axis in MESH_AXES]
    asked = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, shape, strict=True))
    if shape.count(-1) > 1 or any(size == 0 or size < -1 for size in shape):
        raise UserError(f"mesh({asked}): sizes must be positive, and at most one of them -1 (what is left over)")
    known = int(np.prod([size for size in shape if size != -1]))
    if -1 in shape:
        shape[shape.index(-1)] = max(1, len(devices) // known)
    if int(np.prod(shape)) != len(devices):
        raise UserError(
            f"mesh({asked}) asks for {int(np.prod(shape))} devices, but there are {len(devices)} "
            f"{devices[0].platform} devices; change config.mesh so that its sizes multiply to {len(devices)}"
        )
    return jax.make_mesh(tuple(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def spec(names: tuple[str | None, ...]) -> PartitionSpec:
    """Logical names, one per axis -> PartitionSpec. Raises on an unknown name or a mesh axis used twice."""
    used: set[str] = set()
    parts: list[Any] = []
    for name in names:
        if name is not None and name not in RULES:
            raise KeyError(f"unknown logical axis {name!r} in {names}; known: {', '.join(RULES)}")
        axes = RULES[name] if name is not None else ()
        if used.intersection(axes):
            raise ValueError(f"logical axes {names} use mesh axis {sorted(used.intersection(axes))} twice")
        used.update(axes)
        parts.append(axes if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*parts)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pin the layout of an activation; the identity where no mesh is set (plain single-device use)."""
    if len(names) != x.ndim:
        raise ValueError(f"{len(names)} axis names {names} for an array of shape {x.shape}")
    resolved = spec(names)
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, resolved)


def param_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Tree of `nn.with_logical_partitioning` boxes (shapes are enough) -> tree of NamedSharding."""
    is_box = lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)
    return jax.tree.map(
        lambda box: NamedSharding(mesh, spec(box.names) if is_box(box) else PartitionSpec()), boxed, is_leaf=is_box
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the data-parallel axes, everything else whole."""
    return NamedSharding(mesh, spec(("batch",)))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def data_parallel(mesh: Mesh) -> int:
    """Number of ways the rows of a batch are split."""
    return int(np.prod([mesh.shape[axis] for axis in RULES["batch"]]))
