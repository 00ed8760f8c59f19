"""BLEU, chrF and TER of a corpus out of the sums of its sentences' statistics, for many sums at once.

The statistics are sacrebleu's own; the formulas are those of sacrebleu's defaults, so that the scores are its scores.
"""

import numpy as np

from neural_layers.distill.validation.measures import Array, divide

_ORDERS_BLEU, _ORDERS_CHRF, _BETA_SQUARED = 4, 6, 4.0


def bleu(sums: Array) -> Array:
    """BLEU in percent (Papineni et al. 2002, P02-1040): brevity penalty · geometric mean of 1–4-grams' precisions.

    sums: (..., 10): tokens of the hypotheses, of the references, matches of 1–4-grams, 1–4-grams of the hypotheses.
    A precision without matches counts as 1 / (2^k · n-grams), k = how many such there are up to it (the smoothing of
    mteval); without any match at all, or without a 4-gram in the corpus, BLEU is 0.
    """
    ours, theirs, matches, total = sums[..., 0], sums[..., 1], sums[..., 2:6], sums[..., 6:10]
    is_missing = (matches == 0) & (total > 0)
    smoothed = np.where(is_missing, 0.5 ** np.cumsum(is_missing, axis=-1), matches)
    precision = divide(smoothed, total)
    is_defined = (matches > 0).any(axis=-1) & (precision > 0).all(axis=-1)
    logarithms = np.log(np.where(precision > 0, precision, 1.0)).sum(axis=-1) / _ORDERS_BLEU
    brevity = np.minimum(1.0 - divide(theirs, ours), 0.0)
    return np.where(is_defined, 100.0 * np.exp(brevity + logarithms), 0.0)


def chrf(sums: Array) -> Array:
    """chrF2 in percent (Popović 2015, W15-3049): F of mean precision and mean recall of 1–6-grams of characters.

    sums: (..., 18): of each order the n-grams of the hypotheses, of the references, and the matches. An order counts
    where both sides have n-grams of it.
    """
    counts = sums.reshape(*sums.shape[:-1], _ORDERS_CHRF, 3)
    hypotheses, references, matches = counts[..., 0], counts[..., 1], counts[..., 2]
    counted = (hypotheses > 0) & (references > 0)
    orders = counted.sum(axis=-1)
    precision = divide(np.where(counted, divide(matches, hypotheses), 0.0).sum(axis=-1), orders)
    recall = divide(np.where(counted, divide(matches, references), 0.0).sum(axis=-1), orders)
    return 100.0 * divide((1 + _BETA_SQUARED) * precision * recall, _BETA_SQUARED * precision + recall)


def ter(sums: Array) -> Array:
    """TER in percent (Snover et al. 2006): edits, a shift counting as one, over the words of the references.

    sums: (..., 2): edits, words of the references. Without reference words it is 100, or 0 where there are no edits.
    """
    edits, words = sums[..., 0], sums[..., 1]
    return 100.0 * np.where(words > 0, divide(edits, words), (edits > 0).astype(np.float64))
