"""Adapters: their parameters, what they add, dropout, what is trained, merging, and a run that has some."""

import contextlib
import dataclasses
import functools
import json
import os
import signal

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import traverse_util
from safetensors.numpy import load_file

import runs
from parity_cases import FOLDER, join
from sparsecut_jax import config as config_lib
from sparsecut_jax.convert import to_hf
from sparsecut_jax.exporting import adapter, export
from sparsecut_jax.models import lora as lora_lib
from sparsecut_jax.models.attention import Packed
from sparsecut_jax.models.parameters import split
from sparsecut_jax.runs.checkpoint import CONVERTED, Checkpoints
from sparsecut_jax.runs.origin import Origin
from sparsecut_jax.runs.parameters import abstract_params, example_batch
from sparsecut_jax.runs.run import Run, load_run
from sparsecut_jax.runtime import sharding
from sparsecut_jax.settings import InitConfig, LoraConfig, StageConfig
from sparsecut_jax.tasks.registry import build_model
from sparsecut_jax.train import train
from sparsecut_jax.training import optimizer as opt
from sparsecut_jax.training import report
from sparsecut_jax.training.step import make_gradients
from sparsecut_jax.types import Exit
from tiny import IMAGE, make_batch, matrices_of, params_of, refusal, tiny_config

EVERY = ("llm/.*",)  # all linears, the head among them
SOME = (
    "llm/layers/attention/(q|out)",
    "llm/layers/mlp/down",
    "llm/head",
)  # one of each kind: drawing takes long to compile
LORA = dict(rank=4, alpha=8.0, targets=EVERY)
TRAINABLE = ("llm/.*_lora_[ab]",)
ROWS = [[1, 5, IMAGE, 7, 8, 9], [1, 20, 21, 22, 23], [1, IMAGE, 11, IMAGE, 13, 4, 2], [3, 4, 5]] * 2
BATCH = make_batch(ROWS)
MATRICES = {  # of the tiny model: 2 layers, width 32, 4 and 2 heads of width 8, MLP 48, 64 words
    "llm/layers/attention/q_lora_a": (2, 32, 4), "llm/layers/attention/q_lora_b": (2, 4, 4, 8),
    "llm/layers/attention/k_lora_a": (2, 32, 4), "llm/layers/attention/k_lora_b": (2, 4, 2, 8),
    "llm/layers/attention/v_lora_a": (2, 32, 4), "llm/layers/attention/v_lora_b": (2, 4, 2, 8),
    "llm/layers/attention/out_lora_a": (2, 4, 8, 4), "llm/layers/attention/out_lora_b": (2, 4, 32),
    "llm/layers/mlp/gate_lora_a": (2, 32, 4), "llm/layers/mlp/gate_lora_b": (2, 4, 48),
    "llm/layers/mlp/up_lora_a": (2, 32, 4), "llm/layers/mlp/up_lora_b": (2, 4, 48),
    "llm/layers/mlp/down_lora_a": (2, 48, 4), "llm/layers/mlp/down_lora_b": (2, 4, 32),
    "llm/head_lora_a": (32, 4), "llm/head_lora_b": (4, 64),
}  # fmt: skip


def eight_devices():
    return sharding.make_mesh({"replica": 1, "data": 2, "fsdp": 2, "tensor": 2})


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def tree(leaves):
    return traverse_util.unflatten_dict(leaves, sep="/")


def config_of(llm=None, **lora):
    small = dict(vision=dict(layers=2), fusion=dict(name="mlp"), shortcuts=dict(density="none"))
    return tiny_config(lora={**LORA, **lora}, llm={"layers": 2, **(llm or {})}, **small)


def model_of(llm=None, **lora):
    return build_model(config_of(llm, **lora))


def abstract(model):
    return nn.meta.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), BATCH))["params"])


@pytest.fixture(scope="module")
def params():
    """Random ones, b among them."""
    return params_of(model_of(), BATCH)


@pytest.fixture(scope="module")
def logits(params):
    return apply(model_of(), params)


def text(model):
    """Logits of the rows as if they had no images: the LLM alone is run, or initialised."""
    sight = Packed(BATCH.segments, BATCH.branches, BATCH.positions, BATCH.tokens.shape[1])
    x, _, _ = model.llm(model.llm.embed(BATCH.tokens, model.dtype), BATCH.positions, sight)
    return model.llm.logits(x)


def apply(model, params, **rngs):
    """Logits of `text`."""
    return np.asarray(jax.jit(lambda p: model.apply({"params": p}, rngs=rngs, method=text))(params))


def own_merge(params, scale):
    """W + scale * a @ b, written out anew: layer by layer, matrix by matrix."""
    leaves = {path: np.array(leaf, np.float64) for path, leaf in flat(params).items()}
    for path in [path for path in leaves if path.endswith("_lora_a")]:
        base = path[: -len("_lora_a")]
        a, b = leaves.pop(path), leaves.pop(f"{base}_lora_b")
        target = leaves[base] if base in leaves else leaves[f"{base}/kernel"]
        if "layers" not in path:
            target, a, b = target[None], a[None], b[None]
        for layer in range(len(a)):
            rank = a.shape[-1]
            product = a[layer].reshape(-1, rank) @ b[layer].reshape(rank, -1)
            target[layer] += scale * product.reshape(target[layer].shape)
    return tree({path: leaf.astype(np.float32) for path, leaf in leaves.items()})


# --- parameters ---


def test_parameters():
    found, plain = flat(abstract(model_of())), flat(abstract(model_of(rank=0)))
    assert {path: leaf.shape for path, leaf in found.items() if path not in plain} == MATRICES
    assert set(found) == set(plain) | set(MATRICES)


def test_linears_are_all_there_are():
    """Whatever has two dimensions or more in the LLM, but for the embedding, is a linear that may have an adapter."""
    for tied in (False, True):
        cfg = config_of(dict(tie_embeddings=tied, qk_norm=True), rank=0)
        shapes = flat(abstract(build_model(cfg))["llm"])
        axes = {path: len(leaf.shape) - ("layers/" in path) for path, leaf in shapes.items()}
        matrices = {f"llm/{path}".removesuffix("/kernel") for path, n in axes.items() if n > 1 and path != "embedding"}
        assert matrices == set(cfg.llm.linears)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (LoraConfig.targets, {path for path in MATRICES if "head" not in path}),
        (("llm/layers/attention/(q|v)",), {path for path in MATRICES if path.split("/")[-1][:2] in ("q_", "v_")}),
        (("llm/head",), {"llm/head_lora_a", "llm/head_lora_b"}),
    ],
)
def test_targets_are_regexes(targets, expected):
    assert {path for path in flat(abstract(model_of(targets=targets))) if "_lora_" in path} == expected


def test_rank_0_leaves_no_trace():
    """The program is that of a model which knows of no adapters, and training with dropout draws nothing."""
    off, plain = model_of(rank=0, dropout=0.5), model_of(rank=0).clone(lora=LoraConfig())

    def program(model, **rngs):
        forward = lambda params, rngs: model.apply({"params": params}, BATCH, rngs=rngs)
        return jax.jit(forward).lower(abstract(model), rngs).as_text()

    assert program(off) == program(plain)
    draws = lambda model: program(model, dropout=jax.random.key(0)).count("threefry")
    assert draws(off) == draws(plain) < draws(model_of(dropout=0.5))


def test_fresh_adapters_change_nothing():
    """b begins as zeros; a as PyTorch begins its linears, uniform up to 1 / sqrt(inputs)."""
    model = model_of(rank=16, targets=SOME)
    made = flat(jax.jit(lambda: model.init(jax.random.key(0), method=text))()["params"])
    made = {path: np.asarray(getattr(leaf, "value", leaf)) for path, leaf in made.items()}
    for path, leaf in made.items():
        if path.endswith("_lora_b"):
            assert not leaf.any(), path
        if path.endswith("_lora_a"):
            inputs = 48 if "down" in path else 32
            assert 0.9 < np.abs(leaf).max() * inputs**0.5 <= 1, path
            np.testing.assert_allclose(leaf.std() * inputs**0.5, 3**-0.5, rtol=0.15, err_msg=path)
    assert np.unique(made["llm/layers/attention/q_lora_a"]).size > 0.99 * 2 * 32 * 16  # every layer has its own
    base = tree({path: leaf for path, leaf in made.items() if "_lora_" not in path})
    np.testing.assert_array_equal(apply(model, tree(made)), apply(model_of(rank=0), base))


def test_adapters_are_split_like_their_linears():
    cfg = config_of()
    leaves = flat(abstract_params(build_model(cfg), cfg, eight_devices()))
    assert {path: tuple(leaves[path].sharding.spec) for path in MATRICES} == {
        **{f"llm/layers/attention/{n}_lora_a": (None, "fsdp", "tensor") for n in "qkv"},
        **{f"llm/layers/attention/{n}_lora_b": (None, "fsdp", "tensor", None) for n in "qkv"},
        "llm/layers/attention/out_lora_a": (None, "tensor", None, "fsdp"),
        "llm/layers/attention/out_lora_b": (None, "tensor", "fsdp"),
        **{f"llm/layers/mlp/{n}_lora_a": (None, "fsdp", "tensor") for n in ("gate", "up")},
        **{f"llm/layers/mlp/{n}_lora_b": (None, "fsdp", "tensor") for n in ("gate", "up")},
        "llm/layers/mlp/down_lora_a": (None, "tensor", "fsdp"), "llm/layers/mlp/down_lora_b": (None, "tensor", "fsdp"),
        "llm/head_lora_a": ("fsdp", "tensor"), "llm/head_lora_b": ("fsdp", "tensor"),
    }  # fmt: skip


# --- what they add ---


def test_the_formula(params, logits):
    """Every linear's output is x @ (W + alpha / rank * a @ b), here 8 / 4 = 2."""
    expected = apply(model_of(rank=0), own_merge(params, 2.0))
    assert np.abs(expected - apply(model_of(rank=0), own_merge(params, 0.0))).max() > 0.1
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def test_merged_equals_unmerged(params, logits):
    merged = lora_lib.merge(flat(params), LoraConfig(**LORA))
    assert set(merged) == set(flat(params)) - set(MATRICES)
    for path, leaf in flat(own_merge(params, 2.0)).items():
        np.testing.assert_allclose(merged[path], leaf, rtol=1e-6, atol=1e-6, err_msg=path)
    np.testing.assert_allclose(apply(model_of(rank=0), tree(merged)), logits, rtol=0, atol=1e-5)


def test_merging_keeps_the_dtype(params):
    leaves = {path: leaf.astype("bfloat16") if "_lora_" not in path else leaf for path, leaf in flat(params).items()}
    merged = lora_lib.merge(leaves, LoraConfig(**LORA))
    assert {str(leaf.dtype) for leaf in merged.values()} == {"bfloat16"}


@pytest.mark.parametrize("llm", [dict(scan_layers=False), dict(remat="full")], ids=str)
def test_scanned_unrolled_and_rematted_are_the_same(gradients, llm):
    """Dropout's draws too."""
    total, _, grads, _ = gradients()
    other, _, found, _ = gradients(**llm)
    np.testing.assert_allclose(other, total, rtol=1e-6)
    for path, grad in grads.items():
        np.testing.assert_allclose(found[path], grad, rtol=1e-4, atol=1e-5, err_msg=path)


# --- dropout ---


def test_dropout_acts_where_there_are_random_numbers(params):
    plain, dropping = model_of(targets=SOME), model_of(targets=SOME, dropout=0.5)
    still = apply(plain, params)
    np.testing.assert_array_equal(apply(dropping, params), still)  # evaluation and generation give none
    draw = jax.jit(lambda seed: dropping.apply({"params": params}, rngs={"dropout": jax.random.key(seed)}, method=text))
    one, same, other = (np.asarray(draw(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - still).max() > 0.01 and np.abs(one - other).max() > 0.01


def test_what_is_dropped(monkeypatch):
    """Half of the inputs of each adapter, what is left is doubled; no two adapters and no two layers draw the same."""
    x = np.ones((2, 5, 4), np.float32)
    lora = LoraConfig(rank=2, alpha=2.0, dropout=0.5)

    class Module(nn.Module):
        @nn.compact
        def __call__(self, x):
            return lora_lib.narrow(self, lora, x, np.eye(4, 2, dtype=np.float32))

    y = Module().apply({}, x, rngs={"dropout": jax.random.key(0)})
    assert set(np.unique(y)) == {0.0, 2.0}

    keys = []
    draw = jax.random.bernoulli

    def note(key, p, shape):
        assert p == 0.5
        jax.debug.callback(lambda data: keys.append(tuple(np.asarray(data).tolist())), jax.random.key_data(key))
        return draw(key, p, shape)

    monkeypatch.setattr(jax.random, "bernoulli", note)
    model = model_of(dropout=0.5)
    apply(model, params_of(model, BATCH), dropout=jax.random.key(0))
    jax.effects_barrier()
    assert len(keys) == len(set(keys)) == 2 * 7 + 1


@pytest.fixture(scope="module")
def gradients(params):
    """Function (settings, mesh) -> what the gradient function gives for adapters with dropout."""
    names = flat(abstract(model_of(targets=SOME)))
    some = {path: leaf for path, leaf in flat(params).items() if path in names}

    @functools.cache
    def of(remat="none", scan_layers=True, mesh=None):
        cfg = config_of(dict(remat=remat, scan_layers=scan_layers), dropout=0.25, targets=SOME)
        model, leaves, batch = build_model(cfg), some, BATCH
        if mesh is not None:
            layout = flat(abstract_params(model, cfg, mesh))
            leaves = {path: jax.device_put(leaf, layout[path].sharding) for path, leaf in some.items()}
            batch = jax.device_put(batch, sharding.batch_sharding(mesh))
        moving, frozen = split(tree(leaves), TRAINABLE)
        compute = jax.jit(make_gradients(model, matrices_of(model), accumulate=1, loss_chunk=16))
        return jax.tree.map(np.asarray, compute(moving, frozen, batch, jax.random.key(5)))

    return of


def test_a_mesh_draws_the_same(gradients):
    """Loss and gradients of one device, dropout included."""
    mesh = eight_devices()
    with jax.set_mesh(mesh):
        total, _, grads, _ = gradients(mesh=mesh)
    np.testing.assert_allclose(total, gradients()[0], rtol=1e-5)
    for path, grad in gradients()[2].items():
        off = np.linalg.norm(grads[path] - grad)
        assert off <= 1e-4 * np.linalg.norm(grad) + 1e-6, path


# --- what is trained ---


def test_only_adapters_have_gradients_and_moments(params):
    model = model_of()
    compute = jax.jit(make_gradients(model, matrices_of(model), accumulate=1, loss_chunk=16))
    grads = compute(*split(params, TRAINABLE), BATCH, jax.random.key(0))[2]
    assert set(grads) == set(MATRICES)
    assert all(np.abs(grad).max() > 0 for grad in grads.values())
    stage = StageConfig(trainable=TRAINABLE)
    moments = optax.tree.get(opt.adamw(stage, {}).init(split(params, TRAINABLE)[0]), "mu")
    assert set(moments) == set(MATRICES)


# --- what is refused ---


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (
            dict(targets=("llm/layers/attention/(q|k)", "llm/layers/mlp/fc1")),
            "config.lora.targets has 'llm/layers/mlp/fc1', which matches no linear layer of the LLM; they are "
            "llm/layers/attention/q, llm/layers/attention/k, llm/layers/attention/v, llm/layers/attention/out, "
            "llm/layers/mlp/gate, llm/layers/mlp/up, llm/layers/mlp/down, llm/head",
        ),
        (dict(targets=("llm/(",)), "config.lora.targets has 'llm/(', which is not a valid regular expression: "),
        (dict(targets=()), "config.lora.targets is empty; set config.lora.rank=0 to train without adapters"),
        (dict(rank=-1), "config.lora.rank=-1: expected 0 (no adapters) to 16384"),
        (dict(alpha=0.0), "config.lora.alpha=0.0: expected a positive number"),
        (dict(dropout=1.0), "config.lora.dropout=1.0: expected 0 to below 1"),
    ],
)
def test_bad_settings(setting, expected):
    assert refusal(lambda: tiny_config(lora={**LORA, **setting})).startswith(expected)


def test_a_tied_head_is_no_linear():
    lora = {**LORA, "targets": ("llm/head",)}
    assert "matches no linear" in refusal(lambda: tiny_config(lora=lora, llm=dict(tie_embeddings=True)))


# --- pretrained parts ---


def test_a_pretrained_llm_has_none_and_they_are_fresh():
    """Without init.fresh naming them."""
    found = join(llm=FOLDER / "llama2", settings={"lora.rank": 2, "lora.targets": ("llm/layers/attention/q",)})
    assert {path for path in found.report.fresh if path.startswith("llm/")} == {
        "llm/layers/attention/q_lora_a", "llm/layers/attention/q_lora_b",
    }  # fmt: skip


# --- as PEFT has it ---

NAMES = {
    "base_model.model.lm_head.lora_A.weight", "base_model.model.lm_head.lora_B.weight",
    *(
        f"base_model.model.model.layers.{i}.{module}.lora_{letter}.weight"
        for i in range(2)
        for module in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
        )
        for letter in "AB"
    ),
}  # fmt: skip


def test_an_adapter_as_peft_has_it(params, tmp_path):
    """PeftModel.from_pretrained on the exported LLM gave these logits within 1e-5 (peft 0.21.2, transformers 5.23)."""
    cfg = config_of(dropout=0.1)
    stages = {name: dataclasses.replace(stage, trainable=TRAINABLE) for name, stage in cfg.stages.items()}
    cfg = dataclasses.replace(cfg, stages=stages, init=InitConfig(llm="lmsys/vicuna-7b-v1.5"))
    told = adapter.write_adapter(Run("runs/x", 7, cfg, None, build_model(cfg), params, None, None), str(tmp_path))
    assert told == (
        "runs/x, step 7, as LoRA adapters of rank 4 for down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, "
        "v_proj, and the fusion"
    )
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "lmsys/vicuna-7b-v1.5",
        "r": 4,
        "lora_alpha": 8.0,
        "lora_dropout": 0.1,
        "target_modules": ["down_proj", "gate_proj", "k_proj", "lm_head", "o_proj", "q_proj", "up_proj", "v_proj"],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    tensors, ours = load_file(tmp_path / "adapter_model.safetensors"), flat(params["llm"])
    assert set(tensors) == NAMES
    expected = {  # torch has [out, in]
        "self_attn.q_proj.lora_A": ("attention/q_lora_a", (4, 32), lambda x: x.T),
        "self_attn.q_proj.lora_B": ("attention/q_lora_b", (32, 4), lambda x: x.reshape(4, 32).T),
        "self_attn.v_proj.lora_B": ("attention/v_lora_b", (16, 4), lambda x: x.reshape(4, 16).T),
        "self_attn.o_proj.lora_A": ("attention/out_lora_a", (4, 32), lambda x: x.reshape(32, 4).T),
        "self_attn.o_proj.lora_B": ("attention/out_lora_b", (32, 4), lambda x: x.T),
        "mlp.down_proj.lora_A": ("mlp/down_lora_a", (4, 48), lambda x: x.T),
        "mlp.down_proj.lora_B": ("mlp/down_lora_b", (32, 4), lambda x: x.T),
    }
    for name, (path, shape, turned) in expected.items():
        got = tensors[f"base_model.model.model.layers.1.{name}.weight"]
        assert got.shape == shape and got.dtype == np.float32
        np.testing.assert_array_equal(got, turned(ours[f"layers/{path}"][1]), err_msg=name)
    np.testing.assert_array_equal(tensors["base_model.model.lm_head.lora_B.weight"], ours["head_lora_b"].T)


# --- a run ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    runs.draw_rows(folder)
    return folder


@pytest.fixture(scope="module")
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        runs.take_one_device(patch)
        yield


def lora_settings(folder, **more):
    return {
        "run_stages": ("instruct",), "init_from": str(folder / "base"), "lora.rank": 4, "lora.alpha": 8.0,
        "lora.dropout": 0.1, "lora.targets": ("llm/layers/attention/(q|out)", "llm/layers/mlp/down"),
        "stages.instruct.max_steps": 4, "stages.instruct.lr": 1e-2, "dtype": "bfloat16", "llm.vocab_size": 320,
        "eval.test": False, "eval.every": 0, "data.holdout": 0,
        "stages.instruct.trainable": ("fusion/.*", "llm/.*_lora_[ab]"), "stages.instruct.lr_of": {"fusion": 1e-3},
        **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(folder, one_device):
    """A workdir without adapters, and a run with them that starts from it."""
    cfg = config_lib.check(runs.small(folder, folder / "base"))
    cfg = dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, vocab_size=320))
    model = build_model(cfg)
    values = params_of(model, example_batch(model, cfg.data.max_images))
    saved = json.loads(config_lib.to_json(cfg))
    meta = dict(stage=CONVERTED, asked=saved, config=saved, tokenizer=None, data="", seconds=0.0)
    with contextlib.closing(Checkpoints(cfg.workdir)) as checkpoints:
        checkpoints.save_params(jax.device_put(values), meta)
    train(config_lib.check(runs.small(folder, folder / "run", set=lora_settings(folder))))
    return folder / "base", folder / "run"


def leaves_of(workdir):
    return {path: np.asarray(leaf) for path, leaf in flat(load_run(str(workdir), text=False).params).items()}


def test_a_run_moves_adapters_and_fusion_alone(trained):
    base, run = map(leaves_of, trained)
    assert len(set(run) - set(base)) == 6 and all("_lora_" in path for path in set(run) - set(base))
    for path, leaf in base.items():
        assert np.array_equal(run[path], leaf.astype(run[path].dtype)) == (not path.startswith("fusion/")), path
    frozen = {path: str(run[path].dtype) for path in ("llm/head", "llm/layers/attention/q", "vision/blocks/fc1/kernel")}
    moving = {str(leaf.dtype) for path, leaf in run.items() if "_lora_" in path or path.startswith("fusion/")}
    assert set(frozen.values()) == {"bfloat16"} and moving == {"float32"}
    assert all(leaf.any() for path, leaf in run.items() if path.endswith("_lora_b"))


def test_a_stopped_run_goes_on_to_the_same_bits(trained, folder, monkeypatch, capsys):
    settings = config_lib.check(runs.small(folder, folder / "stopped", set=lora_settings(folder)))
    write = report.MetricsWriter.write

    def write_and_stop(self, step, values):
        write(self, step, values)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(Exit) as stopped:
        patch.setattr(report.MetricsWriter, "write", write_and_stop)
        train(settings)
    assert stopped.value.code == 3
    assert train(settings)["step"] == 4
    out = capsys.readouterr().out
    assert "6 fresh" in out and "resuming" in out and "lr 0.01, of fusion 0.001" in out
    unbroken, again = leaves_of(trained[1]), leaves_of(folder / "stopped")
    assert unbroken.keys() == again.keys()
    for path, leaf in unbroken.items():
        np.testing.assert_array_equal(again[path], leaf, err_msg=path)


def test_adapters_are_not_lost_on_the_way_to_another_run(trained, folder):
    """Nor scaled otherwise."""
    text = (
        f"{folder}/run has LoRA adapters with config.lora.rank=4, .alpha=8 and "
        ".targets=('llm/layers/attention/(q|out)', 'llm/layers/mlp/down'), without which its LLM is another; set the same, or merge them first: convert to-hf --merge, then config.init.model"
    )
    for settings in ({"lora.rank": 0}, {"lora.alpha": 4.0}):
        changes = lora_settings(folder, init_from=str(folder / "run"), **settings)
        cfg = config_lib.check(runs.small(folder, folder / "none", set=changes))
        mesh = sharding.make_mesh({})
        abstract = abstract_params(build_model(cfg), cfg, mesh)
        assert refusal(Origin(cfg).load, cfg, abstract) == text


def test_an_adapter_of_a_run_goes_out_with_the_fusion(trained, folder):
    out = folder / "adapter"
    to_hf(str(trained[1]), "latest", str(out), "adapter", drop_shortcuts=False, merge=False, check=False)
    assert sorted(os.listdir(out)) == ["adapter_config.json", "adapter_model.safetensors", "fusion.safetensors"]
    assert set(load_file(out / "adapter_model.safetensors")) == {
        f"base_model.model.model.layers.{i}.{module}.lora_{letter}.weight"
        for i in range(3) for module in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj") for letter in "AB"
    }  # fmt: skip
    fusion, ours = load_file(out / "fusion.safetensors"), leaves_of(trained[1])
    assert set(fusion) == {f"multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    np.testing.assert_array_equal(
        fusion["multi_modal_projector.linear_1.weight"], ours["fusion/fuse/projector/fc1/kernel"].T
    )


def test_a_merged_run_goes_out_and_comes_in(trained, folder, capsys):
    out = folder / "merged"
    to_hf(str(trained[1]), "latest", str(out), "auto", drop_shortcuts=False, merge=True, check=True)
    assert "logits on a built-in batch differ by at most 0" in capsys.readouterr().out
    merged, again = adapter.merged(load_run(str(trained[1]), text=False)), join(model=out)
    assert again.cfg.lora.rank == merged.config.lora.rank == 0
    assert set(flat(again.params)) == set(flat(merged.params))
    for path, leaf in flat(merged.params).items():
        np.testing.assert_array_equal(flat(again.params)[path], leaf.astype(np.float32), err_msg=path)


def test_exports_that_would_lose_something_are_refused(trained, folder):
    base, run = (load_run(str(workdir), text=False) for workdir in trained)
    assert refusal(export.write, run, str(folder), "auto", False) == (
        f"{folder}/run has LoRA adapters; --merge adds them to the LLM's weights, --as=adapter writes them separately"
    )
    assert refusal(adapter.merged, base) == f"--merge: {folder}/base has no LoRA adapters; leave out --merge"
    assert (
        refusal(adapter.write_adapter, base, str(folder))
        == f"--as=adapter: {folder}/base has no LoRA adapters; use --as=llm"
    )
    wider = dataclasses.replace(run.config.stages["instruct"], trainable=("llm/.*",))
    both = dataclasses.replace(run, config=dataclasses.replace(run.config, stages={"instruct": wider}))
    assert "trained llm/" in refusal(adapter.write_adapter, both, str(folder))
    fused = dataclasses.replace(run.config.llm, family="phi3")
    phi3 = dataclasses.replace(run, config=dataclasses.replace(run.config, llm=fused))
    assert "a phi3 model stores llm/layers/" in refusal(adapter.write_adapter, phi3, str(folder))
    nowhere = lambda **flags: to_hf(str(trained[1]), "latest", str(folder / "x"), "adapter", **flags)
    assert refusal(lambda: nowhere(drop_shortcuts=False, merge=True, check=False)) == (
        "--as=adapter does not write a whole model; leave out --merge, --verify and --drop-shortcuts"
    )
    assert not (folder / "x").exists()
