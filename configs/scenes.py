"""Trains a small SparseCut model on Scenes: generated pictures whose questions separate tower levels and views.

    python -m sparsecut_jax.train --config=configs/scenes.py
    python -m sparsecut_jax.train --config=configs/scenes.py:smoke
    python -m sparsecut_jax.train --config=configs/scenes.py --config.fusion.name=mlp      only the low-res view

Accuracy is reported per question (low_coarse_color, high_fine_letter, ...), and as heldout_... for combinations that never
occur in training. docs/scenes.md shows the pictures and what the questions can and cannot tell.
"""

from ml_collections import ConfigDict

from configs import base
from sparsecut_jax.config import variant_arguments


def get_config(arguments: str = "") -> ConfigDict:
    args = variant_arguments(arguments, smoke=False)
    config = base.get_config("smoke" if args.smoke else "")

    config.workdir = "runs/scenes_smoke" if args.smoke else "runs/scenes"
    # No flips or shifts: half of the questions ask about left and right or directions, and fine details must stay in place.
    config.data.update(source="scenes", flip=False, shift=0)
    config.stages.align.update(seq_len=40, epochs=0.2)
    config.stages.instruct.update(seq_len=160, epochs=1.5)
    if args.smoke:
        config.data.scenes.update(train=400, test=40)
        config.data.holdout = 40
    return config
