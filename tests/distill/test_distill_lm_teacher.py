"""Language models of transformers as teachers: documents of a packed sequence never see each other."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from neural_layers.distill.losses import DistillationLoss
from neural_layers.distill.recipes.distill_lm_teacher import (
    LinearHeadTeacher,
    TransformersTeacher,
    load_teacher,
    teacher_of,
)
from neural_layers.distill.tasks import CausalTask
from neural_layers.distill.text.packing import pack
from neural_layers.distill.text.sampling import collate
from neural_layers.errors import InputError

VOCABULARY, LENGTH = 29, 20
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
}
_SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "n_head": 2, "n_layer": 2, "initializer_range": 0.3}
_RECURRENT = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2}
# A model, whether it keeps documents apart by itself, and whether its logits are a product with a matrix.
MODELS = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**_DECODER)), True, True),
    "qwen2": (lambda: Qwen2ForCausalLM(Qwen2Config(**_DECODER)), True, True),
    "mistral": (lambda: MistralForCausalLM(MistralConfig(**_DECODER, sliding_window=4)), True, True),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, **_SMALL)), True, True),
    "gemma2": (lambda: Gemma2ForCausalLM(Gemma2Config(**_DECODER, head_dim=8, sliding_window=4)), True, False),
    "bloom": (lambda: BloomForCausalLM(BloomConfig(**_SMALL)), False, True),
    "mamba": (lambda: MambaForCausalLM(MambaConfig(**_RECURRENT)), False, True),
}  # fmt: skip
ROWS = [[6, 13], [1, 19], []]


def make_model(name: str):
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def batch_of(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=(len(rows), LENGTH))
    return collate([pack(ids, np.array(starts, dtype=np.int64)) for ids, starts in zip(tokens, rows, strict=True)])


def alone(model, batch: dict[str, torch.Tensor], rows: list[list[int]]) -> torch.Tensor:
    """The logits of each document by itself, put together again."""
    whole = []
    for ids, starts in zip(batch["input_ids"], rows, strict=True):
        edges = [0, *starts, LENGTH]
        parts = [model(input_ids=ids[None, a:b]).logits[0] for a, b in itertools.pairwise(edges)]
        whole.append(torch.cat(parts))
    return torch.stack(whole)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_packed_documents_are_those_of_the_documents_alone(name) -> None:
    model, batch = make_model(name), batch_of(ROWS)
    teacher = teacher_of(model)
    assert teacher.packs is MODELS[name][1]
    assert isinstance(teacher, LinearHeadTeacher) is MODELS[name][2]
    expected = alone(model, batch, ROWS)
    outputs = CausalTask().outputs(teacher, batch, with_states=True)
    assert (outputs.logits is None) is MODELS[name][2]
    torch.testing.assert_close(outputs.all_logits(), expected, rtol=1e-4, atol=1e-4)
    assert all(state.shape == (3, LENGTH, 16) for state in outputs.states)
    # Both ways serve every model that can go either.
    torch.testing.assert_close(
        TransformersTeacher(model, packs=False)(**without_labels(batch)).logits, expected, rtol=1e-4, atol=1e-4
    )
    single = batch_of([[], []])  # rows of one document come without positions
    assert "position_ids" not in single
    torch.testing.assert_close(
        CausalTask().outputs(teacher, single, False).all_logits(), alone(model, single, [[], []]), rtol=1e-4, atol=1e-4
    )


def without_labels(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


@torch.no_grad()
@pytest.mark.parametrize("name", ["mamba", "bloom"])
def test_a_model_that_does_not_keep_documents_apart_would_leak(name) -> None:
    model, batch = make_model(name), batch_of(ROWS)
    if name == "mamba":
        packed = TransformersTeacher(model, packs=True).model(input_ids=batch["input_ids"]).logits
    else:
        packed = model(input_ids=batch["input_ids"]).logits
    assert (packed - alone(model, batch, ROWS)).abs().max() > 1e-3


@torch.no_grad()
def test_the_loss_by_a_linear_head_is_that_of_the_logits() -> None:
    batch, task = batch_of(ROWS), CausalTask()
    student, model = make_model("gpt2"), make_model("llama")
    ours = task.outputs(teacher_of(student), batch, False)
    by_head, by_logits = teacher_of(model), TransformersTeacher(model, packs=True)
    loss = DistillationLoss(temperature=2.0)
    labels = task.labels(batch)
    found = [float(loss(ours, labels, task.outputs(t, batch, False))[0]) for t in (by_head, by_logits)]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_folder_is_loaded_in_float32_and_what_does_not_fit_is_named(tmp_path: Path) -> None:
    model = make_model("llama").bfloat16()
    model.save_pretrained(tmp_path / "good")
    teacher = load_teacher(tmp_path / "good", LENGTH)
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    assert not teacher.training
    with pytest.raises(InputError, match=r"longer than the 2048 tokens that the teacher in .*good reads"):
        load_teacher(tmp_path / "good", 2049)
    with pytest.raises(InputError, match="there is no folder"):
        load_teacher(tmp_path / "absent", LENGTH)
    config = (tmp_path / "good" / "config.json").read_text()
    (tmp_path / "good" / "config.json").write_text(config.replace('"intermediate_size": 24', '"intermediate_size": 28'))
    with pytest.raises(InputError, match=r"do not fit its config.json: model.layers.0.mlp"):
        load_teacher(tmp_path / "good", LENGTH)
    (tmp_path / "good" / "model.safetensors").rename(tmp_path / "good" / "pytorch_model.bin")
    with pytest.raises(InputError, match="safetensors alone"):
        load_teacher(tmp_path / "good", LENGTH)


def test_weights_that_are_not_finite_and_models_of_another_kind_are_refused(tmp_path: Path) -> None:
    model = make_model("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(InputError, match=r"h\.1\.mlp\.c_fc\.weight in .* not finite"):
        load_teacher(tmp_path / "nan", LENGTH)
    config = (tmp_path / "nan" / "config.json").read_text()
    (tmp_path / "nan" / "config.json").write_text(config.replace('"gpt2"', '"t5"'))
    with pytest.raises(InputError, match=r"\(t5\) cannot be read as a causal language model"):
        load_teacher(tmp_path / "nan", LENGTH)
