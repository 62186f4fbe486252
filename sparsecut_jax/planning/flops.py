"""Model FLOPs of a training step, read from the traced model: 2 x rows x inputs x outputs of every matmul.

The real loss is traced by shapes alone and its jaxpr is walked, so a module needs no entry here, and names of parameters
do not matter. Attention counts in full rather than its causal half, and the loss at every position. Norms, activations,
softmax, rotary embeddings and the optimizer are left out: together they stay below 3 % of what the compiler counts
(tests/test_planning_flops.py).

The backward pass of a matmul has one more of the same size for each operand that depends on a trained parameter. What is
computed again for it depends on what a remat policy keeps, and is read from the jaxpr of the gradient.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal, jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import AbstractMesh

from sparsecut_jax.models.fusion import views_of
from sparsecut_jax.models.parameters import unflatten
from sparsecut_jax.models.sparsecut import SparseCut, build_model
from sparsecut_jax.settings import Config
from sparsecut_jax.training.losses import summed_loss
from sparsecut_jax.types import Batch

PARTS = ("vision", "fusion", "llm", "loss")
Shapes = dict[str, tuple[int, ...]]
AGAIN = "rematted_computation"  # jax.checkpoint's name of what the backward pass computes again


@dataclasses.dataclass(frozen=True)
class Product:
    """A matmul of a step, over all layers.

    Attributes:
      scope: names of the modules that it is computed in, joined by "/".
      path: path of its weight, the first one if it is made of several; "" for a product of activations, as attention's.
      contracted: axes of that weight which are summed over, counted from the last one: -1, -2, ...
      flops: FLOPs of the forward pass.
      moved: number of elements that it reads and writes, without its weights.
      outputs: how many of them it writes.
      weights: number of elements of its weights.
      more: number of matmuls of the same size in the backward pass.
      again: how often the forward matmul is recomputed for the backward pass (rematerialisation).
    """

    scope: str
    path: str
    contracted: tuple[int, ...]
    flops: float
    moved: float
    outputs: float
    weights: float
    more: float
    again: float = 0.0

    @property
    def part(self) -> str:
        """The part of the model: one of PARTS."""
        words = re.split(r"[/()]", self.scope)
        return next((part for part in ("loss", "fusion", "vision") if part in words), "llm")

    def times(self, count: int) -> Product:
        sizes = {key: count * getattr(self, key) for key in ("flops", "moved", "outputs", "weights")}
        return dataclasses.replace(self, **sizes)


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs of one part."""

    forward: float = 0.0
    backward: float = 0.0
    again: float = 0.0  # forward matmuls recomputed for backward; not part of model FLOPs

    def __add__(self, other: Work) -> Work:
        return Work(self.forward + other.forward, self.backward + other.backward, self.again + other.again)

    @property
    def model(self) -> float:
        return self.forward + self.backward


def work(products: Iterable[Product]) -> dict[str, Work]:
    """{part: FLOPs}, and their sum as "total"."""
    by_part = dict.fromkeys(PARTS, Work())
    for p in products:
        by_part[p.part] += Work(p.flops, p.flops * p.more, p.flops * p.again)
    return {**by_part, "total": sum(by_part.values(), Work())}


def of_batch(cfg: Config, name: str, shapes: Shapes, slots: int) -> Callable[[int], float]:
    """A function from sequence length to the model FLOPs of a batch of stage `name` with `slots` image slots."""
    cfg = cfg.with_stage(name, slots=slots)
    rows = cfg.stages[name].batch_size
    return functools.cache(lambda t: work(products(cfg, name, shapes, rows, t, again=False))["total"].model)


# --- the traced model ---


def slots_of(cfg: Config, name: str) -> int:
    """Image slots per sequence (M)."""
    return cfg.stages[name].slots or cfg.data.max_images


def products(
    cfg: Config, name: str, shapes: Shapes, rows: int, seq_len: int, again: bool = True
) -> tuple[Product, ...]:
    """The matmuls of `rows` sequences of `seq_len` positions in stage `name`.

    Args:
      cfg: resolved for its platform, with no "auto" settings left.
      name: the stage.
      shapes: {path of a parameter: its shape}.
      rows, seq_len: B and T.
      again: also tell what is computed again, for which the gradient is traced too.
    """
    # Other backends compute a part of the scores, or hide them in a kernel.
    model = build_model(dataclasses.replace(cfg, attention="xla"))
    size, slots = (rows, seq_len), slots_of(cfg, name)
    policies = {cfg.vision.remat, cfg.fusion.remat, cfg.llm.remat} - {"none", "auto"}
    trainable = cfg.stages[name].trainable
    matmuls = _products(model, tuple(shapes.items()), trainable, size, slots, again and bool(policies))
    if again and cfg.mesh.fsdp != 1 and cfg.mesh.tensor == 1:  # the logits, see training/losses.py
        twice = lambda p: p.part == "loss" and _is_trained(trainable, p.path)
        matmuls = tuple(dataclasses.replace(p, again=1.0) if twice(p) else p for p in matmuls)
    return matmuls


@functools.lru_cache(maxsize=256)
def _products(
    model: SparseCut, shapes: tuple, trainable: tuple[str, ...], size: tuple[int, int], slots: int, again: bool
) -> tuple[Product, ...]:
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes}
    moving = {path: leaf for path, leaf in params.items() if _is_trained(trainable, path)}
    frozen = {path: leaf for path, leaf in params.items() if path not in moving}
    batch = _batch(model, *size, slots)

    def loss(moving: dict, frozen: dict, batch: Batch) -> jax.Array:
        rngs = {"dropout": jax.random.key(0)}
        total, _, seen = summed_loss(model, unflatten({**frozen, **moving}), batch, size[1], rngs)
        return total + seen["aux_loss"]

    forward = traced(loss, moving, frozen, batch)
    if not again or not moving:
        return tuple(forward)
    recomputed: dict[tuple, float] = collections.Counter()
    for p in traced(jax.grad(loss), moving, frozen, batch):
        recomputed[p.part, p.path] += p.flops * (AGAIN in p.scope)
    whole: dict[tuple, float] = collections.Counter()
    for p in forward:
        whole[p.part, p.path] += p.flops
    share = lambda p: recomputed[p.part, p.path] / whole[p.part, p.path]
    return tuple(dataclasses.replace(p, again=share(p)) for p in forward)


def _is_trained(trainable: tuple[str, ...], path: str) -> bool:
    return any(re.fullmatch(pattern, path) for pattern in trainable)


def _batch(model: SparseCut, rows: int, seq_len: int, slots: int) -> Batch:
    """A batch of shapes, an unpacked sequence per row."""
    side, views = model.vision_config.image_size, views_of(model.fusion_config)
    of = lambda dtype, *shape: jax.ShapeDtypeStruct((rows, *shape), dtype)
    return Batch(
        tokens=of(jnp.int32, seq_len),
        loss_mask=of(jnp.uint8, seq_len),
        segments=of(jnp.int32, seq_len),
        branches=None,
        positions=of(jnp.int32, seq_len),
        views=of(jnp.uint8, slots, views, side, side, 3),
        image_start=of(jnp.int32, slots),
        most_segments=1,
    )


def traced(function: Callable, moving: dict, frozen: dict, *inputs: Any) -> list[Product]:
    """The matmuls of function(moving, frozen, *inputs) that its results need.

    moving, frozen: {path: a parameter's shape and dtype}, those that are trained and those that are not.
    """
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):  # as on one device, whatever mesh a run has set
        closed = jax.make_jaxpr(function)(moving, frozen, *inputs)
    jaxpr, used = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    leaves = jax.tree_util.tree_flatten_with_path((moving, frozen, *inputs))[0]
    arrays = []
    for (argument, *rest), leaf in leaves:
        path = rest[0].key if argument.idx < 2 else None
        arrays.append(Array(None if path is None else {path: leaf.shape}, argument.idx == 0))
    arrays = [array for array, is_used in zip(arrays, used, strict=True) if is_used]
    return _walk(jaxpr, [CONSTANT] * len(jaxpr.constvars), arrays, "")[0]


# --- jaxprs ---


@dataclasses.dataclass(frozen=True)
class Array:
    """What an array in a jaxpr depends on.

    Attributes:
      weights: {path: shape} of the parameters that it is computed from, if from nothing but parameters and constants;
        None if data enters too.
      trained: whether a trained parameter enters.
    """

    weights: dict[str, tuple[int, ...]] | None
    trained: bool


CONSTANT = Array({}, False)


def _joined(arrays: Iterable[Array]) -> Array:
    """What depends on all of these."""
    weights: dict[str, tuple[int, ...]] | None = {}
    trained = False
    for array in arrays:
        weights = None if weights is None or array.weights is None else weights | array.weights
        trained |= array.trained
    return Array(weights, trained)


def _walk(
    jaxpr: Jaxpr, consts: Sequence[Array], args: Sequence[Array], scope: str
) -> tuple[list[Product], list[Array]]:
    """The matmuls of a jaxpr, those of nested ones included, and what its results depend on."""
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    products: list[Product] = []
    read = lambda atom: CONSTANT if isinstance(atom, Literal) else known[atom]
    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        inside, outputs = _equation(eqn, inputs, f"{scope}/{eqn.source_info.name_stack}")
        products += inside
        for var, output in zip(eqn.outvars, outputs, strict=True):
            moves = output.trained and jnp.issubdtype(var.aval.dtype, jnp.inexact)
            known[var] = dataclasses.replace(output, trained=moves)
    return products, [read(atom) for atom in jaxpr.outvars]


def _equation(eqn: JaxprEqn, inputs: list[Array], scope: str) -> tuple[list[Product], list[Array]]:
    name, all_inputs = eqn.primitive.name, _joined(inputs)
    if name in CONTRACTED:
        return [_product(eqn, inputs, scope)], [all_inputs]
    if name == "stop_gradient":
        return [], [dataclasses.replace(inputs[0], trained=False)]
    if name == "scan":
        return _scan(eqn, inputs, scope)
    if name == "while":
        return _while(eqn, inputs, scope)
    bodies = list(jaxprs_in_params(eqn.params))
    if name == "cond":
        branches = [_walk(body, [], inputs[1:], scope) for body in bodies]
        outputs = [_joined((inputs[0], *each)) for each in zip(*(outs for _, outs in branches), strict=True)]
        return max((inside for inside, _ in branches), key=lambda inside: sum(p.flops for p in inside)), outputs
    # A Pallas kernel runs once for each cell of its grid, a shard_map once for each device.
    times = math.prod(getattr(eqn.params.get("grid_mapping"), "grid", ()))
    times *= eqn.params["mesh"].size if name == "shard_map" else 1
    products, outputs = [], [all_inputs] * len(eqn.outvars)
    for body in bodies:
        fits = len(body.invars) == len(inputs)  # else its arguments are references, as a kernel's
        args = inputs if fits else [all_inputs] * len(body.invars)
        inside, results = _walk(body, [all_inputs] * len(body.constvars), args, scope)
        products += [p.times(times) for p in inside]
        if fits and len(results) == len(outputs):
            outputs = results
    return products, outputs


def _scan(eqn: JaxprEqn, inputs: list[Array], scope: str) -> tuple[list[Product], list[Array]]:
    """Walks as many first iterations as differ in what they depend on; all others are alike."""
    first, last = eqn.params["num_consts"], eqn.params["num_consts"] + eqn.params["num_carry"]
    consts, carry, rows = inputs[:first], inputs[first:last], inputs[last:]
    left, products, outputs = eqn.params["length"], [], []
    while left:
        inside, outputs = _walk(eqn.params["jaxpr"].jaxpr, [], [*consts, *carry, *rows], scope)
        following = [_joined(pair) for pair in zip(carry, outputs, strict=False)]
        count = left if following == carry else 1
        products += [p.times(count) for p in inside]
        carry, left = following, left - count
    return products, [*carry, *outputs[len(carry) :]]


def _while(eqn: JaxprEqn, inputs: list[Array], scope: str) -> tuple[list[Product], list[Array]]:
    """Counts one iteration, since their number depends on data: JAX writes other loops as scans."""
    condition, body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    consts, carry = inputs[condition : condition + body], inputs[condition + body :]
    while True:
        inside, outputs = _walk(eqn.params["body_jaxpr"].jaxpr, [], [*consts, *carry], scope)
        following = [_joined(pair) for pair in zip(carry, outputs, strict=True)]
        if following == carry:
            return inside, carry
        carry = following


# {primitive: function from its parameters to the axes of both operands that are summed over}
CONTRACTED: dict[str, Callable[[dict[str, Any]], tuple[Sequence[int], Sequence[int]]]] = {
    "dot_general": lambda params: params["dimension_numbers"][0],
    "ragged_dot_general": lambda params: params["ragged_dot_dimension_numbers"].dot_dimension_numbers[0],
    "conv_general_dilated": lambda params: ((), params["dimension_numbers"].rhs_spec[1:]),
}


def _product(eqn: JaxprEqn, inputs: list[Array], scope: str) -> Product:
    """A matmul or convolution."""
    left, right = (atom.aval for atom in eqn.invars[:2])
    output, axes = eqn.outvars[0].aval, CONTRACTED[eqn.primitive.name](eqn.params)
    inner = math.prod(right.shape[axis] for axis in axes[1])
    weights = moved = 0.0
    path, contracted = "", ()
    for operand, array, summed in zip((left, right), inputs[:2], axes, strict=True):
        if not array.weights:
            moved += operand.size
            continue
        weights += operand.size
        if path:
            continue
        path, shape = min(array.weights.items())
        if shape[-operand.ndim :] == operand.shape:
            contracted = tuple(sorted(axis - operand.ndim for axis in summed))
    written = output.size
    if not weights:  # of attention's two products, the scores stay on the chip
        largest = max(left.size, right.size, output.size)
        moved, written = moved + written - largest, written * (written != largest)
    else:
        moved += written
    return Product(
        scope=scope.strip("/"),
        path=path,
        contracted=contracted,
        flops=2.0 * output.size * inner,
        moved=float(moved),
        outputs=float(written),
        weights=float(weights),
        more=float(sum(array.trained for array in inputs[:2])),
    )
