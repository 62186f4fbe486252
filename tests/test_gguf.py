"""GGUF -> Hugging Face names, config and tokenizer, on files written here as llama.cpp's converter writes them."""

import os
import random
from itertools import pairwise

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import load_file
from tokenizers import pre_tokenizers

from parity_cases import FOLDER, join, numbers, text_batch
from sparsecut_jax.types import UserError
from sparsecut_jax.weights.gguf import gguf_config, open_gguf
from sparsecut_jax.weights.gguf_tokenizer import gguf_tokenizer

D, F, W, LAYERS, Q, G, H = 64, 96, 600, 2, 4, 2, 16  # W is more than the rows that are dequantised at a time
META = {
    "llama.context_length": 128, "llama.embedding_length": D, "llama.block_count": LAYERS,
    "llama.feed_forward_length": F, "llama.attention.head_count": Q, "llama.attention.head_count_kv": G,
    "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 5e5, "llama.rope.dimension_count": H,
    "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
}  # fmt: skip
MATRICES = {
    "blk.{}.attn_q": ("self_attn.q_proj", (Q * H, D), Kind.Q4_1),
    "blk.{}.attn_k": ("self_attn.k_proj", (G * H, D), Kind.Q8_0),
    "blk.{}.attn_v": ("self_attn.v_proj", (G * H, D), Kind.F16),
    "blk.{}.attn_output": ("self_attn.o_proj", (D, Q * H), Kind.BF16),
    "blk.{}.ffn_gate": ("mlp.gate_proj", (F, D), Kind.F32),
    "blk.{}.ffn_up": ("mlp.up_proj", (F, D), Kind.Q4_1),
    "blk.{}.ffn_down": ("mlp.down_proj", (D, F), Kind.Q8_0),
    "blk.{}.attn_norm": ("input_layernorm", (D,), Kind.F32),
    "blk.{}.ffn_norm": ("post_attention_layernorm", (D,), Kind.F32),
}
TOP = {
    "token_embd": ("model.embed_tokens", (W, D), Kind.Q8_0),
    "output_norm": ("model.norm", (D,), Kind.F32),
    "output": ("lm_head", (W, D), Kind.Q4_1),
}


def write(path, meta=None, tensors=None, architecture="llama"):
    """A GGUF file of `meta` and {name: (array, Kind)}, both by their names in the file."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (meta or {}).items():
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        add[type(value)](key, value)
    for name, (array, kind) in (tensors or {}).items():
        data = array if array.dtype == np.int8 else gguf.quants.quantize(array, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def exact(shape, kind, rng):
    """Small whole numbers that `kind` holds without loss: the blocks of 32 have a scale of 1."""
    low, high = {Kind.Q4_1: (0, 15), Kind.Q8_0: (-127, 127)}.get(kind, (-50, 50))
    value = rng.integers(low, high + 1, shape).astype(np.float32)
    if len(shape) == 2:
        value[:, ::32], value[:, 1::32] = low, high
    return value


def as_stored(weight, heads):
    """q or k as llama.cpp stores it: the rows of a head's two halves alternate."""
    stored = np.empty_like(weight)
    width = len(weight) // heads
    for head in range(heads):
        for i in range(width // 2):
            stored[head * width + 2 * i] = weight[head * width + i]
            stored[head * width + 2 * i + 1] = weight[head * width + width // 2 + i]
    return stored


def make_tensors():
    """({Hugging Face name: array}, {name in the file: (array, Kind)})."""
    rng = np.random.default_rng(0)
    theirs, stored = {}, {}
    for name, (hf, shape, kind) in TOP.items():
        theirs[f"{hf}.weight"] = value = exact(shape, kind, rng)
        stored[f"{name}.weight"] = (value, kind)
    for layer in range(LAYERS):
        for name, (hf, shape, kind) in MATRICES.items():
            theirs[f"model.layers.{layer}.{hf}.weight"] = value = exact(shape, kind, rng)
            heads = {"blk.{}.attn_q": Q, "blk.{}.attn_k": G}.get(name)
            stored[f"{name.format(layer)}.weight"] = (as_stored(value, heads) if heads else value, kind)
    return theirs, stored


THEIRS, STORED = make_tensors()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "model.gguf", META, STORED)


def without(mapping, *names):
    return {key: value for key, value in mapping.items() if key not in names}


def test_every_tensor_reads_as_it_was_before_llama_cpp(model):
    found = open_gguf(model)
    assert set(found) == set(THEIRS)
    for name, expected in THEIRS.items():
        value = found[name].read()
        assert found[name].shape == value.shape == expected.shape, name
        np.testing.assert_array_equal(value.astype(np.float32), expected, err_msg=name)


def test_dtypes_are_those_of_the_file_and_float32_where_it_is_quantised(model):
    found = open_gguf(model)
    kinds = {name: (found[f"model.layers.0.{name}.weight"]) for name, _, _ in MATRICES.values()}
    assert {name: tensor.dtype for name, tensor in kinds.items()} == {
        "self_attn.q_proj": "F32", "self_attn.k_proj": "F32", "self_attn.v_proj": "F16", "self_attn.o_proj": "BF16",
        "mlp.gate_proj": "F32", "mlp.up_proj": "F32", "mlp.down_proj": "F32",
        "input_layernorm": "F32", "post_attention_layernorm": "F32",
    }  # fmt: skip
    dtypes = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
    for tensor in kinds.values():
        assert tensor.read().dtype == dtypes[tensor.dtype]


def test_values_of_blocks_are_scale_times_number_plus_minimum(tmp_path):
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((2, 64)).astype(np.float32)
    path = write(tmp_path / "m.gguf", META, STORED | {"token_embd.weight": (weight, Kind.Q4_1)})
    value = open_gguf(path)["model.embed_tokens.weight"].read()
    for row in range(2):
        for block in range(0, 64, 32):
            part = weight[row, block : block + 32]
            low, scale = np.float16(part.min()), np.float16((part.max() - part.min()) / 15)
            steps = (value[row, block : block + 32] - np.float32(low)) / np.float32(scale)
            np.testing.assert_allclose(steps, np.round(steps), atol=1e-4)
            np.testing.assert_allclose(value[row, block : block + 32], part, atol=0.51 * scale + 1e-3)


@pytest.mark.parametrize(
    "index", [np.s_[3:50, :], np.s_[:, 5:41], np.s_[17:18, 63:], np.s_[16:32, 0:32], np.s_[9:9, :]]
)
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight"])
def test_a_slice_is_that_part_of_the_whole(model, name, index):
    tensor = open_gguf(model)[name]
    np.testing.assert_array_equal(tensor.read(index), THEIRS[name][index])


def test_slices_across_chunks_and_of_vectors(model):
    found = open_gguf(model)
    embedding, norm = found["model.embed_tokens.weight"], found["model.norm.weight"]
    np.testing.assert_array_equal(
        embedding.read(np.s_[200:590, 7:9]), THEIRS["model.embed_tokens.weight"][200:590, 7:9]
    )
    np.testing.assert_array_equal(norm.read(np.s_[3:9,]), THEIRS["model.norm.weight"][3:9])


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux's list of mapped files")
def test_the_file_does_not_stay_mapped(model):
    for tensor in open_gguf(model).values():
        tensor.read()
    with open("/proc/self/maps") as maps:
        assert model not in maps.read()


def test_a_tensor_that_no_llama_has_keeps_its_name(tmp_path):
    bias = {"blk.0.attn_q.bias": (np.ones(Q * H, np.float32), Kind.F32)}
    assert "blk.0.attn_q.bias" in open_gguf(write(tmp_path / "m.gguf", META, STORED | bias))


def test_a_tensor_is_called_in_messages_as_the_file_calls_it(tmp_path):
    bad = {"blk.1.ffn_norm.weight": (np.full(D, np.inf, np.float32), Kind.F32)}
    tensor = open_gguf(write(tmp_path / "m.gguf", META, STORED | bad))["model.layers.1.post_attention_layernorm.weight"]
    with pytest.raises(UserError, match="m.gguf: tensor blk.1.ffn_norm.weight has NaN or infinite values"):
        tensor.read()


def test_config(model):
    assert gguf_config(model) == {
        "model_type": "llama",
        "vocab_size": 600,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }


def test_config_of_what_is_left_out(tmp_path):
    meta = without(META, "llama.rope.freq_base", "llama.rope.dimension_count", "llama.attention.head_count_kv")
    config = gguf_config(write(tmp_path / "m.gguf", meta, without(STORED, "output.weight")))
    assert config["tie_word_embeddings"] is True
    assert (config["num_key_value_heads"], config["head_dim"]) == (4, 16)
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0, "rope_theta": 500000.0}),
        ({"factor": 2.0}, {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0}),
        ({"type": "none", "factor": 4.0}, {"rope_type": "default", "rope_theta": 500000.0}),
    ],
)
def test_rope_scaling(tmp_path, scaling, expected):
    meta = META | {f"llama.rope.scaling.{key}": value for key, value in scaling.items()}
    assert gguf_config(write(tmp_path / "m.gguf", meta, STORED))["rope_parameters"] == expected


@pytest.mark.parametrize(
    ("meta", "tensors", "message"),
    [
        ({"llama.expert_count": 8}, {}, "llama.expert_count is 8"),
        ({"llama.attention.sliding_window": 4096}, {}, "llama.attention.sliding_window is 4096"),
        ({"llama.rope.scaling.type": "yarn"}, {}, "llama.rope.scaling.type is 'yarn'; expected none or linear"),
        ({"llama.rope.dimension_count": 8}, {}, "llama.rope.dimension_count is 8; expected the width of a head, 16"),
        ({"llama.attention.key_length": 32}, {}, "rope.dimension_count is 16; expected the width of a head, 32"),
        ({"llama.block_count": "two"}, {}, "llama.block_count: expected int, got str"),
        ({"llama.attention.head_count": [4, 4]}, {}, "llama.attention.head_count: expected int, got list"),
        ({"llama.attention.head_count": 0}, {}, "llama.attention.head_count is 0"),
        ({"llama.attention.head_count": 64}, {}, "heads are 1 wide; expected an even width"),
        ({}, {"rope_freqs.weight": (np.ones(8, np.float32), Kind.F32)}, "rope_freqs.weight"),
        ({}, {"blk.0.attn_k.weight": (np.ones((48, D), np.float32), Kind.F32)}, "has 48 rows; expected 2 heads of 16"),
        ({}, {"blk.0.ffn_up.weight": (np.ones((2, F, D), np.float32), Kind.F32)}, "blk.0.ffn_up.weight .* has shape"),
        ({}, {"blk.0.ffn_up.weight": (np.ones((F, D), np.int8), Kind.I8)}, "blk.0.ffn_up.weight has type I8"),
    ],
)
def test_what_is_no_plain_llama_is_refused(tmp_path, meta, tensors, message):
    path = write(tmp_path / "odd.gguf", META | meta, STORED | tensors)
    with pytest.raises(UserError, match=f"odd.gguf: .*{message}"):
        open_gguf(path)


def test_another_architecture_is_refused(tmp_path):
    path = write(tmp_path / "other.gguf", META, STORED, architecture="qwen2")
    with pytest.raises(UserError, match="other.gguf: expected the architecture llama, got 'qwen2'"):
        gguf_config(path)


def test_missing_metadata_and_embedding_are_named(tmp_path):
    path = write(tmp_path / "m.gguf", without(META, "llama.block_count"), STORED)
    with pytest.raises(UserError, match="m.gguf: metadata llama.block_count: expected int, got nothing"):
        gguf_config(path)
    path = write(tmp_path / "n.gguf", META, without(STORED, "token_embd.weight"))
    with pytest.raises(UserError, match="n.gguf has no tensor token_embd.weight"):
        gguf_config(path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.005, 0.02, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path, model, share):
    with open(model, "rb") as file:
        content = file.read()
    (tmp_path / "cut.gguf").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match="cut.gguf is not a complete GGUF file"):
        open_gguf(str(tmp_path / "cut.gguf"))


def test_what_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "text.gguf").write_bytes(b"this is no GGUF file, but some text that is long enough to be read")
    with pytest.raises(UserError, match="text.gguf is not a complete GGUF file"):
        open_gguf(str(tmp_path / "text.gguf"))
    with pytest.raises(UserError, match="nowhere.gguf does not exist"):
        gguf_tokenizer(str(tmp_path / "nowhere.gguf"))


# Tokenizers. Types of tokens: 1 normal, 2 unknown, 3 control, 4 user defined, 6 byte.

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["t h", "th e", "Ġ the", "1 2", "12 3", "123 4", "' S"]
BYTE_LEVEL = ["<pad>", "<s>", "</s>", *LETTERS, *("".join(m.split()) for m in MERGES), "hello", "<img>"]


def byte_level(path, **changes):
    meta = {
        "model": "gpt2", "pre": "gpt-2", "tokens": BYTE_LEVEL, "merges": MERGES, "bos_token_id": 1, "eos_token_id": 2,
        "token_type": [3, 3, 3] + [1] * (len(BYTE_LEVEL) - 4) + [4],
    } | changes  # fmt: skip
    own = {"tokenizer.chat_template": meta.pop("chat_template", None)}
    own |= {f"tokenizer.ggml.{key}": value for key, value in meta.items()}
    return write(path, {key: value for key, value in own.items() if value is not None})


def pieces(tokenizer, text):
    return [tokenizer.backend.id_to_token(i) for i in tokenizer.encode(text)]


@pytest.mark.parametrize(
    ("pre", "digits", "contraction", "word"),
    [
        ("gpt-2", ["1234"], ["'", "S"], list("hello")),
        ("smollm", ["1", "2", "3", "4"], ["'", "S"], list("hello")),
        ("llama-bpe", ["123", "4"], ["'S"], ["hello"]),
        ("qwen2", ["1", "2", "3", "4"], ["'S"], list("hello")),
    ],
)
def test_how_a_byte_level_vocabulary_splits(tmp_path, pre, digits, contraction, word):
    tokenizer = gguf_tokenizer(byte_level(tmp_path / "t.gguf", pre=pre))
    assert pieces(tokenizer, "the the") == ["the", "Ġthe"]
    assert pieces(tokenizer, "1234") == digits
    assert pieces(tokenizer, "a'S") == ["a", *contraction]
    assert pieces(tokenizer, "hello") == word  # Llama 3 takes a word that is a token as it is
    assert tokenizer.encode("the") == (BYTE_LEVEL.index("the"),)
    assert tokenizer.size == len(BYTE_LEVEL)


def test_any_text_comes_back_from_a_byte_level_vocabulary(tmp_path):
    tokenizer = gguf_tokenizer(byte_level(tmp_path / "t.gguf", pre="smollm"))
    for text in ["", " ", "the  end\n", "Grüße, 日本語 😀", "</s><s>", "see <img> here"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_control_tokens_are_never_read_from_text(tmp_path):
    tokenizer = gguf_tokenizer(byte_level(tmp_path / "t.gguf"))
    assert pieces(tokenizer, "</s>") == ["<", "/", "s", ">"]
    assert pieces(tokenizer, "<img>") == ["<img>"]
    assert tokenizer.decode([2, *tokenizer.encode("the"), 0]) == "the"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (2, -1, 2)),
        ({"add_bos_token": True, "padding_token_id": 0}, (0, 1, 2)),
        ({"pre": "llama-bpe"}, (2, 1, 2)),
        ({"pre": "llama-bpe", "add_bos_token": False}, (2, -1, 2)),
        ({"add_bos_token": True, "bos_token_id": None}, (2, -1, 2)),
    ],
)
def test_special_ids(tmp_path, changes, expected):
    tokenizer = gguf_tokenizer(byte_level(tmp_path / "t.gguf", **changes))
    assert (tokenizer.pad, tokenizer.bos, tokenizer.eos) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'; expected one of gpt2, llama"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre is 'tekken'; expected one of gpt-2, smollm, llama-bpe, qwen2"),
        ({"pre": "default"}, "tokenizer.ggml.pre is 'default'"),
        ({"pre": None}, "tokenizer.ggml.pre: expected str, got nothing"),
        ({"merges": ["x yz"]}, "vocabulary and merges do not fit together"),
        ({"merges": ["xyz"]}, "vocabulary and merges do not fit together"),
        ({"token_type": [1, 1]}, "one token_type per distinct token, got 2"),
        ({"tokens": [*BYTE_LEVEL[:-1], "a"]}, "one token_type per distinct token"),
        ({"eos_token_id": None}, "tokenizer.ggml.eos_token_id: expected int, got nothing"),
        ({"eos_token_id": 9999}, "the pad token has id 9999|the eos token has id 9999"),
        ({"model": "llama", "scores": [0.5]}, "tokenizer.ggml.scores of [0-9]+ tokens, got 1"),
    ],
)
def test_a_tokenizer_that_cannot_be_rebuilt_is_refused(tmp_path, changes, message):
    path = byte_level(tmp_path / "odd.gguf", **changes)
    with pytest.raises(UserError, match=f"odd.gguf: .*({message})"):
        gguf_tokenizer(path)


def test_the_chat_template_comes_along(tmp_path):
    assert gguf_tokenizer(byte_level(tmp_path / "a.gguf")).chat_template == ""
    told = gguf_tokenizer(byte_level(tmp_path / "b.gguf", chat_template="{{ messages }}"))
    assert told.chat_template == "{{ messages }}"


BYTES = [f"<0x{i:02X}>" for i in range(256)]
SINGLE = ["▁", *"abcs</>"]
SCORED = {"ab": -1.0, "bc": -0.5, "▁ab": -2.0, "abc": -3.0, "▁▁": -4.0, "</": -5.0, "s>": -6.0}
SENTENCEPIECE = ["<unk>", "<s>", "</s>", *BYTES, *SINGLE, *SCORED]


def sentencepiece(path, **changes):
    meta = {
        "model": "llama", "tokens": SENTENCEPIECE, "bos_token_id": 1, "eos_token_id": 2,
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(SINGLE + list(SCORED)),
        "scores": [0.0] * 259 + [-1000.0] * len(SINGLE) + list(SCORED.values()),
    } | changes  # fmt: skip
    return write(path, {f"tokenizer.ggml.{key}": value for key, value in meta.items()})


def test_sentencepiece_merges_the_best_score_first(tmp_path):
    tokenizer = gguf_tokenizer(sentencepiece(tmp_path / "t.gguf"))
    assert (tokenizer.pad, tokenizer.bos, tokenizer.eos) == (2, 1, 2)
    assert tokenizer.size == len(SENTENCEPIECE)
    assert pieces(tokenizer, "ab") == ["▁ab"]
    assert pieces(tokenizer, "bc") == ["▁", "bc"]
    assert pieces(tokenizer, "abc") == ["▁", "abc"]  # bc first, so there is no ab that "▁" could join
    assert pieces(tokenizer, "cab  ab") == ["▁", "c", "ab", "▁", "▁ab"]
    assert tokenizer.encode("ab") == (SENTENCEPIECE.index("▁ab"),)


def test_sentencepiece_writes_unknown_characters_in_bytes(tmp_path):
    tokenizer = gguf_tokenizer(sentencepiece(tmp_path / "t.gguf"))
    assert pieces(tokenizer, "aé") == ["▁", "a", "<0xC3>", "<0xA9>"]
    for text in ["a", " a", "a  b ", "é日本😀\n", "<0x41>", "</s>", "<s>"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_never_reads_control_tokens_from_text(tmp_path):
    tokenizer = gguf_tokenizer(sentencepiece(tmp_path / "t.gguf"))
    assert pieces(tokenizer, "</s>") == ["▁", "</", "s>"]


def test_sentencepiece_without_a_space_in_front(tmp_path):
    tokenizer = gguf_tokenizer(sentencepiece(tmp_path / "t.gguf", add_space_prefix=False))
    assert pieces(tokenizer, "ab ab") == ["ab", "▁ab"]
    assert tokenizer.decode(tokenizer.encode(" ab")) == " ab"


def test_equal_scores_merge_in_the_order_of_ids(tmp_path):
    tokenizer = gguf_tokenizer(sentencepiece(tmp_path / "t.gguf", scores=[-1000.0] * len(SENTENCEPIECE)))
    assert pieces(tokenizer, "abc") == ["▁ab", "c"]  # ab comes before bc


def test_sentencepiece_merges_as_its_definition_says(tmp_path):
    rng = random.Random(0)
    words = ["▁", *"abcd"]
    while len(words) < 80:
        longer = rng.choice(words) + rng.choice(words)
        if longer not in words and len(longer) < 6 and "▁" not in longer[1:]:
            words.append(longer)
    score = {word: -float(i) for i, word in enumerate(words)}
    tokens, types = ["<unk>", "<s>", "</s>", *BYTES, *words], [2, 3, 3] + [6] * 256 + [1] * len(words)
    scores = [0.0] * 259 + list(score.values())
    tokenizer = gguf_tokenizer(sentencepiece(tmp_path / "t.gguf", tokens=tokens, token_type=types, scores=scores))
    for _ in range(100):
        text = "".join(rng.choices("abcd ", k=40))
        parts = ["▁", *text.replace(" ", "▁")]
        # Of all neighbours that make a token, those with the best score become one; the first of equals.
        while pairs := [(score[a + b], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in score]:
            i = -max(pairs)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        assert pieces(tokenizer, text) == parts


def test_a_gguf_computes_what_pytorch_does(tmp_path):
    """The smollm2 fixture as llama.cpp would store it, through the loader."""
    expected = load_file(FOLDER / "smollm2/model.safetensors")
    stored = {
        "token_embd.weight": expected["model.embed_tokens.weight"],
        "output_norm.weight": expected["model.norm.weight"],
    }
    for layer in range(3):
        for name, (hf, *_) in MATRICES.items():
            value = expected[f"model.layers.{layer}.{hf}.weight"]
            heads = {"blk.{}.attn_q": 4, "blk.{}.attn_k": 2}.get(name)
            stored[f"{name.format(layer)}.weight"] = as_stored(value, heads) if heads else value
    meta = META | {
        "llama.embedding_length": 32, "llama.block_count": 3, "llama.feed_forward_length": 48,
        "llama.rope.freq_base": 1e5, "llama.rope.dimension_count": 8,
    }  # fmt: skip
    path = write(tmp_path / "model.gguf", meta, {name: (value, Kind.F32) for name, value in stored.items()})
    loaded, io = join(llm=path), numbers("smollm2")
    assert loaded.cfg.llm.tie_embeddings
    logits, _ = jax.jit(loaded.model.apply)({"params": loaded.params}, text_batch(io["input_ids"], loaded.cfg))
    np.testing.assert_allclose(logits, io["logits"], rtol=0, atol=3e-5)
