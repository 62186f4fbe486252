"""The baseline: LLaVA-1.5, with only the low-res view and no shortcuts; everything else is as in configs/sparsecut.py.

python -m sparsecut_jax.train --config=configs/llava.py:size=7b,stage=pretrain
python -m sparsecut_jax.train --config=configs/llava.py:size=7b,stage=finetune
python -m sparsecut_jax.plan --config=configs/llava.py:size=7b,stage=finetune --topology=v5e:8x8
"""

from ml_collections import ConfigDict

from configs import sparsecut
from sparsecut_jax.config import default, variant_arguments


def get_config(arguments: str = "") -> ConfigDict:
    args = variant_arguments(arguments, size=tuple(sparsecut.VICUNA), stage=sparsecut.STAGES)
    config = default()
    sparsecut.clip_and_vicuna(config, args.size)
    config.fusion.name = "mlp"
    config.shortcuts.density = "none"
    sparsecut.recipe(config, f"llava_{args.size}", args.stage)
    return config
