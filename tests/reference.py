"""The semantics once more, in NumPy, float64 and loops, for the package to be compared with.

Reads the package's parameter trees (their names and shapes) and shares no code with it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

erf = np.vectorize(math.erf)


def gelu(x):
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def double(tree: Any) -> Any:
    """A tree of dicts, its arrays in float64."""
    return {k: double(v) for k, v in tree.items()} if isinstance(tree, dict) else np.asarray(tree, np.float64)


def layer_of(tree: Any, i: int) -> Any:
    """Layer i of a stack of layers."""
    return {k: layer_of(v, i) for k, v in tree.items()} if isinstance(tree, dict) else tree[i]


def layer_norm(p, x, eps):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + eps) * p["scale"] + p["bias"]


def rms_norm(p, x, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * p["scale"]


def linear(p, x):
    return x @ p["kernel"] + p.get("bias", 0.0)


def attend(q, k, v, mask=None):
    """q [T, Q, H], k and v [S, G, H], mask [T, S] -> [T, Q, H], one query and one head at a time."""
    out = np.zeros(q.shape)
    for t in range(q.shape[0]):
        for head in range(q.shape[1]):
            group = head // (q.shape[1] // k.shape[1])
            score = k[:, group] @ q[t, head] / math.sqrt(q.shape[2])
            seen = np.ones(len(score), bool) if mask is None else mask[t]
            weight = np.where(seen, np.exp(score - score[seen].max()), 0)
            out[t, head] = weight @ v[:, group] / weight.sum()
    return out


def biased_attention(p, x, memory):
    """CLIP's attention, and PyTorch's: biases on q, k, v and out. x [T, C], memory [S, C]."""
    q, k, v = (
        np.einsum("tc,cqh->tqh", inputs, p[f"{name}_kernel"]) + p[f"{name}_bias"]
        for name, inputs in zip("qkv", (x, memory, memory), strict=True)
    )
    return np.einsum("tqh,qhc->tc", attend(q, k, v), p["out_kernel"]) + p["out_bias"]


def rotary(x, positions, theta):
    """x [T, Q, H]: the pair (i, i + H/2) turned by position * theta^(-2i/H), as complex numbers."""
    half = x.shape[-1] // 2
    turn = np.exp(1j * positions[:, None] * theta ** (-2 * np.arange(half) / x.shape[-1]))
    turned = (x[..., :half] + 1j * x[..., half:]) * turn[:, None]
    return np.concatenate([turned.real, turned.imag], -1)


def tower(params, images, cfg, depth) -> list[np.ndarray]:
    """Normalised images [I, S, S, 3] -> the outputs [I, N, C] of blocks 0 to depth - 1."""
    p = double(params)
    size, side = cfg.patch_size, cfg.image_size // cfg.patch_size
    outputs: list[list[np.ndarray]] = [[] for _ in range(depth)]
    for image in np.asarray(images, np.float64):
        patches = [image[y * size :, x * size :][:size, :size] for y in range(side) for x in range(side)]
        h = np.stack([linear(p["patch_embedding"], patch.reshape(-1)) for patch in patches])
        if cfg.class_token:
            h = np.concatenate([p["class_embedding"][None], h])
        h = h + p["position_embedding"]
        if cfg.pre_norm:
            h = layer_norm(p["pre_norm"], h, cfg.norm_eps)
        for i in range(depth):
            block = layer_of(p["blocks"], i)
            y = layer_norm(block["norm1"], h, cfg.norm_eps)
            h = h + biased_attention(block["attention"], y, y)
            y = linear(block["fc1"], layer_norm(block["norm2"], h, cfg.norm_eps))
            h = h + linear(block["fc2"], y * sigmoid(1.702 * y))
            outputs[i].append(h[1:] if cfg.class_token else h)
    return [np.stack(level) for level in outputs]


def project(p, x):
    return linear(p["fc2"], gelu(linear(p["fc1"], x)))


def channel(p, views):
    """Views [5, N, C] -> [N, D]: each low-res token beside its four cells of the 2h x 2w canvas."""
    low, crops = views[0], views[1:]
    h = math.isqrt(len(low))
    canvas = np.zeros((2 * h, 2 * h, low.shape[-1]))
    for i, (top, left) in enumerate([(0, 0), (0, h), (h, 0), (h, h)]):  # TL, TR, BL, BR
        for y in range(h):
            for x in range(h):
                canvas[top + y, left + x] = crops[i, y * h + x]
    rows = []
    for y in range(h):
        for x in range(h):
            cells = [(2 * y, 2 * x), (2 * y, 2 * x + 1), (2 * y + 1, 2 * x), (2 * y + 1, 2 * x + 1)]
            rows.append(np.concatenate([low[y * h + x], *(canvas[cell] for cell in cells)]))
    return project(p["projector"], np.stack(rows))


def cross_attention(p, views):
    """Views [5, N, C] -> [N, D]: low-res tokens look at the tokens of the four crops."""
    low, crops = views[0], np.concatenate(list(views[1:]))
    x = layer_norm(p["norm1"], low + biased_attention(p["attention"], low, crops), 1e-5)
    x = layer_norm(p["norm2"], x + linear(p["ffn2"], gelu(linear(p["ffn1"], x))), 1e-5)
    return project(p["projector"], x)


def mlp(p, views):
    return project(p["projector"], views[0])


FUSIONS = {"channel": channel, "cross_attention": cross_attention, "mlp": mlp}


def visible(segments, branches):
    """bool[B, T, T], position by position."""
    b, t = segments.shape
    mask = np.zeros((b, t, t), bool)
    for row in range(b):
        for i in range(t):
            for j in range(i + 1):
                together = segments[row, i] == segments[row, j]
                mask[row, i, j] = together and branches[row, j] in (0, branches[row, i])
    return mask


def projected(attention, name, x, cfg):
    """[T, D] -> [T, heads, H]: queries, keys or values, with their bias and norm where the layer has them."""
    y = np.einsum("td,dqh->tqh", x, attention[name]) + attention.get(f"{name}_bias", 0)
    return rms_norm(attention[f"{name}_norm"], y, cfg.norm_eps) if f"{name}_norm" in attention else y


def decoder(params, x, positions, mask, cfg, shortcuts=(), starts=None, position="pre", inside=None, before=None):
    """Embeddings [B, T, D] -> logits [B, T, W] and the inputs of every layer [L, B, T, D].

    shortcuts: (layer, fused [B, M, N, D]), added to the runs of positions that begin at starts[B, M].
    inside: function (layer, its attention weights, rotated q [T, Q, H], row) -> [T, Q, H], added to attention's output.
    before: function (layer, x [T, D], row) -> [T, D], what stands before a layer.
    """
    p = double(params)
    x = np.array(x, np.float64)
    inputs = []

    def shortcut(layer, x):
        for at, fused in shortcuts:
            for b, row in enumerate(starts if at == layer else []):
                for m, start in enumerate(row):
                    for n in range(fused.shape[2] if start >= 0 else 0):
                        x[b, start + n] += fused[b, m, n]

    for i in range(cfg.layers):
        layer = layer_of(p["layers"], i)
        inputs.append(x.copy())
        if position == "pre":
            shortcut(i, x)
        for b in range(len(x)):
            x[b] = x[b] if before is None else before(i, x[b], b)
            y = rms_norm(layer["norm1"], x[b], cfg.norm_eps)
            q, k, v = (projected(layer["attention"], name, y, cfg) for name in "qkv")
            q, k = rotary(q, positions[b], cfg.rope_theta), rotary(k, positions[b], cfg.rope_theta)
            out = attend(q, k, v, mask[b])
            if inside is not None:
                out += inside(i, layer["attention"], q, b)
            x[b] += np.einsum("tqh,qhd->td", out, layer["attention"]["out"])
            y = rms_norm(layer["norm2"], x[b], cfg.norm_eps)
            gate = linear(layer["mlp"]["gate"], y)
            x[b] += linear(layer["mlp"]["down"], gate * sigmoid(gate) * linear(layer["mlp"]["up"], y))
        if position == "post":
            shortcut(i, x)
    head = p["embedding"].T if cfg.tie_embeddings else p["head"]
    return rms_norm(p["norm"], x, cfg.norm_eps) @ head, np.stack(inputs)


def model(params, batch, cfg, pairs, main):
    """Logits [B, T, W] of the whole model; pairs: (vit level, llm layer); main: block of the main feature."""
    b, m, v = batch.views.shape[:3]
    pixels = (np.asarray(batch.views, np.float64) / 255 - cfg.vision.mean) / cfg.vision.std
    depth = max([main, *(level for level, _ in pairs)]) + 1
    levels = tower(params["vision"], pixels.reshape(b * m * v, *pixels.shape[3:]), cfg.vision, depth)
    weights = double(params["fusion"]["fuse"])

    def fused(level):
        views = levels[level].reshape(b * m, v, *levels[level].shape[1:])
        tokens = np.stack([FUSIONS[cfg.fusion.name](weights, image) for image in views])
        return tokens.reshape(b, m, *tokens.shape[1:])

    x = np.asarray(params["llm"]["embedding"], np.float64)[batch.tokens]
    tokens = fused(main)
    for row in range(b):
        for slot, start in enumerate(batch.image_start[row]):
            if start >= 0:
                x[row, start : start + tokens.shape[2]] = tokens[row, slot]
    shortcuts = [(layer, fused(level)) for level, layer in pairs]
    mask = visible(batch.segments, batch.branches)
    return decoder(
        params["llm"], x, batch.positions, mask, cfg.llm, shortcuts, batch.image_start, cfg.shortcuts.position
    )[0]
