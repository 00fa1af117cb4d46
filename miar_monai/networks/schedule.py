"""The scales of a latent grid: numbers and positions of their tokens.

Glossary of shapes: B batch; C latent channels; D width of the transformer; H, W high-resolution size; h, w
low-resolution size; K number of scales; side_k side of scale k; L positions of all scales; S codebooks, with one
token each at every position; V codes of a codebook.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from miar_monai.errors import ConfigurationError

__all__ = ["ScaleSchedule"]


@dataclass(frozen=True)
class ScaleSchedule:
    """Sides of the token maps, coarse to fine; the last one is the side of the latent grid.

    The tokens of all scales form one sequence of length ``num_tokens``: scale 0 first, each scale row by row.

    Args:
        sides: strictly increasing, such as VAR's (1, 2, 3, 4, 6, 9, 13, 18, 24, 32) for a latent of side 32.

    Raises:
        ConfigurationError: if there are no sides, or they are not positive and strictly increasing.

    Example:
        >>> schedule = ScaleSchedule((1, 2, 4))
        >>> schedule.num_tokens, schedule.bounds
        (21, ((0, 1), (1, 5), (5, 21)))
    """

    sides: Sequence[int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sides", tuple(int(side) for side in self.sides))
        if not self.sides or self.sides[0] < 1 or any(a >= b for a, b in zip(self.sides, self.sides[1:], strict=False)):
            raise ConfigurationError(
                f"scales is {self.sides}, but the sides must be positive and strictly increasing; correct the setting."
            )

    @property
    def num_scales(self) -> int:
        """K, the number of scales."""
        return len(self.sides)

    @property
    def latent_side(self) -> int:
        """Side of the latent grid, that is of the last scale."""
        return self.sides[-1]

    @property
    def bounds(self) -> tuple[tuple[int, int], ...]:
        """First and one-past-last index of each scale in the sequence of all tokens."""
        ends = tuple(accumulate(side * side for side in self.sides))
        return tuple(zip((0, *ends[:-1]), ends, strict=True))

    @property
    def num_tokens(self) -> int:
        """L, the number of tokens of all scales."""
        return self.bounds[-1][1]

    def split(self, x: Tensor, dim: int = 1) -> tuple[Tensor, ...]:
        """Split a tensor by scale along its token axis."""
        return x.split([side * side for side in self.sides], dim=dim)

    def levels(self) -> Tensor:
        """Return the scale of every token, (L,), int64."""
        return torch.cat([torch.full((side * side,), k) for k, side in enumerate(self.sides)])

    def positions(self) -> Tensor:
        """Return the cell centers of all tokens, (row, column) in units of the latent grid: (L, 2).

        A cell of a scale of side p covers G / p latent cells, so the center of cell r is (r + 1/2) · G / p - 1/2. The
        last scale has the centers 0, 1, …, G - 1.
        """
        grids = []
        for side in self.sides:
            centers = (torch.arange(side, dtype=torch.float64) + 0.5) * self.latent_side / side - 0.5
            grids.append(torch.cartesian_prod(centers, centers))
        return torch.cat(grids)
