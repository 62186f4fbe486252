"""`mlp`: the low-res view alone, through LLaVA-1.5's projector (arXiv 2310.03744).

With `fusion.mlp.match=NAME` it has as many parameters as way NAME, as nearly as a width between its matrices allows: a control
that tells what a way does from how large it is.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparsecut_jax.models.interfaces import Fused, Fusing, Question, Seen, Wiring
from sparsecut_jax.models.levels import Projector, each_level, level_per_source, patches, shortcut_wiring
from sparsecut_jax.models.rules import LLAVA_OFFICIAL, projector
from sparsecut_jax.settings import Config, setting
from sparsecut_jax.types import UserError

IGNORES = ("fusion.grid",)
OFFICIAL = LLAVA_OFFICIAL
OF_WEIGHTS = ("fusion.mlp.hidden", "fusion.mlp.match")
RULES = projector()


@dataclasses.dataclass(frozen=True)
class Settings:
    """How large the projector is."""

    hidden: int = setting(0, "Channels between the projector's two matrices; 0: the LLM's width, as in LLaVA.")
    match: str = setting("", "Way of fusing whose number of parameters `hidden` is chosen for; empty: none.")


def others(settings: Settings) -> tuple[str, ...]:
    return (settings.match,) if settings.match else ()


def portable(settings: Settings, wiring: Wiring) -> Settings:
    """The width that was found for `match`, since what it matches may depend on the tower's depth."""
    return Settings(wiring.hidden)


def check(settings: Settings, cfg: Config) -> None:
    """Raises UserError for a negative width, or a way that cannot be matched."""
    from sparsecut_jax.models import ways  # which imports this file

    if settings.hidden < 0:
        raise UserError(f"config.fusion.mlp.hidden={settings.hidden}: expected 0 or more")
    if not settings.match:
        return
    known = [name for name in ways.FUSING if name != "mlp"]
    if settings.match not in known:
        raise UserError(f"config.fusion.mlp.match={settings.match!r}: expected one of {', '.join(known)}")
    if settings.hidden:
        raise UserError(
            f"config.fusion.mlp.hidden={settings.hidden} and .match={settings.match!r} both say how large the projector is; "
            "leave one of them out"
        )
    ways.check(_matched(settings, cfg))


def wiring(settings: Settings, cfg: Config) -> Wiring:
    """Raises UserError for impossible shortcuts, or if the way to be matched is impossible."""
    wiring = shortcut_wiring(cfg, None)
    hidden = settings.hidden
    if settings.match:
        sets = 1 if cfg.fusion.shared else len(wiring.levels)
        each = cfg.vision.width + 1 + cfg.llm.width  # parameters of a hidden channel
        hidden = max(1, round((parameters(_matched(settings, cfg)) / sets - cfg.llm.width) / each))
    return dataclasses.replace(wiring, hidden=hidden)


def _matched(settings: Settings, cfg: Config) -> Config:
    """The config with the way to be matched, all else being equal."""
    return dataclasses.replace(cfg, fusion=dataclasses.replace(cfg.fusion, name=settings.match, mlp=Settings()))


def parameters(cfg: Config) -> int:
    """Number of parameters of the config's fusion and its way of injecting, counted from their shapes."""
    from sparsecut_jax.models.fusion import Fusion  # which imports this file
    from sparsecut_jax.models.ways import view_count, wiring_of

    wiring = wiring_of(cfg)
    fusion = Fusion(cfg.fusion, wiring, cfg.llm)
    levels = jnp.zeros((len(wiring.levels), 1, view_count(wiring), patches(cfg), cfg.vision.width))
    question = Question(jnp.ones((1, wiring.question), bool), jnp.zeros((1, wiring.question, cfg.llm.width)))
    every = lambda fusion: (fusion(levels, question), fusion.site_weights())
    shapes = jax.eval_shape(lambda: fusion.init(jax.random.key(0), method=every))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


class Mlp(nn.Module):
    """[I, 1, N, C] -> [I, N, D]."""

    width: int
    hidden: int

    @nn.compact
    def __call__(self, level: jax.Array) -> jax.Array:
        return Projector(self.width, self.hidden, name="projector")(level[:, 0])


class Fuse(Fusing):
    """Every level by one set of weights, or one set each (`fusion.shared`)."""

    @nn.compact
    def __call__(self, seen: Seen, question: Question | None = None) -> Fused:
        levels = each_level(Mlp, seen.levels.shape[0], self.config)
        return level_per_source(levels(self.width, self.wiring.hidden, name="fuse")(seen.levels), seen)
