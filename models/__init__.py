"""Models assembled from the blocks; each is a `transformers` model."""

from neural_layers.errors import require

require("transformers", extra="models")
