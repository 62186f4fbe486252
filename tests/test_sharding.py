"""Meshes: the same losses and gradients on every one, no activation gathered over devices, nothing large whole."""

import dataclasses
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from configs import siglip_qwen, sparsecut
from sparsecut_jax import config as config_lib
from sparsecut_jax.inference.decoding import encode_images, generate
from sparsecut_jax.models.parameters import split
from sparsecut_jax.planning.collectives import collectives_of, gathered_activations, weight_shapes
from sparsecut_jax.planning.memory import Parameters
from sparsecut_jax.runs.parameters import abstract_params, stage_dtypes
from sparsecut_jax.runtime import backends, sharding
from sparsecut_jax.settings import StageConfig
from sparsecut_jax.tasks.registry import build_model
from sparsecut_jax.training import optimizer as opt
from sparsecut_jax.training import state
from sparsecut_jax.training.step import make_gradients, make_train_step
from sparsecut_jax.types import TrainState
from tiny import IMAGE, make_batch, matrices_of, params_of, refusal, tiny_config

# replica, data, fsdp, tensor: every way to lay out eight devices without replicas, and two with
MESHES = [(1, 2, 2, 2), (1, 8, 1, 1), (1, 1, 8, 1)]
OTHERS = [
    (1, 1, 1, 8), (1, 4, 2, 1), (1, 4, 1, 2), (1, 2, 4, 1), (1, 1, 4, 2), (1, 2, 1, 4), (1, 1, 2, 4),
    (2, 1, 4, 1), (2, 2, 1, 2),
]  # fmt: skip
STAGE = StageConfig(trainable=(".*",))
# T = 22: eleven is a factor of no parameter's axis, so activations cannot pass for parameters.
B, T, CHUNK = 8, 22, 16
ROWS = [[1, 5, IMAGE, 7, 8, 9], [1, 20, 21, 22, 23, 24], [1, IMAGE, 11, IMAGE, 13], [1, 4, IMAGE, 31, 32, 33, 34]] * 2
ANSWERS = [2, 5, 1, 4, 3, 1, 1, 2]


def named(sizes):
    return dict(zip(sharding.MESH_AXES, sizes, strict=True))


def mesh_of(sizes):
    return sharding.make_mesh(named(sizes))


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
    step = make_train_step(
        model, matrices_of(model), STAGE, recorder(), lambda _: 0.1, first_step=0, seed=0, loss_chunk=CHUNK
    )
    return model, params_of(model, batch), batch, step, Parameters(cfg, "instruct")


def state_of(params):
    zero = np.zeros((), np.int32)
    return TrainState(zero, params, recorder().init(split(params, (".*",))[0]), zero, zero)


def boxed(model, batch):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), batch))["params"]


@pytest.fixture(scope="module")
def single(problem):
    """(loss, gradients) of one device."""
    _, params, batch, step, _ = problem
    alone = jax.jit(step).lower(state_of(params), batch).compile()
    state, metrics = alone(state_of(params), batch)
    return metrics["loss"], jax.tree.map(np.asarray, state.opt_state)


@pytest.fixture(scope="module", params=MESHES, ids=str)
def meshed(request, problem):
    """(sizes, compiled step, lowered text, loss, gradients) on a mesh of eight devices."""
    model, params, batch, step, _ = problem
    mesh = mesh_of(request.param)
    with jax.set_mesh(mesh):
        shardings = sharding.param_shardings(boxed(model, batch), mesh)
        params = jax.device_put(params, shardings)
        whole = sharding.replicated(mesh)
        layout = TrainState(whole, shardings, split(shardings, (".*",))[0], whole, whole)
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
    _, _, fsdp, tensor = meshed[0]
    grads = meshed[4]
    assert grads["llm/layers/attention/q"].addressable_shards[0].data.shape == (3, 32 // fsdp, 4 // tensor, 8)
    assert grads["llm/embedding"].addressable_shards[0].data.shape == (64 // tensor, 32 // fsdp)


def test_constraints_reach_the_compiler(meshed):
    """They are in the lowered program, and in the compiled one hidden states are rows of one device."""
    (replica, data, fsdp, tensor), compiled, lowered, *_ = meshed
    assert len(re.findall(r"sdy\.sharding_constraint|custom_call @Sharding", lowered)) >= 10
    rows = B // (replica * data * fsdp)
    assert f"f32[{rows},{T},32]" in compiled
    assert f"f32[{rows * T},{48 // tensor}]" in compiled  # hidden units of the MLP
    assert re.search(rf"f32\[(1,)?{rows},{CHUNK},{64 // tensor}\]", compiled)  # logits of a part of the positions
    for length, width in itertools.product((T, CHUNK), (32, 48, 64)):
        assert f"{B},{length},{width}]" not in compiled


def gathered(text, allowed):
    """[(shape, op_name)] of what all-gathers of anything but weights of these shapes return."""
    return [
        (shape, each.origin) for each in gathered_activations(collectives_of(text), allowed) for shape in each.shapes
    ]


def test_no_activation_is_gathered(meshed, problem):
    sizes, compiled, *_ = meshed
    assert gathered(compiled, weight_shapes(problem[-1], named(sizes))) == []


def test_parameters_are_gathered_where_they_are_split(meshed):
    """Else the test above would look at nothing."""
    (_, _, fsdp, tensor), compiled, *_ = meshed
    assert ("all-gather" in compiled) == (fsdp * tensor > 1)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_planted_gather_is_found(problem, sizes):
    """Hidden states pinned to the batch axes and then to none, in a scanned layer, as in the step."""
    allowed = weight_shapes(problem[-1], named(sizes))

    def layer(x, _):
        x = sharding.constrain(jnp.tanh(x), "batch", "length", "act_embed")
        x = jax.lax.with_sharding_constraint(x, P())
        return sharding.constrain(x[::-1] * 2, "batch", "length", "act_embed"), None

    with jax.set_mesh(mesh_of(sizes)):
        planted = jax.jit(lambda x: jax.lax.scan(layer, x, length=3)[0])
        text = planted.lower(np.ones((B, T, 32), np.float32)).compile().as_text()
    shapes = {shape for shape, _ in gathered(text, allowed)}
    assert any(sorted(shape)[-3:] == sorted((B, T, 32)) for shape in shapes), shapes


def test_reading_hlo():
    """Plain, asynchronous and combined all-gathers; what is allowed is not reported, nor are ids."""
    text = """
ENTRY %main (x: f32[]) -> f32[] {
  %a = f32[8,22,32]{2,1,0} all-gather(%x), dimensions={0}, metadata={op_name="jit(f)/tanh" stack_frame_id=1}
  %b = f32[32,48]{1,0} all-gather(%y), dimensions={0}, metadata={op_name="jit(f)/dot"}
  %c = (f32[2,22]{1,0}, f32[8,22]{1,0}) all-gather-start(%z), dimensions={0}
  %d = f32[8,22]{1,0} all-gather-done(%c)
  ROOT %e = (f32[32,48]{1,0}, u8[8]{0}) all-gather(%u, %v), dimensions={0}
  %g = s32[8,22]{1,0} all-gather(%w), dimensions={0}
  %f = f32[4,22]{1,0} all-reduce(%all-gather), metadata={op_name="all-gather(x)"}
"""
    assert gathered(text, {(32, 48)}) == [((8, 22, 32), "jit(f)/tanh"), ((8, 22), ""), ((32, 48), ""), ((8,), "")]


def test_activations_do_not_look_like_parameters(problem):
    """What the planted test finds, and the merged forms [B * T, D] on any mesh, are no shapes of parameters."""
    for sizes in MESHES:
        allowed = weight_shapes(problem[-1], named(sizes))
        assert (32, 48) in allowed and (3, 32, 4, 8) in allowed and (32, 4, 8) in allowed
        for rows in (1, 2, 4, 8):
            for width in (4, 8, 16, 24, 32, 48, 64):
                assert not {(rows, T, width), (rows * T, width)} & allowed


# --- every mesh of eight devices ---


@pytest.fixture(scope="module")
def two_layers():
    """(boxes, parameters, batch, function of the latter, its loss and gradients on one device), attention as on CPUs.

    A tensor axis of four or eight has all of the two KV heads on every device.
    """
    cfg = backends.resolve(tiny_config(
        vision=dict(layers=2, heads=8),
        fusion=dict(name="mlp"),
        llm=dict(layers=2, heads=8, kv_heads=2, head_dim=4, qkv_bias=True, replicate_kv=True),
        shortcuts=dict(density="explicit", vit_levels=(1,), llm_layers=(1,)),
    ))  # fmt: skip
    model = build_model(cfg)
    batch = make_batch(ROWS[:2] * 4, length=T, slots=1)
    params = params_of(model, batch)
    gradients = make_gradients(model, matrices_of(model), accumulate=1, loss_chunk=CHUNK)

    def loss_and_gradients(params, batch):
        moving, frozen = split(params, (".*",))
        total, count, grads, _ = gradients(moving, frozen, batch, jax.random.key(0))
        return total / count, grads

    alone = jax.jit(loss_and_gradients).lower(params, batch).compile()
    return boxed(model, batch), params, batch, loss_and_gradients, alone(params, batch)


@pytest.mark.parametrize("sizes", OTHERS, ids=str)
def test_every_mesh_gives_what_one_device_gives(two_layers, sizes):
    boxes, params, batch, function, expected = two_layers
    mesh = mesh_of(sizes)
    with jax.set_mesh(mesh):
        shardings = sharding.param_shardings(boxes, mesh)
        placed = jax.device_put((params, batch), (shardings, sharding.batch_sharding(mesh)))
        outs = sharding.replicated(mesh), split(shardings, (".*",))[0]
        compiled = jax.jit(function, out_shardings=outs).lower(*placed).compile()
        loss, grads = compiled(*placed)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
    for path, grad in expected[1].items():
        off = np.linalg.norm(np.asarray(grads[path]) - grad)
        assert off <= 1e-4 * np.linalg.norm(grad) + 1e-6, path  # a bias of keys has none, but for rounding
    replica, data, fsdp, tensor = sizes
    shapes = {path: grads[f"llm/layers/attention/{path}"].addressable_shards[0].data.shape for path in ("q", "k")}
    assert shapes == {"q": (2, 32 // fsdp, 8 // tensor, 4), "k": (2, 32 // fsdp, 1 if tensor == 2 else 2, 4)}
    if tensor == 8:  # keys and values as a device attends with them: one head, and never all eight
        assert f"f32[{B},{T},8,4]" not in compiled.as_text()
        assert f"f32[{B},{T},1,4]" in compiled.as_text()


def test_generation_with_whole_kv_heads():
    """Eight devices, two KV heads: the cache keeps the two, and the words are those of one device."""
    cfg = tiny_config(
        vision=dict(layers=2, heads=8),
        fusion=dict(name="mlp"),
        llm=dict(layers=2, heads=8, kv_heads=2, head_dim=4, replicate_kv=True),
        shortcuts=dict(density="explicit", vit_levels=(1,), llm_layers=(1,)),
    )
    model = build_model(cfg)
    batch = make_batch([[1, IMAGE, 5, 7]], length=13, slots=1)
    params = params_of(model, batch)
    asked = batch.tokens, np.array([12], np.int32), batch.image_start

    def answer(params):
        encoded = encode_images(model, params, batch.views)
        return generate(model, params, *asked, encoded, max_new_tokens=3, return_logits=True)

    alone, mesh = answer(params), mesh_of((1, 1, 1, 8))
    with jax.set_mesh(mesh):
        spread = answer(jax.device_put(params, sharding.param_shardings(boxed(model, batch), mesh)))
    np.testing.assert_array_equal(spread[0], alone[0])
    np.testing.assert_allclose(spread[1], alone[1], atol=1e-4)


def test_meshes_are_all_there_are():
    sizes = [(1, *s) for s in itertools.product((1, 2, 4, 8), repeat=3) if math.prod(s) == 8]
    assert len(sizes) == 10 and set(sizes) <= {*MESHES, *OTHERS}


# --- shardings of parameters ---


def test_param_shardings(problem):
    model, _, batch, *_ = problem
    mesh = mesh_of((1, 2, 2, 2))
    tree = sharding.param_shardings(boxed(model, batch), mesh)
    specs = {path: leaf.spec for path, leaf in split(tree, (".*",))[0].items()}
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
    mesh = mesh_of((1, 2, 2, 2))
    tree = {"box": nn.LogicallyPartitioned(np.zeros((4, 4)), ("embed", "mlp")), "plain": np.zeros(3)}
    made = sharding.param_shardings(tree, mesh)
    assert made["box"].spec == P("fsdp", "tensor")
    assert made["plain"].spec == P()


# --- names ---


def test_spec():
    assert sharding.spec(("batch", "length", "act_embed")) == P(("replica", "data", "fsdp"), None, None)
    assert sharding.spec(("layers", "embed", "mlp")) == P(None, "fsdp", "tensor")
    assert sharding.spec((None, "vocab")) == P(None, "tensor")


def test_an_unknown_name_raises():
    with pytest.raises(KeyError, match=r"unknown logical axis 'embd' in \('embd', 'mlp'\); known: batch, "):
        sharding.spec(("embd", "mlp"))
    with pytest.raises(KeyError, match="unknown logical axis 'bach'"):
        sharding.constrain(jnp.zeros((2, 2)), "bach", None)
    with pytest.raises(KeyError, match="unknown logical axis 'embd'"):
        sharding.param_shardings(
            {"a": nn.LogicallyPartitioned(np.zeros((4, 4)), ("embd", "mlp"))}, mesh_of((1, 2, 2, 2))
        )


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


def test_kv_heads_that_cannot_be_split_are_whole():
    layout = jax.jit(lambda x: sharding.constrain(x, "batch", None, "act_kv_heads", None))
    with jax.set_mesh(mesh_of((1, 2, 1, 4))):
        assert layout(jnp.ones((2, 3, 8, 4))).addressable_shards[0].data.shape == (1, 3, 2, 4)
        assert layout(jnp.ones((2, 3, 2, 4))).addressable_shards[0].data.shape == (1, 3, 2, 4)


def test_constrain_on_a_mesh():
    mesh = mesh_of((1, 2, 2, 2))
    with jax.set_mesh(mesh):
        out = jax.jit(lambda x: sharding.constrain(x, "batch", "length", "act_mlp"))(jnp.ones((8, 3, 4)))
    assert out.addressable_shards[0].data.shape == (2, 3, 2)


# --- what each device holds ---


def states(config, sizes):
    """{path in the train state: (shape, dtype, sharding)} of the first stage on a mesh of devices that need not exist."""
    cfg = backends.resolve(config_lib.check(config), "tpu")
    name = cfg.run_stages[0]
    mesh = AbstractMesh(sizes, sharding.MESH_AXES)
    model = build_model(cfg)
    params = abstract_params(model, cfg, mesh, stage_dtypes(cfg, name, matrices_of(model)))
    tx = opt.adamw(cfg.stages[name], matrices_of(model))
    found = state.abstract_state(params, cfg.stages[name].trainable, tx, mesh)
    keys = lambda path: "/".join(str(getattr(key, "key", getattr(key, "name", ""))) for key in path)
    return {keys(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(found)}


# What is left whole on some devices although it is larger than 64 KiB: vectors, and two matrices of the tower's first
# layer under tensor alone. Paths as regexes.
NORMS = {r".*norm\d?/(scale|bias)"}
TOWER_BIASES = {r"params/vision/blocks/attention/(q|k|v|out)_bias", r"params/vision/blocks/fc[12]/bias"}
FIRST_LAYER = {r"params/vision/(position_embedding|patch_embedding/kernel)"}


@pytest.mark.parametrize("sizes", [(1, 1, 8, 1), (1, 1, 1, 8), (1, 1, 4, 2), (2, 2, 4, 2), (1, 2, 128, 1)], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        lambda: sparsecut.get_config("size=7b,stage=finetune"),
        lambda: sparsecut.get_config("size=13b,stage=lora"),
        lambda: siglip_qwen.get_config("stage=finetune"),
    ],
    ids=["7b", "13b lora", "siglip_qwen"],
)
def test_nothing_large_is_whole(config, sizes):
    """Of the released configs at their full sizes: parameters, frozen ones too, and moments."""
    kept = NORMS | TOWER_BIASES | (FIRST_LAYER if sizes[3] > 1 else set())
    ways, whole = math.prod(sizes[2:]), 0
    for path, leaf in states(config(), sizes).items():
        size = leaf.size * leaf.dtype.itemsize
        here = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        if size > 2**16 and here * ways != size:
            assert any(re.fullmatch(pattern, path) for pattern in kept), (path, leaf.shape, leaf.sharding.spec)
            whole += here
    assert whole < 2**23


@pytest.mark.parametrize(
    "config, sentence",
    [
        (
            lambda: siglip_qwen.get_config("stage=finetune"),
            "mesh(data=1, fsdp=256, tensor=1) cannot shard parameter vision/blocks/attention/k_kernel of shape "
            "(27, 1152, 16, 72) as P(None, 'fsdp', 'tensor', None); mesh(data=2, fsdp=128, tensor=1) can",
        ),
        (
            lambda: sparsecut.get_config("size=7b,stage=lora"),
            "mesh(data=1, fsdp=256, tensor=1) cannot shard parameter llm/layers/attention/k_lora_b of shape "
            "(32, 128, 32, 128) as P(None, 'fsdp', 'tensor', None); mesh(data=2, fsdp=128, tensor=1) can",
        ),
    ],
    ids=["siglip", "lora"],
)
def test_a_large_parameter_that_cannot_be_split_is_refused(config, sentence):
    assert refusal(states, config(), (1, 1, 256, 1)) == sentence
    states(config(), (1, 2, 128, 1))


def test_common_models_are_split_over_256_devices():
    leaves = states(sparsecut.get_config("size=7b,stage=finetune"), (1, 1, 256, 1))
    shapes = {path: leaves[f"params/{path}"].sharding.shard_shape(leaves[f"params/{path}"].shape) for path in (
        "vision/blocks/fc1/kernel", "vision/position_embedding", "fusion/fuse/projector/fc1/kernel", "llm/head",
    )}  # fmt: skip
    assert shapes == {
        "vision/blocks/fc1/kernel": (24, 4, 4096),
        "vision/position_embedding": (577, 4),
        "fusion/fuse/projector/fc1/kernel": (20, 4096),
        "llm/head": (16, 32000),
    }


def test_where_an_axis_cannot_be_split():
    """Another axis is; else a small parameter is whole, and a large one refused."""
    mesh = AbstractMesh((1, 1, 8, 4), sharding.MESH_AXES)
    box = lambda shape, *names: {"a": nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)}
    layout = lambda *given: sharding.param_shardings(box(*given), mesh)["a"].spec
    assert layout((16, 12), "embed", "mlp") == P("fsdp", "tensor")
    assert layout((12, 96), "embed", "mlp") == P(None, ("tensor", "fsdp"))
    assert layout((16, 12, 24), "layers", "embed", "head_dim") == P(None, None, "fsdp")
    for name in ("layers", "sites"):  # not over these: the loop, which takes one at a time, would collect them
        assert layout((16, 12), name, "embed") == P(None, None)
    assert layout((16, 2, 64), "embed", "kv_heads", "head_dim") == P("fsdp", None, None)
    assert layout((16, 8, 64), "embed", "kv_heads", "head_dim") == P("fsdp", "tensor", None)
    assert layout((1024, 4092), "norm", "embed") == P("fsdp", None)
    assert layout((1023, 4092), "norm", "embed") == P(None, None)
    assert refusal(layout, (1027, 4092), "norm", "embed") == (
        "mesh(data=1, fsdp=8, tensor=4) cannot shard parameter a of shape (1027, 4092) as P(None, 'fsdp'); "
        "mesh(data=2, fsdp=4, tensor=4) can"
    )
    assert refusal(layout, (1027, 4095), "norm", "mlp").endswith("; choose mesh sizes that divide its axes")


# --- meshes ---


@pytest.mark.parametrize(
    "sizes, shape",
    [
        ((1, -1, 1, 1), (1, 8, 1, 1)),
        ((1, 1, -1, 2), (1, 1, 4, 2)),
        ((1, 2, 2, -1), (1, 2, 2, 2)),
        ((-1, 1, 4, 1), (2, 1, 4, 1)),
        ((1, 2, 4, 1), (1, 2, 4, 1)),
    ],
)
def test_make_mesh(sizes, shape):
    mesh = mesh_of(sizes)
    assert mesh.axis_names == ("replica", "data", "fsdp", "tensor")
    assert mesh.devices.shape == shape
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)
    assert sharding.data_parallel(mesh) == shape[0] * shape[1] * shape[2]


def test_sizes_of_a_mesh_of_devices_that_are_not_here():
    sizes = sharding.mesh_sizes(dict(data=-1, fsdp=32), 256, "tpu")
    assert sizes == {"replica": 1, "data": 8, "fsdp": 32, "tensor": 1}
    assert refusal(sharding.mesh_sizes, dict(data=3, fsdp=32), 256, "tpu") == (
        "mesh(data=3, fsdp=32, tensor=1) asks for 96 devices, but there are 256 tpu devices; "
        "change config.mesh so that the product of its sizes is 256, for example mesh(data=4, fsdp=32, tensor=2)"
    )


def test_make_mesh_of_some_devices():
    mesh = sharding.make_mesh(dict(data=-1, fsdp=1, tensor=1), jax.devices()[:3])
    assert mesh.devices.shape == (1, 3, 1, 1)


@pytest.mark.parametrize(
    "sizes, asked, instead",
    [
        ((1, 2, 2, 1), "mesh(data=2, fsdp=2, tensor=1) asks for 4", "mesh(data=2, fsdp=2, tensor=2)"),
        ((1, 3, -1, 1), "mesh(data=3, fsdp=-1, tensor=1) asks for a multiple of 3", "mesh(data=4, fsdp=2, tensor=1)"),
        (
            (1, 16, -1, 1),
            "mesh(data=16, fsdp=-1, tensor=1) asks for a multiple of 16",
            "mesh(data=8, fsdp=1, tensor=1)",
        ),
        (
            (2, 1, 1, 3),
            "mesh(replica=2, data=1, fsdp=1, tensor=3) asks for 6",
            "mesh(replica=2, data=1, fsdp=1, tensor=4)",
        ),
    ],
)
def test_sizes_must_multiply_to_the_devices(sizes, asked, instead):
    assert refusal(mesh_of, sizes) == (
        f"{asked} devices, but there are 8 cpu devices; change config.mesh so that the product of its sizes is 8, "
        f"for example {instead}"
    )


@pytest.mark.parametrize("sizes", [(1, -1, -1, 1), (1, 0, 1, 1), (1, 8, 1, -2)])
def test_sizes_must_be_positive(sizes):
    asked = "mesh(data={1}, fsdp={2}, tensor={3})".format(*sizes)
    assert refusal(mesh_of, sizes) == (
        f"{asked}: sizes must be positive, and at most one of them -1 (all remaining devices)"
    )


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh reads of a device: a TPU's place in its slice, a GPU's node."""

    id: int
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    coords: tuple[int, ...] = ()
    core_on_chip: int = 0


def slices_of(count, side):
    """`count` slices of side x side chips, the slices mixed up."""
    places = list(itertools.product(range(side), range(side), range(count)))
    return [Device(i, s, coords=(x, y, 0)) for i, (x, y, s) in enumerate(places)]


@pytest.mark.parametrize("shape", [(2, 1, 16, 1), (2, 2, 4, 2), (4, 1, 8, 1), (2, 1, 2, 8)])
def test_replicas_lie_in_slices(shape):
    grid = sharding.device_grid(shape, slices_of(2, 4))
    assert grid.shape == shape and len(set(grid.flat)) == 32
    for i, replica in enumerate(grid):
        assert {device.slice_index for device in replica.flat} == {i * 2 // shape[0]}


def test_slices_need_replicas():
    assert refusal(sharding.device_grid, (1, 1, 32, 1), slices_of(2, 4)) == (
        "config.mesh.replica=1 does not fit 2 slices of 16 devices, between which the network is slow; "
        "expected config.mesh.replica=2 or a multiple of it"
    )
    assert refusal(sharding.make_mesh, dict(replica=2, data=3, fsdp=8), slices_of(3, 4)).startswith(
        "config.mesh.replica=2 "
    )


def test_nodes_of_gpus_need_no_replicas():
    gpus = [Device(i, i // 4, "gpu", "NVIDIA H100 80GB HBM3") for i in range(8)]
    assert [d.id for d in sharding.device_grid((1, 1, 8, 1), gpus[::-1]).flat] == list(range(8))
    assert [[d.id for d in r.flat] for r in sharding.device_grid((2, 1, 4, 1), gpus)] == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    "topology, slices, sizes, shape",
    [
        ("v5e:4x4", 2, dict(replica=-1, data=1, fsdp=8, tensor=2), (2, 1, 8, 2)),
        ("v5e:8x8", 1, dict(data=1, fsdp=-1), (1, 1, 64, 1)),
        ("v6e:8x8", 1, dict(data=1, fsdp=-1, tensor=4), (1, 1, 16, 4)),
        ("v5p:4x4x4", 1, dict(data=2, fsdp=-1, tensor=2), (1, 2, 16, 2)),
    ],
)
def test_a_mesh_of_tpus_that_are_not_here(monkeypatch, topology, slices, sizes, shape):
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    described = {} if slices == 1 else {"num_slices": slices}
    devices = topologies.get_topology_desc(topology, platform="tpu", **described).devices
    mesh = sharding.make_mesh(sizes, devices)
    assert mesh.devices.shape == shape
    assert [{getattr(d, "slice_index", 0) for d in replica.flat} for replica in mesh.devices] == [
        {i} for i in range(slices)
    ]
    if slices > 1:
        assert "expected config.mesh.replica=2 or" in refusal(
            sharding.make_mesh, {**sizes, "replica": 1, "data": 2}, devices
        )


def test_ways():
    mesh = mesh_of((2, 1, 2, 2))
    assert [sharding.ways(name, mesh) for name in ("batch", "embed", "kv_heads", "norm")] == [4, 2, 2, 1]
    assert sharding.ways("batch") == sharding.data_parallel() == 1
    with jax.set_mesh(mesh):
        assert sharding.ways("act_heads") == 2 and sharding.data_parallel() == 4


def test_layouts():
    mesh = mesh_of((2, 1, 2, 2))
    assert sharding.batch_sharding(mesh).spec == P(("replica", "data", "fsdp"))
    assert sharding.replicated(mesh).spec == P()
