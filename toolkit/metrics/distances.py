"""Distances between two sets of feature vectors."""

from __future__ import annotations

import numpy as np
from scipy import linalg


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
