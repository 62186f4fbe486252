"""The paper's recipe on a current small stack: SigLIP 2 so400m/14-384 and Qwen3-1.7B.

    python -m sparsecut_jax.train --config=configs/siglip_qwen.py:stage=pretrain
    python -m sparsecut_jax.train --config=configs/siglip_qwen.py:stage=finetune
    python -m sparsecut_jax.plan --config=configs/siglip_qwen.py:stage=finetune --topology=v5e:4x4

Stages and data are those of configs/sparsecut.py. An image takes 27 x 27 = 729 positions. Both parts are downloaded from
the hub, as safetensors.
"""

from ml_collections import ConfigDict

from configs import sparsecut
from sparsecut_jax.config import default, variant_arguments


def get_config(arguments: str = "") -> ConfigDict:
    args = variant_arguments(arguments, stage=sparsecut.STAGES)
    config = default()
    # SigLIP 2 towers of fixed resolution are of family siglip.
    config.vision.update(
        family="siglip", image_size=384, patch_size=14, width=1152, layers=27, heads=16, mlp_dim=4304,
        activation="gelu_tanh", norm_eps=1e-6, class_token=False, patch_bias=True, pre_norm=False, select_layer=-2,
        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
    )  # fmt: skip
    config.llm.update(
        family="qwen3", vocab_size=151936, width=2048, layers=28, heads=16, kv_heads=8, head_dim=128, mlp_dim=6144,
        norm_eps=1e-6, rope_theta=1e6, max_positions=40960, qk_norm=True, tie_embeddings=True,
    )  # fmt: skip
    config.init.update(vision="google/siglip2-so400m-patch14-384", llm="Qwen/Qwen3-1.7B")
    config.fusion.name = "channel"
    config.shortcuts.update(density="sparse", count=8, distribution="uniform", order="u")
    sparsecut.recipe(config, "siglip_qwen", args.stage, template="chatml")
    return config
