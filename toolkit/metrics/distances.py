"""Distances between two sets of feature vectors."""

from __future__ import annotations

import numpy as np
from scipy import linalg
from scipy.spatial.distance import cdist


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean ``(D,)`` and unbiased covariance ``(D, D)`` of ``(N, D)`` features."""
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def frechet_from_moments(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """Squared Fréchet distance of two Gaussians (Dowson & Landau 1982; Heusel et al. 2017, eq. 6).

    ``|ma - mb|^2 + tr(A + B - 2 (A B)^(1/2))``. The trace of the root is the sum of the square roots of the eigenvalues
    of ``A^(1/2) B A^(1/2)``, which is symmetric: no complex parts to drop, singular covariances included.
    """
    values, vectors = linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(linalg.eigvalsh(root @ cov_b @ root), 0, None)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Fréchet distance between Gaussians fitted to features ``(N, D)`` and ``(M, D)``, N and M at least 2.

    Raises:
        ValueError: fewer than two vectors on a side.
    """
    if len(a) < 2 or len(b) < 2:
        raise ValueError(f"the Fréchet distance needs at least 2 vectors on each side, not {len(a)} and {len(b)}")
    return max(0.0, frechet_from_moments(*moments(a), *moments(b)))


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel ``(x.y / D + 1)^3`` (Bińkowski et al. 2018, eq. 4).

    It can be slightly negative for equal distributions.

    Raises:
        ValueError: fewer than two vectors on a side.
    """
    n, m, dimension = len(a), len(b), a.shape[1]
    if n < 2 or m < 2:
        raise ValueError(f"the kernel distance needs at least 2 vectors on each side, not {n} and {m}")
    aa, bb, ab = ((p @ q.T / dimension + 1) ** 3 for p, q in ((a, a), (b, b), (a, b)))
    within_a = (aa.sum() - np.trace(aa)) / (n * (n - 1))
    within_b = (bb.sum() - np.trace(bb)) / (m * (m - 1))
    return float(within_a + within_b - 2 * ab.mean())


def _radii(x: np.ndarray, groups: np.ndarray, neighbours: int) -> np.ndarray:
    """Distance of every vector to its ``neighbours``-th nearest other group, the nearest vector of which counts."""
    order = np.argsort(groups, kind="stable")
    _, starts, place = np.unique(groups[order], return_index=True, return_inverse=True)
    nearest = np.minimum.reduceat(cdist(x, x[order]), starts, axis=1)
    own = np.empty(len(x), dtype=int)
    own[order] = place
    nearest[np.arange(len(x)), own] = np.inf
    return np.partition(nearest, neighbours - 1, axis=1)[:, neighbours - 1]


def manifold_measures(
    real: np.ndarray,
    fake: np.ndarray,
    neighbours: int | tuple[int, int] = 5,
    real_groups: np.ndarray | None = None,
    fake_groups: np.ndarray | None = None,
) -> dict[str, float]:
    """Precision and recall (Kynkäänniemi et al. 2019, eq. 1 and 2), density and coverage (Naeem et al. 2020, eq. 3 and 5).

    The manifold of a set is the union of balls around its vectors, each reaching to the ``neighbours``-th nearest other
    vector of the set. ``precision``: share of fakes in the real manifold; ``recall``: share of reals in the manifold of
    the fakes; ``density``: mean number of real balls that a fake lies in, over ``neighbours`` (can exceed 1);
    ``coverage``: share of real balls that hold a fake.

    Frames of one clip are near-copies, whose balls would hold nothing but the next frame. So vectors may come in groups:
    then a ball reaches to the ``neighbours``-th nearest other group, and in the density the balls of a group count as
    one. With every vector a group of its own these are the published measures.

    Args:
        real, fake: features ``(N, D)`` and ``(M, D)``.
        neighbours: 5, as recommended by Naeem et al.; 3 is that of Kynkäänniemi et al. Two numbers for real and fake apart.
        real_groups, fake_groups: ``(N,)`` and ``(M,)`` group of each vector; by default each its own.

    Raises:
        ValueError: a set has no more than ``neighbours`` groups.
    """
    near = (neighbours, neighbours) if isinstance(neighbours, int) else neighbours
    groups = [np.arange(len(x)) if g is None else np.asarray(g) for x, g in ((real, real_groups), (fake, fake_groups))]
    counts = [len(np.unique(g)) for g in groups]
    if any(count <= k for count, k in zip(counts, near, strict=True)):
        raise ValueError(f"{max(near)} neighbours need more vectors (groups) than that on each side, not {counts[0]} and {counts[1]}")
    radius_real, radius_fake = (_radii(x, g, k) for x, g, k in zip((real, fake), groups, near, strict=True))
    between = cdist(real, fake)
    in_real = between < radius_real[:, None]
    _, place, size = np.unique(groups[0], return_inverse=True, return_counts=True)
    return {
        "precision": float(in_real.any(axis=0).mean()),
        "recall": float((between < radius_fake[None, :]).any(axis=1).mean()),
        "density": float((in_real / size[place][:, None]).sum(axis=0).mean() / near[0]),
        "coverage": float((between.min(axis=1) < radius_real).mean()),
    }
