"""The embedded default: trains a small SparseCut model on easy-VQA from scratch, on a laptop's CPU.

    python -m sparsecut_jax.train --config=configs/base.py
    python -m sparsecut_jax.train --config=configs/base.py:smoke      the whole pipeline in under a minute

Stage 1 learns captions ("a red circle"), stage 2 the questions, as in the paper's recipe; the tower is trained too, since
nothing is pretrained. Any setting can be changed on the command line, for example --config.llm.layers=12;
`sparsecut_jax/settings/` lists them all. For your own data start from configs/own.py.
"""

from ml_collections import ConfigDict

from sparsecut_jax.config import default, variant_arguments


def get_config(arguments: str = "") -> ConfigDict:
    args = variant_arguments(arguments, smoke=False)
    config = default()

    config.workdir = "runs/smoke" if args.smoke else "runs/base"

    # 32-pixel views of 64-pixel pictures: one low-res view, four crops of the original. 16 tokens each.
    config.vision.update(image_size=32, patch_size=8, width=64, layers=5, heads=2, mlp_dim=256, remat="full")
    config.fusion.name = "channel"
    config.shortcuts.count = 4
    # For a model this small, recomputing activations is faster than keeping them, on a CPU too: 116 against 164 ms per step
    # on 2 cores, because kept activations cost memory traffic.
    config.llm.update(width=64, layers=8, heads=2, kv_heads=2, head_dim=32, mlp_dim=128, remat="full")

    # For pictures of a single shape, flips and shifts do not change any answer.
    config.data.update(source="easy_vqa", holdout=200, flip=True, shift=2)

    for stage in config.stages.values():
        stage.update(trainable=("vision/.*", "fusion/.*", "llm/.*"), batch_size=16, lr=7e-4, b2=0.98, warmup=0.05)
    config.stages.align.update(rows="captions", template="plain", seq_len=24, epochs=13.0)
    config.stages.instruct.update(rows="conversations", template="qa", seq_len=96, epochs=9.0, lr=1e-3)

    config.eval.update(every=1000, max_new_tokens=4)
    config.checkpoint.every = 1000

    if args.smoke:
        config.stages.align.max_steps = 20
        config.stages.instruct.max_steps = 20
        config.eval.every = 20
    return config
