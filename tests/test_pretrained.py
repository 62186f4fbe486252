"""Where pretrained parts come from, and what their folders say of the settings. Only headers are read here."""

import dataclasses
import json
import os
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import save_file

from golden_cases import sources_of
from parity_cases import FOLDER
from sparsecut_jax import config
from sparsecut_jax.models import ways
from sparsecut_jax.settings import Config, FusionConfig, InitConfig
from sparsecut_jax.text import tokenizer as tokenizer_lib
from sparsecut_jax.types import UserError
from sparsecut_jax.weights import pretrained
from sparsecut_jax.weights.architecture import whole_settings
from sparsecut_jax.weights.claims import adopt
from sparsecut_jax.weights.pretrained import open_sources, source_tokenizer
from tiny import refusal

CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 24, "image_size": 20, "intermediate_size": 40,
    "num_attention_heads": 3, "num_hidden_layers": 5, "patch_size": 4,
}  # fmt: skip
SIGLIP = CLIP | {"model_type": "siglip_vision_model"}
LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64,
    "num_attention_heads": 4, "num_hidden_layers": 6, "num_key_value_heads": 2, "rope_theta": 5e4, "vocab_size": 96,
}  # fmt: skip
LLAVA = {
    "model_type": "llava", "projector_hidden_act": "gelu", "text_config": LLAMA, "vision_config": CLIP,
    "vision_feature_layer": -3, "vision_feature_select_strategy": "default",
}  # fmt: skip
SPARSECUT = LLAVA | {
    "model_type": "sparsecut",
    "image_fit": "crop",
    "fusion": {"name": "cross_attention", "shared": False},
    "shortcuts": {"vit_levels": [2, 0], "llm_layers": [1, 4], "position": "post"},
}
VISION, LLM = "vision_model.pre_layrnorm.bias", "model.norm.weight"
PROJECTOR = "model.mm_projector.mlp.0.bias"
WHOLE = ("vision_tower." + VISION, "language_model." + LLM, "multi_modal_projector.linear_1.bias")


def checkpoint(folder, settings: dict | None, *names: str, file: str = "model.safetensors", **others: dict) -> str:
    """A folder with one number for each tensor, its config.json, and other JSON files by their stems."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: np.zeros(1, np.float32) for name in names}, folder / file)
    for stem, content in {"config": settings, **others}.items():
        if content is not None:
            (folder / f"{stem}.json").write_text(json.dumps(content))
    return str(folder)


def opened(**init) -> dict:
    return open_sources(InitConfig(**init))


def resolved(settings: dict | None = None, **init) -> Config:
    """The default config with groups of `settings` changed, after the sources in `init` have had their say."""
    raw = config.default()
    for group, values in (settings or {}).items():
        raw[group].update(values)
    raw.init.update(init)
    cfg = config.check(raw)
    return adopt(cfg, open_sources(cfg.init))


# ----------------------------------------------------------------------------------------------------------------------
# sources


def test_nothing_is_opened_where_nothing_is_named():
    assert opened() == {}


def test_tensors_are_sorted_by_the_part_they_belong_to(tmp_path):
    text = ("text_model.final_layer_norm.bias", "logit_scale")
    processor = {"image_mean": [0.1, 0.2, 0.3]}
    vision = checkpoint(tmp_path / "clip", CLIP, VISION, *text, preprocessor_config=processor)
    llm = checkpoint(tmp_path / "llama", LLAMA, LLM, "lm_head.weight")
    fusion = checkpoint(tmp_path / "projector", None, PROJECTOR, file="mm_projector.safetensors")
    found = opened(vision=vision, llm=llm, fusion=fusion)
    assert {part: {p: set(t) for p, t in source.tensors.items()} for part, source in found.items()} == {
        "vision": {"vision": {"pre_layrnorm.bias"}, None: set(text)},
        "fusion": {"fusion": {"mm_projector.0.bias"}},
        "llm": {"llm": {"model.norm.weight", "lm_head.weight"}},
    }
    assert (found["vision"].config, found["vision"].processor) == (CLIP, processor)
    assert (found["llm"].config, found["llm"].processor, found["fusion"].config) == (LLAMA, {}, {})
    assert found["llm"].file == os.path.join(llm, "config.json")


def test_a_run_is_no_source(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    run = str(tmp_path / "run")
    with pytest.raises(UserError) as caught:
        opened(llm=run)
    assert str(caught.value) == (
        f"config.init.llm={run!r} is a run; start from it with --config.init_from={run}, or export it first: "
        f"python -m sparsecut_jax.convert to-hf --workdir={run} --out=exported"
    )


def test_a_whole_model_is_the_source_of_every_part(tmp_path):
    found = opened(model=checkpoint(tmp_path, LLAVA, *WHOLE))
    assert sorted(found) == ["fusion", "llm", "vision"]
    assert found["vision"] is found["llm"] is found["fusion"]
    assert {part: list(tensors) for part, tensors in found["llm"].tensors.items()} == {
        "vision": ["pre_layrnorm.bias"],
        "llm": ["model.norm.weight"],
        "fusion": ["multi_modal_projector.linear_1.bias"],
    }


def test_parts_of_a_whole_model_one_by_one(tmp_path):
    found = opened(vision=checkpoint(tmp_path, LLAVA, *WHOLE))
    assert list(found) == ["vision"] and list(found["vision"].tensors["vision"]) == ["pre_layrnorm.bias"]


def test_a_file_has_its_config_beside_it(tmp_path):
    checkpoint(tmp_path, LLAMA, LLM, file="weights.safetensors")
    found = opened(llm=str(tmp_path / "weights.safetensors"))["llm"]
    assert found.config == LLAMA and found.folder == str(tmp_path)


def test_a_file_of_the_folder_one_is_in(tmp_path, monkeypatch):
    checkpoint(tmp_path, LLAMA, LLM)
    monkeypatch.chdir(tmp_path)
    found = opened(llm="model.safetensors")["llm"]
    assert found.config == LLAMA and os.path.samefile(found.folder, tmp_path)


@pytest.mark.parametrize("part", ["vision", "fusion", "llm"])
def test_a_whole_model_stands_alone(tmp_path, part):
    model = checkpoint(tmp_path, LLAVA, *WHOLE)
    expected = f"config.init.model is a whole model, so config.init.{part} has no effect; leave one of them out"
    assert refusal(opened, model=model, **{part: model}) == expected


@pytest.mark.parametrize(
    ("part", "names"),
    [("vision", (LLM,)), ("llm", (VISION,)), ("fusion", (LLM, VISION)), ("model", WHOLE[:2]), ("model", WHOLE[1:])],
)
def test_weights_of_another_part(tmp_path, part, names):
    path = checkpoint(tmp_path, LLAVA, *names)
    missing = part if part != "model" else "fusion" if names == WHOLE[:2] else "vision"
    expected = f"{path} has no tensors of the {missing}; expected Hugging Face's names"
    assert refusal(opened, **{part: path}) == expected


def test_a_tensor_under_two_names(tmp_path):
    path = checkpoint(tmp_path, LLAMA, LLM, "language_model." + LLM)
    expected = f"{path}/model.safetensors: tensors language_model.{LLM} and {LLM} are both {LLM}; remove one of them"
    assert refusal(opened, llm=path) == expected


@pytest.mark.parametrize("part", ["vision", "llm", "model"])
def test_a_config_is_needed_but_for_a_projector(tmp_path, part):
    path = checkpoint(tmp_path, None, *WHOLE)
    assert refusal(opened, **{part: path}) == f"{path}/config.json does not exist"
    assert list(opened(fusion=path)) == ["fusion"]


@pytest.mark.parametrize("part", ["vision", "fusion", "llm", "model"])
@pytest.mark.parametrize("where", [(), ("text_config",), ("vision_config",)])
def test_code_of_the_checkpoint_is_refused_before_any_weights_are_read(tmp_path, part, where):
    settings = {**LLAVA, "auto_map": {}} if not where else {**LLAVA, where[0]: {**LLAVA[where[0]], "auto_map": {}}}
    path = checkpoint(tmp_path, settings, *WHOLE)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    text = refusal(opened, **{part: path})
    assert text.startswith(f"{path}/config.json: 'auto_map' asks for code in the checkpoint")


@pytest.mark.parametrize(
    ("part", "file", "expected"),
    [
        ("vision", "model.gguf", "a GGUF file can only be the LLM"),
        ("model", "model.gguf", "a GGUF file can only be the LLM"),
        ("llm", "vit.onnx", "an ONNX file can only be the vision tower"),
        ("fusion", "vit.onnx", "an ONNX file can only be the vision tower"),
    ],
)
def test_other_formats_hold_one_part_only(tmp_path, part, file, expected):
    path = tmp_path / file
    path.write_bytes(b"")
    assert refusal(opened, **{part: str(path)}) == f"config.init.{part}={str(path)!r}: {expected}"


@pytest.mark.parametrize(("part", "file", "name"), [("llm", "m.gguf", LLM), ("vision", "v.onnx", VISION)])
def test_other_formats_say_their_config_themselves(tmp_path, monkeypatch, part, file, name):
    path = tmp_path / file
    path.write_bytes(b"")
    module = getattr(pretrained, file[2:])
    monkeypatch.setattr(module, f"open_{file[2:]}", lambda p: {name: SimpleNamespace(name=name, file=p)})
    monkeypatch.setattr(module, f"{file[2:]}_config", lambda p: {"of": p})
    found = opened(**{part: str(path)})[part]
    assert (found.config, found.file, found.processor) == ({"of": str(path)}, str(path), {})
    assert len(found.tensors[part]) == 1


# ----------------------------------------------------------------------------------------------------------------------
# hub ids


def test_a_hub_id_is_fetched(tmp_path, monkeypatch):
    path, asked = checkpoint(tmp_path / "snapshot", LLAMA, LLM), []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return path

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    found = opened(llm="lmsys/vicuna-7b-v1.5")["llm"]
    assert (found.path, found.config) == (path, LLAMA)
    [(name, patterns)] = asked
    assert name == "lmsys/vicuna-7b-v1.5"
    # neither code nor pickles
    assert sorted(patterns) == ["*.jinja", "*.json", "*.safetensors", "tokenizer.model"]


def test_a_folder_that_looks_like_a_hub_id_is_that_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "runs" / "llama", LLAMA, LLM)
    assert opened(llm="runs/llama")["llm"].path == "runs/llama"


@pytest.mark.parametrize(
    "path",
    ["llama", "./llama", "../llama", "./runs/llama", "/abs/llama", "a/b/c", "https://hub/a", "a b/c", "a/", "~/x"],
)
def test_what_is_neither_here_nor_a_hub_id(tmp_path, monkeypatch, path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    expected = f"config.init.llm={path!r} does not exist; expected a folder, a file or a hub id"
    assert refusal(opened, llm=path) == expected


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError("no network\nand more about it"), "no network"),
        (ValueError("Repository Not Found"), "Repository Not Found"),
        (RuntimeError(), "RuntimeError()"),
    ],
)
def test_a_hub_id_that_cannot_be_fetched(tmp_path, monkeypatch, error, reason):
    def snapshot_download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    expected = f"config.init.vision='a/b' is not a local path and could not be downloaded as a hub id: {reason}"
    assert refusal(opened, vision="a/b") == expected


# ----------------------------------------------------------------------------------------------------------------------
# settings


def test_sizes_come_from_the_sources(tmp_path):
    vision = checkpoint(tmp_path / "clip", CLIP, VISION, preprocessor_config={"image_std": [0.5, 0.25, 1]})
    llm = checkpoint(tmp_path / "llama", LLAMA, LLM)
    before = config.check(config.default())
    cfg = resolved(vision=vision, llm=llm)
    v, m = cfg.vision, cfg.llm
    assert (v.image_size, v.patch_size, v.width, v.layers, v.heads, v.mlp_dim) == (20, 4, 24, 5, 3, 40)
    assert (v.family, v.activation, v.class_token, v.std) == ("clip", "quick_gelu", True, (0.5, 0.25, 1.0))
    assert (m.vocab_size, m.width, m.layers, m.heads, m.kv_heads, m.head_dim, m.mlp_dim) == (96, 32, 6, 4, 2, 8, 48)
    assert (m.family, m.rope_theta, m.max_positions, m.tie_embeddings) == ("llama", 5e4, 64, False)
    # what no file says stays as it was asked
    assert (v.select_layer, v.scan_layers, m.remat) == (-2, True, "auto")
    assert (cfg.fusion, cfg.shortcuts, cfg.data) == (before.fusion, before.shortcuts, before.data)


def test_a_part_without_a_source_stays_as_it_was_asked(tmp_path):
    asked = dict(vision=dict(width=40, heads=5, layers=3), llm=dict(width=40, heads=5, kv_heads=5, layers=3))
    cfg = resolved(asked, vision=checkpoint(tmp_path / "clip", SIGLIP, VISION))
    assert (cfg.vision.family, cfg.vision.width, cfg.llm.width, cfg.llm.layers) == ("siglip", 24, 40, 3)
    cfg = resolved(asked, llm=checkpoint(tmp_path / "llama", LLAMA, LLM))
    assert (cfg.vision.width, cfg.vision.layers, cfg.llm.width) == (40, 3, 32)


def test_another_picture_size(tmp_path):
    path = checkpoint(tmp_path, CLIP, VISION)
    assert resolved(vision=path).vision.image_size == 20
    assert resolved(vision=path, image_size=36).vision.image_size == 36
    text = refusal(resolved, vision=path, image_size=37)
    assert text == "config.vision.image_size=37 is not a multiple of config.vision.patch_size=4"


@pytest.mark.parametrize(
    ("kind", "fusion"), [("cross_mlp", "channel"), ("cross_attention", "cross_attention"), ("mlp2x_gelu", "mlp")]
)
def test_the_kind_of_an_official_projector(tmp_path, kind, fusion):
    path = checkpoint(tmp_path, {"mm_projector_type": kind}, PROJECTOR)
    assert (
        resolved({"fusion": {"name": "mlp" if fusion == "channel" else "channel"}}, fusion=path).fusion.name == fusion
    )


@pytest.mark.parametrize("kind", ["linear", "mlp3x_gelu", "", None, 2, ["mlp2x_gelu"]])
def test_official_projectors_that_are_not_supported(tmp_path, kind):
    path = checkpoint(tmp_path, {"mm_projector_type": kind}, PROJECTOR)
    assert refusal(resolved, fusion=path) == (
        f"{path}/config.json: mm_projector_type {kind!r} is not supported; supported are cross_mlp, cross_attention, "
        "mlp2x_gelu"
    )


@pytest.mark.parametrize("name", ["channel", "cross_attention", "mlp"])
def test_a_projector_without_a_config_is_of_the_kind_that_was_asked(tmp_path, name):
    assert resolved({"fusion": {"name": name}}, fusion=checkpoint(tmp_path, None, PROJECTOR)).fusion.name == name


def test_a_whole_llava(tmp_path):
    asked = dict(fusion=dict(shared=False), shortcuts=dict(density="dense", feature_order_reverse=True))
    cfg = resolved(asked, model=checkpoint(tmp_path, LLAVA, *WHOLE))
    assert (cfg.vision.width, cfg.llm.width, cfg.vision.select_layer) == (24, 32, -3)
    assert (cfg.fusion.name, cfg.fusion.shared) == ("mlp", True)
    s = cfg.shortcuts
    assert (s.density, s.vit_levels, s.llm_layers, s.feature_order_reverse) == ("none", (), (), False)
    assert cfg.data.image_fit == "pad"


def test_a_whole_sparsecut(tmp_path):
    cfg = resolved(model=checkpoint(tmp_path, SPARSECUT, *WHOLE))
    assert (cfg.vision.width, cfg.llm.width, cfg.vision.select_layer) == (24, 32, -3)
    assert (cfg.fusion.name, cfg.fusion.shared) == ("cross_attention", False)
    s = cfg.shortcuts
    assert (s.density, s.vit_levels, s.llm_layers, s.position) == ("explicit", (2, 0), (1, 4), "post")
    assert cfg.data.image_fit == "crop"


def test_the_grid_of_a_sparsecut(tmp_path):
    """Files of before there were grids mean 2 x 2, whatever the run's own config says."""
    fusion = SPARSECUT["fusion"] | {"grid": [1, 3]}
    path = checkpoint(tmp_path / "new", SPARSECUT | {"fusion": fusion}, *WHOLE)
    assert resolved(model=path).fusion.grid == (1, 3)
    path = checkpoint(tmp_path / "old", SPARSECUT, *WHOLE)
    assert resolved({"fusion": {"grid": (3, 3)}}, model=path).fusion.grid == (2, 2)


def test_a_sparsecut_without_shortcuts(tmp_path):
    settings = SPARSECUT | {"shortcuts": {"vit_levels": [], "llm_layers": [], "position": "pre"}}
    cfg = resolved(model=checkpoint(tmp_path, settings, *WHOLE))
    assert (cfg.shortcuts.density, cfg.shortcuts.vit_levels) == ("none", ())


def test_the_llava_fixture():
    cfg = resolved(model=str(FOLDER / "llava"))
    assert (cfg.vision.image_size, cfg.vision.layers, cfg.vision.select_layer, cfg.llm.layers) == (28, 4, -2, 3)
    assert (cfg.fusion.name, cfg.shortcuts.density) == ("mlp", "none")


@pytest.mark.parametrize(("class_token", "strategy"), [(True, "default"), (False, "full"), (True, None)])
def test_the_tokens_that_the_llm_sees(class_token, strategy):
    """All but the class token; a key that is left out means "default"."""
    settings = {k: v for k, v in LLAVA.items() if k != "vision_feature_select_strategy"}
    if strategy:
        settings["vision_feature_select_strategy"] = strategy
    assert whole_settings(settings, "F", class_token)["fusion"] == {"name": "mlp", "shared": True}


NO_WHOLE = (
    "model_type {!r} is not a whole model in LLaVA's layout; set its parts as config.init.vision, .llm and .fusion"
)


@pytest.mark.parametrize(
    ("settings", "class_token", "expected"),
    [
        (LLAMA, True, NO_WHOLE.format("llama")),
        (LLAVA | {"model_type": "llava_next"}, True, NO_WHOLE.format("llava_next")),
        (LLAVA | {"model_type": None}, True, NO_WHOLE.format(None)),
        (LLAVA | {"model_type": ["llava"]}, True, NO_WHOLE.format(["llava"])),
        (LLAMA | {"model_type": "llava"}, True, NO_WHOLE.format("llava")),
        (LLAVA | {"vision_feature_layer": [-2, -5]}, True,
         "vision_feature_layer=[-2, -5] is not supported; expected one layer"),
        (LLAVA | {"vision_feature_layer": None}, True,
         "vision_feature_layer=None is not supported; expected one layer"),
        (LLAVA | {"projector_hidden_act": "relu"}, True, "projector_hidden_act='relu'; expected 'gelu'"),
        (LLAVA | {"vision_feature_select_strategy": "full"}, True,
         "vision_feature_select_strategy='full' is not supported here; expected 'default'"),
        (LLAVA, False, "vision_feature_select_strategy='default' is not supported here; expected 'full'"),
        ({k: v for k, v in SPARSECUT.items() if k != "fusion"}, True,
         "'fusion' or 'shortcuts' is not as convert to-hf writes it: KeyError('fusion')"),
        (SPARSECUT | {"shortcuts": {"vit_levels": [1], "llm_layers": [1]}}, True,
         "'fusion' or 'shortcuts' is not as convert to-hf writes it: KeyError('position')"),
        (SPARSECUT | {"shortcuts": {"vit_levels": 3, "llm_layers": 4, "position": "pre"}}, True,
         "'fusion' or 'shortcuts' is not as convert to-hf writes it: TypeError(\"'int' object is not iterable\")"),
        (SPARSECUT | {"fusion": {"name": "hydra", "shared": True}}, True,
         f"fusion 'hydra' is not supported; supported are {', '.join(ways.FUSING)}"),
        (SPARSECUT | {"fusion": {"name": "channel", "shared": True, "channel": {"heads": 3}}}, True,
         "fusion.channel.heads is not a setting; known are none"),
        (SPARSECUT | {"injecting": {"hydra": {"heads": 3}}}, True,
         f"injecting 'hydra' is not supported; supported are {', '.join(ways.INJECTING)}"),
    ],
)  # fmt: skip
def test_whole_models_that_are_not_supported(settings, class_token, expected):
    assert refusal(whole_settings, settings, "model/config.json", class_token) == f"model/config.json: {expected}"


def test_a_siglip_llava_has_no_class_token_to_leave_out(tmp_path):
    settings = LLAVA | {"vision_config": SIGLIP}
    text = refusal(resolved, model=checkpoint(tmp_path, settings, *WHOLE))
    assert "vision_feature_select_strategy='default'" in text
    settings |= {"vision_feature_select_strategy": "full"}
    assert resolved(model=checkpoint(tmp_path, settings, *WHOLE)).vision.family == "siglip"


# ----------------------------------------------------------------------------------------------------------------------
# tokenizer


@pytest.fixture
def loaded(monkeypatch) -> list[str]:
    """What was asked of the loader of Hugging Face tokenizers; it gives back what it was asked."""
    asked = []
    monkeypatch.setattr(tokenizer_lib, "load", lambda path: asked.append(path) or f"the one of {path}")
    return asked


def tokenizer_of(path: str = "", **init):
    raw = config.default()
    raw.tokenizer.path = path
    cfg = config.check(raw)
    return source_tokenizer(cfg, opened(**init))


@pytest.mark.parametrize("stem", ["tokenizer", "tokenizer_config"])
def test_the_tokenizer_that_came_with_the_llm(tmp_path, loaded, stem):
    path = checkpoint(tmp_path, LLAMA, LLM, **{stem: {}})
    assert tokenizer_of(llm=path) == f"the one of {path}"
    assert tokenizer_of(llm=f"{path}/model.safetensors") == f"the one of {path}"


def test_a_sentencepiece_model_alone_is_a_tokenizer(tmp_path, loaded):
    path = checkpoint(tmp_path, LLAMA, LLM)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    assert tokenizer_of(llm=path) == f"the one of {path}"


def test_the_tokenizer_of_a_file_in_the_folder_one_is_in(tmp_path, monkeypatch, loaded):
    checkpoint(tmp_path, LLAMA, LLM, tokenizer={})
    monkeypatch.chdir(tmp_path)
    assert tokenizer_of(llm="model.safetensors") == "the one of ."


def test_the_tokenizer_that_was_asked_for_comes_first(tmp_path, loaded):
    path = checkpoint(tmp_path, LLAMA, LLM, tokenizer={})
    assert tokenizer_of("elsewhere", llm=path) == "the one of elsewhere"
    assert tokenizer_of("elsewhere") == "the one of elsewhere"
    assert loaded == ["elsewhere", "elsewhere"]


def test_no_tokenizer(tmp_path, loaded):
    assert tokenizer_of(llm=checkpoint(tmp_path / "llama", LLAMA, LLM)) is None
    assert tokenizer_of(vision=checkpoint(tmp_path / "clip", CLIP, VISION, tokenizer={})) is None  # that of CLIP's text
    assert tokenizer_of() is None
    assert loaded == []


def test_the_tokenizer_of_a_whole_model(tmp_path, loaded):
    path = checkpoint(tmp_path, LLAVA, *WHOLE, tokenizer={})
    assert tokenizer_of(model=path) == f"the one of {path}"


def test_the_tokenizer_inside_a_gguf(tmp_path, monkeypatch, loaded):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"")
    (tmp_path / "tokenizer.json").write_text("{}")  # of something else
    monkeypatch.setattr(pretrained.gguf, "open_gguf", lambda p: {LLM: SimpleNamespace(name=LLM, file=p)})
    monkeypatch.setattr(pretrained.gguf, "gguf_config", lambda p: LLAMA)
    monkeypatch.setattr(pretrained, "gguf_tokenizer", lambda p: f"the one in {p}")
    assert tokenizer_of(llm=str(path)) == f"the one in {path}"
    assert loaded == []


def test_the_plan_beside_an_official_projector():
    """Of the golden case: its config.json says fusion, levels and layers, whatever the config says."""
    cfg = config.check(config.default())
    found = open_sources(dataclasses.replace(cfg.init, **sources_of("a_cross_mlp_llama")))
    cfg = adopt(dataclasses.replace(cfg, fusion=FusionConfig(name="mlp")), found)
    assert cfg.fusion.name == "channel"
    assert (cfg.shortcuts.density, cfg.shortcuts.vit_levels, cfg.shortcuts.llm_layers) == (
        "explicit",
        (0, 2, 4),
        (0, 3, 6),
    )
    assert cfg.vision.select_layer == -2


def test_a_tower_of_any_resolution_keeps_its_size():
    cfg = config.check(config.default())
    cfg = dataclasses.replace(cfg, init=dataclasses.replace(cfg.init, vision=str(FOLDER / "siglip2"), image_size=42))
    with pytest.raises(UserError, match="config.init.image_size is not supported for siglip2 towers"):
        adopt(cfg, open_sources(cfg.init))
