"""The separable linear operator of a degradation, and what follows from it in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from miar_monai.degradation.axis import AxisOperator
from miar_monai.degradation.resampling import resample

__all__ = ["SeparableOperator"]

_LEVEL_STEPS = 8


class SeparableOperator(NamedTuple):
    r"""The linear operator ``A x = P x Q^T``, ``P`` for the rows and ``Q`` for the columns of images.

    One operator for all images of a batch, or, as `select` returns it, one for each. It consists of tensors alone, so
    that a CUDA graph can have it as its input. Methods named as in deepinv (``A``, ``A_adjoint``, ``A_dagger``,
    ``prox``) do the same as there. Everything is computed in the dtype of the operator, which is that of the images,
    and never in a lower precision by autocast.

    ``P = U diag(s) V^T``; ``S`` is the outer product of the singular values of rows and columns. A ``damping`` is the
    standard deviation of the noise of the LR image relative to that of the detail to be restored, a number for all
    images or (..., 1, 1). It applies at the resolution limit of the LR image and falls in proportion to the frequency,
    as in a Wiener filter for images, whose spectra fall about as 1/f. So the low frequencies of the LR image, and with
    them the level of every tissue, are kept whatever its noise. A damping of 0 needs a noiseless LR image in float64:
    an operator with a blur amplifies noise by up to 10 000.

    Example:
        >>> from miar_monai.degradation import Degradation
        >>> hr = torch.rand(1, 1, 64, 32)
        >>> operator = Degradation(scale=(4, 1), sigma=(1, 0)).for_hr(hr)
        >>> lr = operator.A(hr)
        >>> lr.shape, operator.restore(lr, 1e-3).shape
        (torch.Size([1, 1, 16, 32]), torch.Size([1, 1, 64, 32]))
    """

    rows: AxisOperator
    columns: AxisOperator
    stop_band: Tensor
    """Indices of the eighth of the coefficients with the smallest singular values, in flattened LR images, (..., n)."""

    @classmethod
    def of(cls, rows: AxisOperator, columns: AxisOperator) -> SeparableOperator:
        """Combine the operators of both axes."""
        passing = torch.outer(rows.s, columns.s).flatten()
        return cls(rows, columns, passing.argsort()[: max(len(passing) // 8, 1)])

    @classmethod
    def stack(cls, operators: Sequence[SeparableOperator]) -> SeparableOperator:
        """Stack operators of equal sizes along a new first axis, for `select`."""
        rows, columns = (AxisOperator.stack(axes) for axes in list(zip(*operators, strict=True))[:2])
        return cls(rows, columns, torch.stack([operator.stop_band for operator in operators]))

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor]) -> SeparableOperator:
        """Return the operator of the tensors that `tensors` returns."""
        count = len(AxisOperator._fields)
        return cls(AxisOperator(*tensors[:count]), AxisOperator(*tensors[count : 2 * count]), tensors[-1])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors of the operator, in one row."""
        return *self.rows, *self.columns, self.stop_band

    def select(self, index: Tensor) -> SeparableOperator:
        """Return the operators of a batch of images, (B, 1, H, W), from a stack, by their index in it, (B,)."""
        return self.from_tensors([x[index][:, None] for x in self.tensors])

    def to(self, like: Tensor) -> SeparableOperator:
        """Return the operator with the dtype and on the device of a tensor."""
        *floats, stop_band = self.tensors
        return self.from_tensors([*(x.to(like) for x in floats), stop_band.to(like.device)])

    @property
    def hr_shape(self) -> tuple[int, int]:
        """(H, W)."""
        return self.rows.matrix.shape[-1], self.columns.matrix.shape[-1]

    @property
    def lr_shape(self) -> tuple[int, int]:
        """(h, w)."""
        return self.rows.matrix.shape[-2], self.columns.matrix.shape[-2]

    @property
    def sigma(self) -> Tensor:
        """Standard deviation of the blur in LR voxels, the mean of both axes: (..., 1, 1)."""
        return ((self.rows.sigma + self.columns.sigma) / 2)[..., None, None]

    def A(self, x: Tensor) -> Tensor:
        """Degrade images (..., H, W) to (..., h, w)."""
        with torch.autocast(x.device.type, enabled=False):
            return resample(x, self.rows.matrix, self.columns.matrix)

    def A_adjoint(self, y: Tensor) -> Tensor:
        """Apply the transpose, ``P^T y Q``, to images (..., h, w): (..., H, W)."""
        with torch.autocast(y.device.type, enabled=False):
            return resample(y, self.rows.matrix.mT, self.columns.matrix.mT)

    def A_dagger(self, y: Tensor, damping: float | Tensor = 0.0) -> Tensor:
        r"""Apply the damped pseudo-inverse to images (..., h, w): (..., H, W).

        ``V[(U^T y) * S / (S^2 + D^2)] V^T`` with ``D`` the damping of each coefficient; without damping, the
        Moore-Penrose inverse.
        """
        s, damping = self._singular_values, self._damping_of_each(damping)
        with torch.autocast(y.device.type, enabled=False):
            coefficients = self._coefficients(y) * (s / (s**2 + damping**2))
            return resample(coefficients, self.rows.vt.mT, self.columns.vt.mT)

    def prox(self, x: Tensor, y: Tensor, damping: float | Tensor) -> Tensor:
        r"""Return the images closest to ``x`` that degrade to ``y``: ``x + A_dagger(y - A x)``.

        The proximal step of the data fidelity: the minimum of ``|y - A z|^2 + |D V^T (z - x) V|^2`` over all ``z`` that
        differ from ``x`` in the row space of ``A`` only. Without damping and with an exact ``y`` this is the orthogonal
        projection on all images that explain ``y``, which hold the truth: the mean squared error cannot grow.

        Args:
            x: estimates, (..., H, W).
            y: LR images, (..., h, w).
            damping: see the class.

        Returns:
            The corrected estimates, (..., H, W).

        Reference:
            Wang et al., Zero-Shot Image Restoration Using Denoising Diffusion Null-Space Model, 2023.
        """
        return x + self.A_dagger(y - self.A(x), damping)

    def interpolate(self, y: Tensor) -> Tensor:
        """Upsample LR images (..., h, w) by bicubic interpolation: (..., H, W)."""
        with torch.autocast(y.device.type, enabled=False):
            return resample(y, self.rows.upsample, self.columns.upsample)

    def restore(self, y: Tensor, damping: float | Tensor) -> Tensor:
        """Return the linear estimate of LR images (..., h, w): `prox` of their bicubic interpolation, (..., H, W).

        The strongest linear baseline: 4 dB above bicubic where ``y`` is exact and blurred.
        """
        return self.prox(self.interpolate(y), y, damping)

    def bounded(self, x: Tensor, floor: float | Tensor) -> Tensor:
        """Return images none of whose voxels is below a floor, and whose LR images are about the same.

        Clipped voxels alone would leave their surroundings too bright, so that the low frequencies of what clipping
        adds are taken off, and the result is clipped again: projected Landweber iterations, accelerated by momentum.

        Args:
            x: images, (..., H, W); those that are nowhere below the floor stay as they are.
            floor: such as 0 for magnitudes; one for all, or (..., 1, 1).

        Reference:
            Beck and Teboulle, A Fast Iterative Shrinkage-Thresholding Algorithm for Linear Inverse Problems, 2009.

        Example:
            >>> from miar_monai.degradation import Degradation
            >>> line = torch.arange(-31.5, 32)
            >>> disk = (torch.hypot(line[:, None], line) < 20).float()
            >>> operator = Degradation().for_hr(disk)
            >>> lr = operator.A(disk)
            >>> linear = operator.restore(lr, 1e-3)
            >>> clipped, bounded = linear.clamp(min=0), operator.bounded(linear, 0)
            >>> [round((x.mean() / lr.mean()).item(), 3) for x in (linear, clipped, bounded)], bounded.min().item() >= 0
            ([1.0, 1.029, 1.003], True)
        """
        y = self.A(x)
        with torch.autocast(x.device.type, enabled=False):
            x = ahead = x.clamp(min=floor)
            for step in range(_LEVEL_STEPS):
                before = x
                x = ahead + resample(y - self.A(ahead), self.rows.smooth, self.columns.smooth)
                x = x.clamp(min=floor)
                ahead = torch.lerp(before, x, 1 + step / (step + 3))
        return x

    def noise_level(self, y: Tensor) -> Tensor:
        """Return the standard deviation of the noise of LR images, from their coefficients in the stop band.

        Rounding counts as noise (one step of integers is 0.29), and so does detail that this blur would have removed,
        in images of another degradation. Where much passes everywhere (without a blur), fine detail counts too. Robust:
        the median of the absolute coefficients, but for those that a symmetry makes zero.

        Args:
            y: LR images, (..., h, w).

        Returns:
            (..., 1, 1), in units of the intensities.

        Example:
            >>> from miar_monai.degradation import Degradation
            >>> noise = 0.01 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
            >>> round(Degradation().for_lr(noise).noise_level(noise).item(), 3)
            0.01
        """
        with torch.autocast(y.device.type, enabled=False):
            coefficients = self._coefficients(y).flatten(-2)  # (..., h · w)
        sizes = coefficients.gather(-1, self.stop_band.expand(*y.shape[:-2], -1)).abs()  # (..., n)
        rounding = torch.finfo(sizes.dtype).eps * coefficients.abs().amax(dim=-1, keepdim=True)
        level = sizes.where(sizes > rounding, torch.nan).nanmedian(dim=-1).values / 0.6745  # of a normal distribution
        return level.nan_to_num(nan=0.0)[..., None, None]

    def suppressed_fraction(self, damping: Tensor) -> Tensor:
        """Return the fraction of the coefficients of LR images that a damping suppresses, in [0, 1]: (..., 1, 1).

        With a blur, which most coefficients hardly pass, a small damping costs many of them, without one almost none.

        Args:
            damping: (..., 1, 1).

        Example:
            >>> from miar_monai.degradation import Degradation
            >>> damping, lr = torch.full((1, 1), 0.05), torch.zeros(16, 16)
            >>> blurs = (Degradation(sigma=sigma).for_lr(lr) for sigma in (0.0, 1.0))
            >>> [round(operator.suppressed_fraction(damping).item(), 2) for operator in blurs]
            [0.05, 0.71]
        """
        s, damping = self._singular_values, self._damping_of_each(damping)
        return (damping**2 / (s**2 + damping**2)).mean(dim=(-2, -1), keepdim=True)

    def _coefficients(self, y: Tensor) -> Tensor:
        return resample(y, self.rows.u.mT, self.columns.u.mT)  # (..., h, w)

    @property
    def _singular_values(self) -> Tensor:
        return self.rows.s[..., :, None] * self.columns.s[..., None, :]  # (..., h, w)

    def _damping_of_each(self, damping: float | Tensor) -> Tensor:
        """Return the damping of each coefficient, (..., h, w).

        Singular values fall as the frequency of their vectors rises. So the frequency of a vector, relative to the
        resolution limit, is its index over the number of coefficients that pass.
        """
        vertical, horizontal = (
            torch.arange(s.shape[-1], device=s.device) * s[..., :1] / s.sum(dim=-1, keepdim=True)
            for s in (self.rows.s, self.columns.s)
        )
        return damping * torch.hypot(vertical[..., :, None], horizontal[..., None, :]).clamp(max=1)
