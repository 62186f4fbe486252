"""Model FLOPs of a training step, counted from the parameters' shapes: 2 x rows x inputs x outputs of every matmul.

Matmuls with weights and those of attention are counted, attention in full rather than its causal half. Norms,
activations, softmax, rotary embeddings and the optimizer are left out: together they stay below 3 % of what the compiler
counts (tests/test_planning_flops.py). In the backward pass a matmul has up to two more: the gradient of its weight, if
that is trained, and the gradient of its input, if anything before it is trained.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable

from sparsecut_jax.models.fusion import views_of
from sparsecut_jax.models.sparsecut import build_model
from sparsecut_jax.settings import Config

PARTS = ("vision", "fusion", "llm", "loss")
Shapes = dict[str, tuple[int, ...]]

# Every parameter in the order in which the model uses it, and which rows its matrix is multiplied with (`Rows`).
# "scores" stands for attention's two matmuls without weights, in their place between the projections.
ORDER: tuple[tuple[str, str], ...] = (
    (r"vision/patch_embedding/kernel", "patches"),
    (r"vision/(patch_embedding/bias|class_embedding|position_embedding|pre_norm/.*)", ""),
    (r"vision/blocks/norm1/.*", ""),
    (r"vision/blocks/attention/[qkv]_kernel", "vit"),
    (r"vision/blocks/attention/[qkv]_bias", ""),
    (r"vision/blocks/scores", "scores"),
    (r"vision/blocks/attention/out_kernel", "vit"),
    (r"vision/blocks/(attention/out_bias|scale1|norm2/.*)", ""),
    (r"vision/blocks/fc1/kernel", "vit"),
    (r"vision/blocks/fc1/bias", ""),
    (r"vision/blocks/fc2/kernel", "vit"),
    (r"vision/.*", ""),
    (r"fusion/fuse/attention/q_kernel", "fused"),
    (r"fusion/fuse/attention/[kv]_kernel", "crops"),
    (r"fusion/fuse/attention/[qkv]_bias", ""),
    (r"fusion/fuse/scores", "scores"),
    (r"fusion/fuse/attention/out_kernel", "fused"),
    (r"fusion/fuse/(attention/out_bias|norm1/.*)", ""),
    (r"fusion/fuse/ffn1/kernel", "fused"),
    (r"fusion/fuse/ffn1/bias", ""),
    (r"fusion/fuse/ffn2/kernel", "fused"),
    (r"fusion/fuse/(ffn2/bias|norm2/.*)", ""),
    (r"fusion/fuse/projector/fc1/kernel", "fused"),
    (r"fusion/fuse/projector/fc1/bias", ""),
    (r"fusion/fuse/projector/fc2/kernel", "fused"),
    (r"fusion/.*", ""),
    (r"llm/embedding", ""),
    (r"llm/layers/norm1/.*", ""),
    (r"llm/layers/attention/[qkv](_lora_a)?", "text"),
    (r"llm/layers/attention/[qkv]_lora_b", "text"),
    (r"llm/layers/attention/([qkv]_bias|[qk]_norm/.*)", ""),
    (r"llm/layers/scores", "scores"),
    (r"llm/layers/attention/out(_lora_a)?", "text"),
    (r"llm/layers/attention/out_lora_b", "text"),
    (r"llm/layers/norm2/.*", ""),
    (r"llm/layers/mlp/(gate|up)(/kernel|_lora_a)", "text"),
    (r"llm/layers/mlp/(gate|up)_lora_b", "text"),
    (r"llm/layers/mlp/down(/kernel|_lora_a)", "text"),
    (r"llm/layers/mlp/down_lora_b", "text"),
    (r"llm/norm/.*", ""),
    (r"llm/head_lora_a", "text"),
    (r"llm/head(_lora_b)?", "text"),
)
STACKS = ("vision/blocks/", "llm/layers/")  # parameters with a leading layer axis, applied in sequence


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of the matrices that weights are multiplied with, in one step or micro-batch."""

    patches: int  # patch tokens of all views
    vit: int  # the same plus class tokens
    fused: int  # image tokens of the LLM, times the levels if these share the fusion's weights
    crops: int  # hi-res tokens that these are fused with
    text: int  # B * T

    @classmethod
    def of(cls, cfg: Config, name: str, rows: int, seq_len: int) -> Rows:
        """Counts for `rows` sequences of `seq_len` positions in stage `name`."""
        images = rows * slots_of(cfg, name)
        n, views = cfg.tokens_per_image, views_of(cfg.fusion)
        side = cfg.vision.image_size // cfg.vision.patch_size
        copies = levels_of(cfg) if cfg.fusion.shared else 1
        return cls(
            patches=images * views * side**2,
            vit=images * views * (side**2 + cfg.vision.class_token),
            fused=copies * images * n,
            crops=copies * images * n * (views - 1),
            text=rows * seq_len,
        )


@dataclasses.dataclass(frozen=True)
class Product:
    """A matmul of a step, over all layers.

    Attributes:
      part: "vision", "fusion", "llm" or "loss".
      path: path of its weight; ends in "scores" for attention's own matmuls.
      flops: FLOPs of the forward pass.
      moved: number of elements it reads and writes, without its weights.
      outputs: how many of them it writes.
      weights: number of elements of its weights; 0 for attention's own matmuls.
      more: number of matmuls of the same size in the backward pass.
      again: how often the forward matmul is recomputed for the backward pass (rematerialisation).
    """

    part: str
    path: str
    flops: float
    moved: float
    outputs: float
    weights: float
    more: float
    again: float = 0.0


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs of one part."""

    forward: float = 0.0
    backward: float = 0.0
    again: float = 0.0  # forward matmuls recomputed for backward; not part of model FLOPs

    def __add__(self, other: Work) -> Work:
        return Work(self.forward + other.forward, self.backward + other.backward, self.again + other.again)

    @property
    def model(self) -> float:
        return self.forward + self.backward


def slots_of(cfg: Config, name: str) -> int:
    """Image slots per sequence (M)."""
    return cfg.stages[name].slots or cfg.data.max_images


def levels_of(cfg: Config) -> int:
    """Number of fused levels: the main feature and those of the shortcuts."""
    return 1 + len(build_model(cfg).plan.levels)


@functools.cache
def place_of(path: str) -> int:
    """Index in ORDER of a parameter."""
    return next(i for i, (pattern, _) in enumerate(ORDER) if re.fullmatch(pattern, path))


def products(cfg: Config, name: str, shapes: Shapes, rows: int, seq_len: int) -> list[Product]:
    """The matmuls of `rows` sequences of `seq_len` positions in stage `name`.

    Args:
      cfg: resolved for its platform, with no "auto" settings left.
      name: the stage.
      shapes: {path of a parameter: its shape}.
      rows, seq_len: B and T.
    """
    counts = Rows.of(cfg, name, rows, seq_len)
    trained = {path for path in shapes if any(re.fullmatch(p, path) for p in cfg.stages[name].trainable)}
    flow = Flow(shapes, trained)
    found = []
    for path, shape in shapes.items():
        kind = ORDER[place_of(path)][1]
        tied = path == "llm/embedding" and cfg.llm.tie_embeddings
        if not kind and not tied:
            continue
        layers = shape[0] if path.startswith(STACKS) or (path.startswith("fusion") and not cfg.fusion.shared) else 1
        inputs, outputs = _sides(path, shape)
        size = math.prod(shape)
        height = counts.text if tied else getattr(counts, kind)
        found.append(
            Product(
                part="loss" if tied or path.startswith("llm/head") else path.split("/")[0],
                path=path,
                flops=2.0 * height * size,
                moved=float(height * layers * (inputs + outputs)),
                outputs=float(height * layers * outputs),
                weights=float(size),
                more=flow.inputs(path, tied) + (path in trained),
            )
        )
    found += _scores(cfg, name, shapes, flow, counts, rows, seq_len)
    return [dataclasses.replace(p, again=_again(cfg, p, flow)) for p in found]


def _sides(path: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Input and output width of a matrix; q, k, v and out have separate axes for heads."""
    if path.startswith(STACKS):
        shape = shape[1:]
    if path.startswith("fusion") and len(shape) in (3, 4) and not re.search(r"attention/[qkvo]", path):
        shape = shape[1:]
    if re.search(r"attention/out", path) and len(shape) == 3:
        return shape[0] * shape[1], shape[2]
    return shape[0], math.prod(shape[1:])


def _scores(cfg: Config, name: str, shapes: Shapes, flow: Flow, counts: Rows, rows: int, seq_len: int) -> list[Product]:
    """Attention's matmuls of queries with keys and of probabilities with values, in tower, fusion and LLM."""

    def product(path: str, layers: int, sequences: int, queries: int, keys: int, width: int) -> Product:
        flops = 4.0 * layers * sequences * queries * keys * width
        moved = 2.0 * layers * sequences * (queries + keys) * width
        return Product(path.split("/")[0], path, flops, moved, moved / 4, 0.0, 2 * flow.inputs(path))

    side, v, m = cfg.vision.image_size // cfg.vision.patch_size, cfg.vision, cfg.llm
    tokens = side**2 + v.class_token
    depth = shapes["vision/blocks/norm1/scale"][0]
    found = [
        product("vision/blocks/scores", depth, counts.vit // tokens, tokens, tokens, v.width),
        product("llm/layers/scores", m.layers, rows, seq_len, seq_len, m.heads * m.head_dim),
    ]
    if "fusion/fuse/attention/q_kernel" in shapes:
        images = levels_of(cfg) * rows * slots_of(cfg, name)
        n = cfg.tokens_per_image
        found.append(product("fusion/fuse/scores", 1, images, n, n * (views_of(cfg.fusion) - 1), v.width))
    return found


class Flow:
    """Where gradients flow, given the paths of the trained parameters."""

    def __init__(self, shapes: Shapes, trained: set[str]):
        self.shapes, self.trained = shapes, trained
        self.places = sorted(place_of(path) for path in trained)

    def inputs(self, path: str, tied: bool = False) -> float:
        """Share of the layers in which the input of the matmul at `path` needs a gradient."""
        place = len(ORDER) if tied else place_of(path)
        stack = next((prefix for prefix in STACKS if path.startswith(prefix)), None)
        if stack is None:
            return float(any(p < place for p in self.places))
        here = [place_of(p) for p in self.trained if p.startswith(stack)]
        first = min(i for i, (pattern, _) in enumerate(ORDER) if pattern.startswith(stack))
        if any(p < first for p in self.places):
            return 1.0
        if not here:
            return 0.0
        layers = next(shape[0] for p, shape in self.shapes.items() if p.startswith(stack))
        return (layers - 1 + any(p < place for p in here)) / layers

    def through(self, part: str) -> bool:
        """Whether the backward pass runs through the layers of a part."""
        last = {"vision": "vision/blocks/fc2/kernel", "fusion": "fusion/fuse/projector/fc2/kernel"}
        return self.inputs(last.get(part, "llm/layers/scores")) > 0


def _again(cfg: Config, product: Product, flow: Flow) -> float:
    """How often a matmul's forward pass is recomputed for the backward pass."""
    part, path = product.part, product.path
    if part == "loss":  # see training/losses.py
        return float(cfg.mesh.fsdp != 1 and cfg.mesh.tensor == 1 and path in flow.trained)
    remat = getattr(cfg, part).remat
    if not path.startswith((*STACKS, "fusion/")) or not flow.through(part):
        return 0.0
    if remat == "dots":
        return float(path.endswith("scores"))
    last = re.search(r"(fc2/kernel|down(/kernel|_lora_b))$", path)  # the backward pass does not need its result
    return float(remat in ("full", "offload") and not last)


def work(found: list[Product]) -> dict[str, Work]:
    """{part: FLOPs}, and their sum as "total"."""
    by_part = dict.fromkeys(PARTS, Work())
    for p in found:
        by_part[p.part] += Work(p.flops, p.flops * p.more, p.flops * p.again)
    return {**by_part, "total": sum(by_part.values(), Work())}


def of_batch(cfg: Config, name: str, shapes: Shapes, slots: int) -> Callable[[int], float]:
    """A function from sequence length to the model FLOPs of a batch of stage `name` with `slots` image slots."""
    cfg = cfg.with_stage(name, slots=slots)
    rows = cfg.stages[name].batch_size
    return functools.cache(lambda t: work(products(cfg, name, shapes, rows, t))["total"].model)
