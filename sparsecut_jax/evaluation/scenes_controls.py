"""Controls for Scenes: verify that pictures contain the information they should, and no other.

python -m sparsecut_jax.evaluation.scenes_controls --control=text_only    the questions alone: chance
python -m sparsecut_jax.evaluation.scenes_controls --control=shuffled     another picture's questions: chance
python -m sparsecut_jax.evaluation.scenes_controls --control=cnn_low      the low-res view: fine questions at chance
python -m sparsecut_jax.evaluation.scenes_controls --control=cnn_full     the whole picture: all questions answered
python -m sparsecut_jax.evaluation.scenes_controls --control=speed        pictures drawn per second
python -m sparsecut_jax.evaluation.scenes_controls --gallery=docs/scenes.png

All but the last two train the same small CNN with one head per question and report its accuracy (docs/scenes.md).
"""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
import time
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from sparsecut_jax.commandline import cli
from sparsecut_jax.data import scenes
from sparsecut_jax.data.images import square
from sparsecut_jax.data.scenes import LEVELS, SCALES, TEMPLATES, Scenes
from sparsecut_jax.evaluation import scenes_gallery
from sparsecut_jax.runtime.folders import write_json
from sparsecut_jax.runtime.progress import Progress
from sparsecut_jax.runtime.tables import table
from sparsecut_jax.settings import ScenesConfig
from sparsecut_jax.types import UserError

CONTROLS = ("text_only", "shuffled", "cnn_low", "cnn_full", "speed")
MOST_ANSWERS = max(len(template.answers) for template in TEMPLATES)
AT_ONCE = 252  # test pictures per batch


# ----------------------------------------------------------------------------------------------------------------------
# the CNN


class CNN(nn.Module):
    """uint8[B, P, P, 3] -> logits float32[B, questions, answers], -inf where a question has fewer answers."""

    width: int = 24

    @nn.compact
    def __call__(self, pictures: jax.Array) -> jax.Array:
        w = self.width
        conv = functools.partial(nn.Conv, kernel_init=nn.initializers.he_normal())
        halve = functools.partial(conv, kernel_size=(2, 2), strides=(2, 2), padding="VALID")
        x = nn.relu(conv(w, (3, 3))(_haar(pictures)))
        x = nn.relu(halve(2 * w)(x))
        x = nn.relu(nn.LayerNorm()(conv(2 * w, (3, 3))(x)))
        x = nn.relu(halve(3 * w)(x))
        x = nn.relu(nn.LayerNorm()(conv(3 * w, (3, 3))(x)))
        x = nn.relu(conv(w, (1, 1))(x)).reshape(len(x), -1)
        x = nn.relu(nn.Dense(256)(nn.LayerNorm()(x)))
        x = nn.Dense(len(TEMPLATES) * MOST_ANSWERS)(x).reshape(-1, len(TEMPLATES), MOST_ANSWERS)
        possible = np.array([[a < len(template.answers) for a in range(MOST_ANSWERS)] for template in TEMPLATES])
        return jnp.where(possible, x, -jnp.inf)


def _haar(pictures: jax.Array) -> jax.Array:
    """uint8[B, P, P, 3] -> float32[B, P/2, P/2, 12]: mean and three differences of each 2 x 2 pixels.

    All are scaled to about 1: fine details are much weaker than coarse ones and would hardly be learnt otherwise.
    """
    b, h, w, c = pictures.shape
    x = (pictures.astype(jnp.float32) - 128).reshape(b, h // 2, 2, w // 2, 2, c)
    signs = np.array([[[1, 1], [1, 1]], [[1, 1], [-1, -1]], [[1, -1], [1, -1]], [[1, -1], [-1, 1]]])
    weights = signs / 4 / np.array([30, 8, 8, 8])[:, None, None]
    return jnp.einsum("bhiwjc,kij->bhwkc", x, weights).reshape(b, h // 2, w // 2, 4 * c)


def train(pictures: np.ndarray, answers: np.ndarray, steps: int, batch_size: int, lr: float, seed: int):
    """Parameters of a CNN trained on uint8[n, P, P, 3] -> int[n, questions]."""
    model = CNN()
    params = jax.jit(model.init)(jax.random.key(seed), pictures[:1])
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, lr, max(1, steps // 20), steps), weight_decay=0.01)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, opt_state, pictures, answers):
        def loss(params):
            log_odds = model.apply(params, pictures)
            return optax.softmax_cross_entropy_with_integer_labels(log_odds, answers).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    opt_state = jax.jit(optimizer.init)(params)
    rng, left = np.random.default_rng(seed), np.zeros(0, int)
    progress = Progress(steps, 0, "train")
    for _ in range(steps):
        while len(left) < batch_size:
            left = np.concatenate([left, rng.permutation(len(pictures))])
        batch, left = left[:batch_size], left[batch_size:]
        params, opt_state, loss = update(params, opt_state, pictures[batch], answers[batch].astype(np.int32))
        progress.note(f"loss {loss:.4f}")
        progress.update()
    progress.close()
    return params


# ----------------------------------------------------------------------------------------------------------------------
# inputs of the CNN


def views(rows: Scenes, control: str, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (uint8[P, P, 3] as the control sees it, int8[questions] answers) for every picture."""
    progress = Progress(len(rows), 0, name)
    for row in map(rows.name, rows.indices):
        picture = rows.open(row)
        if control in ("text_only", "cnn_low"):
            picture = square(picture, rows.low, rows.low, "pad")  # exactly the model's low-res view
        yield np.asarray(picture) * np.uint8(control != "text_only"), rows.answers(row)
        progress.update()
    progress.close()


def measure(control: str, cfg: ScenesConfig, low: int, steps: int, batch_size: int, lr: float) -> dict[str, np.ndarray]:
    """Trains and tests a control. Returns {"test", "heldout": bool[pictures, questions], True for right answers}."""
    rng = np.random.default_rng((cfg.seed, 0))
    mix = rng.permutation if control == "shuffled" else np.asarray
    pictures, answers = zip(*views(scenes.rows(cfg, "train", 2 * low, low), control, "draw"), strict=True)
    params = train(np.stack(pictures), mix(np.stack(answers)), steps, batch_size, lr, cfg.seed)
    predict = jax.jit(lambda pictures: CNN().apply(params, pictures).argmax(-1))
    rows = scenes.rows(cfg, "test", 2 * low, low)
    right = {}
    for part, some in (("test", rows[: rows.first_heldout]), ("heldout", rows[rows.first_heldout :])):
        predicted, answers, batch = [], [], []
        for picture, answer in views(some, control, part):
            answers.append(answer)
            batch.append(picture)
            if len(batch) == AT_ONCE or len(answers) == len(some):
                predicted.append(np.asarray(predict(np.stack(batch))))
                batch = []
        right[part] = np.concatenate(predicted) == mix(np.stack(answers))
    return right


# ----------------------------------------------------------------------------------------------------------------------
# the report


def summary(right: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """{group: {"questions", "chance", "test", "heldout", "both"}} for each question, cell and scale, and for all."""
    groups = {template.kind: [i] for i, template in enumerate(TEMPLATES)}
    for name, member in [
        *((f"{level} {scale}", (level, scale)) for scale in SCALES for level in LEVELS),
        *((scale, (None, scale)) for scale in SCALES),
        ("all", (None, None)),
    ]:
        groups[name] = [
            i for i, t in enumerate(TEMPLATES) if member[0] in (None, t.level) and member[1] in (None, t.scale)
        ]
    scores = {}
    for name, columns in groups.items():
        parts = {part: array[:, columns] for part, array in right.items()}
        both = np.concatenate(list(parts.values()))
        chance = np.mean([1 / len(TEMPLATES[i].answers) for i in columns])
        scores[name] = {"questions": both.size, "chance": float(chance)}
        scores[name] |= {part: float(array.mean()) for part, array in parts.items()} | {"both": float(both.mean())}
    return scores


def report(figures: dict[str, dict[str, float]]) -> str:
    head = ["questions", "number", "chance", "test", "heldout", "both"]
    percent = lambda line: [f"{line[key]:.2%}" for key in ("chance", "test", "heldout", "both")]
    return table(head, [[name, f"{line['questions']:,}", *percent(line)] for name, line in figures.items()])


def speed(cfg: ScenesConfig, low: int) -> dict[str, float]:
    """Pictures drawn per second by one process, and by two in parallel."""
    rows = scenes.rows(cfg, "train", 2 * low, low)
    rates = {}
    for processes in (1, 2):
        with concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            list(pool.map(_draw, [rows[:10]] * 8 * processes))  # starts the processes and fills their caches
            start = time.perf_counter()
            list(pool.map(_draw, [rows[i : i + 50] for i in range(0, len(rows), 50)]))
            rates[f"{processes} process" + "es" * (processes > 1)] = len(rows) / (time.perf_counter() - start)
    return rates


def _draw(rows: Scenes) -> None:
    for index in rows.indices:
        rows.open(rows.name(index))


# ----------------------------------------------------------------------------------------------------------------------
# the command


def check(given: dict[str, Any]) -> None:
    """Raises UserError for invalid settings."""
    if given["control"] not in CONTROLS:
        raise UserError(f"--control={given['control']}: expected one of {', '.join(CONTROLS)}, or --gallery=FILE")
    for name, least in (("train", 1), ("test", 4), ("steps", 1), ("batch_size", 1), ("seed", 0)):
        if given[name] < least:
            raise UserError(f"--{name}={given[name]}: expected {least} or more")
    for name in ("size", "low"):
        if given[name] % 8:
            raise UserError(f"--{name}={given[name]}: the CNN halves it three times; expected a multiple of 8")


def main() -> None:
    if FLAGS.gallery:
        scenes_gallery.gallery(FLAGS.gallery, FLAGS.size or 2 * FLAGS.low, FLAGS.low, seed=FLAGS.seed)
        print(f"written {FLAGS.gallery}")
        return
    given = {name: FLAGS[name].value for name in SETTINGS}
    check(given)
    cfg = ScenesConfig(size=FLAGS.size, train=FLAGS.train, test=FLAGS.test, seed=FLAGS.seed)
    start = time.monotonic()
    if FLAGS.control == "speed":
        figures = speed(cfg, FLAGS.low)
        text = table(["", "pictures/s"], [[name, f"{value:,.0f}"] for name, value in figures.items()])
    else:
        figures = summary(measure(FLAGS.control, cfg, FLAGS.low, FLAGS.steps, FLAGS.batch_size, FLAGS.lr))
        text = report(figures)
    seconds = time.monotonic() - start
    print(f"\n{FLAGS.control}, {seconds:.0f} s\n{text}")
    if FLAGS.out:
        write_json(FLAGS.out, {**given, "seconds": round(seconds, 1), "figures": figures})
        print(f"written {FLAGS.out}")


FLAGS = flags.FLAGS
SETTINGS = ("control", "size", "low", "seed", "train", "test", "steps", "batch_size", "lr")

if __name__ == "__main__":
    flags.DEFINE_string("control", "", f"One of {', '.join(CONTROLS)}.")
    flags.DEFINE_string("gallery", "", "PNG file for a gallery of pictures, instead of a control.")
    flags.DEFINE_integer("size", 0, "Side of a picture in pixels; 0: twice --low.")
    flags.DEFINE_integer("low", 32, "Side of the low-res view in pixels.")
    flags.DEFINE_integer("seed", 0, "Seed of pictures, answers and the CNN.")
    flags.DEFINE_integer("train", 20_000, "Training pictures.")
    flags.DEFINE_integer("test", 20_160, "Test pictures, half of them with held-out combinations.")
    flags.DEFINE_integer("steps", 700, "Optimizer steps.")
    flags.DEFINE_integer("batch_size", 64, "Pictures per step.")
    flags.DEFINE_float("lr", 2e-3, "Peak learning rate.")
    flags.DEFINE_string("out", "", "JSON file for the figures.")
    cli.run(main, __doc__)
