"""What the configs of others ask for: read, or refused by name."""

from typing import Any

from neural_layers.errors import InputError


def expect(config: Any, field: str, supported: tuple[Any, ...], remedy: str = "") -> None:
    """Raise InputError unless the config's `field` has one of the values that are supported; a missing field has."""
    value = getattr(config, field, supported[0])
    if value not in supported:
        listed = " or ".join(repr(each) for each in supported)
        raise InputError(f"{config.model_type}: {field}={value!r} is not supported, only {listed}" + remedy)


def take(config: Any, *fields: str) -> dict[str, Any]:
    """The fields that the config has under the names they have in `HybridConfig`."""
    return {field: getattr(config, field) for field in fields if hasattr(config, field)}


SHARED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "initializer_range",
    "use_cache",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
