"""A config becomes a run, step by step. Every command takes the steps that it needs, in this order:

    opened = open_weights(cfg)      the pretrained parts, of which only headers are read; the config adopts their settings
    data = open_data(opened)        rows, tokenizer and pictures; no row is read unless a tokenizer is trained on them
    shaped = shape(cfg, mesh)       the model on the mesh, with shapes, dtypes and shardings of all parameters

`runs/parameters.py` gives these shapes values; `runs/run.py` and `runs/joined.py` load what was trained or downloaded.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from sparsecut_jax import checks
from sparsecut_jax.data import pipeline, sources
from sparsecut_jax.data.walk import RowEncoder
from sparsecut_jax.models import parameters, ways
from sparsecut_jax.models.sparsecut import SparseCut
from sparsecut_jax.runs.checkpoint import as_saved, check_same_data
from sparsecut_jax.runs.parameters import abstract_params, boxed_shapes, stage_dtypes
from sparsecut_jax.runtime import backends, sharding
from sparsecut_jax.settings import Config
from sparsecut_jax.tasks import registry
from sparsecut_jax.tasks.registry import build_model
from sparsecut_jax.text import tokenizer as tokenizer_lib
from sparsecut_jax.text.tokenizer import Tokenizer
from sparsecut_jax.types import UserError
from sparsecut_jax.weights import pretrained
from sparsecut_jax.weights.claims import adopt, adopt_here, differences

# ------------------------------------------------------------------ pretrained parts


@dataclasses.dataclass(frozen=True)
class Opened:
    """A config with the settings of its pretrained parts.

    Attributes:
      weight_sources: {part: its source}, for the parts that have one.
      notes: a line for each setting that won over a file, and for each file that replaced some.
    """

    config: Config
    weight_sources: dict[str, pretrained.WeightSource]
    notes: list[str]


def open_weights(cfg: Config) -> Opened:
    """Opens what config.init names. Raises UserError if it cannot be read or contradicts the config."""
    weight_sources = pretrained.open_sources(cfg.init)
    return Opened(adopt(cfg, weight_sources), weight_sources, differences(cfg, weight_sources))


def open_here(cfg: Config, stage: str) -> Opened:
    """The config of one stage as a run would open it, as far as its files are on this machine.

    Nothing is downloaded. The notes also say what is assumed about other files and the vocabulary.
    """
    adopted, lines, _, away = adopt_here(cfg)
    notes = [" ".join(line.split()) for line in lines]
    notes += [f"not on this machine, so the config's sizes are used: {', '.join(away)}"] if away else []
    if not adopted.llm.vocab_size:
        vocabulary = -(-adopted.tokenizer.vocab_size // 64) * 64
        notes.append(f"config.llm.vocab_size comes from the tokenizer; {vocabulary} is assumed")
        adopted = dataclasses.replace(adopted, llm=dataclasses.replace(adopted.llm, vocab_size=vocabulary))
    checks.check_room(adopted := dataclasses.replace(adopted, run_stages=(stage,)))
    return Opened(adopted, {}, notes)


def reopen(cfg: Config, meta: Mapping[str, Any]) -> Opened:
    """The config of a resumed run, whose parameters are in its checkpoint. meta: that checkpoint's."""
    return Opened(as_saved(cfg, meta["config"]), {}, [])


def check_fits(cfg: Config, mesh: Mesh) -> None:
    """Raises UserError for sizes that do not fit one another, the mesh or its platform."""
    checks.check_room(cfg)
    check_mesh(cfg, mesh.shape)
    backends.resolve(cfg, sharding.platform(mesh))
    ways.wiring_of(cfg)


def check_mesh(cfg: Config, sizes: Mapping[str, int]) -> None:
    """Checks that a mesh of these sizes (`mesh.shape`) can shard the model and its batches; no device is needed.

    Raises:
      UserError: heads, widths, the vocabulary (0: not known yet) or the rows of a micro-batch cannot be sharded.
    """
    tensor, llm = sizes["tensor"], cfg.llm
    widths = {
        "config.vision.heads": cfg.vision.heads,
        "config.vision.mlp_dim": cfg.vision.mlp_dim,
        "config.llm.heads": llm.heads,
        "config.llm.mlp_dim": llm.mlp_dim,
        "config.llm.width": llm.width,  # also the width of the fusion's hidden layer
        "config.llm.vocab_size": llm.vocab_size,
        **ways.sharded_sizes(cfg),
    }
    kv_heads = {} if llm.replicate_kv else {"config.llm.kv_heads": llm.kv_heads}
    most = math.gcd(*widths.values(), *kv_heads.values())
    fitting = f"tensor={' or '.join(str(n) for n in range(1, most + 1) if most % n == 0)}"
    for key, value in widths.items():
        if value % tensor:
            raise UserError(f"{key}={value} cannot be sharded over mesh axis tensor={tensor}; expected {fitting}")
    if kv_heads and llm.kv_heads % tensor:
        raise UserError(
            f"config.llm.kv_heads={llm.kv_heads} cannot be sharded over mesh axis tensor={tensor}; expected {fitting}, or "
            "config.llm.replicate_kv=True, which replicates them on every device"
        )
    split = sharding.shards("batch", sizes)
    for name in cfg.run_stages:
        stage = cfg.stages[name]
        rows, step = stage.batch_size // stage.accumulate, split * stage.accumulate
        if rows % split == 0:
            continue
        below = stage.batch_size // step * step
        mended = f"batch_size={f'{below} or ' if below else ''}{below + step}"
        fewer = next((n for n in range(stage.accumulate, 0, -1) if stage.batch_size % (split * n) == 0), 0)
        raise UserError(
            f"config.stages.{name}.batch_size / accumulate = {rows} rows cannot be sharded over the {split} devices of mesh "
            f"axes {' x '.join(sharding.RULES['batch'])}; expected {mended}{f', or accumulate={fewer}' if fewer else ''}"
        )


# ------------------------------------------------------------------ data


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run reads."""

    config: Config
    source: sources.Source
    tokenizer: Tokenizer
    pictures: pipeline.Images

    def reader(self, name: str, holdout: bool = False) -> pipeline.Reader:
        """The reader of a stage's training rows, or of its held-out rows, which are never augmented."""
        cfg, stage, wiring = self.config, self.config.stages[name], ways.wiring_of(self.config)
        encoder = RowEncoder.of(stage, wiring.positions, self.tokenizer, wiring.question, registry.task_of(cfg))
        split, extras = self.source.stage(stage, holdout), registry.extras_of(cfg)
        return pipeline.Reader(split, encoder, self.pictures, cfg.data.flip, cfg.data.shift, extras)

    @functools.cached_property
    def readers(self) -> dict[str, pipeline.Reader]:
        """{stage: the reader of its training rows}"""
        return {name: self.reader(name) for name in self.config.run_stages}


def open_data(opened: Opened, meta: Mapping[str, Any] | None = None) -> Data:
    """Opens the rows of a config. meta: the checkpoint's, if the run is resumed.

    Raises:
      UserError: there are no rows, other rows than the run began with, or no tokenizer.
    """
    cfg = opened.config
    source = sources.load_source(cfg)
    if meta is not None:
        check_same_data(meta["data"], source.fingerprint, cfg)
        tokenizer = tokenizer_lib.from_json(meta["tokenizer"])
    else:
        tokenizer = _tokenizer(opened, source)
    return Data(cfg, source, tokenizer, pipeline.Images(cfg))


def _tokenizer(opened: Opened, source: sources.Source) -> Tokenizer:
    """The tokenizer of the LLM or of config.tokenizer; for an LLM trained from scratch, one trained on the rows."""
    tokenizer = pretrained.source_tokenizer(opened.config, opened.weight_sources)
    if tokenizer is None and "llm" in opened.weight_sources:
        raise UserError(
            f"{opened.weight_sources['llm'].path} has no tokenizer; set config.tokenizer.path to a folder with the LLM's "
            "tokenizer"
        )
    return tokenizer or tokenizer_lib.train(source.texts(), opened.config.tokenizer.vocab_size)


# ------------------------------------------------------------------ model


@dataclasses.dataclass(frozen=True)
class Shaped:
    """The model of a config, whose vocabulary is known, on a mesh; it has no parameters yet.

    config: with every "auto" resolved for the mesh's platform, if it was made by `shape` or `shape_for_inference`.
    """

    config: Config
    mesh: Mesh
    model: SparseCut

    @functools.cached_property
    def matrices(self) -> dict[str, bool]:
        """{path: whether the parameter is a matrix}"""
        return parameters.matrices(boxed_shapes(self.model, self.config.data.max_images))

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{path: shape of the parameter}"""
        return {path: leaf.shape for path, leaf in parameters.flatten(self.abstract()).items()}

    def abstract(self, dtype_of: Callable[[str], jnp.dtype] | None = None) -> Any:
        """All parameters as `jax.ShapeDtypeStruct`s with shardings, see `abstract_params`."""
        return abstract_params(self.model, self.config, self.mesh, dtype_of)

    def abstract_at(self, stage: str) -> Any:
        """`abstract` in the dtypes that parameters are stored in from a stage on."""
        return self.abstract(stage_dtypes(self.config, stage, self.matrices))


def mesh_of(cfg: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """The config's mesh, over all devices or those given. Raises UserError if it does not fit them."""
    return sharding.make_mesh(dataclasses.asdict(cfg.mesh), devices)


def shape(cfg: Config, mesh: Mesh, branched: bool = False) -> Shaped:
    """The model to be trained, which reports the strength of its shortcuts.

    branched: whether rows have independent questions.

    Raises:
      UserError: the platform does not support a setting.
    """
    here = backends.resolve(cfg, sharding.platform(mesh), branched)
    return Shaped(here, mesh, build_model(here, backends.compute_dtype(here), ("shortcut_ratio",)))


def shape_for_inference(cfg: Config, mesh: Mesh) -> Shaped:
    """The model to answer questions with; the run may have trained on another platform."""
    here = backends.resolve_for_inference(cfg, sharding.platform(mesh))
    return Shaped(here, mesh, build_model(here, backends.compute_dtype(here)))
