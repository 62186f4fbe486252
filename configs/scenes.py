"""A small SparseCut learns Scenes: drawn pictures whose questions tell levels of the tower and views apart.

    python -m sparsecut_jax.train --config=configs/scenes.py
    python -m sparsecut_jax.train --config=configs/scenes.py:smoke
    python -m sparsecut_jax.train --config=configs/scenes.py --config.fusion.name=mlp      the low-res view alone

Accuracy is reported by question: low_coarse_color, high_fine_letter and so on, and heldout_... for combinations that
were never trained on. docs/scenes.md shows the pictures, and what they can and cannot tell.
"""

from ml_collections import ConfigDict

from configs import base
from sparsecut_jax.config import variant_arguments


def get_config(arguments: str = "") -> ConfigDict:
    args = variant_arguments(arguments, smoke=False)
    config = base.get_config("smoke" if args.smoke else "")

    config.workdir = "runs/scenes_smoke" if args.smoke else "runs/scenes"
    # Half of the questions ask for left and right or for directions, and the places of fine things are known.
    config.data.update(source="scenes", flip=False, shift=0)
    config.stages.align.update(seq_len=40, epochs=0.2)
    config.stages.instruct.update(seq_len=160, epochs=1.5)
    if args.smoke:
        config.data.scenes.update(train=400, test=40)
        config.data.holdout = 40
    return config
