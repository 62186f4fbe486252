"""Loads a trained run for evaluation and generation."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from jax.sharding import Mesh

from sparsecut_jax.data.pipeline import Images
from sparsecut_jax.models.parameters import flatten
from sparsecut_jax.models.sparsecut import SparseCut
from sparsecut_jax.runs.checkpoint import CONVERTED, open_run
from sparsecut_jax.runs.setup import mesh_of, shape_for_inference
from sparsecut_jax.runtime import sharding
from sparsecut_jax.settings import Config
from sparsecut_jax.text.tokenizer import Tokenizer
from sparsecut_jax.types import UserError

FRESH_FUSION = (
    "the fusion of {0} was never trained, so its answers say nothing about the image; train it in a run with "
    "--config.init_from={0}, or give `convert from-hf` a trained one with --fusion"
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A model with its parameters, and what turns text and images into its input.

    Attributes:
      fresh_fusion: whether the fusion still has its initial values, neither trained nor read from a file.
      template: name of the template of the last stage, which the model expects.
    """

    workdir: str
    step: int
    config: Config
    mesh: Mesh
    model: SparseCut
    params: Any
    tokenizer: Tokenizer | None
    pictures: Images
    fresh_fusion: bool = False

    @property
    def template(self) -> str:
        return self.config.stages[self.config.run_stages[-1]].template


def load_run(workdir: str, which: str = "latest", text: bool = True) -> Run:
    """Loads the parameters of a checkpoint ("latest", "best" or a step) onto the devices of this machine.

    The mesh is the run's if it fits the devices, else all devices side by side (data parallel).

    Raises:
      UserError: there is no such checkpoint, or no tokenizer although `text` is set.
    """
    checkpoints, step, cfg, tokenizer = open_run(workdir, which)
    # Any picture may be asked about, also one whose features are not stored.
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, cache_features="none"))
    if text and tokenizer is None:
        raise UserError(f"{workdir} has no tokenizer; convert the weights again with --tokenizer=DIR")
    try:
        mesh = mesh_of(cfg)
    except UserError:
        mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
    shaped = shape_for_inference(cfg, mesh)
    stage = checkpoints.meta(step)["stage"]
    params = checkpoints.restore_params(step, shaped.abstract(checkpoints.dtypes(step)))
    checkpoints.close()
    return Run(
        workdir, step, cfg, mesh, shaped.model, params, tokenizer, Images(cfg), _fresh_fusion(cfg, stage, params)
    )


def _fresh_fusion(cfg: Config, stage: str, params: Any) -> bool:
    """Whether the fusion is untrained at a checkpoint of `stage`; one taken from another run counts as trained."""
    if cfg.init.model or cfg.init.fusion or cfg.init_from:
        return False
    done = () if stage == CONVERTED else cfg.run_stages[: cfg.run_stages.index(stage) + 1]
    trained = [pattern for name in done for pattern in cfg.stages[name].trainable]
    paths = [path for path in flatten(params) if path.startswith("fusion/")]
    return not any(re.fullmatch(pattern, path) for pattern in trained for path in paths)
