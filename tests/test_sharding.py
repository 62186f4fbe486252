"""Meshes: the same losses and gradients on every one, and no activation gathered over devices."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from sparsecut_jax import sharding
from sparsecut_jax.models.sparsecut import build_model
from sparsecut_jax.training import optimizer as opt
from sparsecut_jax.training.step import make_train_step
from sparsecut_jax.types import TrainState, UserError
from tiny import IMAGE, make_batch, params_of, tiny_config

MESHES = [(2, 2, 2), (8, 1, 1), (1, 8, 1)]  # data, fsdp, tensor
# T = 22: eleven is a factor of no parameter's axis, so activations cannot pass for parameters.
B, T = 8, 22
ROWS = [[1, 5, IMAGE, 7, 8, 9], [1, 20, 21, 22, 23, 24], [1, IMAGE, 11, IMAGE, 13], [1, 4, IMAGE, 31, 32, 33, 34]] * 2
ANSWERS = [2, 5, 1, 4, 3, 1, 1, 2]


def mesh_of(sizes):
    return sharding.make_mesh(dict(zip(sharding.MESH_AXES, sizes, strict=True)))


# --- the compiled step ---


def recorder():
    """An optimizer whose state is the gradient, so that the real step hands it out."""
    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), lambda g, s, p: (g, g))


@pytest.fixture(scope="module")
def problem():
    cfg = tiny_config(
        vision=dict(layers=3),
        llm=dict(layers=3),
        shortcuts=dict(density="explicit", vit_levels=(2, 0, 1), llm_layers=(0, 2, 2)),
    )
    model = build_model(cfg)
    batch = make_batch(ROWS, length=T, answers=ANSWERS)
    step = make_train_step(model, (".*",), recorder(), lambda _: 0.1, first_step=0, accumulate=1, seed=0)
    return model, params_of(model, batch), batch, step


def state_of(params):
    zero = np.zeros((), np.int32)
    return TrainState(zero, params, recorder().init(opt.split(params, (".*",))[0]), zero, zero)


def boxed(model, batch):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), batch))["params"]


@pytest.fixture(scope="module")
def single(problem):
    """(loss, gradients) of one device."""
    _, params, batch, step = problem
    state, metrics = jax.jit(step)(state_of(params), batch)
    return metrics["loss"], jax.tree.map(np.asarray, state.opt_state)


@pytest.fixture(scope="module", params=MESHES, ids=str)
def meshed(request, problem):
    """(sizes, compiled step, lowered text, loss, gradients) on a mesh of eight devices."""
    model, params, batch, step = problem
    mesh = mesh_of(request.param)
    with jax.set_mesh(mesh):
        shardings = sharding.param_shardings(boxed(model, batch), mesh)
        params = jax.device_put(params, shardings)
        whole = sharding.replicated(mesh)
        layout = TrainState(whole, shardings, opt.split(shardings, (".*",))[0], whole, whole)
        state = jax.device_put(state_of(params), layout)
        batch = jax.device_put(batch, sharding.batch_sharding(mesh))
        lowered = jax.jit(step, out_shardings=(layout, None)).lower(state, batch)
        compiled = lowered.compile()
        state, metrics = compiled(state, batch)
    return request.param, compiled.as_text(), lowered.as_text(), metrics["loss"], state.opt_state


def test_loss_is_that_of_one_device(meshed, single):
    np.testing.assert_allclose(meshed[3], single[0], rtol=1e-5)


def test_gradients_are_those_of_one_device(meshed, single):
    assert set(meshed[4]) == set(single[1])
    for path, expected in single[1].items():
        off = np.linalg.norm(np.asarray(meshed[4][path]) - expected)
        assert off <= 1e-4 * np.linalg.norm(expected) + 1e-6, path


def test_gradients_are_sharded_like_their_parameters(meshed):
    data, fsdp, tensor = meshed[0]
    grads = meshed[4]
    assert grads["llm/layers/attention/q"].addressable_shards[0].data.shape == (3, 32 // fsdp, 4 // tensor, 8)
    assert grads["llm/embedding"].addressable_shards[0].data.shape == (64 // tensor, 32 // fsdp)


def test_constraints_reach_the_compiler(meshed):
    """They are in the lowered program, and in the compiled one hidden states are rows of one device."""
    (data, fsdp, tensor), compiled, lowered, *_ = meshed
    assert len(re.findall(r"sdy\.sharding_constraint|custom_call @Sharding", lowered)) >= 10
    rows = B // (data * fsdp)
    assert f"f32[{rows},{T},32]" in compiled
    assert f"f32[{rows},{T},{48 // tensor}]" in compiled  # hidden units of the MLP
    assert f"f32[{rows},{T},{64 // tensor}]" in compiled  # logits
    for width in (32, 48, 64):
        assert f"f32[{B},{T},{width}]" not in compiled


def gathered_activations(text, allowed):
    """All-gathers in HLO text whose result is not of a shape in `allowed`: [(shape, op_name)]."""
    found = []
    for line in text.splitlines():
        match = re.search(r"= (.+?) all-gather(?:-start)?\(", line)
        if not match:
            continue
        name = re.search(r'op_name="([^"]*)"', line)
        shapes = [tuple(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"\w+\[([\d,]*)\]", match[1])]
        assert shapes, line
        if "all-gather-start(" in line:
            shapes = shapes[len(shapes) // 2 :]  # operands, then results
        found += [(shape, name[1] if name else "") for shape in shapes if shape not in allowed]
    return found


def parameter_shapes(params, sizes):
    """Shapes of parameters, of one layer of a stack, and of shards of both along the axes of the mesh."""
    ways = {a * b * c for a, b, c in itertools.product(*((1, size) for size in sizes))}
    shapes = set()
    for path, leaf in opt.split(params, (".*",))[0].items():
        stacked = "blocks/" in path or "layers/" in path
        for shape in {leaf.shape} | ({leaf.shape[1:], (1, *leaf.shape[1:])} if stacked else set()):
            for cut in itertools.product(ways, repeat=len(shape)):
                if all(n % c == 0 for n, c in zip(shape, cut, strict=True)):
                    shapes.add(tuple(n // c for n, c in zip(shape, cut, strict=True)))
    return shapes


def test_no_activation_is_gathered(meshed, problem):
    sizes, compiled, *_ = meshed
    assert gathered_activations(compiled, parameter_shapes(problem[1], sizes)) == []


def test_parameters_are_gathered_where_they_are_split(meshed):
    """Else the test above would look at nothing."""
    (_, fsdp, tensor), compiled, *_ = meshed
    assert ("all-gather" in compiled) == (fsdp * tensor > 1)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_planted_gather_is_found(problem, sizes):
    """Hidden states pinned to the batch axes and then to none, in a scanned layer, as in the step."""
    allowed = parameter_shapes(problem[1], sizes)

    def layer(x, _):
        x = sharding.constrain(jnp.tanh(x), "batch", "length", "act_embed")
        x = jax.lax.with_sharding_constraint(x, P())
        return sharding.constrain(x[::-1] * 2, "batch", "length", "act_embed"), None

    with jax.set_mesh(mesh_of(sizes)):
        planted = jax.jit(lambda x: jax.lax.scan(layer, x, length=3)[0])
        text = planted.lower(np.ones((B, T, 32), np.float32)).compile().as_text()
    shapes = {shape for shape, _ in gathered_activations(text, allowed)}
    assert any(sorted(shape)[-3:] == sorted((B, T, 32)) for shape in shapes), shapes


def test_reading_hlo():
    """Plain, asynchronous and combined all-gathers; what is allowed is not reported."""
    text = """
  %a = f32[8,22,32]{2,1,0} all-gather(%x), dimensions={0}, metadata={op_name="jit(f)/tanh" stack_frame_id=1}
  %b = f32[32,48]{1,0} all-gather(%y), dimensions={0}, metadata={op_name="jit(f)/dot"}
  %c = (f32[2,22]{1,0}, f32[8,22]{1,0}) all-gather-start(%z), dimensions={0}
  %d = f32[8,22]{1,0} all-gather-done(%c)
  ROOT %e = (f32[32,48]{1,0}, s32[8]{0}) all-gather(%u, %v), dimensions={0}
  %f = f32[4,22]{1,0} all-reduce(%all-gather), metadata={op_name="all-gather(x)"}
"""
    assert gathered_activations(text, {(32, 48)}) == [((8, 22, 32), "jit(f)/tanh"), ((8, 22), ""), ((8,), "")]


def test_activations_do_not_look_like_parameters(problem):
    """What the planted test finds, and the merged forms [B * T, D] on any mesh, are no shapes of parameters."""
    for sizes in MESHES:
        allowed = parameter_shapes(problem[1], sizes)
        assert (32, 48) in allowed and (3, 32, 4, 8) in allowed and (32, 4, 8) in allowed
        for rows in (1, 2, 4, 8):
            for width in (4, 8, 16, 24, 32, 48, 64):
                assert not {(rows, T, width), (rows * T, width)} & allowed


# --- shardings of parameters ---


def test_param_shardings(problem):
    model, _, batch, _ = problem
    mesh = mesh_of((2, 2, 2))
    tree = sharding.param_shardings(boxed(model, batch), mesh)
    specs = {path: leaf.spec for path, leaf in opt.split(tree, (".*",))[0].items()}
    assert all(leaf.mesh == mesh for leaf in jax.tree.leaves(tree))
    expected = {
        "vision/class_embedding": P(None),
        "vision/position_embedding": P(None, "fsdp"),
        "vision/patch_embedding/kernel": P(None, "fsdp"),
        "vision/blocks/norm1/scale": P(None, None),
        "vision/blocks/attention/q_kernel": P(None, "fsdp", "tensor", None),
        "vision/blocks/attention/q_bias": P(None, "tensor", None),
        "vision/blocks/attention/out_kernel": P(None, "tensor", None, "fsdp"),
        "vision/blocks/fc1/kernel": P(None, "fsdp", "tensor"),
        "vision/blocks/fc1/bias": P(None, "tensor"),
        "vision/blocks/fc2/kernel": P(None, "tensor", "fsdp"),
        "fusion/fuse/projector/fc1/kernel": P("fsdp", "tensor"),
        "fusion/fuse/projector/fc2/kernel": P("tensor", "fsdp"),
        "llm/embedding": P("tensor", "fsdp"),
        "llm/head": P("fsdp", "tensor"),
        "llm/norm/scale": P(None),
        "llm/layers/norm1/scale": P(None, None),
        "llm/layers/attention/q": P(None, "fsdp", "tensor", None),
        "llm/layers/attention/out": P(None, "tensor", None, "fsdp"),
        "llm/layers/mlp/gate/kernel": P(None, "fsdp", "tensor"),
        "llm/layers/mlp/down/kernel": P(None, "tensor", "fsdp"),
    }
    assert {path: specs[path] for path in expected} == expected


def test_an_unboxed_leaf_is_replicated():
    mesh = mesh_of((2, 2, 2))
    tree = {"box": nn.LogicallyPartitioned(np.zeros((4, 4)), ("embed", "mlp")), "plain": np.zeros(3)}
    made = sharding.param_shardings(tree, mesh)
    assert made["box"].spec == P("fsdp", "tensor")
    assert made["plain"].spec == P()


# --- names ---


def test_spec():
    assert sharding.spec(("batch", "length", "act_embed")) == P(("data", "fsdp"), None, None)
    assert sharding.spec(("layers", "embed", "mlp")) == P(None, "fsdp", "tensor")
    assert sharding.spec((None, "vocab")) == P(None, "tensor")


def test_an_unknown_name_raises():
    with pytest.raises(KeyError, match=r"unknown logical axis 'embd' in \('embd', 'mlp'\); known: batch, length"):
        sharding.spec(("embd", "mlp"))
    with pytest.raises(KeyError, match="unknown logical axis 'bach'"):
        sharding.constrain(jnp.zeros((2, 2)), "bach", None)


@pytest.mark.parametrize(
    "names, axis", [(("mlp", "heads"), "tensor"), (("batch", "embed"), "fsdp"), (("embed", "embed"), "fsdp")]
)
def test_colliding_axes_raise(names, axis):
    with pytest.raises(ValueError, match=re.escape(f"logical axes {names} use mesh axis ['{axis}'] twice")):
        sharding.spec(names)


def test_constrain_needs_a_name_per_axis():
    with pytest.raises(ValueError, match=r"2 axis names \('batch', 'length'\) for an array of shape \(2, 3, 4\)"):
        sharding.constrain(jnp.zeros((2, 3, 4)), "batch", "length")


def test_constrain_without_a_mesh_is_the_identity():
    x = jnp.ones((8, 3))
    assert sharding.constrain(x, "batch", None) is x
    assert "sharding" not in jax.jit(lambda x: sharding.constrain(x, "batch", None)).lower(x).as_text()


def test_constrain_on_a_mesh():
    mesh = mesh_of((2, 2, 2))
    with jax.set_mesh(mesh):
        out = jax.jit(lambda x: sharding.constrain(x, "batch", "length", "act_mlp"))(jnp.ones((8, 3, 4)))
    assert out.addressable_shards[0].data.shape == (2, 3, 2)


# --- meshes ---


@pytest.mark.parametrize(
    "sizes, shape",
    [((-1, 1, 1), (8, 1, 1)), ((1, -1, 2), (1, 4, 2)), ((2, 2, -1), (2, 2, 2)), ((2, 4, 1), (2, 4, 1))],
)
def test_make_mesh(sizes, shape):
    mesh = mesh_of(sizes)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == shape
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)
    assert sharding.data_parallel(mesh) == shape[0] * shape[1]


def test_make_mesh_of_some_devices():
    mesh = sharding.make_mesh(dict(data=-1, fsdp=1, tensor=1), jax.devices()[:3])
    assert mesh.devices.shape == (3, 1, 1)


@pytest.mark.parametrize(
    "sizes, asked",
    [
        ((2, 2, 1), "mesh(data=2, fsdp=2, tensor=1) asks for 4"),
        ((3, -1, 1), "mesh(data=3, fsdp=-1, tensor=1) asks for 6"),
        ((16, -1, 1), "mesh(data=16, fsdp=-1, tensor=1) asks for 16"),
    ],
)
def test_sizes_must_multiply_to_the_devices(sizes, asked):
    rest = " devices, but there are 8 cpu devices; change config.mesh so that its sizes multiply to 8"
    with pytest.raises(UserError, match=re.escape(asked + rest)):
        mesh_of(sizes)


@pytest.mark.parametrize("sizes", [(-1, -1, 1), (0, 1, 1), (8, 1, -2)])
def test_sizes_must_be_positive(sizes):
    asked = "mesh(data={}, fsdp={}, tensor={})".format(*sizes)
    with pytest.raises(UserError, match=re.escape(f"{asked}: sizes must be positive, and at most one of them -1")):
        mesh_of(sizes)


def test_layouts():
    mesh = mesh_of((2, 2, 2))
    assert sharding.batch_sharding(mesh).spec == P(("data", "fsdp"))
    assert sharding.replicated(mesh).spec == P()
