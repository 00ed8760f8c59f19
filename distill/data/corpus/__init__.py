"""The embedded corpus: `generate_corpus` makes English and German sentence pairs from a grammar of our own."""

from neural_layers.distill.data.corpus.generate import Corpus, CorpusSizes, generate_corpus, translate

__all__ = ["Corpus", "CorpusSizes", "generate_corpus", "translate"]
