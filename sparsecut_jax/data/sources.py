"""Sources of rows: easy-VQA, Scenes, TFDS, or files and folders; a single one, or a weighted mixture."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence

import numpy as np

from sparsecut_jax.data import easy_vqa
from sparsecut_jax.data.opening import is_shards, open_rows
from sparsecut_jax.data.parts import Folder, Part, Split
from sparsecut_jax.data.rows import Row, is_folder
from sparsecut_jax.settings import Config, DataConfig, SourceConfig, StageConfig
from sparsecut_jax.types import BadSample, UserError

AUTO = -1  # config.data.holdout: a share of the rows
AUTO_SHARE, AUTO_LEAST, AUTO_MOST = 20, 10, 500  # one row in 20, but at least 10 and at most 500 rows,
AUTO_FEW = 5  # and never more than one row in 5, or a single one
NO_TESTS = "the run has no test rows, neither held out (config.data.holdout) nor named (config.data.test)"
TOKENIZER_TEXT = 5_000_000  # maximum number of characters to train a tokenizer on


@dataclasses.dataclass(frozen=True)
class Source:
    """All rows of a run: for training, held out for the periodic evaluation, and for the test at the end.

    Attributes:
      name: title of the data, for messages.
      train, holdout: {name of the source: rows}.
      tests: {name in the results: rows}: those of config.data.test, else the official test split, else held-out rows.
      fingerprint: identifies the data when a run resumes.
    """

    name: str
    train: dict[str, Part]
    holdout: dict[str, Part]
    tests: dict[str, Part]
    fingerprint: str

    def stage(self, stage: StageConfig, holdout: bool = False) -> Split:
        """The rows of a stage: those of its sources, as captions if it trains on captions."""
        parts = self.holdout if holdout else self.train
        chosen = [parts[name] for name in stage.sources or parts]
        return Split(tuple(part.as_captions() if stage.rows == "captions" else part for part in chosen))

    def texts(self) -> Iterator[str]:
        """Texts to train a tokenizer on: spread evenly over the rows, about TOKENIZER_TEXT characters."""
        parts = [*self.train.values(), *(part.as_captions() for part in self.train.values() if part.captions)]
        left, budget = sum(map(len, parts)), TOKENIZER_TEXT
        for part in parts:
            rest = budget - budget * len(part) // max(1, left)  # for the other parts
            left -= len(part)
            for i in _spread(len(part)):
                try:
                    turns = part.row(i)["conversations"]
                except BadSample:
                    continue
                yield from (turn["value"] for turn in turns)
                budget -= sum(len(turn["value"]) for turn in turns)
                if budget <= rest:
                    break


def _spread(count: int) -> Iterator[int]:
    """0 to count - 1: in order if there are few, else in strided passes, so that any prefix covers the whole range."""
    step = max(1, count // 10_000)
    for first in range(step):
        yield from range(first, count, step)


def load_source(cfg: Config) -> Source:
    """Opens the data that `cfg.data` names; rows are not read yet.

    Raises:
      UserError: a file does not exist or has no rows, or more rows are to be held out than there are.
    """
    mix = cfg.data.mix or {"": SourceConfig(path=cfg.data.source, images=cfg.data.images)}
    opened = {name: _open(source, cfg, name) for name, source in mix.items()}
    train = {name: found[0] for name, found in opened.items()}
    fingerprint = "; ".join(filter(None, (found[2] for found in opened.values())))
    kept, held = _hold_out(train, cfg.data)
    title = "+".join(map(_title, train.values()))
    tests = open_test(cfg) if cfg.data.test else _own_tests(cfg, opened, held)
    return Source(title, kept, held, tests, fingerprint)


def _own_tests(cfg: Config, opened: dict[str, tuple[Part, Part | None, str]], held: dict[str, Part]) -> dict[str, Part]:
    """Official test rows, or held-out ones, of the sources of the run's last stage."""
    tests = {}
    for name in cfg.stages[cfg.run_stages[-1]].sources or tuple(opened):
        train, test, _ = opened[name]
        label = name or _title(train)
        if test is not None:
            tests[f"{label}/test"] = test
        elif len(held[name]):
            tests[f"{label}/holdout"] = held[name]
    return tests


def open_tests(cfg: Config) -> dict[str, Part]:
    """{name in the results: test rows} of a run; with config.data.test, training rows need not exist."""
    return open_test(cfg) if cfg.data.test else load_source(cfg).tests


def open_test(cfg: Config) -> dict[str, Part]:
    """{name in the results: rows} of config.data.test.

    If the run has a mixture, they are read with the settings of the first source of its last stage.

    Raises:
      UserError: as `load_source`, or a folder of images is named for a source that has pictures of its own.
    """
    data = cfg.data
    like = SourceConfig(images=data.images)
    if data.mix:
        like = data.mix[(cfg.stages[cfg.run_stages[-1]].sources or tuple(data.mix))[0]]
    train, test, _ = _open(dataclasses.replace(like, path=data.test, images=data.test_images or like.images), cfg, "")
    part = train if test is None else test
    if isinstance(part.pictures, Folder):
        pictures = dataclasses.replace(part.pictures, setting="config.data.test_images (--images of evaluate)")
        part = dataclasses.replace(part, pictures=pictures)
    elif data.test_images:
        raise UserError(
            f"config.data.test_images={data.test_images!r} (--images of evaluate) has no effect with {data.test!r}, which "
            "has its own images; leave it out"
        )
    return {f"{_title(part)}/test": part}


def _title(part: Part) -> str:
    return os.path.splitext(os.path.basename(part.name.rstrip("/")))[0]


def _open(source: SourceConfig, cfg: Config, name: str) -> tuple[Part, Part | None, str]:
    """(training rows, official test rows or None, fingerprint) of a source."""
    data = cfg.data
    if source.path == "easy_vqa":
        parts = []
        for split in ("train", "test"):
            rows, folder = easy_vqa.load(split)
            pictures = Folder(folder, data.max_pixels)
            parts.append(Part("easy_vqa", rows, pictures, data.max_images, captions=easy_vqa.captions))
        return _weighted(parts[0], source), parts[1], f"{len(parts[0])} rows, {_digest(parts[0].rows)}"
    if source.path == "scenes":
        from sparsecut_jax.data import scenes

        rows_, columns = cfg.fusion.grid
        low = cfg.data.view_size or cfg.vision.image_size
        size = data.scenes.size or low * max(rows_, columns)
        parts = []
        for split in ("train", "test"):
            drawn = scenes.rows(data.scenes, split, size, low)
            parts.append(Part("scenes", drawn, drawn, data.max_images, captions=scenes.captions))
        return _weighted(parts[0], source), parts[1], f"{len(parts[0])} rows of {data.scenes}, {size} and {low} pixels"
    named = source.path if source.split == "train" else f"{source.path} {source.split}"
    if source.path.startswith("tfds:") or is_folder(source.path) and not is_shards(source.path):
        from sparsecut_jax.data import tfds_source

        rows = tfds_source.open_tfds(source, data.max_pixels)
        part = Part(named, rows, rows, data.max_images)
        return _weighted(part, source), None, rows.fingerprint()
    rows = open_rows(source)
    where = f"config.data.mix.{name}.images" if name else "config.data.images"
    folder = Folder(source.images, data.max_pixels, where, data.follow_links)
    part = Part(named, rows, folder, data.max_images)
    return _weighted(part, source), None, rows.fingerprint()


def _weighted(part: Part, source: SourceConfig) -> Part:
    return dataclasses.replace(part, weight=source.weight)


def _digest(rows: Sequence[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode())
    return f"sha256 {digest.hexdigest()[:16]}"


def _hold_out(train: dict[str, Part], cfg: DataConfig) -> tuple[dict[str, Part], dict[str, Part]]:
    """Training rows and `cfg.holdout` others, in proportion to each source; the same for every seed of a run.

    AUTO holds out one row in AUTO_SHARE of each source, at least AUTO_LEAST and at most AUTO_MOST, but never
    more than one in AUTO_FEW (or a single one), and nothing of a single row.
    """
    total = sum(len(part) for part in train.values())
    if cfg.holdout >= total:
        of = repr(cfg.source) if not cfg.mix else "config.data.mix"
        raise UserError(
            f"config.data.holdout={cfg.holdout} rows cannot be held out of the {total} of {of}; "
            f"expected at most {total - 1}"
        )
    kept, held, seen, given = {}, {}, 0, 0
    for name, part in train.items():
        seen += len(part)
        count = min(cfg.holdout * seen // total - given, len(part) - 1)  # as many as requested, over all parts
        if cfg.holdout == AUTO:
            wanted = min(max(len(part) // AUTO_SHARE, AUTO_LEAST), AUTO_MOST)
            count = min(wanted, max(1, len(part) // AUTO_FEW), len(part) - 1)
        given += count
        order = np.random.default_rng(0).permutation(len(part))
        chosen = np.sort(order[:count])
        rest = np.sort(order[count:])
        kept[name], held[name] = part.take(rest), part.take(chosen)
    return kept, held
