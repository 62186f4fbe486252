"""`repeat`: the main feature alone enters where the shortcuts of another way would bring tower levels. A control.

It has the depth of `fusion.repeat.base`, one of the ways that follow `config.shortcuts`, without its levels: the same entries
into the same layers, but each source is the main feature, fused as `base` fuses a level. With `fusion.shared=False` every level
that it stands for has weights of its own, as with `base`. What `base` gains over `repeat` comes from the levels.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from flax import linen as nn

from sparsecut_jax.models.fusing import channel, cross_attention, mlp
from sparsecut_jax.models.interfaces import Fused, Fusing, Question, Seen, Wiring
from sparsecut_jax.models.rules import projector
from sparsecut_jax.settings import Config, FusionConfig, setting
from sparsecut_jax.types import UserError

BASES = {"channel": channel, "cross_attention": cross_attention, "mlp": mlp}
IGNORES = ("fusion.grid",)  # unless the base reads crops
OF_WEIGHTS = ("fusion.repeat.base", "fusion.grid")
RULES = projector()


@dataclasses.dataclass(frozen=True)
class Settings:
    """The way whose levels are replaced."""

    base: Literal["channel", "cross_attention", "mlp"] = setting(
        "channel", "Way of fusing that makes the sources, each from the main feature instead of from a level."
    )


def others(settings: Settings) -> tuple[str, ...]:
    return (settings.base,)


def _of_base(fusion: FusionConfig, settings: Settings) -> Any:
    kind = getattr(BASES[settings.base], "Settings", None)
    return None if kind is None else getattr(fusion, settings.base, kind())


def check(settings: Settings, cfg: Config) -> None:
    """Raises UserError if the base refuses the config."""
    if hasattr(BASES[settings.base], "check"):
        BASES[settings.base].check(_of_base(cfg.fusion, settings), cfg)


def sharded_sizes(settings: Settings, cfg: Config) -> dict[str, int]:
    sizes = getattr(BASES[settings.base], "sharded_sizes", None)
    return sizes(_of_base(cfg.fusion, settings), cfg) if sizes else {}


def wiring(settings: Settings, cfg: Config) -> Wiring:
    """Raises UserError for impossible shortcuts, or none."""
    base = BASES[settings.base].wiring(_of_base(cfg.fusion, settings), cfg)
    if not base.names:
        raise UserError(
            "config.fusion.name='repeat' repeats the main feature through shortcuts, but config.shortcuts.density='none'; "
            f"choose another density, or config.fusion.name={settings.base!r}"
        )
    main, count = base.levels[0], len(base.names)
    if cfg.fusion.shared:  # all sources would be equal: one enters in the place of each
        once = tuple((0,) * len(rows) for rows in base.entering)
        return dataclasses.replace(base, levels=(main,), names=("main",), entering=once, shortcuts=None)
    names = tuple(f"main{place}" for place in range(count))
    return dataclasses.replace(base, levels=(main,) * (1 + count), names=names, shortcuts=None)


class Fuse(Fusing):
    """The main feature [K, I, V, N, C], K copies for K sets of weights -> tokens [I, S, D], and the sources of the wiring."""

    def setup(self) -> None:
        base = BASES[self.settings.base].Fuse
        own = _of_base(self.config, self.settings)
        self.base = base(own, self.config, self.wiring, self.width, self.attention)
        nn.share_scope(self, self.base)

    def __call__(self, seen: Seen, question: Question | None = None) -> Fused:
        fused = self.base(seen, question)
        return fused.replace(bank=fused.tokens[None]) if fused.bank is None else fused
