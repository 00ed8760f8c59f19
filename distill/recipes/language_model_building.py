"""The model that a language model's training begins with."""

from pathlib import Path
from typing import Any

from neural_layers.distill.recipes.language_model_options import LanguageModelOptions
from neural_layers.distill.text.errors import first_line
from neural_layers.distill.text.tokenizing import fingerprint, load_text_tokenizer
from neural_layers.errors import InputError
from neural_layers.models.hybrid import HybridConfig, HybridForCausalLM, attention_every, pure, samba
from neural_layers.models.loading import check_vocabulary, load_model

_FIELDS = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "ff": "intermediate_size",
}


def build_model(options: LanguageModelOptions, tokenizer: Any) -> HybridForCausalLM:
    """A new model of the sizes that the options name, or that of `options.model`.

    Raises: InputError for sizes that do not fit each other, and for a model that cannot be loaded, is no hybrid, has
    another tokenizer or too short a context.
    """
    if options.model is not None:
        return _given_model(options, tokenizer)
    return HybridForCausalLM(_config(options, tokenizer))


def _config(options: LanguageModelOptions, tokenizer: Any) -> HybridConfig:
    sizes = {field: value for name, field in _FIELDS.items() if (value := getattr(options, name)) is not None}
    if "num_attention_heads" in sizes:
        sizes.setdefault("num_key_value_heads", sizes["num_attention_heads"])
    try:
        depth = HybridConfig.preset(options.preset, **sizes, mixers=None).num_hidden_layers
        return HybridConfig.preset(
            options.preset,
            **sizes,
            mixers=mixers_named(options.mixers, depth),
            vocab_size=max(tokenizer.get_vocab().values()) + 1,
            max_position_embeddings=options.max_context or options.context,
            dropout=options.dropout,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"the model cannot be built: {first_line(error)}") from error


def mixers_named(name: str, depth: int) -> list[str]:
    """The mixer of each of `depth` layers: "hybrid" (every fourth attention, the others Mamba), "samba", one mixer's
    name for all layers, or one name a layer with commas between. Raises InputError for anything else."""
    if name == "hybrid":
        return attention_every(depth)
    if name == "samba":
        return samba(depth)
    names = name.split(",")
    known = ("mamba", "mamba2", "attention", "sliding_attention")
    if unknown := [n for n in names if n not in known]:
        raise InputError(
            f"--mixers {unknown[0]} is unknown; give hybrid, samba, or one or several of {', '.join(known)}"
        )
    if len(names) == 1:
        return pure(depth, name)
    if len(names) != depth:
        raise InputError(f"--mixers names {len(names)} layers and the model has {depth}; name each, or change --layers")
    return names


def check_tokenizer(folder: Path, model: Any, tokenizer: Any) -> None:
    """Raise InputError where `tokenizer` is not the one that the model in `folder` was trained with."""
    if not (folder / "tokenizer.json").is_file():
        check_vocabulary(tokenizer, model.config.vocab_size, folder)
    elif fingerprint(load_text_tokenizer(folder)) != fingerprint(tokenizer):
        raise InputError(
            f"--tokenizer differs from the tokenizer of the model in {folder}; leave it out to take the model's"
        )


def _given_model(options: LanguageModelOptions, tokenizer: Any) -> HybridForCausalLM:
    assert options.model is not None
    model = load_model(options.model).float()  # to add small steps to: bfloat16 would round them away
    check_tokenizer(options.model, model, tokenizer)
    longest = model.config.max_position_embeddings
    if options.context > longest:
        raise InputError(
            f"--context {options.context} is longer than the {longest} tokens of the model in {options.model}; give "
            "less, or extend it first (model.extend_context)"
        )
    return model
