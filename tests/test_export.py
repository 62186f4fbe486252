"""Models written out: names and bytes as the Hugging Face files had them that they came from."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from parity_cases import FOLDER, join, numbers, text_batch
from sparsecut_jax.exporting import export, tensors, verify
from sparsecut_jax.models import ways
from sparsecut_jax.models.parameters import flatten
from sparsecut_jax.runs.run import Run
from sparsecut_jax.runtime import sharding
from sparsecut_jax.tasks.registry import build_model
from sparsecut_jax.text import tokenizer as tokenizers
from sparsecut_jax.text.conversation import encode_prompt
from sparsecut_jax.text.templates import TEMPLATES
from sparsecut_jax.types import UserError
from tiny import tiny_config

MESH = {"data": 1, "fsdp": 1, "tensor": 1}


def as_run(loaded, tokenizer=None) -> Run:
    mesh = sharding.make_mesh(MESH, devices=_devices())
    return Run("runs/x", 7, loaded.cfg, mesh, build_model(loaded.cfg), loaded.params, tokenizer, None)


def _devices():
    return jax.devices()[:1]


def fixture_tensors(name: str) -> dict[str, np.ndarray]:
    tensors = {}
    for file in (FOLDER / name).glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def same_bytes(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert got[name].dtype == value.dtype and got[name].shape == value.shape, name
        assert got[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize(
    "name", ["llama2", "llama2_linear", "llama3", "mistral", "qwen2", "qwen3", "phi3", "phi3_longrope", "smollm2"]
)
def test_an_llm_goes_out_as_it_came_in(name, tmp_path):
    run = as_run(join(llm=FOLDER / name))
    export.write(run, str(tmp_path), "llm", drop_shortcuts=False)
    expected = {k: v for k, v in fixture_tensors(name).items() if "inv_freq" not in k}
    same_bytes(load_file(tmp_path / "model.safetensors"), expected)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == {"smollm2": "llama"}.get(
        name, name.split("_")[0].replace("llama2", "llama").replace("llama3", "llama")
    )
    assert join(llm=tmp_path).cfg.llm == run.config.llm


@pytest.mark.parametrize("name", ["clip", "clip_vision", "siglip", "siglip2", "dinov2"])
def test_a_tower_goes_out_as_it_came_in(name, tmp_path):
    """But for the norm after the last block, which is not kept and is written as the identity."""
    run = as_run(join(vision=FOLDER / name))
    export.write(run, str(tmp_path), "vision", drop_shortcuts=False)
    got = load_file(tmp_path / "model.safetensors")
    norm = "layernorm" if name == "dinov2" else "vision_model.post_layernorm"
    np.testing.assert_array_equal(got.pop(f"{norm}.weight"), np.ones(32))
    np.testing.assert_array_equal(got.pop(f"{norm}.bias"), np.zeros(32))
    left = ("text_", "visual_projection", "logit_", "position_ids", ".head.", "mask_token", norm)
    same_bytes(got, {k: v for k, v in fixture_tensors(name).items() if not any(part in k for part in left)})
    assert join(vision=tmp_path).cfg.vision == run.config.vision


def llava_tensors(tmp_path, prefix) -> str:
    """The llava fixture with the key layout of one generation of transformers."""
    (tmp_path / "config.json").write_text((FOLDER / "llava/config.json").read_text())
    renamed = {prefix(name): value for name, value in fixture_tensors("llava").items()}
    save_file(renamed, tmp_path / "model.safetensors")
    return str(tmp_path)


def newer(name: str) -> str:
    if name.startswith("language_model.model."):
        return name.replace("language_model.model.", "model.language_model.", 1)
    return name.removeprefix("language_model.") if "lm_head" in name else f"model.{name}"


@pytest.mark.parametrize("prefix", [lambda name: name, newer], ids=["old", "new"])
def test_a_whole_llava(tmp_path, prefix):
    """Old and new names of llava-hf checkpoints give PyTorch's logits and greedy ids."""
    from sparsecut_jax.inference.decoding import encode_images, generate

    loaded, io = join(model=llava_tensors(tmp_path, prefix)), numbers("llava")
    assert loaded.cfg.fusion.name == "mlp" and loaded.cfg.shortcuts.density == "none"
    start = np.argmax(io["input_ids"] == 95, axis=1).astype(np.int32)[:, None]
    pixels = io["pixel_values"].transpose(0, 2, 3, 1)[:, None, None]
    batch = text_batch(io["input_ids"], loaded.cfg).replace(views=pixels, image_start=start)
    logits, _ = jax.jit(loaded.model.apply)({"params": loaded.params}, batch)
    np.testing.assert_allclose(logits, io["logits"], rtol=0, atol=3e-5)
    encoded = encode_images(loaded.model, loaded.params, pixels)
    lengths = np.full(2, io["input_ids"].shape[1], np.int32)
    ids, _ = generate(loaded.model, loaded.params, batch.tokens, lengths, start, encoded, 8)
    np.testing.assert_array_equal(ids, io["greedy_ids"])


def test_a_llava_goes_out_as_llava(tmp_path):
    """Its own names and bytes; the block above the main feature is gone, rows for the image token have come."""
    run = as_run(join(model=FOLDER / "llava"), tokenizers.train(["a b c"], 300))
    with pytest.raises(UserError, match="the tokenizer has"):
        tokenizers.with_vocabulary(run.config, run.tokenizer)
    run = as_run(join(model=FOLDER / "llava"))
    assert export.write(run, str(tmp_path), "auto", drop_shortcuts=False) == "runs/x, step 7, as llava in float32"
    got, expected = load_file(tmp_path / "model.safetensors"), fixture_tensors("llava")
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        assert got[name].shape == (128, 32)
        np.testing.assert_allclose(got[name][96:], np.tile(expected[name].mean(0), (32, 1)), atol=1e-6)
        got[name] = got[name][:96]
    for part in ("weight", "bias"):
        expected[f"vision_tower.vision_model.post_layernorm.{part}"] = np.full(32, part == "weight", np.float32)
    same_bytes(got, {k: v for k, v in expected.items() if ".encoder.layers.3." not in k})
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["image_token_index"], config["vision_feature_layer"]) == (96, -1)
    assert json.loads((tmp_path / "processor_config.json").read_text())["patch_size"] == 7
    assert "verified   37 arrays bit by bit" in verify.verify(run, str(tmp_path), drop_shortcuts=False)


def test_every_fusion_and_plan_survives(tmp_path):
    """Weights of their own for every level, the released code's reversed order, injection after the layer."""
    settings = {
        "fusion.name": "cross_attention", "fusion.shared": False, "shortcuts.position": "post",
        "shortcuts.feature_order_reverse": True, "vision.width": 64,
    }  # fmt: skip
    run = as_run(join(llm=FOLDER / "qwen3", settings=settings))
    told = export.write(run, str(tmp_path), "auto", drop_shortcuts=False)
    assert told == "runs/x, step 7, as sparsecut in float32"
    assert "multi_modal_projector.2.attn.in_proj_weight" in load_file(tmp_path / "model.safetensors")
    again = join(model=tmp_path)
    assert build_model(again.cfg).wiring.shortcuts.pairs == run.model.wiring.shortcuts.pairs
    assert again.cfg.shortcuts.position == "post"
    assert "differ by at most 0" in verify.verify(run, str(tmp_path), drop_shortcuts=False)


def test_a_way_that_reads_the_question_is_verified_with_one():
    asked = verify._example(tiny_config(fusion=dict(name="emma", emma=dict(question=5))), 64, 2).extras["question"]
    assert asked.shape == (2, 1, 5) and (asked >= 0).all() and len(set(asked.flat)) > 5


def test_a_fusion_that_no_table_names_survives(tmp_path, monkeypatch):
    """Its parameters go out as they are, stacks whole, and come back bit by bit, from a whole model and beside an adapter."""
    monkeypatch.delattr(ways.FUSING["cross_attention"], "RULES")
    settings = {"fusion.name": "cross_attention", "fusion.shared": False, "vision.width": 64}
    run = as_run(join(llm=FOLDER / "llama2", settings=settings))
    fusion = {path: np.asarray(leaf) for path, leaf in flatten(run.params).items() if path.startswith("fusion/")}
    expected = {path.replace("/", "."): leaf for path, leaf in fusion.items()}
    assert expected["fusion.fuse.attention.q_kernel"].shape == (3, 64, 1, 64)
    export.write(run, str(tmp_path), "auto", drop_shortcuts=False)
    same_bytes({k: v for k, v in load_file(tmp_path / "model.safetensors").items() if "fusion" in k}, expected)
    assert "verified   53 arrays bit by bit" in verify.verify(run, str(tmp_path), drop_shortcuts=False)
    file = tmp_path / "fusion.safetensors"
    save_file(expected, file)
    again = flatten(join(fusion=file, settings=settings | {"llm.vocab_size": 96}).params)
    same_bytes({path: np.asarray(again[path]) for path in fusion}, fusion)


def test_shortcuts_are_dropped_only_on_request(tmp_path):
    run = as_run(join(llm=FOLDER / "llama2", settings={"fusion.name": "mlp", "shortcuts.count": 3}))
    with pytest.raises(UserError, match="it has 3 shortcuts, and without them it would be a different model"):
        export.write(run, str(tmp_path), "llava", drop_shortcuts=False)
    told = export.write(run, str(tmp_path), "auto", drop_shortcuts=True)
    assert told.endswith("as llava in float32; without its 3 shortcuts, a different model")
    assert "verified   37 arrays bit by bit" in verify.verify(run, str(tmp_path), drop_shortcuts=True)


def test_bfloat16_goes_out_as_bfloat16(tmp_path):
    run = as_run(join(llm=FOLDER / "phi3", settings={"param_dtype": "bfloat16"}))
    export.write(run, str(tmp_path), "llm", drop_shortcuts=False)
    got = load_file(tmp_path / "model.safetensors")
    assert {str(value.dtype) for value in got.values()} == {"bfloat16"}
    expected = fixture_tensors("phi3")["model.layers.1.self_attn.qkv_proj.weight"].astype(jnp.bfloat16)
    assert got["model.layers.1.self_attn.qkv_proj.weight"].tobytes() == expected.tobytes()
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_sharded_model_is_written_and_verified(tmp_path):
    """From eight devices the same bytes."""
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    loaded = join(mesh, llm=FOLDER / "phi3")
    run = dataclasses.replace(as_run(loaded), mesh=mesh)
    with jax.set_mesh(mesh):
        export.write(run, str(tmp_path), "llm", drop_shortcuts=False)
        assert "verified   12 arrays bit by bit" in verify.verify(run, str(tmp_path), drop_shortcuts=False)
    same_bytes(load_file(tmp_path / "model.safetensors"), fixture_tensors("phi3"))


def test_large_models_are_cut_into_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "SHARD_SIZE", "40KB")
    run = as_run(join(llm=FOLDER / "smollm2"))
    export.write(run, str(tmp_path), "llm", drop_shortcuts=False)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1 and files[0] == f"model-00001-of-0000{len(files)}.safetensors"
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in fixture_tensors("smollm2").values())
    same_bytes(fixture_tensors(tmp_path), fixture_tensors("smollm2"))
    assert "differ by at most 0" in verify.verify(run, str(tmp_path), drop_shortcuts=False)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_all_files_have_the_mode_that_the_umask_says(umask, mode, tmp_path):
    run = as_run(join(settings={"llm.vocab_size": 320, "fusion.name": "mlp"}), tokenizers.train(["a b c"], 300))
    before = os.umask(umask)
    try:
        export.write(run, str(tmp_path), "sparsecut", drop_shortcuts=False)
    finally:
        os.umask(before)
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in tmp_path.iterdir()} == dict.fromkeys(
        ["config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"],
        oct(mode),
    )


def test_verify_notices_a_changed_file(tmp_path):
    run = as_run(join(llm=FOLDER / "smollm2"))
    export.write(run, str(tmp_path), "llm", drop_shortcuts=False)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float32(1.0001)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="--verify: llm/norm/scale in the export differs from the run's"):
        verify.verify(run, str(tmp_path), drop_shortcuts=False)


def test_what_no_family_can_say():
    cfg = tiny_config(llm={"family": "mistral", "qkv_bias": True})
    with pytest.raises(UserError, match="config.llm.qkv_bias=True cannot be written as a mistral model"):
        export.llm_config_json(cfg.llm, {})
    cfg = tiny_config(vision={"class_token": False})
    with pytest.raises(UserError, match="set config.vision.family to what the tower is"):
        export.vision_config_json(cfg.vision, 5)


@pytest.mark.parametrize("template", ["qa", "vicuna_v1"])
def test_a_raw_prompt_has_the_same_ids_in_transformers(template, tmp_path):
    """<s>, an id for each image position, and the words; also after the model was read back and written again."""
    from transformers import AutoTokenizer

    settings = {
        "llm.vocab_size": 320, "fusion.name": "mlp", "shortcuts.density": "none", "stages.instruct.template": template,
    }  # fmt: skip
    run = as_run(join(settings=settings), tokenizers.train(["what color is it?"], 300))
    n, around = ways.positions(run.config), TEMPLATES[template]
    raw = f"{around.start}{'<image>' * n}\nwhat color is it?{around.answer}"
    for folder in (tmp_path / "once", tmp_path / "twice"):
        folder.mkdir()
        export.write(run, str(folder), "llava", drop_shortcuts=False)
        theirs = AutoTokenizer.from_pretrained(folder)(raw)["input_ids"]
        prompt = encode_prompt("what color is it?", 1, run.tokenizer, around, n)
        [start] = prompt.image_start
        ours = prompt.tokens.copy()
        ours[start : start + n] = json.loads((folder / "config.json").read_text())["image_token_index"]
        assert theirs == ours.tolist() and theirs[0] == 1 and theirs.count(1) == 1
        again = join(model=folder, settings={"stages.instruct.template": template})
        run = as_run(again, tokenizers.load(str(folder)))


def test_tokenizer_and_image_processor(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = tokenizers.train(["what color is it?"], 300)
    loaded = join(settings={"llm.vocab_size": 320, "fusion.name": "mlp", "shortcuts.density": "none"})
    export.write(as_run(loaded, tokenizer), str(tmp_path), "auto", drop_shortcuts=False)
    written = AutoTokenizer.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert written.convert_tokens_to_ids("<image>") == config["image_token_index"] == tokenizer.size
    assert config["text_config"]["vocab_size"] == 320  # there was room
    assert config["text_config"]["eos_token_id"] == tokenizer.eos
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == [0.48145466, 0.4578275, 0.40821073]
    assert (processor["do_pad"], processor["size"]) == (True, {"shortest_edge": 28})
