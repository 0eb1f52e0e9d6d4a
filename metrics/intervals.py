"""Every bootstrap: 95% intervals of means and of paired differences, over clusters, and over seeds and questions."""

from collections.abc import Sequence

import numpy as np

NUM_RESAMPLES = 1000
_CHUNK = 100  # resamples drawn at once: bounds the memory to 100 x n counts


# ---- intervals -----------------------------------------------------------------------------------------------------
def resampled_means(
    values_NM: np.ndarray, clusters: Sequence[str | int], seed: int, counted_NM: np.ndarray | None = None
) -> np.ndarray:
    """Means of each column over R bootstrap resamples of the clusters, (R, M); those of all rows, or of the counted.

    Clusters are drawn whole (Davison and Hinkley 1997, section 3.8); where each has one row it is the plain bootstrap
    (Efron 1979). The same resamples serve all columns. nan where a resample has no row that counts.
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

    `clusters` says which samples are drawn together; None: each alone.
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
    "The pigeonhole bootstrap"). Percentiles of 1,000 resamples. Of one seed questions alone are drawn; of three it is
    a rough guide, as ten different draws of seeds are all there are.
    """
    (num_seeds, num), rng = values_SN.shape, np.random.default_rng(seed)
    seeds_RS = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=NUM_RESAMPLES) / num_seeds
    questions_RN = rng.multinomial(num, np.full(num, 1 / num), size=NUM_RESAMPLES) / num
    means_R = ((seeds_RS @ values_SN) * questions_RN).sum(1)
    low, high = np.percentile(means_R, (2.5, 97.5))
    return float(values_SN.mean()), float(low), float(high)
