"""Adversarial losses and gradient penalties. Scores are ``(N,)``, higher for real; every loss is a scalar mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LossName = Literal["bce", "hinge", "lsgan", "wgan-gp"]


class AdversarialLoss(NamedTuple):
    """``discriminator(real scores, fake scores)`` and ``generator(fake scores)``."""

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


def _bce_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def _bce_probabilities(real: Tensor, fake: Tensor) -> Tensor:
    return F.binary_cross_entropy(real, torch.ones_like(real)) + F.binary_cross_entropy(fake, torch.zeros_like(fake))


LOSSES: dict[str, AdversarialLoss] = {
    # Goodfellow et al. 2014, eq. 1, with the non-saturating generator of section 3; on logits.
    "bce": AdversarialLoss(_bce_discriminator, lambda fake: F.softplus(-fake).mean()),
    # The same for a discriminator whose output site is a sigmoid.
    "bce-probability": AdversarialLoss(_bce_probabilities, lambda fake: F.binary_cross_entropy(fake, torch.ones_like(fake))),
    # Lim & Ye 2017, arXiv:1705.02894; Miyato et al. 2018, eq. 16 and 17.
    "hinge": AdversarialLoss(lambda real, fake: F.relu(1 - real).mean() + F.relu(1 + fake).mean(), lambda fake: -fake.mean()),
    # Mao et al. 2017, eq. 9 with a = 0, b = c = 1.
    "lsgan": AdversarialLoss(
        lambda real, fake: 0.5 * ((real - 1) ** 2).mean() + 0.5 * (fake**2).mean(),
        lambda fake: 0.5 * ((fake - 1) ** 2).mean(),
    ),
    # Arjovsky et al. 2017; its penalty is gradient_penalty below.
    "wgan-gp": AdversarialLoss(lambda real, fake: fake.mean() - real.mean(), lambda fake: -fake.mean()),
}


def gradient_penalty(discriminator: nn.Module, real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    """``mean((|grad D(x)| - 1)^2)`` on random points between real and fake images (Gulrajani et al. 2017, eq. 3).

    Args:
        discriminator: maps ``(N, 3, H, W)`` to ``(N,)``.
        real, fake: ``(N, 3, H, W)``.
        mix: ``(N,)`` uniform in [0, 1): the share of the real image in each point.
    """
    mix = mix.view(-1, 1, 1, 1).to(real.dtype)
    points = (mix * real + (1 - mix) * fake).detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(discriminator(points).sum(), points, create_graph=True)
    return ((gradient.flatten(1).norm(dim=1) - 1) ** 2).mean()


def r1_penalty(discriminator: nn.Module, real: Tensor) -> Tensor:
    """``mean(|grad D(x)|^2)`` on real images, to be weighted by gamma / 2 (Mescheder et al. 2018, eq. 9)."""
    points = real.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(discriminator(points).sum(), points, create_graph=True)
    return gradient.flatten(1).square().sum(dim=1).mean()
