"""Files and folders that appear whole or not at all: the names of `neural_layers.files`, for this package."""

from neural_layers.files import replacing, save_json

__all__ = ["replacing", "save_json"]
