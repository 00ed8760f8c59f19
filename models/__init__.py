"""Models assembled from the blocks; each is a `transformers` model. What serves exported ones needs no transformers."""
