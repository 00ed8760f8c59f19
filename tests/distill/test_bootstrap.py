"""The paired bootstrap: against all possible samples, against sacrebleu's own, and on planted differences."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neural_layers.distill.validation import bootstrap
from neural_layers.distill.validation.bootstrap import paired_bootstrap, ratio_interval
from neural_layers.distill.validation.measures import Measure, mean_measure, quotient


def test_shares_and_interval_are_those_of_all_possible_samples() -> None:
    ours, theirs = np.array([0.0, 2.0, 1.0, 4.0]), np.array([1.0, 1.0, 1.0, 2.0])
    samples = [list(rows) for rows in itertools.product(range(4), repeat=4)]
    differences = np.array([ours[rows].mean() - theirs[rows].mean() for rows in samples])
    found = paired_bootstrap(mean_measure("m", ours), mean_measure("m", theirs), samples=40_000)
    assert (found.value, found.reference, found.difference) == (1.75, 1.25, 0.5)
    assert found.better == pytest.approx((differences > 0).mean(), abs=0.01)
    assert found.worse == pytest.approx((differences < 0).mean(), abs=0.01)
    assert [found.low, found.high] == pytest.approx(np.quantile(differences, [0.025, 0.975]), abs=0.01)


@pytest.mark.parametrize("name", ["BLEU", "CHRF"])
def test_the_interval_is_that_of_sacrebleus_own_resampling(name: str) -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
    from sacrebleu.significance import _bootstrap_resample

    from neural_layers.distill.validation.metrics import TranslationScorer

    references, ours, theirs = _corpus(120, [0.25, 0.3])
    metric = getattr(sacrebleu.metrics, name)(references=[references])
    # Its seed is fixed, so that both systems are drawn alike: the differences are paired.
    samples = [
        np.array(
            [s.score for s in _bootstrap_resample(metric._extract_corpus_statistics(texts, None), metric, 2000)[1]]
        )
        for texts in (ours, theirs)
    ]
    expected = np.quantile(samples[0] - samples[1], [0.025, 0.975])
    scorer = TranslationScorer(references)
    found = paired_bootstrap(*[scorer.measures(texts)[name.lower()] for texts in (ours, theirs)], samples=2000)
    assert [found.low, found.high] == pytest.approx(expected, abs=0.08 * (expected[1] - expected[0]))
    assert found.better == pytest.approx((samples[0] > samples[1]).mean(), abs=0.04)


def _corpus(size: int, error_rates: list[float]) -> list[list[str]]:
    """References, and hypotheses with so many words replaced."""
    generator = np.random.default_rng(1)
    references = [generator.integers(40, size=generator.integers(4, 20)) for _ in range(size)]
    spoiled = [
        [np.where(generator.random(len(row)) < rate, generator.integers(40, size=len(row)), row) for row in references]
        for rate in error_rates
    ]
    return [[" ".join(f"w{word}" for word in row) for row in rows] for rows in (references, *spoiled)]


@given(st.integers(1, 50), st.integers(1, 40), st.integers(0, 2**32))
@settings(max_examples=25, derandomize=True, deadline=None, database=None)
def test_the_parts_that_samples_are_drawn_in_change_nothing(number: int, samples: int, seed: int) -> None:
    values = np.random.default_rng(seed).random((2, number))
    measures = [mean_measure("m", row) for row in values]
    whole = paired_bootstrap(*measures, samples=samples, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "_COUNTS_AT_ONCE", 3 * number)
        parts = paired_bootstrap(*measures, samples=samples, seed=seed)
    assert parts.as_dict() == pytest.approx(whole.as_dict(), abs=1e-12)
    assert whole.low <= whole.high
    assert whole.better + whole.worse <= 1


def test_a_seed_gives_the_same_samples_and_another_seed_others() -> None:
    measures = [mean_measure("m", np.random.default_rng(i).random(30)) for i in range(2)]
    assert paired_bootstrap(*measures, seed=7) == paired_bootstrap(*measures, seed=7)
    assert paired_bootstrap(*measures, seed=7).low != paired_bootstrap(*measures, seed=8).low


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_a_planted_fall_is_confirmed_and_an_accident_is_not(higher_is_better: bool) -> None:
    generator, sign = np.random.default_rng(0), 1 if higher_is_better else -1
    best = generator.normal(size=400)
    fallen, other = best - sign * (0.2 + generator.normal(size=400)), best + generator.normal(size=400)
    other -= (other - best).mean() + sign * 0.01
    best_measure, fallen_measure, other_measure = (
        mean_measure("m", v, higher_is_better) for v in (best, fallen, other)
    )
    worse = paired_bootstrap(fallen_measure, best_measure)
    assert worse.is_worse
    assert not worse.is_better
    assert worse.worse > 0.99
    better = paired_bootstrap(best_measure, fallen_measure)
    assert better.is_better
    assert not better.is_worse
    accident = paired_bootstrap(other_measure, best_measure)
    assert not accident.is_worse
    assert not accident.is_better


def test_pairing_finds_a_small_fall_that_independent_samples_would_hide() -> None:
    best = np.random.default_rng(0).normal(size=200) * 10
    found = paired_bootstrap(mean_measure("m", best - 0.1), mean_measure("m", best))
    assert found.high == pytest.approx(-0.1)
    assert found.low == pytest.approx(-0.1)


def test_a_model_compared_with_itself_is_neither_better_nor_worse() -> None:
    measure = mean_measure("m", np.random.default_rng(0).random(10))
    found = paired_bootstrap(measure, measure)
    assert (found.difference, found.low, found.high, found.better, found.worse) == (0, 0, 0, 0, 0)
    assert not found.is_worse
    assert not found.is_better


def test_the_ratio_says_what_is_kept_in_either_direction() -> None:
    teacher = np.random.default_rng(0).uniform(1, 2, size=50)
    ratio, low, high = ratio_interval(mean_measure("m", 0.8 * teacher), mean_measure("m", teacher))
    assert (ratio, low, high) == pytest.approx((0.8, 0.8, 0.8))
    kept = ratio_interval(mean_measure("loss", 1.25 * teacher, False), mean_measure("loss", teacher, False))
    assert kept == pytest.approx((0.8, 0.8, 0.8))
    noisy = ratio_interval(mean_measure("m", teacher[::-1]), mean_measure("m", teacher))
    assert noisy[0] == pytest.approx(1.0)
    assert noisy[1] < 1 < noisy[2]


def test_where_the_teacher_has_nothing_there_is_nothing_to_keep() -> None:
    assert ratio_interval(mean_measure("m", [1.0, 0.0]), mean_measure("m", [0.0, 0.0])) is None
    # In a quarter of the samples the teacher has nothing: they are left out.
    ratio = ratio_interval(mean_measure("m", [1.0, 1.0]), mean_measure("m", [0.0, 1.0]))
    assert ratio == pytest.approx((2.0, 1.0, 2.0))


def test_what_cannot_be_compared_is_refused() -> None:
    three, four = mean_measure("m", [1, 2, 3]), mean_measure("m", [1, 2, 3, 4])
    with pytest.raises(ValueError, match="3 and 4 examples of m"):
        paired_bootstrap(three, four)
    with pytest.raises(ValueError, match="'m' is compared with 'n'"):
        paired_bootstrap(three, mean_measure("n", [1, 2, 3]))
    with pytest.raises(ValueError, match="samples=0"):
        paired_bootstrap(three, three, samples=0)
    for confidence in (0.0, 1.0, -1.0, 95.0, float("nan")):
        with pytest.raises(ValueError, match="confidence="):
            ratio_interval(three, three, confidence=confidence)


def test_a_measure_needs_finite_statistics_of_examples() -> None:
    with pytest.raises(ValueError, match=r"m: statistics of shape \(0, 2\)"):
        mean_measure("m", [])
    with pytest.raises(ValueError, match=r"m: statistics of shape \(3,\)"):
        Measure("m", np.ones(3), quotient)
    with pytest.raises(ValueError, match=r"m: the statistics of example 1 are \[nan, 1.0\]"):
        mean_measure("m", [0.0, float("nan")])
