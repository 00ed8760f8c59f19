"""Handing the layers of a transformers cache to mixers."""

from typing import Any


def cache_layer(cache: Any, index: int) -> Any:
    """Layer `index` of a transformers `Cache`, made first where the cache makes its layers lazily; None for None.

    Raises ValueError for a static layer: it returns keys of its full capacity, which only a mask of the model could
    tell from real ones.
    """
    if cache is None:
        return None
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if type(layer).__name__.startswith("Static"):
        raise ValueError(f"{type(layer).__name__} is not supported; use a DynamicCache (the default of generate)")
    return layer
