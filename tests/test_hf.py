"""Hugging Face names and layouts -> our parameters. The golden cases check the values of tower, LLM and projector."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from golden_cases import FOLDER
from safetensors.numpy import load_file
from tiny import make_batch, tiny_config

from sparsecut_jax.models.sparsecut import build_model
from sparsecut_jax.types import UserError
from sparsecut_jax.weights.hf import assemble, targets

C, D = 128, 32  # two heads of the cross-attention


def test_where_names_go():
    where = lambda name: [(path, layer) for path, layer, _ in targets(name)]
    assert where("vision_model.encoder.layers.3.layer_norm2.weight") == [("vision/blocks/norm2/scale", 3)]
    assert where("encoder.layers.3.self_attn.k_proj.bias") == [("vision/blocks/attention/k_bias", 3)]
    assert where("model.layers.11.mlp.down_proj.weight") == [("llm/layers/mlp/down/kernel", 11)]
    assert where("mm_projector.0.bias") == [("fusion/fuse/projector/fc1/bias", None)]
    assert where("model.mm_projector.norm2.bias") == [("fusion/fuse/norm2/bias", None)]
    assert [path for path, _ in where("model.mm_projector.attn.in_proj_weight")] == [
        "fusion/fuse/attention/q_kernel", "fusion/fuse/attention/k_kernel", "fusion/fuse/attention/v_kernel",
    ]  # fmt: skip
    assert where("vision_model.post_layernorm.weight") == []


@pytest.fixture(scope="module")
def cross_attention():
    """(config, shapes of the fusion, the official tensors of one)."""
    cfg = tiny_config(fusion={"name": "cross_attention"}, vision={"width": C})
    model = build_model(cfg)
    shapes = nn.meta.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), make_batch([[1, 2]]))))["params"]
    rng = np.random.default_rng(0)
    sizes = {
        "mlp.0.weight": (D, C), "mlp.0.bias": (D,), "mlp.2.weight": (D, D), "mlp.2.bias": (D,),
        "attn.in_proj_weight": (3 * C, C), "attn.in_proj_bias": (3 * C,),
        "attn.out_proj.weight": (C, C), "attn.out_proj.bias": (C,),
        "norm1.weight": (C,), "norm1.bias": (C,), "norm2.weight": (C,), "norm2.bias": (C,),
        "ffn.0.weight": (4 * C, C), "ffn.0.bias": (4 * C,), "ffn.2.weight": (C, 4 * C), "ffn.2.bias": (C,),
    }  # fmt: skip
    tensors = {f"model.mm_projector.{k}": rng.standard_normal(s).astype(np.float32) for k, s in sizes.items()}
    return cfg, {"fusion": shapes["fusion"]}, tensors


def test_cross_attention_projects_as_torch_does(cross_attention):
    cfg, shapes, tensors = cross_attention
    params, unused = assemble(tensors, shapes, cfg)
    attention = params["fusion"]["fuse"]["attention"]
    x = np.random.default_rng(1).standard_normal((5, C)).astype(np.float32)
    packed = x @ tensors["model.mm_projector.attn.in_proj_weight"].T + tensors["model.mm_projector.attn.in_proj_bias"]
    for i, name in enumerate("qkv"):
        ours = np.einsum("tc,cqh->tqh", x, attention[f"{name}_kernel"]) + attention[f"{name}_bias"]
        np.testing.assert_allclose(ours.reshape(5, C), packed[:, i * C : (i + 1) * C], atol=1e-4)
    y = x.reshape(5, 2, C // 2)
    theirs = x @ tensors["model.mm_projector.attn.out_proj.weight"].T
    np.testing.assert_allclose(np.einsum("tqh,qhc->tc", y, attention["out_kernel"]), theirs, atol=1e-4)
    assert unused == []


def test_missing_wrong_and_extra_tensors(cross_attention):
    cfg, shapes, tensors = cross_attention
    without = {k: v for k, v in tensors.items() if "norm1.weight" not in k}
    with pytest.raises(UserError, match=r"no tensor for the whole of fusion/fuse/norm1/scale\(128,\)"):
        assemble(without, shapes, cfg)
    wrong = {**tensors, "model.mm_projector.mlp.0.weight": np.zeros((D, C + 1), np.float32)}
    with pytest.raises(UserError, match=r"mlp.0.weight has shape \(129, 32\) .* expected \(128, 32\)"):
        assemble(wrong, shapes, cfg)
    assert assemble({**tensors, "other": np.zeros(1)}, shapes, cfg)[1] == ["other"]


def test_a_stack_with_a_missing_layer():
    tensors = load_file(FOLDER / "weights/llama/model.safetensors")
    del tensors["model.layers.5.input_layernorm.weight"]
    cfg = tiny_config(llm={"width": 96, "head_dim": 16})
    template = {"llm": {"layers": {"norm1": {"scale": np.zeros((8, 96))}}}}
    with pytest.raises(UserError, match="no tensor for the whole of llm/layers/norm1/scale"):
        assemble(tensors, template, cfg)
