"""The matmuls of a function, read from its jaxpr: what they compute, read and write, and which parameters enter.

Nothing runs and nothing is compiled. Loops count as often as they run, of branches the most expensive one; a branch that a
way of injecting takes in some layers counts for these.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal, jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import AbstractMesh


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
        """The part of the model: "vision", "fusion", "llm" or "loss"."""
        words = re.split(r"[/()]", self.scope)
        return next((part for part in ("loss", "fusion", "vision") if part in words), "llm")

    def times(self, count: float) -> Product:
        sizes = {key: count * getattr(self, key) for key in ("flops", "moved", "outputs", "weights")}
        return dataclasses.replace(self, **sizes)


def traced(function: Callable, moving: dict, frozen: dict, *inputs: Any) -> list[Product]:
    """The matmuls of function(moving, frozen, *inputs) that its results need.

    moving, frozen: {path: a parameter's shape and dtype}, those that are trained and those that are not.
    """
    return _traced(function, moving, frozen, *inputs)[0]


def results(function: Callable, moving: dict, frozen: dict, *inputs: Any) -> list[tuple[jax.ShapeDtypeStruct, bool]]:
    """The results of function(moving, frozen, *inputs), see `traced`: shape and dtype, and whether they grow with the inputs.

    Those do that are computed from inputs, and constants with an axis that is a multiple of the inputs' first axis.
    """
    rows = jax.tree.leaves(inputs)[0].shape[0]
    leaves = []
    for aval, array in _traced(function, moving, frozen, *inputs)[1]:
        grows = array.weights is None or not array.weights and any(axis % rows == 0 for axis in aval.shape)
        leaves.append((jax.ShapeDtypeStruct(aval.shape, aval.dtype), grows))
    return leaves


def _traced(function: Callable, moving: dict, frozen: dict, *inputs: Any) -> tuple[list[Product], list[tuple]]:
    """The matmuls, and (shape and dtype, what it depends on) of every result."""
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):  # as on one device, whatever mesh a run has set
        closed = jax.make_jaxpr(function)(moving, frozen, *inputs)
    jaxpr, used = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    leaves = jax.tree_util.tree_flatten_with_path((moving, frozen, *inputs))[0]
    arrays = []
    for (argument, *rest), leaf in leaves:
        path = rest[0].key if argument.idx < 2 else None
        arrays.append(Array(None if path is None else {path: leaf.shape}, argument.idx == 0))
    arrays = [array for array, is_used in zip(arrays, used, strict=True) if is_used]
    products, outputs = _walk(jaxpr, [CONSTANT] * len(jaxpr.constvars), arrays, "")
    return products, list(zip(closed.out_avals, outputs, strict=True))


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
        most = max((inside for inside, _ in branches), key=lambda inside: sum(p.flops for p in inside))
        share = re.search(r"(\d+)_of_(\d+)_layers", scope)  # models/injection.py
        return [p.times(int(share[1]) / int(share[2])) for p in most] if share else most, outputs
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
