"""A GGUF file is imported as the model it was made of, or refused by name."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from minitron_nemo.artifact import open_artifact
from minitron_nemo.checks import Mistake
from minitron_nemo.hf.gguf import unpack_gguf
from minitron_nemo.hf.gguf_metadata import llama3_scaling
from support.door import Door
from support.gguf import BOS, EOS, TOKENIZER, TOKENS, TOOL, llama3_factors, write_gguf
from support.hf import LLAMA3_SCALING, hf_logits, hf_model, load_with_transformers
from support.transformers5 import transformers5

DIMS: dict[str, Any] = {
    "vocab_size": len(TOKENS),
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,  # 6 x 8 = 48 is not the hidden size
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
}
# As many channels as leave two within the band that scaling interpolates.
SCALED = DIMS | {"head_dim": 32, "rope_scaling": LLAMA3_SCALING | {"low_freq_factor": 1.0}, "rope_theta": 500.0}
QWEN3_EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**DIMS, rope_theta=500.0),
    "llama scaled and tied": LlamaConfig(**SCALED, tie_word_embeddings=True),
    "llama biases": LlamaConfig(**DIMS, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**DIMS, sliding_window=None),
    "mixtral": MixtralConfig(**DIMS, num_local_experts=5, num_experts_per_tok=2),
    "nemotron": NemotronConfig(**DIMS | {"head_dim": 12}, norm_eps=1e-3),
    "qwen2": Qwen2Config(**DIMS | {"head_dim": 4}),
    "qwen3 tied": Qwen3Config(**DIMS, tie_word_embeddings=True),
    "qwen3_moe": Qwen3MoeConfig(**DIMS, **QWEN3_EXPERTS),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return hf_model(CONFIGS["llama"], tmp_path_factory.mktemp("llama"))


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
def test_a_gguf_file_gives_the_logits_of_the_model_it_was_made_of(family: str, tmp_path: Path) -> None:
    model = hf_model(CONFIGS[family], tmp_path / "hf")
    unpack_gguf(write_gguf(model, tmp_path / "model.gguf"), tmp_path / "unpacked")
    logits = hf_logits(load_with_transformers(tmp_path / "unpacked"))
    assert (logits - hf_logits(model)).abs().max() < 1e-5  # nemotron's norms lose a bit to the 1 added
    assert logits.std() > 0.1


def test_transformers_5_reads_the_same_model_and_tokens(tmp_path: Path) -> None:
    model = hf_model(CONFIGS["llama scaled and tied"], tmp_path / "hf")
    unpack_gguf(write_gguf(model, tmp_path / "model.gguf"), tmp_path / "unpacked")
    code = """if True:
        import json, sys, torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="eager", dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
        ids = tokenizer("a 12 hello")["input_ids"]
        logits = model(torch.tensor([ids])).logits[0, -1].tolist()
        print(json.dumps([ids, tokenizer.eos_token_id, logits]))
    """
    ids, eos, logits = transformers5(code, tmp_path / "unpacked")
    assert (ids, eos) == (AutoTokenizer.from_pretrained(tmp_path / "unpacked")("a 12 hello")["input_ids"], 1)
    with torch.no_grad():
        assert (torch.tensor(logits) - model(torch.tensor([ids])).logits[0, -1]).abs().max() < 1e-5


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0, Kind.F16, Kind.BF16])
def test_weights_are_what_the_file_holds_whatever_its_quantization(kind: Kind, tmp_path: Path) -> None:
    sizes = DIMS | {"hidden_size": 32, "intermediate_size": 64, "head_dim": 16}
    model = hf_model(LlamaConfig(**sizes), tmp_path / "hf")
    file = write_gguf(model, tmp_path / "model.gguf", quantization=kind)
    facts = unpack_gguf(file, tmp_path / "unpacked")
    held = load_file(tmp_path / "unpacked" / "model.safetensors")
    down = model.state_dict()["model.layers.1.mlp.down_proj.weight"].numpy()
    expected = gguf.quants.dequantize(gguf.quants.quantize(down, kind), kind)
    assert np.array_equal(held["model.layers.1.mlp.down_proj.weight"].float().numpy(), expected)
    assert {dtype for name, t in held.items() if "proj" in name for dtype in [t.dtype]} == {
        {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}.get(kind, torch.float32)
    }
    assert facts["tensor_types"][kind.name] == 3 * 7 + 2


@pytest.mark.parametrize(
    ("factor", "head_dim"), [(8.0, 128), (32.0, 64)], ids=["Llama-3.1-8B and -70B", "Llama-3.2-1B"]
)
def test_the_published_llama3_scalings_are_found_in_their_factors(factor: float, head_dim: int) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert llama3_scaling(llama3_factors(scaling, theta=500000.0, head_dim=head_dim), theta=500000.0) == scaling


# ---- tokenizers ------------------------------------------------------------------------------------------------------

PIECES = {
    ("smollm", "a 12"): ["a", "Ġ", "1", "2"],
    ("smollm", "\n\n3"): ["ĊĊ", "3"],
    ("smollm", "  42"): ["ĠĠ", "4", "2"],
    ("gpt-2", "a 12"): ["a", "Ġ", "12"],
    ("gpt-2", "\n\n3"): ["Ċ", "Ċ", "3"],
    ("gpt-2", "  42"): ["Ġ", "Ġ", "4", "2"],
    ("gpt-2", "fooBall"): ["f", "o", "oB", "a", "ll"],
    ("llama-bpe", "a 12"): ["a", "Ġ", "12"],
    ("llama-bpe", "\n\n3"): ["ĊĊ", "3"],
    ("llama-bpe", "3312"): ["3", "3", "1", "2"],  # 331, then 2
    ("llama-bpe", "hello"): ["hello"],
    ("gpt-2", "hello"): ["h", "e", "ll", "o"],
    ("qwen2", "a 12"): ["a", "Ġ", "1", "2"],
    ("qwen2", "e\u0301"): ["Ã", "©"],  # NFC: é
    ("gpt-2", "e\u0301"): ["e", "Ì", "ģ"],
    ("tekken", "fooBall"): ["f", "o", "o", "B", "a", "ll"],
    ("tekken", "112"): ["1", "1", "2"],
    ("smollm", f"a{BOS}{TOOL}\n{EOS}"): ["a", BOS, TOOL, "Ċ", EOS],
}


@pytest.mark.parametrize(("pre", "text"), PIECES)
def test_text_is_cut_as_the_named_pre_tokenizer_cuts_it(
    pre: str, text: str, llama: PreTrainedModel, tmp_path: Path
) -> None:
    file = write_gguf(llama, tmp_path / "model.gguf", metadata={"tokenizer.ggml.pre": pre})
    unpack_gguf(file, tmp_path / "unpacked")
    tokenizer = Tokenizer.from_file(str(tmp_path / "unpacked" / "tokenizer.json"))
    encoded = tokenizer.encode(text, add_special_tokens=False)
    assert encoded.tokens == PIECES[pre, text]
    assert encoded.ids == [TOKENS.index(token) for token in encoded.tokens]


@pytest.mark.parametrize("prefixed", [True, False])
def test_sentencepiece_ids_are_those_of_sentencepiece(prefixed: bool, llama: PreTrainedModel, tmp_path: Path) -> None:
    text = Path(__file__).read_text().splitlines()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=prefixed,
        character_coverage=0.99,
        normalization_rule_name="identity",  # this and the next as Llama's
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    expected = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(expected.get_piece_size())
    kinds = {"is_unknown": 2, "is_control": 3, "is_unused": 5, "is_byte": 6}
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [expected.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [expected.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": [next((k for f, k in kinds.items() if getattr(expected, f)(i)), 1) for i in ids],
        "tokenizer.ggml.add_space_prefix": prefixed,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **dict.fromkeys(["tokenizer.ggml.pre", "tokenizer.ggml.merges", "tokenizer.ggml.add_bos_token"]),
    }
    rows = {"token_embd.weight": np.zeros((400, 24), np.float32), "output.weight": np.zeros((400, 24), np.float32)}
    unpack_gguf(write_gguf(llama, tmp_path / "model.gguf", metadata=metadata, tensors=rows), tmp_path / "unpacked")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "unpacked")
    awkward = ["a 12", "\n\n3", "  42", "日本語 x", "e\u0301 \t tab", "x▁y", "trail  ", "1234567890", "🙂a🙂"]
    for line in [*text, *awkward]:
        assert tokenizer(line)["input_ids"] == [1, *expected.encode(line)], line
        assert tokenizer.decode(tokenizer(line)["input_ids"], skip_special_tokens=True) == expected.decode(
            expected.encode(line)
        )


@pytest.mark.parametrize(
    ("pre", "said", "begins"), [("smollm", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False)]
)
def test_a_text_begins_with_bos_as_the_file_or_else_llama_cpp_says(
    pre: str, said: bool | None, begins: bool, llama: PreTrainedModel, tmp_path: Path
) -> None:
    metadata = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": said}
    unpack_gguf(write_gguf(llama, tmp_path / "model.gguf", metadata=metadata), tmp_path / "unpacked")
    ids = AutoTokenizer.from_pretrained(tmp_path / "unpacked")("a")["input_ids"]
    assert ids == [*([0] if begins else []), TOKENS.index("a")]


def test_special_tokens_template_and_ends_are_the_files(llama: PreTrainedModel, tmp_path: Path) -> None:
    metadata = {"tokenizer.ggml.eot_token_id": TOKENS.index(TOOL)}
    unpack_gguf(write_gguf(llama, tmp_path / "model.gguf", metadata=metadata), tmp_path / "unpacked")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "unpacked")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (BOS, EOS, EOS)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello"
    assert json.loads((tmp_path / "unpacked" / "config.json").read_text())["eos_token_id"] == 1
    generation = load_with_transformers(tmp_path / "unpacked").generation_config
    assert (generation.bos_token_id, generation.eos_token_id) == (0, [1, TOKENS.index(TOOL)])


# ---- refusals --------------------------------------------------------------------------------------------------------

REFUSED = {
    "big-endian": ({"endianess": gguf.GGUFEndian.BIG}, "is big-endian. Convert it with"),
    "another architecture": (
        {"architecture": "gemma2"},
        "has architecture 'gemma2'; supported in GGUF: llama, nemotron, qwen2, qwen3, qwen3moe.",
    ),
    "an adapter": ({"metadata": {"general.type": "adapter"}}, "is a GGUF file of type adapter, not a model."),
    "a part": ({"metadata": {"split.count": 3}}, "is one of 3 files. Join them first: llama-gguf-split --merge"),
    "yarn": (
        {"metadata": {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}},
        "has rope.scaling.type=yarn with factor 4.0; supported: none, and llama3's rope_freqs.weight.",
    ),
    "linear scaling without a type": (
        {"metadata": {"llama.rope.scale_linear": 2.0}},
        "has rope.scaling.type=linear with factor 2.0",
    ),
    "factors of another scaling": (
        {"tensors": {"rope_freqs.weight": np.array([1, 3, 2, 8], np.float32)}},
        "holds rope_freqs.weight that no llama3 scaling gives (4 factors up to 8)",
    ),
    "a key that nobody knows": (
        {"metadata": {"llama.attention.scale": 0.5}},
        "sets llama.attention.scale, which is not known here and may change what the model computes.",
    ),
    "layers that differ": (
        {"metadata": {"llama.attention.head_count_kv": [2, 2, 6]}},
        "has another llama.attention.head_count_kv in each layer",
    ),
    "a tensor too few": (
        {"tensors": {"blk.2.ffn_up.weight": None}},
        "has no tensor blk.2.ffn_up.weight, which its metadata calls for.",
    ),
    "a tensor too many": (
        {"tensors": {"blk.0.attn_sinks.weight": np.ones(6, np.float32)}},
        "holds 1 tensors that a llama does not have (blk.0.attn_sinks.weight).",
    ),
    "a tensor of another size": (
        {"tensors": {"output_norm.weight": np.ones(25, np.float32)}},
        "output_norm.weight in {file} has shape (25,) where its metadata calls for (24,).",
    ),
    "an unknown pre-tokenizer": (
        {"metadata": {"tokenizer.ggml.pre": "default"}},
        "has tokenizer.ggml.pre=default: how it cuts text before merging is not known; known: deepseek-r1-qwen, gpt-2,",
    ),
    "no pre-tokenizer": (
        {"metadata": {"tokenizer.ggml.pre": None}},
        "has tokenizer.ggml.pre=missing: how it cuts text before merging is not known",
    ),
    "a unigram tokenizer": (
        {"metadata": {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0, -3.25]}},
        "has tokenizer.ggml.scores that are no ranks: a SentencePiece unigram model",
    ),
    "another kind of tokenizer": (
        {"metadata": {"tokenizer.ggml.model": "t5"}},
        "Name a Hugging Face tokenizer folder of this model instead: import_hf.tokenizer=/path/to/folder.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_kept_is_refused_and_nothing_is_written(
    case: str, llama: PreTrainedModel, tmp_path: Path
) -> None:
    changes, message = REFUSED[case]
    file = write_gguf(llama, tmp_path / "model.gguf", **changes)
    with pytest.raises(Mistake) as mistake:
        unpack_gguf(file, tmp_path / "unpacked")
    assert message.format(file=file) in str(mistake.value)
    assert str(file) in str(mistake.value)
    assert not (tmp_path / "unpacked").exists()


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.1, 0.5, 0.99])
def test_a_file_cut_short_is_named_as_damaged(share: float, llama: PreTrainedModel, tmp_path: Path) -> None:
    file = write_gguf(llama, tmp_path / "model.gguf")
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(Mistake, match=r"model\.gguf cannot be read as GGUF .* damaged or cut short; fetch it again"):
        unpack_gguf(file, tmp_path / "unpacked")


def test_a_missing_package_is_named_with_what_installs_it(
    llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(llama, tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(Mistake, match=r"pip install 'minitron-nemo\[gguf\]'"):
        unpack_gguf(file, tmp_path / "unpacked")


# ---- the stage -------------------------------------------------------------------------------------------------------


@pytest.fixture
def imports(door: Door, tmp_path: Path) -> Callable[..., Path]:
    def run(model: Path, name: str, *more: str) -> Path:
        done = door("import-hf", "recipe=prune", f"run_dir={tmp_path / name}", f"import_hf.model={model}", *more)
        assert done.code == 0, done.err
        return tmp_path / name / "teacher"

    return run


def test_importing_a_gguf_file_is_importing_the_model_it_was_made_of(
    imports: Callable[..., Path], llama: PreTrainedModel, tmp_path: Path
) -> None:
    file = write_gguf(llama, tmp_path / "model.gguf")
    unpack_gguf(file, tmp_path / "unpacked")
    ours, theirs = (open_artifact(imports(*of)) for of in ((file, "gguf"), (tmp_path / "unpacked", "folder")))

    def files(manifest: dict[str, Any]) -> dict[str, Any]:
        return {name: of for name, of in manifest["files"].items() if not name.endswith(".metadata")}

    assert files(ours.manifest) == files(theirs.manifest)
    assert ours.facts["source"]["format"] == "GGUF, dequantized"
    assert ours.facts["source"]["tensor_types"] == {"F32": 30}
    assert "source" not in theirs.facts
    assert [path.name for path in ours.path.parent.iterdir()] == ["teacher"]


def test_a_tokenizer_folder_stands_in_for_the_files_own(
    imports: Callable[..., Path], llama: PreTrainedModel, tmp_path: Path
) -> None:
    unpack_gguf(write_gguf(llama, tmp_path / "known.gguf"), tmp_path / "unpacked")
    file = write_gguf(llama, tmp_path / "model.gguf", metadata={"tokenizer.ggml.pre": "default"})
    teacher = imports(file, "run", f"import_hf.tokenizer={tmp_path / 'unpacked'}")
    assert (teacher / "tokenizer" / "tokenizer.json").read_bytes() == (
        tmp_path / "unpacked" / "tokenizer.json"
    ).read_bytes()
    assert TOKENIZER["tokenizer.ggml.pre"] == "smollm"
