"""Trains a small model with any way of fusing on Scenes, all on the same data, steps and seed.

    python -m sparsecut_jax.train --config=configs/fusion.py:way=deepstack
    python -m sparsecut_jax.train --config=configs/fusion.py:way=dense,smoke
    python -m sparsecut_jax.train --config=configs/fusion.py:way=dense --config.fusion.dense.kind=sci

`way` is the name of a file in sparsecut_jax/models/fusing; --help=config.fusion lists the settings of each.

A way that reads the question, such as emma, encodes a picture with one of its twelve questions: a step trains it on a twelfth
of the answers that the others get from as many rows. --config.stages.instruct.batching=buckets makes its steps four times
faster on a CPU, since a row is then short.

For a way such as concat, whose images take the positions of several views, sequences are longer by these: all ways have the
same room for text.
"""

from ml_collections import ConfigDict

from configs import scenes
from sparsecut_jax.config import check, variant_arguments
from sparsecut_jax.models import levels
from sparsecut_jax.models.ways import FUSING


def get_config(arguments: str = "") -> ConfigDict:
    ways = ("channel", *(name for name in FUSING if name != "channel"))
    args = variant_arguments(arguments, way=ways, smoke=False)
    config = scenes.get_config("smoke" if args.smoke else "")
    config.fusion.name = args.way
    config.workdir += f"_{args.way}"
    cfg = check(config)
    view = levels.patches(cfg)
    for stage in config.stages.values():
        stage.seq_len += max(0, cfg.tokens_per_image // view - 1) * view
    return config
