"""Any causal language model of transformers as a teacher of packed sequences.

Letters: B batch, T length, R documents of a batch, L the longest of them, V vocabulary, D width.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from neural_layers.distill.text.errors import first_line
from neural_layers.errors import InputError
from neural_layers.models.loading import check_model_folder, check_weights, load_model, model_type

_PROBED, _BORDER = 12, 5


class TransformersTeacher(nn.Module):
    """A language model that sees every document of a packed sequence as if it came alone.

    packs: whether the model itself does so where `position_ids` restart. Attention of transformers does, without an
           attention mask; a recurrence does not, and goes on with the state of the document before. Where it does not,
           each document goes through the model in a row of its own, padded behind its end, where nothing causal looks.
    """

    def __init__(self, model: Any, packs: bool) -> None:
        super().__init__()
        self.model, self.packs, self.config = model, packs, model.config.get_text_config()

    @property
    def wrapped(self) -> Any:
        """The model itself."""
        return self.model

    def forward(
        self,
        input_ids: Tensor,
        seq_idx: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool = False,
        use_cache: bool = False,
    ) -> CausalLMOutput:
        """Logits (B, T, V) and, where asked for, states (B, T, D) of ids (B, T).

        position_ids: (B, T), from 0 in every document; left out where each row is one. seq_idx: not needed beside it
        """
        return self._documents(input_ids, position_ids, use_cache=use_cache, output_hidden_states=output_hidden_states)

    def _documents(self, input_ids: Tensor, position_ids: Tensor | None, **asked: Any) -> CausalLMOutput:
        if position_ids is None or self.packs:
            positions = {} if position_ids is None else {"position_ids": position_ids}
            output = self.model(input_ids=input_ids, **positions, **asked)
            return CausalLMOutput(logits=output.logits, hidden_states=output.hidden_states)
        document_BT = (position_ids.flatten() == 0).cumsum(0).view_as(position_ids) - 1
        rows_RL = input_ids.new_zeros(int(document_BT.max()) + 1, int(position_ids.max()) + 1)
        rows_RL[document_BT, position_ids] = input_ids
        output = self.model(input_ids=rows_RL, **asked)
        states = output.hidden_states and tuple(state[document_BT, position_ids] for state in output.hidden_states)
        # Where the model was told to keep the last token's logits alone there are none to put back.
        has_all = output.logits.shape[1] == rows_RL.shape[1]
        logits = output.logits[document_BT, position_ids] if has_all else output.logits
        return CausalLMOutput(logits=logits, hidden_states=states)


class LinearHeadTeacher(TransformersTeacher):
    """A teacher whose logits are its last states times a matrix, so that a loss never needs them all at once."""

    def get_output_embeddings(self) -> nn.Module:
        """The matrix, as the weight of a linear layer."""
        head: nn.Module = self.model.get_output_embeddings()
        return head

    def forward(
        self,
        input_ids: Tensor,
        seq_idx: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool = False,
        use_cache: bool = False,
        skip_logits: bool = False,
    ) -> CausalLMOutput:
        """As above; with `skip_logits` there are states, and the logits are of the last token alone."""
        fewer = {"logits_to_keep": 1} if skip_logits else {}
        asked = {"use_cache": use_cache, "output_hidden_states": output_hidden_states}
        return self._documents(input_ids, position_ids, **asked, **fewer)


def load_teacher(folder: Path, context: int) -> Any:
    """The language model in `folder` as a teacher, in float32 and in evaluation mode.

    Raises: InputError for a folder without a causal language model, weights that are not safetensors, do not fit or are
    not finite, and a `context` that is longer than the model reads.
    """
    model: Any
    if model_type(folder) == "neural_hybrid":
        check_model_folder(folder)
        model = load_model(folder).float()
    else:
        model = teacher_of(load_transformers(folder))
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and context > longest:
        raise InputError(f"--context {context} is longer than the {longest} tokens that the teacher in {folder} reads")
    return model.eval()


def teacher_of(model: Any) -> TransformersTeacher:
    """A model of transformers as a teacher; whether it packs and has a linear head is tried out on a few tokens."""
    kind = LinearHeadTeacher if _has_linear_head(model.eval()) else TransformersTeacher
    return kind(model, packs=packs_documents(model))


def load_transformers(folder: Path) -> Any:
    """The causal language model of transformers in `folder`, in float32; raises InputError as `load_teacher`."""
    kind = model_type(folder)
    check_weights(folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told below
        )
        model, info = loaded
    except Exception as error:
        raise InputError(
            f"the model in {folder} ({kind}) cannot be read as a causal language model: {first_line(error)}"
        ) from error
    absent = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
    if absent:
        raise InputError(
            f"the weights in {folder} do not fit its config.json: {absent[0]} is missing or of another shape"
        )
    wrong = [name for name, weight in model.named_parameters() if not bool(weight.isfinite().all())]
    if wrong:
        raise InputError(f"{wrong[0]} in {folder} holds numbers that are not finite; take an earlier checkpoint")
    return model


def _some_tokens(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.get_text_config().vocab_size, (1, _PROBED), generator=generator)


@torch.no_grad()
def packs_documents(model: Any) -> bool:
    """Whether restarting positions keep two documents apart, judged by what the first does to the second without."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    tokens = _some_tokens(model)
    positions = torch.cat([torch.arange(_BORDER), torch.arange(_PROBED - _BORDER)]).unsqueeze(0)
    run: Callable[..., Tensor] = lambda ids, **given: model(input_ids=ids, use_cache=False, **given).logits  # noqa: E731
    alone = run(tokens[:, _BORDER:])
    leaking = (run(tokens)[:, _BORDER:] - alone).abs().max()
    kept_apart = (run(tokens, position_ids=positions)[:, _BORDER:] - alone).abs().max()
    return bool(kept_apart < 1e-2 * leaking)


@torch.no_grad()
def _has_linear_head(model: Any) -> bool:
    """Whether the logits are what a linear layer without bias makes of the last states, bit for bit."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        return False
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return False
    seen: list[tuple[Tensor, Tensor]] = []
    hook = head.register_forward_hook(lambda module, given, made: seen.append((given[0], made)))
    try:
        output = model(input_ids=_some_tokens(model), output_hidden_states=True, use_cache=False)
    finally:
        hook.remove()
    states = output.hidden_states
    return (
        len(seen) == 1
        and bool(states)
        and torch.equal(seen[0][0], states[-1])
        and torch.equal(seen[0][1], output.logits)
    )
