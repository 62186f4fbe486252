"""Joins pretrained parts into one model, to be converted, trained or used."""

from __future__ import annotations

import dataclasses
from typing import Any

from sparsecut_jax.config import Config
from sparsecut_jax.data.pipeline import Images
from sparsecut_jax.runs.parameters import initial_params
from sparsecut_jax.runs.run import Run
from sparsecut_jax.runs.setup import Opened, Shaped, mesh_of, open_weights, shape_for_inference
from sparsecut_jax.settings import InitConfig
from sparsecut_jax.tasks.registry import build_model
from sparsecut_jax.text import tokenizer as tokenizer_lib
from sparsecut_jax.text.templates import OWN, TEMPLATES
from sparsecut_jax.text.tokenizer import Tokenizer
from sparsecut_jax.types import UserError
from sparsecut_jax.weights import load
from sparsecut_jax.weights.pretrained import WeightSource, source_tokenizer


@dataclasses.dataclass(frozen=True)
class Joined:
    """What config.init names, before its weights are read. The config has the sizes and the dtype of the files."""

    opened: Opened
    tokenizer: Tokenizer | None
    shaped: Shaped

    @property
    def config(self) -> Config:
        return self.shaped.config

    def read(self) -> tuple[Any, load.Report]:
        """The parameters, freshly initialised if no source has them, and a report of where each came from. Raises UserError."""
        abstract = self.shaped.abstract()
        matched = load.match(abstract, self.config, self.opened.weight_sources)
        return initial_params(self.shaped.model, self.config, abstract, matched)


def join(cfg: Config) -> Joined:
    """Opens the parts that config.init names.

    Parameters keep the files' dtype (bfloat16 where all are), unless config.param_dtype says otherwise.

    Raises:
      UserError: there are none, or they cannot be read or do not fit.
    """
    opened = open_weights(cfg)
    if not opened.weight_sources:
        raise UserError(
            "nothing to convert: give --model, or --vision and --llm (a part that is not given is freshly initialised)"
        )
    cfg, tokenizer = opened.config, source_tokenizer(opened.config, opened.weight_sources)
    if tokenizer is not None:
        cfg = tokenizer_lib.with_vocabulary(cfg, tokenizer)
    elif not cfg.llm.vocab_size:
        raise UserError(
            "the LLM is freshly initialised and its vocabulary is unknown; give --tokenizer=DIR or --llm=DIR"
        )
    shaped = Shaped(cfg, mesh_of(cfg), build_model(cfg))
    if cfg.param_dtype == "auto":
        fillings, _ = load.match(shaped.abstract(), cfg, opened.weight_sources)
        cfg = dataclasses.replace(cfg, param_dtype=load.files_dtype(fillings))
    return Joined(opened, tokenizer, dataclasses.replace(shaped, config=cfg))


def load_whole(path: str) -> Run:
    """A whole model that `convert to-hf` or LLaVA's authors wrote, a folder or a hub id, ready for questions.

    Raises:
      UserError: it cannot be read, or has no tokenizer.
    """
    joined = join(Config(init=InitConfig(model=path)))
    if joined.tokenizer is None:
        raise UserError(f"{path} has no tokenizer; expected tokenizer.json and tokenizer_config.json in it")
    cfg = as_written(joined.config, joined.opened.weight_sources["llm"], joined.tokenizer)
    mesh, (params, _) = joined.shaped.mesh, joined.read()
    return Run(path, 0, cfg, mesh, shape_for_inference(cfg, mesh).model, params, joined.tokenizer, Images(cfg))


def as_written(cfg: Config, source: WeightSource, tokenizer: Tokenizer | None) -> Config:
    """The config with the template and the number of images that a whole model was trained with.

    `convert to-hf` writes both into config.json. Where they are missing, the template is the tokenizer's own, or Vicuna's
    as LLaVA-1.5 has it.

    Raises:
      UserError: they are not as `convert to-hf` writes them.
    """
    own = OWN if tokenizer is not None and tokenizer.chat_template else cfg.stages[cfg.run_stages[-1]].template
    said = source.config.get("prompt", {"template": own, "max_images": cfg.data.max_images})
    try:
        template, slots = said["template"], said["max_images"]
    except (KeyError, TypeError):
        template, slots = None, None
    if template not in (OWN, *TEMPLATES) or type(slots) is not int or slots < 1:
        raise UserError(f"{source.file}: 'prompt' is {said!r}; expected the 'template' and 'max_images' of a run")
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, max_images=slots))
    return cfg.with_stage(cfg.run_stages[-1], template=template)
