"""A trained run, loaded to be evaluated or asked."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax.sharding import Mesh

from sparsecut_jax import backends, sharding
from sparsecut_jax.data.pipeline import Images
from sparsecut_jax.data.tokenizer import Tokenizer
from sparsecut_jax.models.sparsecut import SparseCut, build_model
from sparsecut_jax.settings import Config
from sparsecut_jax.training.checkpoint import open_run
from sparsecut_jax.training.state import abstract_params
from sparsecut_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Run:
    """A model with its parameters and what turns text and pictures into its input.

    Attributes:
      template: name of the template of the last stage, which is how the model expects to be asked.
    """

    workdir: str
    step: int
    config: Config
    mesh: Mesh
    model: SparseCut
    params: Any
    tokenizer: Tokenizer | None
    pictures: Images

    @property
    def template(self) -> str:
        return self.config.stages[self.config.run_stages[-1]].template


def load_run(workdir: str, which: str = "latest", text: bool = True) -> Run:
    """Loads the parameters of a checkpoint ("latest", "best" or a step) onto the devices of this machine.

    The mesh is the run's if it fits the devices, else all devices side by side (data parallel).

    Raises:
      UserError: there is no such checkpoint, or no tokenizer although `text` is wanted.
    """
    checkpoints, step, cfg, tokenizer = open_run(workdir, which)
    if text and tokenizer is None:
        raise UserError(f"{workdir} has no tokenizer; convert the weights again with --tokenizer=DIR")
    try:
        mesh = sharding.make_mesh(dataclasses.asdict(cfg.mesh))
    except UserError:
        mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
    here = backends.resolve_for_inference(cfg, sharding.platform(mesh))
    model = build_model(here, backends.compute_dtype(here))
    params = checkpoints.restore_params(step, abstract_params(model, cfg, mesh, checkpoints.dtypes(step)))
    checkpoints.close()
    return Run(workdir, step, cfg, mesh, model, params, tokenizer, Images(cfg))
