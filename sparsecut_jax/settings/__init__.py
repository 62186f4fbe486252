"""Every setting, with its type or allowed values, its default and its meaning.

A file in configs/ starts from these (`config.default()`) and changes what it needs; `config.check` turns
the result into a `Config`, and the program reads nothing else. `--help` of every command prints this list.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from sparsecut_jax.settings.fields import setting
from sparsecut_jax.settings.model import (
    FusionConfig,
    InjectingConfig,
    LLMConfig,
    LoraConfig,
    RopeConfig,
    ShortcutConfig,
    VisionConfig,
)
from sparsecut_jax.settings.run import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    InitConfig,
    MeshConfig,
    ScenesConfig,
    SourceConfig,
    StageConfig,
    TaskConfig,
    TokenizerConfig,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "FusionConfig",
    "InitConfig",
    "InjectingConfig",
    "LLMConfig",
    "LoraConfig",
    "MeshConfig",
    "RopeConfig",
    "ScenesConfig",
    "ShortcutConfig",
    "SourceConfig",
    "StageConfig",
    "TaskConfig",
    "TokenizerConfig",
    "VisionConfig",
    "setting",
]


@dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: int = setting(0, "Seed for initial weights, row order, augmentation and dropout.")
    workdir: str = setting("runs/base", "Folder that the run writes to and resumes from.")
    init_from: str = setting("", "Workdir of another run that weights are taken from.")
    init_parts: tuple[str, ...] = setting(
        ("vision/.*", "fusion/.*", "llm/.*"), "Regular expressions for the parameters taken from init_from."
    )
    init: InitConfig = InitConfig()
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "Dtype of the computation; auto: bfloat16, on CPUs float32."
    )
    param_dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "Dtype of stored parameters; auto: float32 if trained, as small updates vanish in bfloat16, else dtype."
    )
    attention: Literal["auto", "xla", "tiled", "splash", "cudnn"] = setting(
        "auto", "Attention kernel; auto: tiled on CPUs, cudnn on GPUs, splash on TPUs, else xla."
    )
    loss_chunk: int = setting(
        256, "Positions of a row whose logits are in memory at the same time; smaller values save memory."
    )
    log_every: int = setting(10, "Optimizer steps between lines of metrics.")
    profile: str = setting("", "Optimizer steps to profile, as START:STOP; empty: none.")
    run_stages: tuple[str, ...] = setting(("align", "instruct"), "Names in `stages` to run, in this order.")
    stages: dict[str, StageConfig] = setting(
        {"align": StageConfig(), "instruct": StageConfig()}, "Stages of training, by name."
    )
    vision: VisionConfig = VisionConfig()
    fusion: FusionConfig = FusionConfig()
    injecting: InjectingConfig = InjectingConfig()
    shortcuts: ShortcutConfig = ShortcutConfig()
    llm: LLMConfig = LLMConfig()
    lora: LoraConfig = LoraConfig()
    task: TaskConfig = TaskConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()

    def with_stage(self, name: str, **changes: Any) -> Config:
        """The config with settings of stage `name` changed."""
        return replace(self, stages={**self.stages, name: replace(self.stages[name], **changes)})
