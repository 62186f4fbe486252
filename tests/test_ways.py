"""Laws that hold for every way of bringing vision into the LLM. A new file in models/fusing is tested by being there.

All parameters are drawn, also those that begin at zero or at the identity, so that nothing is switched off.
"""

import jax
import numpy as np
import pytest

from parity_cases import join
from sparsecut_jax.exporting import export
from sparsecut_jax.inference.decoding import generate
from sparsecut_jax.models import ways
from sparsecut_jax.models.parameters import flatten, unflatten
from sparsecut_jax.planning import work
from sparsecut_jax.planning.compiling import lower_step
from sparsecut_jax.planning.memory import Parameters
from sparsecut_jax.runs.parameters import abstract_params, boxed_shapes, init_params
from sparsecut_jax.runs.run import Run
from sparsecut_jax.runtime import sharding
from sparsecut_jax.tasks.registry import build_model
from sparsecut_jax.types import EMPTY_SLOT, NO_TOKEN
from ways_cases import MORE, SLOTS, B, Case, all_cases, config_of

CASES = all_cases()
SAME = 1e-5  # largest difference of logits, which are about 1

FIRST, SECOND = [1, 5, -1, 7, 8, 9], [1, 40, 41, -2, 42]
ROWS = [
    [FIRST],
    [[1, 5, -2, 7, 8, 9]],
    [[1, 20, 21, 22, 23]],
    [[1, -1, 11, 12, -2, 13, 14]],
    [[1, -1, 11, 12, -3, 13, 14]],
    [[1, -2, 11, 12, -1, 13, 14]],
    [FIRST, SECOND],
    [SECOND],
]
TEXT, TWO, OTHER_SECOND, EXCHANGED, PACKED, ALONE = 2, 3, 4, 5, 6, 7  # rows of ROWS


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return Case(request.param, config_of(**CASES[request.param]))


@pytest.fixture(scope="module")
def batch(case):
    return case.batch(ROWS)


@pytest.fixture(scope="module")
def first(case, batch):
    """((loss, (logits, Encoded)), gradients) of the batch."""
    return jax.tree.map(np.asarray, case.step(case.params, batch, case.whole))


@pytest.fixture(scope="module")
def logits(first):
    return first[0][1][0]


def moved(a, b):
    """bool[...]: positions whose logits differ by more than rounding."""
    return np.abs(a - b).max(-1) > 10 * SAME


def close(got, expected, atol=SAME):
    np.testing.assert_allclose(got, expected, rtol=SAME, atol=atol)


def test_shapes(case, first):
    """What is encoded has the sizes that the wiring promises, and every source enters a layer."""
    wiring, encoded, width = case.wiring, first[0][1][1], case.cfg.llm.width
    assert encoded.tokens.shape == (B, SLOTS, wiring.positions, width)
    count = 0 if encoded.bank is None else encoded.bank.shape[0]
    assert len(wiring.entering) == case.cfg.llm.layers
    assert len(wiring.names) == len(set(wiring.names)) == count
    assert set().union(*wiring.entering) == set(range(count))
    if count:
        assert encoded.bank.shape[1:3] == (B, SLOTS) and encoded.bank.shape[4] == width
        assert wiring.injecting != "add" or encoded.bank.shape[3] == wiring.positions
    assert encoded.aux_loss.shape == ()
    assert all(-1 <= level < case.cfg.vision.layers for level in wiring.levels)


def test_every_parameter_is_trained_after_two_steps(case, batch):
    """From initial values, where a gate may be zero, and one behind it: each first index of each array has a gradient then."""
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    abstract = abstract_params(case.model, case.cfg, mesh)
    drawn = flatten(case.params)
    fresh = init_params(case.model, case.cfg, abstract, skip=[path for path in drawn if not path.startswith("fusion/")])
    params = jax.tree.map(np.asarray, drawn | flatten(fresh))  # placed like these: nothing is compiled again
    slopes = lambda: jax.tree.map(np.asarray, flatten(case.step(unflatten(params), batch, case.whole)[1]))
    for size in (1e-3, 5e-4):  # unequal, for a gate not to come back to zero
        params = {path: params[path] - size * np.sign(slope) for path, slope in slopes().items()}
    for path, slope in slopes().items():
        if path.endswith("/k_bias"):
            continue  # softmax does not see it
        rows = np.abs(slope).reshape(len(slope) if slope.ndim else 1, -1).max(1)
        rows = rows.max(keepdims=True) if path == "llm/embedding" else rows  # most words are in no text
        assert (rows > 0).all(), path


def test_every_level_view_and_source_matters(case, first):
    """One of them is zero in each row, none in the last one; a text-only row is another test."""
    levels, sources = case.whole
    empty = not first[0][1][1].tokens.any()  # then sources alone bring the image
    zeros = [(0, *place) for place in np.ndindex(levels.shape[1:])] + [(1, r) for r in range(empty, sources.shape[1])]
    batch = case.batch([[FIRST]] * B)
    for begin in range(0, len(zeros), B - 1):
        some = zeros[begin : begin + B - 1]
        factors = tuple(array.copy() for array in case.whole)
        for row, (which, *place) in enumerate(some):
            factors[which][(row, *place)] = 0
        out = case.logits(batch, factors)
        changed = (moved(out, out[-1:]) & (batch.segments > 0)).any(1)
        assert changed.tolist() == [row < len(some) for row in range(B)], some


def test_every_question_matters(case):
    """Where the way reads it: the same picture and text with other questions about it."""
    batch = case.batch([[FIRST]] * B)
    if not case.wiring.question:
        assert not batch.extras
        return
    batch.extras["question"][0, 0, 0] += 1
    batch.extras["question"][1, 0, -1] = NO_TOKEN
    out = case.logits(batch)
    assert moved(out, out[-1:]).any(1).tolist() == [True] * 2 + [False] * (B - 2)


# --- images stay where they belong ---


def test_an_image_changes_its_positions_and_later_ones(case, batch, logits):
    """From its first position on, also the second one of two. Where a way lets all of a text see all of its images, from
    the text's beginning on, or from where their order begins to matter. Tokens
    that only say where an image is do not change with it."""
    tokens = case.encoded(batch).tokens
    alike = np.array_equal(tokens[0, 0], tokens[1, 0]) and case.wiring.injecting != "add"  # which adds to them
    blank = case.wiring.positions if alike else 0
    whole = case.wiring.injecting == "llm_kv" and case.cfg.injecting.llm_kv.rows == "all"
    starts = batch.image_start
    for one, other, start in [
        (0, 1, 0 if whole else starts[0, 0]),
        (TWO, OTHER_SECOND, 0 if whole else starts[TWO, 1]),
        (TWO, EXCHANGED, starts[TWO, 0]),
    ]:
        end = int((batch.segments[one] > 0).sum())
        changed = moved(logits[one], logits[other])[:end]
        first = start + blank
        assert changed.tolist() == [False] * first + [True] * (end - first), (one, other)
        close(logits[one, :first], logits[other, :first])


def test_a_row_is_untouched_by_the_others(case, batch, logits):
    """Each row with other neighbours, in another place, its slots the other way round; with none; and with other images."""
    for order in ([TEXT, 0, 1, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 1, 0, TEXT]):
        mixed = jax.tree.map(lambda x, order=order: x[np.array(order)], batch)
        turned = lambda x: x[:, ::-1]
        extras = {name: turned(x) if x.shape[1] == SLOTS else x for name, x in mixed.extras.items()}
        mixed = mixed.replace(views=turned(mixed.views), image_start=turned(mixed.image_start), extras=extras)
        close(case.logits(mixed), logits[order])
    for row in (TEXT, TWO, PACKED):
        alone = jax.tree.map(np.zeros_like, batch)
        alone.image_start.fill(EMPTY_SLOT)
        jax.tree.map(lambda x, y, row=row: x.__setitem__(5, y[row]), alone, batch)
        close(case.logits(alone)[5], logits[row])
    other = batch.replace(views=255 - batch.views)
    changed = moved(after := case.logits(other), logits).any(1)
    assert changed.tolist() == [row != TEXT for row in range(B)]
    np.testing.assert_array_equal(after[TEXT], logits[TEXT])


def test_packed_texts_are_as_in_rows_of_their_own(case, batch, logits):
    first, second = (int((batch.segments[row] > 0).sum()) for row in (0, ALONE))
    close(logits[PACKED, :first], logits[0, :first])
    close(logits[PACKED, first : first + second], logits[ALONE, :second])


def test_nothing_is_seen_before_it_is_said(case, batch, logits):
    """The last word of every text is another one: nothing before it changes, and of two packed texts not the other."""
    tokens, before = batch.tokens.copy(), np.ones((B, case.length), bool)
    for row in range(B):
        last = int((batch.segments[row] > 0).sum()) - 1
        tokens[row, last] += 1
        before[row, last:] = False
    tokens[PACKED, 3 + case.wiring.positions] += 1  # in the first text
    start = int((batch.segments[PACKED] == 1).sum())
    before[PACKED, 3 + case.wiring.positions : start] = False
    changed = moved(after := case.logits(batch.replace(tokens=tokens)), logits)
    assert changed[~before & (batch.segments > 0)].all()
    close(after[before & (batch.segments > 0)], logits[before & (batch.segments > 0)])


# --- the same model in other programs ---

# Kinds of a way that differ in what is made of the levels alone are left out: there these programs are the same.
BARE = list(ways.FUSING)
INJECTIONS = [name for name, groups in CASES.items() if name in (*BARE, *MORE) or "injecting" in groups]
each_way, each_injection = (
    pytest.mark.parametrize("case", names, indirect=True, scope="module") for names in (BARE, INJECTIONS)
)


@each_injection
@pytest.mark.parametrize("chunk", [0, 7])
def test_generation_is_the_forward_pass(case, batch, first, chunk):
    """Prompts of unequal length, read whole and in parts that end within images; then token by token."""
    new, rows = 3, [row for row in range(B) if row != PACKED]
    length = np.where(np.arange(B) == PACKED, 0, (batch.segments > 0).sum(1))
    inputs = (
        case.model,
        case.params,
        batch.tokens[:, : case.length - new],
        length,
        batch.image_start,
        first[0][1][1],
        new,
    )
    ids, said = map(np.asarray, generate(*inputs, return_logits=True, chunk=chunk))
    tokens, segments = batch.tokens.copy(), batch.segments.copy()
    for row in rows:
        at = slice(length[row], length[row] + new)
        tokens[row, at], segments[row, at] = ids[row], 1
    positions = np.broadcast_to(np.arange(case.length, dtype=np.int32), (B, case.length))
    whole = case.logits(batch.replace(tokens=tokens, segments=segments, positions=positions))
    for row in rows:
        close(said[row], whole[row, length[row] - 1 : length[row] - 1 + new])


@each_way
def test_unrolled_layers_are_the_same(case, batch, logits):
    unrolled = build_model(config_of(**CASES[case.name], llm=dict(scan_layers=False)))
    out, _ = jax.jit(unrolled.apply)({"params": case.params}, batch)
    close(np.asarray(out), logits)


@each_way
def test_flops_are_counted_within_three_percent(case):
    """Of a training step, unrolled, at widths where norms and activations are little beside matmuls."""
    vision = dict(image_size=112, patch_size=14, width=192, heads=3, mlp_dim=768, scan_layers=False, remat="none")
    llm = dict(
        vocab_size=1024, width=384, heads=6, kv_heads=2, head_dim=64, mlp_dim=1032, scan_layers=False, remat="none"
    )
    cfg = config_of(**CASES[case.name], vision=vision, llm=llm)
    asked = lower_step(cfg, "instruct", jax.devices()[:1]).cost_analysis()["flops"]
    sites, layers = case.wiring.site_count, cfg.llm.layers
    # XLA counts a branch in all layers, the planner in those that take it.
    taken = lambda p: p.times(layers / sites) if f"{sites}_of_{layers}_layers" in p.scope else p
    counted = work.by_part(map(taken, work.products(cfg, "instruct", Parameters(cfg, "instruct").shapes, 2, 512)))
    assert counted["fusion"].model > 0
    assert counted["total"].model == pytest.approx(asked, rel=0.03)


@each_injection
def test_eight_devices_are_the_same(case, batch, first):
    """Two each for data, fsdp and tensor."""
    (loss, (logits, _)), slopes = first
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        placed = jax.device_put(case.params, sharding.param_shardings(boxed_shapes(case.model, SLOTS), mesh))
        spread = jax.device_put((batch, case.whole), sharding.batch_sharding(mesh))
        (got, (spoken, _)), gradients = case.step(placed, *spread)
    np.testing.assert_allclose(got, loss, rtol=1e-5)
    close(np.asarray(spoken), logits, 1e-4)
    for path, slope in flatten(slopes).items():
        off = np.linalg.norm(np.asarray(flatten(gradients)[path]) - slope)
        assert off <= 1e-4 * np.linalg.norm(slope) + 1e-6, path  # a bias of keys has none, but for rounding


def test_written_and_read_back(case, tmp_path):
    """Every parameter bit by bit, and all that decides where an image goes."""
    run = Run("runs/x", 7, case.cfg, sharding.make_mesh({}, jax.devices()[:1]), case.model, case.params, None, None)
    export.write(run, str(tmp_path), "sparsecut", drop_shortcuts=False)
    again = join(model=tmp_path)
    old, new = flatten(case.params), flatten(again.params)
    assert old.keys() == new.keys()
    assert [path for path in old if np.asarray(old[path]).tobytes() != np.asarray(new[path]).tobytes()] == []
    assert again.model.wiring == case.wiring
    assert (again.cfg.fusion, again.cfg.injecting) == (case.cfg.fusion, case.cfg.injecting)
