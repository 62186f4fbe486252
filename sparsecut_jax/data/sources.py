"""Where rows come from: easy-VQA, or a user's JSON file of LLaVA conversations and a folder of images."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from sparsecut_jax.data import easy_vqa
from sparsecut_jax.data.conversation import check_row, images_of
from sparsecut_jax.data.images import resolve
from sparsecut_jax.settings import DataConfig
from sparsecut_jax.types import UserError

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Split:
    """Rows and the folder that their image paths start from."""

    rows: list[Row]
    images: str


@dataclasses.dataclass(frozen=True)
class Source:
    """A named set of rows.

    Attributes:
      train: rows to learn from.
      holdout: rows taken out of the training rows, for the periodic evaluation.
      test: rows to report on: the official test split, or the held-out rows where there is none.
      test_name: what the results file calls the test rows.
    """

    name: str
    train: Split
    holdout: Split
    test: Split
    test_name: str
    caption_maker: Callable[[list[Row]], list[Row]] | None = None  # for rows that are no captions themselves

    def stage_rows(self, rows: str, split: Split | None = None) -> Split:
        """Rows of a stage, out of the training rows or `split`; `rows` is "captions" or "conversations"."""
        split = self.train if split is None else split
        if rows == "captions" and self.caption_maker:
            return Split(self.caption_maker(split.rows), split.images)
        return split

    def fingerprint(self) -> str:
        """Number of rows and a hash of all of them: what a resumed run must find unchanged."""
        digest = hashlib.sha256()
        rows = self.train.rows + self.holdout.rows
        for row in rows:
            digest.update(json.dumps(row, sort_keys=True).encode())
        return f"{len(rows)} rows, sha256 {digest.hexdigest()[:16]}"

    def texts(self) -> list[str]:
        """Everything a tokenizer should know, in a fixed order."""
        rows = self.train.rows + self.stage_rows("captions").rows
        return [turn["value"] for row in rows for turn in row["conversations"]]


def load_source(cfg: DataConfig) -> Source:
    """Reads and checks all rows. Raises UserError naming the file, the row and what is wrong with it."""
    if cfg.source == "easy_vqa":
        train, folder = easy_vqa.load("train")
        test, test_folder = easy_vqa.load("test")
        kept, held = _hold_out(train, cfg)
        splits = Split(kept, folder), Split(held, folder), Split(test, test_folder)
        return Source("easy_vqa", *splits, test_name="easy_vqa/test", caption_maker=easy_vqa.captions)
    rows = read_json(cfg.source)
    for i, row in enumerate(rows):
        at = f"{cfg.source} row {i} (id {row.get('id', '?') if isinstance(row, dict) else '?'!r})"
        check_row(row, at, cfg.max_images)
        names = images_of(row)
        if names and not cfg.images:
            raise UserError(f"{at} has an image, but config.data.images, the folder of the images, is empty")
        for name in names:
            try:
                resolve(cfg.images, name)
            except UserError as error:
                raise UserError(f"{at}: {error}") from None
    kept, held = _hold_out(rows, cfg)
    name = os.path.splitext(os.path.basename(cfg.source))[0]
    holdout = Split(held, cfg.images)
    return Source(name, Split(kept, cfg.images), holdout, holdout, f"{name}/holdout")


def read_json(path: str) -> list[Row]:
    """The rows of a JSON file, not yet checked."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            rows = json.load(file)
    except FileNotFoundError:
        raise UserError(
            f"data source {path!r} is not there; expected 'easy_vqa' or a JSON file of conversations"
        ) from None
    except IsADirectoryError:
        raise UserError(
            f"data source {path!r} is a folder; expected 'easy_vqa' or a JSON file of conversations"
        ) from None
    except OSError as error:
        raise UserError(f"data source {path!r} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"data source {path!r} is not valid JSON: {error}") from error
    if not isinstance(rows, list):
        raise UserError(f"data source {path!r}: expected a list of rows, got {type(rows).__name__}")
    if not rows:
        raise UserError(f"data source {path!r} is an empty list; expected at least one row")
    return rows


def _hold_out(rows: list[Row], cfg: DataConfig) -> tuple[list[Row], list[Row]]:
    """Training rows and `cfg.holdout` others, the same for every seed of a run."""
    if cfg.holdout >= len(rows):
        raise UserError(
            f"config.data.holdout={cfg.holdout} rows cannot be kept out of the {len(rows)} of {cfg.source!r}; "
            f"expected at most {len(rows) - 1}"
        )
    held = set(np.random.default_rng(0).permutation(len(rows))[: cfg.holdout].tolist())
    kept = [row for i, row in enumerate(rows) if i not in held]
    return kept, [rows[i] for i in sorted(held)]
