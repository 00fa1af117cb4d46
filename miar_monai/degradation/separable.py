"""The separable linear operator of a degradation, its inverse, and other closed forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from miar_monai.degradation.axis import AxisOperator
from miar_monai.degradation.resampling import resample

__all__ = ["SeparableOperator"]

_LEVEL_STEPS = 8  # iterations of `SeparableOperator.bounded`


class SeparableOperator(NamedTuple):
    r"""The linear operator ``A x = P x Q^T``, ``P`` for the rows and ``Q`` for the columns of images.

    Either one operator for all images of a batch or, from `select`, one per image. It consists of tensors only, so it
    can be the input of a CUDA graph. ``A``, ``A_adjoint``, ``A_dagger`` and ``prox`` are named as in deepinv. All
    methods compute in the dtype of the operator, which must be that of the images, also under autocast.

    ``P = U diag(s) V^T``; ``S`` is the outer product of the singular values of rows and columns. The ``damping`` is the
    ratio of the standard deviations of the noise of the LR image and of the detail to be restored, a number for all
    images or (..., 1, 1). This is its value at the resolution limit of the LR image; it decreases in proportion to the
    frequency, as in a Wiener filter for images with a spectrum of about 1/f. Low frequencies, and with them the mean
    intensity of each tissue, are therefore preserved at any noise level. A damping of 0 needs a noiseless LR image in
    float64: the inverse of an operator with a blur amplifies noise by up to 10 000.

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
    """1 for the eighth of the coefficients where the least signal is expected, otherwise 0, (..., h, w)."""

    @classmethod
    def of(cls, rows: AxisOperator, columns: AxisOperator) -> SeparableOperator:
        """Combine the operators of both axes."""
        frequency = torch.hypot(rows.frequency[:, None], columns.frequency)  # (h, w)
        signal = torch.outer(rows.s, columns.s) / frequency.clamp(min=1e-6)  # images have a spectrum of about 1/f
        lowest = signal.flatten().argsort()[: max(signal.numel() // 8, 1)]
        return cls(rows, columns, torch.zeros_like(signal).flatten().index_fill_(0, lowest, 1).view_as(signal))

    @classmethod
    def stack(cls, operators: Sequence[SeparableOperator]) -> SeparableOperator:
        """Stack operators of equal sizes along a new first axis, for `select`."""
        rows, columns = (AxisOperator.stack(axes) for axes in list(zip(*operators, strict=True))[:2])
        return cls(rows, columns, torch.stack([operator.stop_band for operator in operators]))

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor]) -> SeparableOperator:
        """Rebuild an operator from its `tensors`."""
        count = len(AxisOperator._fields)
        return cls(AxisOperator(*tensors[:count]), AxisOperator(*tensors[count : 2 * count]), tensors[-1])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors of the operator, for `from_tensors`."""
        return *self.rows, *self.columns, self.stop_band

    def select(self, index: Tensor) -> SeparableOperator:
        """Return the operators of a batch of images (B, 1, H, W), given their indices in a stack, (B,)."""
        return self.from_tensors([x[index][:, None] for x in self.tensors])

    def to(self, like: Tensor) -> SeparableOperator:
        """Convert to the dtype and the device of a tensor."""
        return self.from_tensors([x.to(like) for x in self.tensors])

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

    @property
    def inside(self) -> Tensor:
        """1 for the voxels of LR images, or 0 in their padding, see `OperatorFamily`: (..., h, w)."""
        rows, columns = (axis.matrix.sum(dim=-1) for axis in (self.rows, self.columns))
        return rows[..., :, None] * columns[..., None, :]

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

        ``V[(U^T y) * S / (S^2 + D^2)] V^T`` with ``D`` the damping per coefficient; without damping this is
        the Moore-Penrose inverse.
        """
        s, damping = self._singular_values, self._coefficient_damping(damping)
        with torch.autocast(y.device.type, enabled=False):
            coefficients = self._coefficients(y) * (s / (s**2 + damping**2))
            return resample(coefficients, self.rows.vt.mT, self.columns.vt.mT)

    def prox(self, x: Tensor, y: Tensor, damping: float | Tensor) -> Tensor:
        r"""Return the images closest to ``x`` that degrade to ``y``: ``x + A_dagger(y - A x)``.

        The proximal step of the data fidelity: the minimum of ``|y - A z|^2 + |D V^T (z - x) V|^2`` over all ``z`` that
        differ from ``x`` in the row space of ``A`` only. Without damping and noise it is the orthogonal projection onto
        the images consistent with ``y``. The ground truth is one of them, so the mean squared error cannot increase.

        Args:
            x: estimates, (..., H, W).
            y: LR images, (..., h, w).
            damping: see `SeparableOperator`.

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

        A strong linear baseline: 4 dB above bicubic interpolation for blurred, noiseless ``y``.
        """
        return self.prox(self.interpolate(y), y, damping)

    def bounded(self, x: Tensor, floor: float | Tensor) -> Tensor:
        """Raise voxels below a floor to it, and keep the LR images approximately unchanged.

        Clipping alone would raise local means. So the low frequencies of the change are subtracted and the result is
        clipped again: projected Landweber iterations, accelerated by momentum.

        Args:
            x: images, (..., H, W); those without voxels below the floor are returned unchanged.
            floor: lower bound, such as 0 for magnitude images; a number or (..., 1, 1).

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
            x = extrapolated = x.clamp(min=floor)
            for step in range(_LEVEL_STEPS):
                previous = x
                x = extrapolated + resample(y - self.A(extrapolated), self.rows.smooth, self.columns.smooth)
                x = x.clamp(min=floor)
                extrapolated = torch.lerp(previous, x, 1 + step / (step + 3))
        return x

    def noise_level(self, y: Tensor) -> Tensor:
        """Estimate the standard deviation of the noise of LR images in their stop band.

        There, little of the image is left, and what is left lies at edges: the median of the absolute values excludes
        it. Constant background, as around a segmented brain, and replicated padding are excluded too. The estimate
        includes rounding (0.29 for integers) and, in images sharper than this operator, the detail that its blur would
        have removed. Without a blur there is no real stop band, so that some fine detail is included.

        Args:
            y: LR images, (..., h, w).

        Returns:
            (..., 1, 1), in intensity units.

        Example:
            >>> from miar_monai.degradation import Degradation
            >>> noise = 0.01 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
            >>> round(Degradation().for_lr(noise).noise_level(noise).item(), 3)
            0.01
        """
        inside = self.inside.expand_as(y)
        with torch.autocast(y.device.type, enabled=False):
            residual = resample(self._coefficients(y) * self.stop_band, self.rows.u, self.columns.u)  # (..., h, w)
        varies = (inside > 0.5) & _differs(y, -2) & _differs(y, -1)
        sizes = residual.abs().where(varies, torch.nan).flatten(-2)
        share = self.stop_band.sum(dim=(-2, -1)) / inside.sum(dim=(-2, -1))  # of white noise
        level = sizes.nanmedian(dim=-1).values / (0.6745 * share.sqrt())  # median of |x|, x ~ N(0, 1)
        return level.nan_to_num(nan=0.0)[..., None, None]

    def suppressed_fraction(self, damping: Tensor) -> Tensor:
        """Return the fraction of the coefficients of LR images that a damping suppresses, in [0, 1]: (..., 1, 1).

        A blur attenuates most coefficients, so a small damping suppresses many of them; without a blur almost none.

        Args:
            damping: see `SeparableOperator`, (..., 1, 1).

        Example:
            >>> from miar_monai.degradation import Degradation
            >>> damping, lr = torch.full((1, 1), 0.05), torch.zeros(16, 16)
            >>> blurs = (Degradation(sigma=sigma).for_lr(lr) for sigma in (0.0, 1.0))
            >>> [round(operator.suppressed_fraction(damping).item(), 2) for operator in blurs]
            [0.05, 0.71]
        """
        s, damping = self._singular_values, self._coefficient_damping(damping)
        return (damping**2 / (s**2 + damping**2)).mean(dim=(-2, -1), keepdim=True)

    def _coefficients(self, y: Tensor) -> Tensor:
        return resample(y, self.rows.u.mT, self.columns.u.mT)  # (..., h, w)

    @property
    def _singular_values(self) -> Tensor:
        return self.rows.s[..., :, None] * self.columns.s[..., None, :]  # (..., h, w)

    def _coefficient_damping(self, damping: float | Tensor) -> Tensor:
        """Return the damping of each coefficient, (..., h, w).

        Singular values decrease with the frequency of their vectors. So the frequency of a vector, relative to the
        resolution limit, is its index divided by the effective number of coefficients.
        """
        vertical, horizontal = (
            torch.arange(s.shape[-1], device=s.device) * s[..., :1] / s.sum(dim=-1, keepdim=True)
            for s in (self.rows.s, self.columns.s)
        )
        return damping * torch.hypot(vertical[..., :, None], horizontal[..., None, :]).clamp(max=1)


def _differs(y: Tensor, dim: int) -> Tensor:
    """Return which voxels of images (..., h, w) differ from the previous one along an axis, the first from the next."""
    if y.shape[dim] == 1:
        return torch.ones_like(y, dtype=torch.bool)
    steps = y.diff(dim=dim).abs()
    steps = torch.cat([steps.narrow(dim, 0, 1), steps], dim=dim)
    return steps > 1e-6 * y.abs().amax(dim=(-2, -1), keepdim=True)
