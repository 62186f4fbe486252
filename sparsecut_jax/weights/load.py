"""Loads tensors from files directly into their shardings: each device's slice is read separately, and nothing else."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from tqdm import tqdm

from sparsecut_jax.models.lora import is_adapter
from sparsecut_jax.settings import Config
from sparsecut_jax.types import UserError
from sparsecut_jax.weights.families import LEFT, OTHERS, rules_of
from sparsecut_jax.weights.names import Place, places
from sparsecut_jax.weights.pretrained import WeightSource
from sparsecut_jax.weights.resize import grow_rows, resize_positions
from sparsecut_jax.weights.tensors import Tensor

SHOWN = 6  # names in an error message


@dataclasses.dataclass
class Report:
    """What was loaded, what is freshly initialised, and what the model does not use.

    Attributes:
      loaded: {part: (path of its source, number of arrays, number of parameters)}.
      fresh: {path: shape} of the parameters that no file had.
      unused: {description: names} of tensors that the model does not use.
    """

    loaded: dict[str, tuple[str, int, int]]
    fresh: dict[str, tuple[int, ...]]
    unused: dict[str, list[str]]

    def __str__(self) -> str:
        lines = [
            f"loaded     {part}: {arrays} arrays, {numbers:,} parameters from {path}"
            for part, (path, arrays, numbers) in self.loaded.items()
        ]
        fresh = sum(math.prod(shape) for shape in self.fresh.values())
        lines.append(f"fresh      {len(self.fresh)} arrays, {fresh:,} parameters")
        lines += [f"             {path} {list(shape)}" for path, shape in self.fresh.items()]
        lines.append(f"unused     {sum(map(len, self.unused.values()))} tensors")
        lines += [
            f"             {what}: {len(names)}, {names[0]}{' ...' if len(names) > 1 else ''}"
            for what, names in self.unused.items()
        ]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Filling:
    """How one parameter is read: its place, and the tensor of every layer (one if it is not stacked)."""

    leaf: jax.ShapeDtypeStruct
    place: Place
    tensors: list[Tensor]


def match(abstract: Any, cfg: Config, sources: dict[str, WeightSource]) -> tuple[dict[str, Filling], Report]:
    """Decides which tensors fill which parameters, from headers alone (and the values of a head declared as tied).

    Args:
      abstract: the parameter tree as ShapeDtypeStructs.
      cfg: the config, with the sizes of the model.
      sources: {part: its files}.

    Returns:
      {path: `Filling`} of the parameters to read, and a report.

    Raises:
      UserError: a tensor is missing, unused or has another shape; names and shapes are given.
    """
    wanted = traverse_util.flatten_dict(abstract, sep="/")
    shapes = {path: leaf.shape for path, leaf in wanted.items()}
    placed: dict[str, Place] = {}
    for part, source in sources.items():
        placed |= places(rules_of(part, cfg, wanted, source.tensors[part]), shapes)
    fillings: dict[str, Filling] = {}
    used: set[tuple[str, str]] = set()
    problems = []
    for path, leaf in wanted.items():
        part = path.split("/", 1)[0]
        if part not in sources or is_adapter(path):
            continue
        tensors, place = sources[part].tensors[part], placed.get(path)
        count = leaf.shape[0] if place and place.rule.stacked else 1
        names = [place.rule.name.format(i=i) for i in range(count)] if place else []
        missing = [name for name in names if name not in tensors]
        if (not names or len(missing) == len(names)) and any(re.fullmatch(p, path) for p in cfg.init.fresh):
            continue
        used |= {(part, name) for name in names}
        if missing or not names:
            what = (
                f"{missing[0]} and {len(missing) - 1} more are"
                if len(missing) > 1
                else f"{(missing or ['its tensor'])[0]} is"
            )
            problems.append(f"{sources[part].path}: {what} missing, for {path} {list(leaf.shape)}")
            continue
        filling = Filling(leaf, place, [tensors[name] for name in names])
        problems += _wrong_shapes(path, filling, cfg)
        for tensor in filling.tensors:
            tensor.check()
        fillings[path] = filling
    unused, extra = _left_over(sources, used, cfg, abstract)
    problems += [f"{t.file}: the model has no parameter for tensor {t.name} {list(t.shape)}" for t in extra]
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise UserError("; ".join(problems[:SHOWN]) + more)
    loaded = {}
    for part, source in sources.items():
        leaves = [f.leaf for path, f in fillings.items() if path.startswith(f"{part}/")]
        loaded[part] = (source.path, len(leaves), sum(math.prod(leaf.shape) for leaf in leaves))
    fresh = {path: tuple(leaf.shape) for path, leaf in wanted.items() if path not in fillings}
    return fillings, Report(loaded, fresh, unused)


def read(fillings: dict[str, Filling], cfg: Config) -> dict[str, jax.Array]:
    """{path: parameter}, each in the dtype and sharding of its leaf.

    Raises:
      UserError: a file is truncated, or a value is not finite.
    """
    bar = tqdm(fillings.items(), desc="reading weights", unit="array", leave=False, disable=None)
    return {path: _place(filling, cfg) for path, filling in bar}


def files_dtype(fillings: dict[str, Filling]) -> str:
    """The dtype of the files: "bfloat16" if every tensor has it, else "float32"."""
    dtypes = {tensor.dtype for filling in fillings.values() for tensor in filling.tensors}
    return "bfloat16" if dtypes == {"BF16"} else "float32"


def _place(filling: Filling, cfg: Config) -> jax.Array:
    leaf, placed, last, value = filling.leaf, [], None, None
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    # Sorted, so that devices with the same slice follow each other and it is read once.
    where = sharding.addressable_devices_indices_map(leaf.shape)
    for device, index in sorted(where.items(), key=lambda item: str(item[1])):
        if index != last:
            value, last = _slice(filling, index, cfg), index
        placed.append(jax.device_put(value, device))
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, placed)


def _slice(filling: Filling, index: tuple[slice, ...], cfg: Config) -> np.ndarray:
    index = tuple(slice(*s.indices(n)) for s, n in zip(index, filling.leaf.shape, strict=True))
    out = _aligned([s.stop - s.start for s in index], filling.leaf.dtype)
    if not filling.place.rule.stacked:
        _put(out[...], _one(filling, filling.tensors[0], index, cfg), filling.tensors[0])
    else:
        for row, layer in enumerate(range(index[0].start, index[0].stop)):
            tensor = filling.tensors[layer]
            _put(out[row, ...], _one(filling, tensor, index[1:], cfg), tensor)
    return out


def _put(out: np.ndarray, value: np.ndarray, tensor: Tensor) -> None:
    with np.errstate(over="ignore"):
        out[...] = value
    if out.dtype != value.dtype and not np.isfinite(out).all():
        raise UserError(f"{tensor.file}: tensor {tensor.name} has values too large for {out.dtype}")


def _one(filling: Filling, tensor: Tensor, index: tuple[slice, ...], cfg: Config) -> np.ndarray:
    place, path = filling.place, filling.place.rule.path
    if tensor.shape != place.tensor_shape:  # `match` has only accepted shapes that can be resized
        whole = place.to_ours(tensor.read())
        if path == "vision/position_embedding":
            side = cfg.vision.image_size // cfg.vision.patch_size
            return resize_positions(whole, side, cfg.vision.class_token)[index]
        rows = whole if path == "llm/embedding" else whole.T
        rows = grow_rows(rows, cfg.llm.vocab_size)
        return (rows if path == "llm/embedding" else rows.T)[index]
    theirs, keep = place.slices(index)
    return place.to_ours(tensor.read(theirs))[keep]


def _aligned(shape: list[int], dtype: Any) -> np.ndarray:
    """An uninitialised array aligned to 64 bytes, which a CPU device takes over without a copy."""
    dtype = jnp.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def _wrong_shapes(path: str, filling: Filling, cfg: Config) -> list[str]:
    """A sentence for the first tensor whose shape is neither right nor may be resized; [] if there is none."""
    expected = filling.place.tensor_shape
    for tensor in filling.tensors:
        got, hint = tensor.shape, ""
        if got == expected:
            continue
        same = len(got) == len(expected) and got[-1] == expected[-1]
        if path == "vision/position_embedding" and same:
            tokens = got[-2] - int(cfg.vision.class_token)
            if cfg.init.image_size and tokens > 0 and math.isqrt(tokens) ** 2 == tokens:
                continue
            hint = "; for another image size set config.init.image_size"
        if path in ("llm/embedding", "llm/head") and same and got[0] < expected[0]:
            if cfg.init.grow_vocab:
                continue
            hint = "; to add rows set config.init.grow_vocab=True"
        return [
            f"{tensor.file}: tensor {tensor.name} has shape {list(got)}, expected {list(expected)} for {path}{hint}"
        ]
    return []


def _left_over(
    sources: dict[str, WeightSource], used: set[tuple[str, str]], cfg: Config, abstract: Any
) -> tuple[dict[str, list[str]], list[Tensor]]:
    """({description: names} of tensors that may remain unused, tensors that may not)."""
    unused: dict[str, list[str]] = defaultdict(list)
    extra = []
    depth = abstract["vision"]["blocks"]["norm1"]["scale"].shape[0]
    for source in {id(s): s for s in sources.values()}.values():
        parts = {part for part, s in sources.items() if s is source}
        for part, tensors in source.tensors.items():
            known = OTHERS if part is None else LEFT[part]
            for name, tensor in tensors.items():
                if (part, name) in used and part in parts:
                    continue
                what = next((text for pattern, text in known if re.fullmatch(pattern, name)), "")
                block = re.match(r"encoder\.layers?\.(\d+)\.", name)
                if part is not None and part not in parts:
                    what = f"{part}, which is loaded from elsewhere or fresh"
                elif part == "vision" and block and depth <= int(block[1]) < cfg.vision.layers:
                    what = f"blocks above {depth - 1}, the highest one used"
                elif name == "lm_head.weight" and cfg.llm.tie_embeddings and _is_tied(tensor, tensors):
                    what = "head tied to the embedding"
                if what:
                    unused[what].append(tensor.name)
                else:
                    extra.append(tensor)
    return dict(unused), extra


def _is_tied(head: Tensor, tensors: dict[str, Tensor]) -> bool:
    """Whether the head equals the embedding, as config.json claims; a different head must not be dropped silently."""
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is None or embedding.shape != head.shape:
        return False
    step = 4096
    parts = [(slice(i, min(i + step, head.shape[0])), slice(0, head.shape[1])) for i in range(0, head.shape[0], step)]
    return all(np.array_equal(head.read(part), embedding.read(part)) for part in parts)
