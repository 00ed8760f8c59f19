"""BERTScore (arXiv 1904.09675) by an encoder in a local folder."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neural_layers.distill.validation.measures import Array
from neural_layers.errors import InputError


class BertScore:
    """F1 of the greedy matching of contextual embeddings.

        P = mean over x̂ᵢ of max over xⱼ of cos(x̂ᵢ, xⱼ)    R = mean over xⱼ of max over x̂ᵢ    F = 2·P·R / (P + R)

    with the states x̂ of the hypothesis and x of the reference after `num_layers` layers; without idf weights and
    without rescaling. As in the authors' package, tokens that the tokenizer adds may be matched, but are not averaged
    over, and an empty text scores 0. (The package itself fails on empty texts with current transformers.)

    folder:     an encoder, or an encoder-decoder, as transformers saves it, with its tokenizer and safetensors
    num_layers: how many layers the states pass; None for all
    Raises InputError where the folder holds no such model or has fewer layers.
    """

    def __init__(self, folder: str | os.PathLike[str], num_layers: int | None = None, batch_size: int = 32) -> None:
        from transformers import AutoConfig

        self.folder = Path(folder)
        if not (self.folder / "config.json").is_file():
            raise InputError(f"{self.folder}: no config.json; give the folder of an encoder as transformers saves it")
        if not list(self.folder.glob("*.safetensors")):
            raise InputError(f"{self.folder}: no *.safetensors; save the encoder with save_pretrained again")
        config = AutoConfig.from_pretrained(self.folder, local_files_only=True)
        depth = getattr(config, "encoder_layers", None) or config.num_hidden_layers
        self.num_layers = depth if num_layers is None else num_layers
        if not 1 <= self.num_layers <= depth:
            raise InputError(f"{num_layers} layers for BERTScore, but {self.folder} has {depth}; give 1 to {depth}")
        self.batch_size = batch_size
        self._loaded: tuple[Any, Any] | None = None

    def f1(self, hypotheses: Sequence[str], references: Sequence[str]) -> Array:
        """(n,): the score of each sentence, in percent."""
        order = sorted(range(len(references)), key=lambda i: len(references[i]) + len(hypotheses[i]))
        scores = np.zeros(len(references))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            ours, theirs = [self._embed([texts[i] for i in rows]) for texts in (hypotheses, references)]
            scores[rows] = 100 * greedy_f1(*ours, *theirs).double().cpu().numpy()
        return scores

    @torch.no_grad()
    def _embed(self, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Normed states (B, T, D), which are tokens (B, T), and which of those stand for text (B, T)."""
        model, tokenizer = self._load()
        limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512))
        batch = tokenizer(
            [text.strip() for text in texts],
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=limit,
            return_special_tokens_mask=True,
        ).to(model.device)
        is_token = batch["attention_mask"].bool()
        is_text = is_token & ~batch["special_tokens_mask"].bool()
        output = model(batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
        states = output.hidden_states[self.num_layers].float()
        return torch.nn.functional.normalize(states, dim=-1), is_token, is_text

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            from transformers import AutoModel, AutoTokenizer

            model = AutoModel.from_pretrained(self.folder, local_files_only=True, use_safetensors=True).eval()
            tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            if model.config.is_encoder_decoder:
                model = model.get_encoder()
            self._loaded = model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer
        return self._loaded


def greedy_f1(
    hypothesis: Tensor,
    hypothesis_tokens: Tensor,
    hypothesis_text: Tensor,
    reference: Tensor,
    reference_tokens: Tensor,
    reference_text: Tensor,
) -> Tensor:
    """F (B,) of normed states (B, T, D), (B, S, D), with masks (B, T), (B, S) of tokens and of those of the text."""
    similarity = hypothesis @ reference.mT
    matched = similarity.masked_fill(~(hypothesis_tokens[:, :, None] & reference_tokens[:, None]), -1.0)
    precision = _masked_mean(matched.amax(dim=2), hypothesis_text)
    recall = _masked_mean(matched.amax(dim=1), reference_text)
    both = precision + recall
    is_scored = hypothesis_text.any(dim=1) & reference_text.any(dim=1) & (both > 0)
    return torch.where(is_scored, 2 * precision * recall / both.where(is_scored, torch.ones_like(both)), 0.0)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1)
