"""EMMA against a reference in float64, and what its images may know: the question, never the answer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import save_file

import reference
from parity_cases import join
from small_tokenizers import byte_level
from sparsecut_jax.data.batches import collate, spec_of
from sparsecut_jax.data.pipeline import Images
from sparsecut_jax.data.walk import RowEncoder
from sparsecut_jax.inference import engine as engine_lib
from sparsecut_jax.inference.decoding import encode_images, generate
from sparsecut_jax.inference.engine import Engine
from sparsecut_jax.models.fusion import Fusion
from sparsecut_jax.models.interfaces import Question
from sparsecut_jax.models.levels import Projector
from sparsecut_jax.models.parameters import flatten
from sparsecut_jax.models.ways import wiring_of
from sparsecut_jax.runs.run import Run
from sparsecut_jax.runtime import sharding
from sparsecut_jax.tasks.registry import build_model
from sparsecut_jax.text.conversation import Request
from tiny import IMAGE, N, make_batch, params_of, refusal, tiny_config

TQ = 5


def config_of(question=TQ, **groups):
    return tiny_config(fusion=dict(name="emma", emma=dict(question=question)), **groups)


def drawn(images):
    """Levels of images, and questions about them of no token, one, two, ..."""
    rng = np.random.default_rng(0)
    levels = rng.standard_normal((1, images, 1, N, 24)).astype(np.float32)
    there = np.arange(TQ) < np.arange(images)[:, None] % (TQ + 1)
    return levels, Question(there, rng.standard_normal((images, TQ, 32)).astype(np.float32))


@pytest.fixture(scope="module")
def module():
    cfg = config_of()
    return Fusion(cfg.fusion, wiring_of(cfg), cfg.llm)


@pytest.fixture(scope="module")
def params(module):
    return params_of(module, *drawn(1))


@pytest.fixture(scope="module")
def first(module):
    """The parameters before the first step."""
    return jax.jit(lambda: nn.meta.unbox(module.init(jax.random.key(0), *drawn(1))["params"]))()


def tokens_of(module, params, levels, question):
    return jax.jit(module.apply)({"params": params}, levels, question).tokens


def test_equals_the_reference(module, params):
    levels, question = drawn(4)
    fused = tokens_of(module, params, levels, question)
    p = reference.double(params)["fuse"]
    for image in range(4):
        x = levels[0, image, 0].astype(np.float64)
        rows = [x[n] for n in range(N)]
        for j in range(TQ):
            text = reference.gelu(reference.linear(p["mix"]["text"], question.words[image, j].astype(np.float64)))
            rows.append(text if question.there[image, j] else 0 * text)
        mixed = [
            sum(p["mix"]["kernel"][j, n] * row for j, row in enumerate(rows)) + p["mix"]["bias"][n] for n in range(N)
        ]
        expected = reference.project(p["projector"], np.array(mixed))
        np.testing.assert_allclose(fused[image], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_projector_alone_before_the_first_step(module, first, dtype):
    levels, question = jax.tree.map(lambda x: jnp.asarray(x, x.dtype if x.dtype == bool else dtype), drawn(4))
    alone = jax.jit(Projector(32).apply)({"params": first["fuse"]["projector"]}, levels[0, :, 0])
    np.testing.assert_array_equal(tokens_of(module, first, levels, question), alone)


def test_parameters_of_the_original():
    """With CLIP-L/336 and words of CLIP's width: 1,164,160 beside the projector."""
    vision = dict(image_size=336, patch_size=14, width=1024, heads=16)
    cfg = config_of(77, vision=vision, llm=dict(width=768))
    module = Fusion(cfg.fusion, wiring_of(cfg), cfg.llm)
    levels, words = jnp.zeros((1, 1, 1, 576, 1024)), jnp.zeros((1, 77, 768))
    question = Question(jnp.ones((1, 77), bool), words)
    mix = nn.meta.unbox(jax.eval_shape(lambda: module.init(jax.random.key(0), levels, question)))["params"]["fuse"][
        "mix"
    ]
    assert jax.tree.map(lambda leaf: leaf.shape, mix) == {
        "text": {"kernel": (768, 1024), "bias": (1024,)}, "kernel": (576 + 77, 576), "bias": (576,),
    }  # fmt: skip
    assert sum(leaf.size for leaf in jax.tree.leaves(mix)) == 1_164_160


def test_gradients(module, first):
    """The text's first matrix waits for one step: until then nothing reads the text."""
    loss = lambda params: (module.apply({"params": params}, *drawn(2)).tokens ** 2).sum()
    gradient = jax.jit(jax.grad(loss))
    moves = lambda tree: {path for path, leaf in flatten(tree).items() if np.asarray(leaf).any()}
    before = gradient(first)
    assert moves(before) == flatten(first).keys() - {"fuse/mix/text/kernel", "fuse/mix/text/bias"}
    after = gradient(jax.tree.map(lambda value, slope: value - 1e-3 * slope, first, before))
    assert moves(after) == flatten(first).keys()


def test_positions_without_a_token_add_nothing(module, params):
    levels, question = drawn(4)
    noise = np.where(question.there[..., None], question.words, 100.0).astype(np.float32)
    expected = tokens_of(module, params, levels, question)
    np.testing.assert_array_equal(tokens_of(module, params, levels, question.replace(words=noise)), expected)
    changed = tokens_of(module, params, levels, question.replace(words=question.words + 1))
    differ = np.abs(changed - expected).max((1, 2))
    assert differ[0] == 0 and differ[1:].min() > 1e-2  # the first image has no question


@pytest.mark.parametrize("value", [0, -1, 1025])
def test_a_number_of_tokens_that_cannot_be(value):
    assert refusal(config_of, value) == f"config.fusion.emma.question={value}: expected 1 to 1024 tokens"


def test_begins_with_the_projector_of_llava(tmp_path):
    rng, file = np.random.default_rng(0), tmp_path / "projector.safetensors"
    names = [f"multi_modal_projector.linear_{i}.{part}" for i in (1, 2) for part in ("weight", "bias")]
    theirs = {name: rng.standard_normal((32,) * (1 + name.endswith("weight"))).astype(np.float32) for name in names}
    save_file(theirs, file)
    settings = {"fusion.name": "emma", "init.fresh": ("fusion/fuse/mix/.*",)}
    begun = join(fusion=file, settings=settings)
    fresh = {path for path in begun.report.fresh if path.startswith("fusion/")}
    assert fresh == {f"fusion/fuse/mix/{name}" for name in ("kernel", "bias", "text/kernel", "text/bias")}
    ours = begun.params["fusion"]["fuse"]["projector"]
    for i in (1, 2):
        np.testing.assert_array_equal(ours[f"fc{i}"]["kernel"], theirs[f"multi_modal_projector.linear_{i}.weight"].T)
        np.testing.assert_array_equal(ours[f"fc{i}"]["bias"], theirs[f"multi_modal_projector.linear_{i}.bias"])


def test_on_a_mesh(module, params):
    """Data, fsdp and tensor axes of two devices each: the same tokens and gradients, and weights that are sharded."""
    levels, question = drawn(8)

    def loss(params, levels, question):
        return (module.apply({"params": params}, levels, question).tokens ** 2).mean()

    step = lambda: jax.jit(jax.value_and_grad(loss))
    expected, gradients = step()(params, levels, question)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        boxed = jax.eval_shape(lambda: module.init(jax.random.key(0), levels, question))["params"]
        placed = jax.device_put(params, sharding.param_shardings(boxed, mesh))
        by_image = sharding.batch_sharding(mesh)
        question = jax.device_put(question, by_image)
        levels = jax.device_put(levels, jax.NamedSharding(mesh, jax.P(None, *by_image.spec)))
        got, sharded = step()(placed, levels, question)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), sharded, gradients)
    parts = jax.tree.map(lambda leaf: leaf.sharding.shard_shape(leaf.shape), placed["fuse"]["mix"])
    assert parts == {"text": {"kernel": (16, 24), "bias": (24,)}, "kernel": (7, 9), "bias": (9,)}


# --- in the whole model ---


@pytest.fixture(scope="module")
def run():
    tokenizer = byte_level()
    groups = dict(llm=dict(vocab_size=tokenizer.size, layers=2), top=dict(run_stages=("instruct",)))
    cfg = config_of(**groups)
    model = build_model(cfg)
    params = params_of(model, asked(make_batch([[1]], slots=1), [[1]]))
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    return Run("runs/x", 7, cfg, mesh, model, jax.device_put(params), tokenizer, Images(cfg))


def asked(batch, questions):
    """The batch, whose first images are asked about with these tokens."""
    ids = np.full((*batch.image_start.shape, TQ), -1, np.int32)
    for row, question in enumerate(questions):
        ids[row, 0, : len(question)] = question
    return batch.replace(extras={"question": ids})


@pytest.fixture(scope="module")
def logits(run):
    return jax.jit(lambda batch: run.model.apply({"params": run.params}, batch)[0])


def test_another_question_changes_what_an_image_says(logits):
    """And nothing else: a text-only row stays as it is, whatever stands in its empty slots."""
    batch = make_batch([[1, 5, IMAGE, 7, 8], [1, 20, 21]], slots=1)
    one, other = (logits(asked(batch, questions)) for questions in ([[5, 6], [1]], [[5, 7], [2, 3]]))
    changed = np.abs(one - other).max((1, 2))
    assert changed[0] > 1e-3 and changed[1] == 0


def test_no_gradient_goes_through_the_words(run):
    batch = asked(make_batch([[1, IMAGE, 7]], slots=1), [[5, 6]])
    images = lambda llm: run.model.apply(
        {"params": {**run.params, "llm": llm}}, batch.views, batch.extras["question"], method="encode"
    )
    gradients = jax.jit(jax.grad(lambda llm: (images(llm).tokens ** 2).sum()))(run.params["llm"])
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradients))


def test_no_answer_leaks_into_an_image(run):
    """Neither an answer nor a later turn: only the question that the image is shown with."""
    encode = RowEncoder(run.tokenizer, "qa", N, 128, question=TQ)
    view = np.random.default_rng(0).integers(0, 256, (1, 12, 12, 3), np.uint8)

    def images_of(*said, independent=False):
        turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(said)]
        example = encode({"image": "a.png", "conversations": turns, "independent": independent})
        batch = collate([[(example, [view])]], spec_of(run.config, 1, 128, 1))
        return np.asarray(encode_images(run.model, run.params, batch.views, batch.extras["question"]).tokens)

    expected = images_of("<image>\nis it red?", "yes")
    for others in (("no",), ("yes", "is it blue?", "no")):
        np.testing.assert_array_equal(images_of("<image>\nis it red?", *others), expected)
    np.testing.assert_array_equal(images_of("<image>\nis it red?", "no", "blue?", "no", independent=True), expected)
    assert np.abs(images_of("<image>\nwhat color?", "yes") - expected).max() > 1e-2


def test_two_questions_about_a_picture_are_two_encodings(run, monkeypatch):
    encoded, encode = [], engine_lib.encode_images
    monkeypatch.setattr(engine_lib, "encode_images", lambda *given: encoded.append(encode(*given)) or encoded[-1])
    run = dataclasses.replace(
        run, config=dataclasses.replace(run.config, data=dataclasses.replace(run.config.data, max_images=1))
    )
    engine = Engine(run, size=2)
    views = np.random.default_rng(0).integers(0, 256, (1, 1, 1, 12, 12, 3), np.uint8)
    engine.answers(views, [Request(engine.prompt(text, 1)) for text in ("is it red?", "what color?")], 2)
    (both,) = encoded
    assert both.tokens.shape == (2, 1, N, 32) and np.abs(both.tokens[0] - both.tokens[1]).max() > 1e-2


def test_generation_equals_the_forward_pass(run, logits):
    """Prefill and decode give what one pass over the prompts and the new tokens gives."""
    batch = asked(make_batch([[1, 5, IMAGE, 7, 9, 11], [1, IMAGE, 3], [1, 2, 3, 4]], length=32, slots=1), [[5, 6], [7]])
    length, new = np.array([14, 11, 4]), 4
    encoded = encode_images(run.model, run.params, batch.views, batch.extras["question"])
    ids, said = generate(
        run.model, run.params, batch.tokens, length, batch.image_start, encoded, new, return_logits=True
    )
    tokens, segments = np.array(batch.tokens), np.array(batch.segments)
    for row, n in enumerate(length):
        tokens[row, n : n + new], segments[row, n : n + new] = ids[row], 1
    whole = logits(batch.replace(tokens=tokens, segments=segments))
    for row, n in enumerate(length):
        np.testing.assert_allclose(said[row], whole[row, n - 1 : n - 1 + new], rtol=0, atol=1e-4)
