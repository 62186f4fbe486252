"""Every family against PyTorch's numbers: hidden states of every block, logits and greedy ids.

The weights are tiny and random, with biases that are not zero and norms that are not one.
"""

import jax
import numpy as np
import pytest

from parity_cases import FOLDER, join, numbers, text_batch
from sparsecut_jax.inference.decoding import generate
from sparsecut_jax.models import ways
from sparsecut_jax.models.fusion import Fusion
from sparsecut_jax.models.sparsecut import Encoded
from sparsecut_jax.models.vit import VisionTower
from sparsecut_jax.models.ways import wiring_of

TOWERS = ("clip", "clip_vision", "siglip", "siglip2", "dinov2")
LLMS = ("llama2", "llama2_linear", "llama3", "mistral", "qwen2", "qwen3", "phi3", "phi3_longrope", "smollm2")


def close(got, expected, atol=3e-5):
    np.testing.assert_allclose(np.asarray(got), expected, rtol=0, atol=atol)


def blocks(loaded, pixels: np.ndarray) -> np.ndarray:
    """Outputs of all blocks for float32[B, 3, S, S] normalised pixels: [L, B, N, C]."""
    tower = VisionTower(loaded.cfg.vision, tuple(range(loaded.cfg.vision.layers)))
    return jax.jit(tower.apply)({"params": loaded.params["vision"]}, pixels.transpose(0, 2, 3, 1))


@pytest.mark.parametrize("name", TOWERS)
def test_tower(name):
    loaded, io = join(vision=FOLDER / name), numbers(name)
    first = int(loaded.cfg.vision.class_token)
    assert len(io["hidden_states"]) == loaded.cfg.vision.layers + 1
    close(blocks(loaded, io["pixel_values"]), io["hidden_states"][1:, :, first:])


@pytest.mark.parametrize("name", ("clip", "siglip", "dinov2"))
def test_tower_at_another_picture_size(name):
    io = numbers(name)
    size = io["pixel_values_resized"].shape[-1]
    loaded = join(vision=FOLDER / name, image_size=size)
    assert loaded.cfg.vision.image_size == size != io["pixel_values"].shape[-1]
    first = int(loaded.cfg.vision.class_token)
    close(blocks(loaded, io["pixel_values_resized"]), io["hidden_states_resized"][1:, :, first:])


def test_pixels_beside_whole_patches_are_cut_off():
    """As the convolution of SigLIP so400m does with 384 pixels and patches of 14."""
    io = numbers("siglip")
    loaded = join(vision=FOLDER / "siglip", image_size=30)
    assert ways.positions(loaded.cfg) == 16
    pixels = np.pad(io["pixel_values"], ((0, 0), (0, 0), (0, 2), (0, 2)), constant_values=3.0)
    close(blocks(loaded, pixels), io["hidden_states"][1:])


def check_llm(loaded, io: dict, end: str = "") -> None:
    ids, expected = io[f"input_ids{end}"], io[f"hidden_states{end}"]
    batch = text_batch(ids, loaded.cfg)
    logits, seen = jax.jit(loaded.model.apply)({"params": loaded.params}, batch)
    close(logits, io[f"logits{end}"])
    layers = loaded.cfg.llm.layers
    assert seen["hidden"].shape[0] == layers == len(expected) - 1
    close(seen["hidden"], expected[:-1])
    check_greedy(loaded, ids, io, end)


def check_greedy(loaded, ids: np.ndarray, io: dict, end: str) -> None:
    length, new = int(io[f"greedy_prompt_length{end}"]), io[f"greedy_ids{end}"].shape[1]
    encoded = Encoded(np.zeros((len(ids), 1, 16, loaded.cfg.llm.width), np.float32), None, np.float32(0))
    lengths = np.full(len(ids), length, np.int32)
    start = np.full((len(ids), 1), -1, np.int32)
    got, _ = generate(loaded.model, loaded.params, ids[:, :length], lengths, start, encoded, new)
    np.testing.assert_array_equal(got, io[f"greedy_ids{end}"])


def test_official_cross_attention():
    """SparseCut's fusion against PyTorch's MultiheadAttention, LayerNorm and GELU."""
    file, io = FOLDER / "official_cross_attention/mm_projector.safetensors", numbers("official_cross_attention")
    settings = {"fusion.name": "cross_attention", "vision.width": 128, "vision.heads": 2}
    loaded = join(fusion=file, settings=settings)
    assert set(loaded.report.loaded) == {"fusion"}
    levels = np.concatenate([io["low"][:, None], io["crops"]], 1)[None]
    fused = Fusion(loaded.cfg.fusion, wiring_of(loaded.cfg), loaded.cfg.llm).apply(
        {"params": loaded.params["fusion"]}, levels
    )
    close(fused.tokens[:, 0], io["out"])


@pytest.mark.parametrize("name", LLMS)
def test_llm(name):
    loaded, io = join(llm=FOLDER / name, settings={"shortcuts.density": "none"}), numbers(name)
    check_llm(loaded, io)
    if name == "phi3_longrope":
        check_llm(loaded, io, "_long")
        check_greedy(loaded, io["input_ids_long"][:, 7:], io, "_growing")
