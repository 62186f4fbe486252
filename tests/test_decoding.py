"""Generation: the golden ids, ragged prompts, the end token, shortcuts in the prefill only, sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golden_cases import CASES, N, load_case
from sparsecut_jax.inference.decoding import encode_images, generate, until
from tiny import IMAGE, LONGROPE, Tiny, make_batch


@pytest.mark.parametrize("name", CASES)
def test_golden_greedy_ids(name):
    """Both rows in one padded batch, although the reference asks them one by one."""
    case = load_case(name)
    length = case.io["expanded_mask"].sum(1)
    encoded = encode_images(case.model, case.params, case.batch.views)
    ids, logits = generate(
        case.model, case.params, case.batch.tokens, length, case.batch.image_start, encoded, 12, return_logits=True
    )
    np.testing.assert_array_equal(ids, case.io["greedy_ids"])
    np.testing.assert_allclose(logits, case.io["greedy_logits"], atol=3e-5)
    assert case.batch.tokens.shape[1] - length.min() == 4 and N == 16  # the second row really is padded


@pytest.fixture(scope="module")
def prompts(tiny):
    batch = make_batch([[1, 5, IMAGE, 7, 9, 11], [1, IMAGE, 3], [1, 2, 3, 4]], length=24, slots=1)
    length = np.array([14, 11, 4])
    return batch, length, encode_images(tiny.model, tiny.params, batch.views)


@pytest.mark.parametrize("chunk", [1, 16])
def test_prompts_in_chunks(tiny, prompts, chunk):
    """Wherever a chunk ends, also within an image."""
    batch, length, encoded = prompts
    inputs = (tiny.model, tiny.params, batch.tokens, length, batch.image_start, encoded, 3)
    ids, logits = generate(*inputs, return_logits=True)
    chunked, near = generate(*inputs, return_logits=True, chunk=chunk)
    np.testing.assert_array_equal(chunked, ids)
    np.testing.assert_allclose(near, logits, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def longrope():
    return Tiny.build(llm=dict(layers=3, rope=LONGROPE))


# The first prompt is longer than original_length=12; the others outgrow it with their third, second and ninth token.
PROMPTS = [[1, 5, IMAGE, 7, 9, 11], [1, 7, 3, 8, 5, 9, 2, 4, 6, 11], [1, IMAGE, 3], [1, 2, 3, 4]]
PROMPT_LENGTHS = np.array([14, 10, 11, 4])


def test_longrope_generates_what_full_passes_say(longrope):
    """Logits of each new token are those of one pass over the text so far, across the length where factors change."""
    new = 10
    batch = make_batch(PROMPTS, length=16, slots=1)
    encoded = encode_images(longrope.model, longrope.params, batch.views)
    ids, logits = generate(
        longrope.model, longrope.params, batch.tokens, PROMPT_LENGTHS, batch.image_start, encoded, new,
        return_logits=True,
    )  # fmt: skip
    tokens = np.pad(batch.tokens, ((0, 0), (0, new)))
    for row, n in enumerate(PROMPT_LENGTHS):
        tokens[row, n : n + new] = ids[row]
    places = np.arange(16 + new)
    positions = np.broadcast_to(places, tokens.shape).astype(np.int32)
    for i in range(new):
        segments = (places < PROMPT_LENGTHS[:, None] + i).astype(np.int32)
        full = longrope(batch.replace(tokens=tokens, segments=segments, branches=0 * tokens, positions=positions))
        for row, n in enumerate(PROMPT_LENGTHS):
            np.testing.assert_allclose(logits[row, i], full[row, n + i - 1], rtol=0, atol=2e-5, err_msg=f"{row} {i}")


def test_longrope_of_a_row_depends_on_no_other_and_not_on_the_room(longrope):
    batch = make_batch(PROMPTS, length=16, slots=1)
    encoded = encode_images(longrope.model, longrope.params, batch.views)
    together, _ = generate(
        longrope.model, longrope.params, batch.tokens, PROMPT_LENGTHS, batch.image_start, encoded, 10
    )
    for row, n in enumerate(PROMPT_LENGTHS):
        for new in (1, 5, 10):
            alone, _ = generate(
                longrope.model, longrope.params, batch.tokens[row : row + 1, :n], PROMPT_LENGTHS[row : row + 1],
                batch.image_start[row : row + 1], encoded.rows(np.array([row])), new,
            )  # fmt: skip
            np.testing.assert_array_equal(alone[0], together[row, :new])


def test_shortcuts_act_in_the_prefill_alone(tiny, prompts):
    """The image of a row without image positions changes nothing, in whatever way tokens are drawn."""
    batch, length, encoded = prompts
    nowhere = jnp.full_like(batch.image_start, -1)
    loud = encoded.replace(bank=encoded.bank * 100)
    for temperature in (0.0, 1.0):
        one, _ = generate(tiny.model, tiny.params, batch.tokens, length, nowhere, encoded, 4, -1, temperature)
        other, _ = generate(tiny.model, tiny.params, batch.tokens, length, nowhere, loud, 4, -1, temperature)
        np.testing.assert_array_equal(one, other)
        changed, _ = generate(
            tiny.model, tiny.params, batch.tokens, length, batch.image_start, loud, 4, -1, temperature
        )
        assert (np.asarray(changed)[:2] != np.asarray(one)[:2]).any()


def test_the_end_token_ends_a_row(tiny, prompts):
    batch, length, encoded = prompts
    free, _ = generate(tiny.model, tiny.params, batch.tokens, length, batch.image_start, encoded, 6)
    eos = int(free[0, 2])
    ids, _ = generate(tiny.model, tiny.params, batch.tokens, length, batch.image_start, encoded, 6, eos)
    for row in range(3):
        want = until(np.asarray(free[row]), [eos])
        assert until(np.asarray(ids[row]), [eos]) == want
        assert set(np.asarray(ids[row])[len(want) :]) <= {eos}


def test_the_first_of_several_end_tokens_ends_a_row(tiny, prompts):
    batch, length, encoded = prompts
    free = np.asarray(generate(tiny.model, tiny.params, batch.tokens, length, batch.image_start, encoded, 6)[0])
    stop = (int(free[1, 4]), int(free[0, 2]))
    ids, _ = generate(tiny.model, tiny.params, batch.tokens, length, batch.image_start, encoded, 6, np.array(stop))
    for row in range(3):
        want = until(free[row], stop)
        assert until(np.asarray(ids[row]), stop) == want
        assert set(np.asarray(ids[row])[len(want) + 1 :]) <= {stop[0]}
    assert until(np.array([3, 4, 5]), ()) == [3, 4, 5]


def test_sampling_follows_its_key(tiny, prompts):
    batch, length, encoded = prompts
    draw = lambda seed, t: np.asarray(
        generate(
            tiny.model, tiny.params, batch.tokens, length, batch.image_start, encoded, 6, -1, t, jax.random.key(seed)
        )[0]
    )
    np.testing.assert_array_equal(draw(1, 1.0), draw(1, 1.0))
    assert (draw(1, 1.0) != draw(2, 1.0)).any()
    np.testing.assert_array_equal(draw(1, 1e-4), draw(2, 0.0))
