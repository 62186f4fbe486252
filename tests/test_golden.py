"""The reference's numbers (PyTorch, float32), for SparseCut's channel fusion and for plain LLaVA."""

import jax
import numpy as np
import pytest

from golden_cases import CASES, load_case, to_torch
from sparsecut_jax.models.losses import cross_entropy


@pytest.fixture(scope="module", params=CASES)
def run(request):
    """(case, what one forward and backward pass gave)."""
    case = load_case(request.param)

    def loss(params):
        (logits, seen), state = case.model.apply(
            {"params": params},
            case.batch,
            capture_intermediates=lambda _, method: method == "encode",
            mutable="intermediates",
        )
        total, count = cross_entropy(logits, case.batch)
        return total / count, {"logits": logits, "encoded": state["intermediates"]["encode"][0], **seen}

    (value, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(case.params)
    return case, {**out, "loss": value, "grads": jax.tree.map(np.asarray, grads)}


def close(got, expected, atol):
    np.testing.assert_allclose(np.asarray(got), expected, rtol=0, atol=atol)


def test_logits(run):
    case, out = run
    real = case.io["expanded_mask"] == 1
    off = np.abs(out["logits"] - case.io["logits"])[real]
    assert off.max() < 3e-5
    assert off.mean() < 5e-6


def test_hidden_in_layer4(run):
    """Before the layer, and before a shortcut of it."""
    case, out = run
    real = case.io["expanded_mask"] == 1
    close(out["hidden"][4][real], case.io["hidden_in_layer4"][real], 3e-5)


def test_main_feature(run):
    case, out = run
    close(out["encoded"].tokens[:, 0], case.io["main_feature"], 3e-5)


def test_level_features(run):
    case, out = run
    if case.spec["vit_levels"]:
        close(out["encoded"].bank[:, :, 0], case.io["level_features"], 3e-5)
    else:
        assert out["encoded"].bank is None


def test_inputs_embeds(run):
    case, out = run
    real = case.io["expanded_mask"] == 1
    close(out["hidden"][0][real], case.io["inputs_embeds"][real], 3e-5)


def test_loss(run):
    case, out = run
    close(out["loss"], case.io["loss"], 5e-6)


@pytest.mark.parametrize("part, existing", [("adapter", 4), ("llm", 75), ("vit", 5 + 5 * 16)])
def test_gradient_norms(run, part, existing):
    case, out = run
    names = case.io[f"gradnorm_names_{part}"].tolist()
    grads = [to_torch(out["grads"], name) for name in names]
    assert sum(grad is not None for grad in grads) == existing
    norms = [0.0 if grad is None else np.linalg.norm(grad.astype(np.float64)) for grad in grads]
    np.testing.assert_allclose(norms, case.io[f"gradnorm_{part}"], rtol=1e-4, atol=1e-6)
    # every weight here has a torch name: the total would show one without
    ours = jax.tree.leaves(out["grads"][{"adapter": "fusion", "llm": "llm", "vit": "vision"}[part]])
    total = np.sqrt(sum(np.square(leaf, dtype=np.float64).sum() for leaf in ours))
    np.testing.assert_allclose(total, case.io[f"gradnorm_total_{part}"], rtol=1e-4)


def test_full_gradients(run):
    case, out = run
    names = [key.removeprefix("grad:") for key in case.io if key.startswith("grad:")]
    assert len(names) >= 14
    for name in names:
        np.testing.assert_allclose(
            to_torch(out["grads"], name), case.io[f"grad:{name}"], rtol=0, atol=2e-5, err_msg=name
        )


def test_unused_tensors(run):
    """Post-layernorm, and the last block, which is above every level: select_layer is -2."""
    case, _ = run
    unused = {what: len(names) for what, names in case.report.unused.items()}
    assert unused == {"norm after the last block": 2, "blocks above 4, the highest one used": 16}
    assert case.report.fresh == {}
