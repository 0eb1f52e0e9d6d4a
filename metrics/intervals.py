"""Every bootstrap: 95% intervals of means and of paired differences, over clusters, and over seeds and questions."""

from collections.abc import Mapping, Sequence

import numpy as np

NUM_RESAMPLES = 1000
_CHUNK = 100  # resamples drawn at once: bounds the memory to 100 x n counts
Values = Mapping[str | int, float]  # of one model: a metric's value by question


def paired_difference(
    before: Values | Sequence[Values], after: Values | Sequence[Values], clusters: Mapping | None = None
) -> tuple[float, float, float]:
    """Mean of after - before, paired by question, and its bootstrap 95% interval: mean, low, high in the values' unit.

    Two models are compared over the questions that both have; `clusters` says by question what is drawn together. Two
    lists of models, paired by seed, have to have the same questions (else a ValueError); seeds and questions are drawn.
    """
    if isinstance(before, Mapping):
        shared = [question for question in before if question in after]
        drawn = None if clusters is None else [clusters[question] for question in shared]
        return paired_interval([before[i] for i in shared], [after[i] for i in shared], clusters=drawn)
    values_SN = matrix([*before, *after])
    return crossed_interval(values_SN[len(before) :] - values_SN[: len(before)])


def matrix(models: Sequence[Values]) -> np.ndarray:
    """(models, questions) of values, questions sorted. Raises ValueError where two models have other questions."""
    questions = sorted(models[0])
    if any(sorted(values) != questions for values in models):
        raise ValueError("the models answered different questions")
    return np.array([[values[question] for question in questions] for values in models])


def in_points(difference: Sequence[float], digits: int = 1) -> str:
    """A difference and its interval as they are printed.

    >>> in_points((1.25, -0.5, 3.0), digits=2)
    '+1.25 [-0.50, +3.00]'
    """
    mean, low, high = (f"{value:+.{digits}f}" for value in difference)
    return f"{mean} [{low}, {high}]"


def resampled_means(
    values_NM: np.ndarray, clusters: Sequence[str | int], seed: int, counted_NM: np.ndarray | None = None
) -> np.ndarray:
    """Means of each column, over all rows or the counted ones, in R bootstrap resamples of the clusters: (R, M).

    Clusters are drawn whole (Davison and Hinkley 1997, section 3.8). With one row each, that is the plain bootstrap
    (Efron 1979). The same resamples serve all columns. A mean is nan where a resample has no row that counts.
    """
    index_N = np.unique(np.array([str(cluster) for cluster in clusters]), return_inverse=True)[1]
    num = int(index_N.max()) + 1
    counted_NM = np.ones((len(values_NM), 1)) if counted_NM is None else counted_NM
    sums_CM, counts_CM = np.zeros((num, values_NM.shape[1])), np.zeros((num, counted_NM.shape[1]))
    np.add.at(sums_CM, index_N, values_NM)
    np.add.at(counts_CM, index_N, counted_NM)
    rng, share, means = np.random.default_rng(seed), np.full(num, 1 / num), []
    for _ in range(NUM_RESAMPLES // _CHUNK):
        drawn = rng.multinomial(num, share, size=_CHUNK)
        with np.errstate(invalid="ignore"):
            means.append((drawn @ sums_CM) / (drawn @ counts_CM))
    return np.concatenate(means)


def bootstrap_interval(
    values_NM: np.ndarray, seed: int = 0, clusters: Sequence[str | int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Bootstrap 95% interval of the mean of each of M columns over N samples: (low, high), (M,) each.

    `clusters` says which samples are drawn together. Without it each sample is drawn alone.
    """
    means_RM = resampled_means(values_NM, range(len(values_NM)) if clusters is None else clusters, seed)
    low, high = np.percentile(means_RM, (2.5, 97.5), axis=0)
    return low, high


def paired_interval(
    a: Sequence[float], b: Sequence[float], seed: int = 0, clusters: Sequence[str | int] | None = None
) -> tuple[float, float, float]:
    """Mean of b - a over the same samples in the same order, and its bootstrap 95% interval: mean, low, high.

    In the unit of the values. Raises ValueError when the lengths differ or are 0.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"paired values need the same samples on both sides, got {len(a)} and {len(b)}")
    difference_N1 = np.subtract(b, a, dtype=float)[:, None]
    low, high = bootstrap_interval(difference_N1, seed, clusters)
    return float(difference_N1.mean()), float(low[0]), float(high[0])


def crossed_interval(values_SN: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Mean of S seeds x N questions and its bootstrap 95% interval, seeds and questions both drawn anew.

    All seeds answer the same questions, so the seeds of a resample share its questions (two-way bootstrap; Owen 2007,
    "The pigeonhole bootstrap"). With one seed only questions are drawn. With three the interval is a rough guide,
    because there are only ten different draws of seeds.
    """
    (num_seeds, num), rng = values_SN.shape, np.random.default_rng(seed)
    seeds_RS = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=NUM_RESAMPLES) / num_seeds
    questions_RN = rng.multinomial(num, np.full(num, 1 / num), size=NUM_RESAMPLES) / num
    means_R = ((seeds_RS @ values_SN) * questions_RN).sum(1)
    low, high = np.percentile(means_R, (2.5, 97.5))
    return float(values_SN.mean()), float(low), float(high)
