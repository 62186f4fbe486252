"""Shows that the pictures of Scenes keep what they promise: what must not be seen is not, what must be seen is.

python -m sparsecut_jax.evaluation.scenes_controls --control=text_only    the questions alone: chance
python -m sparsecut_jax.evaluation.scenes_controls --control=shuffled     each with another picture: chance
python -m sparsecut_jax.evaluation.scenes_controls --control=cnn_low      the low-res view: fine questions at chance
python -m sparsecut_jax.evaluation.scenes_controls --control=cnn_full     the whole picture: all questions answered
python -m sparsecut_jax.evaluation.scenes_controls --control=speed        pictures drawn per second
python -m sparsecut_jax.evaluation.scenes_controls --gallery=docs/scenes.png

Each control but the speed trains the same small CNN with a head per question, and reports its accuracy.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from sparsecut_jax.data.scenes import TEMPLATES

CONTROLS = ("text_only", "shuffled", "cnn_low", "cnn_full")
MOST_ANSWERS = max(len(template.answers) for template in TEMPLATES)
CHUNK = 256  # pictures that a process draws at a time


class CNN(nn.Module):
    """uint8[B, P, P, 3] -> float32[B, questions, answers] of log-odds; -inf where a question has fewer answers."""

    width: int

    @nn.compact
    def __call__(self, pictures):
        conv = functools.partial(nn.Conv, kernel_init=nn.initializers.he_normal())
        w = self.width
        x = _haar(pictures.astype(jnp.float32) - 128)
        x = nn.relu(conv(w, (3, 3))(x))
        x = nn.relu(conv(2 * w, (2, 2), (2, 2), padding="VALID")(x))
        x = nn.relu(nn.LayerNorm()(conv(2 * w, (3, 3))(x)))
        x = nn.relu(conv(3 * w, (2, 2), (2, 2), padding="VALID")(x))
        x = nn.relu(nn.LayerNorm()(conv(3 * w, (3, 3))(x)))
        x = nn.relu(conv(w, (1, 1))(x)).reshape(len(x), -1)
        x = nn.relu(nn.Dense(256)(nn.LayerNorm()(x)))
        x = nn.Dense(len(TEMPLATES) * MOST_ANSWERS)(x).reshape(-1, len(TEMPLATES), MOST_ANSWERS)
        possible = np.array([[a < len(t.answers) for a in range(MOST_ANSWERS)] for t in TEMPLATES])
        return jnp.where(possible, x, -jnp.inf)


def _haar(x: jax.Array) -> jax.Array:
    """[B, P, P, 3] -> [B, P/2, P/2, 12]: of 2 x 2 pixels their mean and three differences, these made stronger."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // 2, 2, w // 2, 2, c)
    matrix = jnp.array([[[1, 1], [1, 1]], [[1, 1], [-1, -1]], [[1, -1], [1, -1]], [[1, -1], [-1, 1]]]) / 4
    x = jnp.einsum("bhiwjc,kij->bhwkc", x, matrix * jnp.array([1 / 30, 1 / 8, 1 / 8, 1 / 8])[:, None, None])
    return x.reshape(b, h // 2, w // 2, 4 * c)
