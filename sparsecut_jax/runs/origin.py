"""The run whose parameters another one starts from (`config.init_from`)."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import jax
import jax.numpy as jnp

from sparsecut_jax.models.lora import is_adapter
from sparsecut_jax.models.parameters import flatten, unflatten
from sparsecut_jax.runs import checkpoint
from sparsecut_jax.settings import Config
from sparsecut_jax.types import UserError

# Settings of a part that leave its function as it is: `init_from` does not compare them. A tower has no blocks above the
# highest one that is needed, so their number is compared by shape.
NO_FUNCTION = {
    "vision": ("family", "layers", "select_layer", "scan_layers", "remat"),
    "fusion": ("remat",),
    "llm": ("family", "vocab_size", "max_positions", "scan_layers", "remat", "replicate_kv"),
}


class Origin:
    """The run that cfg.init_from names, to be checked first and then read.

    Attributes:
      run, step, config: its checkpoints, the latest one's step, and its resolved config.
      saved: {path: "float32[3, 4]"} of its parameters; wanted: the paths that cfg.init_parts match.

    Raises:
      UserError: it is no run, or a regex matches nothing in it.
    """

    def __init__(self, cfg: Config):
        self.run, self.step, self.config, _ = checkpoint.open_run(cfg.init_from, setting="config.init_from")
        shapes = self.run.shapes(self.step)
        self.saved = {k.removeprefix("params/"): v for k, v in shapes.items() if k.startswith("params/")}
        for pattern in cfg.init_parts:
            if not any(re.fullmatch(pattern, path) for path in self.saved):
                raise UserError(
                    f"config.init_parts={pattern!r} matches no parameter of {cfg.init_from}; paths look like "
                    f"{', '.join(list(self.saved)[:3])}"
                )
        self.wanted = {path for path in self.saved if any(re.fullmatch(p, path) for p in cfg.init_parts)}

    def check_settings(self, cfg: Config) -> None:
        """Raises UserError if the parts that are taken would compute another function here, and no flag says so."""
        differing = []
        for part, left in NO_FUNCTION.items():
            ours, theirs = vars(getattr(cfg, part)), vars(getattr(self.config, part))
            taken = any(path.startswith(f"{part}/") for path in self.wanted)
            for name in ours if taken else ():
                given = any(f"{key}.".startswith(f"{part}.{name}.") for key in cfg.init.keep)
                if name not in left and ours[name] != theirs[name] and not given:
                    differing.append(f"config.{part}.{name}={theirs[name]!r}, here {ours[name]!r}")
        if differing:
            raise UserError(
                f"{cfg.init_from} has {'; '.join(differing)}; with another value its weights would compute something "
                "else: set the same, or leave that part out of config.init_parts"
            )

    def target(self, cfg: Config, flat: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
        """{path: what is to be read} of those that `flat` has too. Raises UserError for other shapes or lost adapters."""
        adapters, lora = {path for path in self.wanted if is_adapter(path)}, self.config.lora
        if adapters - flat.keys() or adapters and cfg.lora.alpha != lora.alpha:
            raise UserError(
                f"{cfg.init_from} has LoRA adapters with config.lora.rank={lora.rank}, .alpha={lora.alpha:g} and "
                f".targets={lora.targets}, without which its LLM is another; set the same, or merge them first: "
                "convert to-hf --merge, then config.init.model"
            )
        dtype = lambda path: jnp.dtype(self.saved[path].partition("[")[0])
        taken = {path: leaf for path, leaf in flat.items() if path in self.wanted}
        targets = {path: jax.ShapeDtypeStruct(x.shape, dtype(path), sharding=x.sharding) for path, x in taken.items()}
        self.run.compare(self.step, {"params": unflatten(targets)})
        return targets

    def load(self, cfg: Config, params: Any) -> tuple[Any, str]:
        """Parameters with cfg.init_parts taken from the run, which is closed, and a report of loaded, fresh and unused
        arrays.

        Raises:
          UserError: as `target`.
        """
        flat = flatten(params)
        with contextlib.closing(self.run):
            target = self.target(cfg, flat)
            loaded = flatten(self.run.restore_params(self.step, unflatten(target)))
        flat |= {path: leaf.astype(flat[path].dtype) for path, leaf in loaded.items()}
        fresh, unused = sorted(set(flat) - set(target)), sorted(set(self.saved) - set(target))
        counts = f"{len(target)} arrays loaded, {len(fresh)} fresh, {len(unused)} unused"
        report = [f"init_from {cfg.init_from} step {self.step}: {counts}"]
        report += [f"  fresh:  {path} {list(flat[path].shape)}" for path in fresh]
        report += [f"  unused: {path} {self.saved[path]}" for path in unused]
        report += [f"  differs: config.{key}={ours!r}, there {theirs!r}" for key, ours, theirs in self.around(cfg)]
        return unflatten(flat), "\n".join(report)

    def around(self, cfg: Config) -> list[tuple[str, Any, Any]]:
        """(setting, its value here, there) of what differs in how parts are joined and pictures are shown to them."""
        settings = lambda c: {
            **{f"shortcuts.{name}": value for name, value in vars(c.shortcuts).items()},
            "vision.select_layer": c.vision.select_layer,
            "data.image_fit": c.data.image_fit,
        }
        ours, theirs = settings(cfg), settings(self.config)
        return [(key, ours[key], theirs[key]) for key in ours if ours[key] != theirs[key]]
