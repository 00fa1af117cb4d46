"""Families of degradations, from which each image of a training batch gets its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miar_monai.degradation.axis import AxisDegradation, AxisOperator
from miar_monai.degradation.description import Degradation
from miar_monai.degradation.separable import SeparableOperator

__all__ = ["Member", "OperatorFamily", "in_plane_degradations", "through_plane_degradations"]


class Member(NamedTuple):
    """A group of degradations with the share of the images that they get together."""

    degradations: Sequence[Degradation]
    share: float


class OperatorFamily(nn.Module):
    """Operators of many degradations for HR images of one size, drawn at random for each image of a batch.

    The LR images of different factors have different sizes; here they are padded with zeros to one size, also the
    matrices, so that a batch can be computed at once, in a CUDA graph.

    Args:
        members: groups of degradations, with their shares of the images.
        side: H = W of the HR images; where it is not a multiple of a factor, the LR images cover the center.

    Example:
        >>> family = OperatorFamily([Member([Degradation()], 1), Member(through_plane_degradations([2, 5]), 3)], 64)
        >>> operator = family.select(family.sample(3))
        >>> hr = torch.rand(3, 1, 64, 64)
        >>> operator.restore(operator.A(hr), 1e-3).shape
        torch.Size([3, 1, 64, 64])
    """

    cumulative: Tensor
    pairs: Tensor
    similar: Tensor
    stop_bands: Tensor

    def __init__(self, members: Sequence[Member | Sequence], side: int) -> None:
        super().__init__()
        groups = [Member(*member) for member in members]
        axes: dict[AxisDegradation, int] = {}  # index of each operator
        listed, pairs, shares = [], [], []
        for degradations, share in groups:
            for degradation in degradations:
                listed.append(degradation)
                height, width = (max(round(side / scale), 1) for scale in degradation.scales)
                rows, columns = degradation.axes((side, side), (height, width))
                pairs.append([axes.setdefault(axis, len(axes)) for axis in (rows, columns)])
                shares.append(share / len(degradations))
        built = [AxisOperator.of(axis) for axis in axes]
        largest = max(len(operator.s) for operator in built)
        self.register_buffer("cumulative", torch.tensor(shares).cumsum(0) / sum(shares), persistent=False)
        self.register_buffer("pairs", torch.tensor(pairs), persistent=False)  # (N, 2)
        self.register_buffer("similar", _similar(listed), persistent=False)  # (N, K)
        bands = [SeparableOperator.of(built[i], built[j]).stop_band for i, j in pairs]
        padded = [F.pad(band, (0, largest - band.shape[1], 0, largest - band.shape[0])) for band in bands]
        self.register_buffer("stop_bands", torch.stack(padded).bool(), persistent=False)  # (N, largest, largest)
        stack = AxisOperator.stack([operator.padded(largest) for operator in built])
        for name, tensor in stack._asdict().items():
            self.register_buffer(f"axis_{name}", tensor.float(), persistent=False)

    def sample(self, count: int) -> Tensor:
        """Draw the degradations of a batch of ``count`` images, on the device of the family: indices, (B,)."""
        drawn = torch.rand(count, device=self.cumulative.device)
        return torch.searchsorted(self.cumulative, drawn).clamp(max=len(self.pairs) - 1)

    def mistaken(self, index: Tensor, share: float) -> Tensor:
        """Replace a share of degradations by similar ones, as where the degradation of an image is assumed wrongly.

        Similar degradations have the same factors, and blurs that differ by at most 0.5 LR voxels on each axis; their
        profiles and thicknesses may differ.

        Args:
            index: from `sample`, (B,).
            share: probability of a replacement.

        Example:
            >>> degradations = [Degradation(2, 0), Degradation(2, 0.5), Degradation(4, 0)]
            >>> family = OperatorFamily([Member(degradations, 1)], 16)
            >>> family.mistaken(torch.tensor([0, 1, 2]), 1.0)
            tensor([1, 0, 2])
        """
        others = self.similar[index]  # (B, K)
        drawn = torch.rand(len(index), 1, device=index.device) * others.shape[1]
        others = others.gather(1, drawn.long().clamp(max=others.shape[1] - 1))[:, 0]
        return others.where(torch.rand(len(index), device=index.device) < share, index)

    def select(self, index: Tensor) -> SeparableOperator:
        """Return the operators of a batch of images (B, 1, H, W), given the indices of their degradations, (B,)."""
        rows, columns = (
            AxisOperator(*(getattr(self, f"axis_{name}")[axis][:, None] for name in AxisOperator._fields))
            for axis in self.pairs[index].unbind(dim=1)
        )
        return SeparableOperator(rows, columns, self.stop_bands[index][:, None].to(rows.s))

    @staticmethod
    def noisy(lr: Tensor, operator: SeparableOperator, std: Tensor) -> Tensor:
        """Add white Gaussian noise with standard deviations (B, 1, 1, 1) to LR images; their padding stays 0."""
        return lr + std * torch.randn_like(lr) * operator.inside


def _similar(members: Sequence[Degradation]) -> Tensor:
    """Return, for each degradation, the indices of similar ones, repeated to fill the rows, or its own: (N, K)."""
    scales, sigmas = (torch.tensor([getattr(one, name) for one in members]) for name in ("scales", "sigmas"))  # (N, 2)
    alike = (scales[:, None] == scales).all(dim=-1) & ((sigmas[:, None] - sigmas).abs() <= 0.5).all(dim=-1)  # (N, N)
    rows = []
    for i, one in enumerate(members):
        rows.append([j for j in alike[i].nonzero()[:, 0].tolist() if members[j] != one] or [i])
    width = max(map(len, rows))
    return torch.tensor([(row * width)[:width] for row in rows])


def in_plane_degradations(
    factors: Iterable[float], blurs: Iterable[float], pairs: Iterable[Sequence[float]] = ()
) -> list[Degradation]:
    """Return bicubic degradations of both axes by the same factors, and by pairs of factors, with different blurs.

    Args:
        factors: factors of both axes.
        blurs: standard deviations of the blur in LR voxels, of the axes whose factor is above 1.
        pairs: factors of rows and columns, used in both orders.

    Example:
        >>> [one.scales for one in in_plane_degradations([2], [0.5], pairs=[(1, 3)])]
        [(2, 2), (1, 3), (3, 1)]
    """
    both = [(factor, factor) for factor in factors]
    both += [pair for rows, columns in pairs for pair in ((rows, columns), (columns, rows))]
    return [Degradation(pair, tuple(blur if factor > 1 else 0.0 for factor in pair)) for blur in blurs for pair in both]


def through_plane_degradations(
    factors: Iterable[float],
    profiles: Iterable[str] = ("gaussian",),
    thicknesses: Iterable[float] = (1.0,),
) -> list[Degradation]:
    """Return degradations of one axis to thick slices, of rows and of columns, without a blur.

    Args:
        factors: spacing of the slices in HR voxels.
        profiles: slice profiles; see `miar_monai.degradation.axis.PROFILES`.
        thicknesses: thickness of the slices over their spacing. Those thinner than an HR voxel are left out.

    Example:
        >>> [one.scales for one in through_plane_degradations([5], thicknesses=(0.1, 1))]
        [(1, 5), (5, 1)]
    """
    result = []
    for factor in factors:
        for profile in profiles:
            for thickness in thicknesses:
                if factor * thickness >= 1:
                    one = Degradation((1, factor), 0.0, profile=("bicubic", profile), thickness=(1.0, thickness))
                    other = replace(one, scale=(factor, 1), profile=(profile, "bicubic"), thickness=(thickness, 1.0))
                    result += [one, other]
    return result
