"""Compressed forms of a student: what they compute, what they weigh, and what the gate says of them."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForSequenceClassification

from neural_layers.distill.compression import (
    Threshold,
    check_variants,
    compress,
    measure_compressed,
    predictor,
)
from neural_layers.distill.validation.translation import translate
from neural_layers.errors import InputError
from neural_layers.linear_4bit import Linear4bit
from neural_layers.models.cvm import CVMConfig, CVMForConditionalGeneration
from neural_layers.wrappers.modules import tensor_bytes
from neural_layers.wrappers.quantization import quantize

TEXTS = ["Guten Tag", "ja", "Das ist ein Haus.", "nein danke"]


def _tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, behind the three special ones."""
    alphabet = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def translator() -> CVMForConditionalGeneration:
    torch.manual_seed(0)
    return CVMForConditionalGeneration(
        CVMConfig(
            vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_decoder_layers=1,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=48, initializer_range=0.3,
        )
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def classifier() -> Qwen2ForSequenceClassification:
    torch.manual_seed(0)
    return Qwen2ForSequenceClassification(
        Qwen2Config(
            vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, num_labels=3, pad_token_id=0,
        )
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def forms(translator: CVMForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("forms")
    return compress(translator, _tokenizer(), "bf16,int8,nf4,onnx,onnx-int8", folder, "translation")


def test_a_graph_translates_as_the_student_does(forms: dict[str, Any], translator: Any) -> None:
    expected = translate(translator, _tokenizer(), TEXTS)
    assert len(set(expected)) > 1
    assert forms["student"].predict(TEXTS) == expected
    assert forms["onnx"].predict(TEXTS) == expected


@pytest.mark.parametrize(("name", "scheme"), [("int8", "int8_dynamic"), ("nf4", "nf4")])
def test_a_form_in_fewer_bits_is_what_quantize_makes_and_loads_from_its_folder(name, scheme, forms, translator) -> None:
    expected = copy.deepcopy(translator)
    quantize(expected, scheme)
    assert forms[name].predict(TEXTS) == translate(expected, _tokenizer(), TEXTS)
    loaded = CVMForConditionalGeneration.from_pretrained(forms[name].folder).eval()
    state = loaded.state_dict()
    assert state.keys() == expected.state_dict().keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in expected.state_dict().items())
    assert loaded.lm_head.weight.data_ptr() == loaded.shared.weight.data_ptr()
    assert not any(isinstance(module, Linear4bit) for module in translator.modules()), "the student stays"


def test_tied_weights_are_written_once(forms: dict[str, Any]) -> None:
    with safe_open(forms["nf4"].folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "shared.weight" in names
    assert names.isdisjoint({"lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"})


def test_sizes_are_those_of_the_files_and_of_the_weights(forms: dict[str, Any], translator: Any) -> None:
    weights = sum(p.numel() for p in translator.parameters())
    assert forms["student"].memory_bytes == 4 * weights
    assert forms["bf16"].memory_bytes == 2 * weights
    for name, least in (("int8", 3.4), ("nf4", 6.0)):
        expected = copy.deepcopy(translator)
        quantize(expected, {"int8": "int8_dynamic"}.get(name, name))
        assert forms[name].memory_bytes == tensor_bytes(expected) < 4 * weights / least
    for name in ("bf16", "int8", "nf4"):
        size = (forms[name].folder / "model.safetensors").stat().st_size
        assert forms[name].file_bytes == size
        assert forms[name].memory_bytes <= size <= forms[name].memory_bytes + 30_000
    graphs = [forms[name].folder / f"{part}.onnx" for name in ("onnx", "onnx-int8") for part in ("encoder", "decoder")]
    assert forms["onnx"].file_bytes == sum(path.stat().st_size for path in graphs[:2])
    assert forms["onnx-int8"].memory_bytes < 0.4 * forms["onnx"].memory_bytes
    # Both graphs of a translator hold the embeddings.
    assert forms["onnx"].memory_bytes == pytest.approx(4 * (weights + 259 * 64), rel=0.02)


def test_each_form_goes_through_the_evaluation_and_the_threshold(forms: dict[str, Any]) -> None:
    chosen = {name: forms[name] for name in ("student", "bf16", "nf4")}
    quality = {chosen["bf16"].predict: 45.01, chosen["nf4"].predict: 44.9}
    told: list[str] = []
    entries = measure_compressed(
        chosen,
        lambda predict: {"bleu": quality[predict], "ter": 50.0},
        Threshold(("bleu",), 0.9),
        teacher={"bleu": 50.0, "ter": 40.0},
        student={"bleu": 48.0, "ter": 45.0},
        examples=TEXTS[:2],
        tell=told.append,
    )
    assert [entry["variant"] for entry in entries] == ["student", "bf16", "nf4"]
    assert [entry["passed"] for entry in entries] == [True, True, False]
    assert entries[1]["retention"] == {"bleu": pytest.approx(0.9002), "ter": pytest.approx(0.8)}
    assert entries[1]["kept"] == {"bleu": pytest.approx(45.01 / 48), "ter": pytest.approx(0.9)}
    assert set(entries[2]["latency_ms"]) == {"p50", "p95", "p99"}
    assert entries[2]["throughput"] > 0
    assert told[2] == "nf4 failed: it keeps 89.8 % of BLEU (at least 90.0 % is asked for)"
    assert json.loads(json.dumps(entries, allow_nan=False)) == entries


def test_a_form_that_cannot_be_made_is_told_and_fails(tmp_path: Path, classifier: Any) -> None:
    class Bare(nn.Module):
        """A model without a layer that can be quantized."""

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(2)

    told: list[str] = []
    forms = compress(Bare(), _tokenizer(), ["nf4"], tmp_path, "classification", tell=told.append)
    assert forms["nf4"].predict is None
    assert told[-1].startswith("nf4 could not be made: no layer is left to quantize")
    assert list(tmp_path.iterdir()) == []
    forms["student"] = compress(classifier, _tokenizer(), ["bf16"], tmp_path, "classification")["student"]
    entries = measure_compressed(
        forms, lambda predict: {"accuracy": 0.9}, Threshold(("accuracy",)), teacher={"accuracy": 0.9}, examples=TEXTS
    )
    assert entries[1]["passed"] is False
    assert (entries[1]["quality"], entries[1]["latency_ms"], entries[1]["throughput"]) == (None, None, None)


def test_a_classifiers_logits_do_not_depend_on_the_batch(classifier: Any, tmp_path: Path) -> None:
    forms = compress(classifier, _tokenizer(), "nf4,bf16,int8", tmp_path, "classification", batch_size=2)
    alone = np.concatenate([forms["student"].predict([text]) for text in TEXTS])
    np.testing.assert_allclose(forms["student"].predict(TEXTS), alone, atol=1e-5)
    for name in ("int8", "nf4"):
        reloaded = Qwen2ForSequenceClassification.from_pretrained(tmp_path / name)
        found = predictor(reloaded, _tokenizer(), "classification")(TEXTS)
        np.testing.assert_allclose(found, forms[name].predict(TEXTS), atol=1e-5)
    for name, most in (("bf16", 0.02), ("int8", 0.05), ("nf4", 0.4)):
        error = np.abs(forms[name].predict(TEXTS) - alone).max() / np.abs(alone).max()
        assert 0 < error < most


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ("int9", "translation", "no compressed form 'int9' for translation; there are bf16, int8, int4, nf4, onnx"),
        ("nf4,", "translation", "no compressed form ''"),
        ("nf4,nf4", "translation", "nf4 is given twice"),
        (
            "nf4,onnx-int8",
            "classification",
            "are not exported to ONNX yet; there are bf16, int8, int4, nf4",
        ),
        ([], "classification", "no compressed form is given; there are bf16, int8, int4, nf4"),
    ],
)
def test_a_wrong_name_is_refused_with_those_there_are(given: Any, kind: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_variants(given, kind)


def test_names_are_read_in_their_order() -> None:
    assert check_variants(" onnx-int8, nf4", "translation") == ["onnx-int8", "nf4"]
