"""The model of the speed comparison with PyTorch: ViT 256x12 at 336 px with 5 views, LLM 512x12, 8 shortcuts.

    python -m sparsecut_jax.benchmark --config=configs/side_by_side.py --parts=step,decode

Two sequences of 576 image and 128 text tokens, float32, tower frozen, AdamW on the rest (docs/speed.md has the figures).
It is for benchmark only: it has no data to train on.
"""

from ml_collections import ConfigDict

from sparsecut_jax.config import default, variant_arguments


def get_config(arguments: str = "") -> ConfigDict:
    variant_arguments(arguments)
    config = default()
    config.workdir = "runs/side_by_side"
    config.vision.update(image_size=336, patch_size=14, width=256, layers=12, heads=8, mlp_dim=1024)
    config.fusion.name = "channel"
    config.shortcuts.count = 8
    config.llm.update(
        vocab_size=32000, width=512, layers=12, heads=8, kv_heads=8, head_dim=64, mlp_dim=1376, remat="full"
    )
    config.dtype = "float32"
    config.loss_chunk = 128  # the text comes last; the other chunks have no target tokens
    config.run_stages = ("instruct",)
    config.stages.instruct.update(
        seq_len=704, batch_size=2, trainable=("fusion/.*", "llm/.*"), lr=1e-4, weight_decay=0.0
    )
    return config
