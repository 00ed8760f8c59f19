"""Longer contexts than a model was trained with."""

from typing import Any

from neural_layers.models.hybrid.config import HybridConfig

_SCALINGS = ("yarn", "linear", "dynamic")


def extended_rope(config: HybridConfig, length: int, scaling: str | dict[str, Any] | None) -> dict[str, Any]:
    """`rope_parameters` with which a model of `config` reads `length` tokens; see `extend_context`.

    The factor is length / the length the model was trained with, which a scaled config still knows.
    """
    old = dict(config.rope_parameters or {})
    if length <= config.max_position_embeddings:
        raise ValueError(f"the model reads {config.max_position_embeddings} tokens already; {length} is not longer")
    if scaling is None:
        return old
    if config.position_embedding != "rope":
        raise ValueError(
            f"scaling={scaling!r} is for RoPE, and the model has position_embedding={config.position_embedding!r}; "
            "give scaling=None"
        )
    theta = old.get("rope_theta", 10000.0)
    if isinstance(scaling, dict):
        if "rope_type" not in scaling:
            raise ValueError(f"scaling={scaling!r} names no rope_type; without one its fields would be ignored")
        return {"rope_theta": theta, **scaling}
    if scaling not in _SCALINGS:
        raise ValueError(f"scaling={scaling!r} must be one of {', '.join(_SCALINGS)}, a dict or None")
    trained = old.get("original_max_position_embeddings") or config.max_position_embeddings / old.get("factor", 1.0)
    parameters = {"rope_type": scaling, "rope_theta": theta, "factor": length / trained}
    if scaling != "linear":
        parameters["original_max_position_embeddings"] = int(trained)
    return parameters
