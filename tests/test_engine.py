"""Prompts to texts: what is asked together is answered as if it were asked alone."""

import dataclasses

import jax
import numpy as np
import pytest

from small_tokenizers import byte_level
from sparsecut_jax.data.pipeline import Images
from sparsecut_jax.inference import engine as engine_lib
from sparsecut_jax.inference.engine import Engine, Request
from sparsecut_jax.runs.run import Run
from sparsecut_jax.runtime import sharding
from tiny import Tiny

NEW = 6


@pytest.fixture(scope="module")
def run() -> Run:
    tokenizer = byte_level()
    tiny = Tiny.build(llm=dict(vocab_size=tokenizer.size), top=dict(run_stages=("instruct",)))
    cfg = dataclasses.replace(tiny.cfg, data=dataclasses.replace(tiny.cfg.data, max_images=2))
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    return Run("runs/x", 7, cfg, mesh, tiny.model, tiny.params, tokenizer, Images(cfg))


@pytest.fixture(scope="module")
def views() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, 2, 5, 12, 12, 3), np.uint8)


def requests(engine: Engine, *asked: tuple[str, int]) -> list[Request]:
    return [Request(engine.prompt(text, 1), row) for text, row in asked]


ASKED = (("what?", 0), ("a much longer question, is it?", 1), ("what?", 1))


def test_together_as_alone(run, views):
    """Whatever the number of prompts in a batch, and of the rows of pictures that are encoded at once."""
    together = Engine(run, rows=2, size=3)
    answers = together.answers(views, requests(together, *ASKED), NEW)
    assert len({answer.text for answer in answers}) == 3  # the pictures and the questions matter
    pairs = Engine(run, rows=2, size=2)
    assert pairs.answers(views, requests(pairs, *ASKED), NEW) == answers
    alone = Engine(run)
    for (text, row), answer in zip(ASKED, answers, strict=True):
        assert alone.answers(views[row : row + 1], requests(alone, (text, 0)), NEW) == [answer]


def test_nothing_asked_is_nothing_answered(run):
    engine = Engine(run)
    assert engine.answers(engine.no_pictures(), [], NEW) == []


def test_an_answer_ends_before_its_end_token_or_is_cut(run, views):
    engine = Engine(run, rows=2)
    (whole,) = engine.answers(views, requests(engine, ASKED[0]), NEW)
    assert whole.cut
    ids = run.tokenizer.encode(whole.text)
    engine.stop = (ids[2], *engine.stop)
    (ended,) = engine.answers(views, requests(engine, ASKED[0]), NEW)
    assert not ended.cut and whole.text.startswith(ended.text) and len(ended.text) < len(whole.text)


def test_sampling_follows_the_seed(run, views):
    engine = Engine(run, rows=2)
    draw = lambda seed: engine.answers(views, requests(engine, *ASKED[:1] * 2), NEW, 3.0, seed)
    first, again, other = draw(1), draw(1), draw(2)
    assert first == again and first != other
    assert first[0] != first[1]  # in batches of their own


def test_pictures_are_encoded_with_each_question_where_a_way_reads_it(run, views, monkeypatch):
    """The same way of fusing, as if it read four tokens of the question: it is given them, once for every prompt."""
    wiring = dataclasses.replace(run.model.wiring, question=4)
    reading = dataclasses.replace(run, model=run.model.clone(wiring=wiring))
    encoded, encode = [], engine_lib.encode_images

    def note(model, params, views, question=None):
        encoded.append(None if question is None else np.asarray(question)[:, 0].tolist())
        return encode(run.model, params, views)

    monkeypatch.setattr(engine_lib, "encode_images", note)
    plain, asking = Engine(run, rows=2, size=3), Engine(reading, rows=2, size=2)
    expected = plain.answers(views, requests(plain, *ASKED), NEW)
    said = asking.answers(views, requests(asking, *ASKED), NEW)
    ids = lambda text: [*run.tokenizer.encode(text)[:4], *[-1] * 4][:4]
    first, second, third = (ids(text) for text, _ in ASKED)
    assert encoded == [None, [first, second], [third, [-1] * 4]]
    assert said == expected
