"""The algorithm that all super-resolution networks share: observe, predict, finish."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from miar_monai.degradation import Degradation, SeparableOperator
from miar_monai.errors import SettingError
from miar_monai.networks.decoding import Decoding
from miar_monai.networks.linear import DataConsistency, LinearInverse, NoiseModel
from miar_monai.networks.results import ErrorEstimator, Estimate, Observation, Prediction
from miar_monai.networks.sample_limit import excess

__all__ = ["SuperResolutionNetwork"]

Network = TypeVar("Network", bound="SuperResolutionNetwork")

_MAX_DEPARTURE = 10  # of maps from the linear estimate, in ranges of the slice; random weights reach 3


class SuperResolutionNetwork(nn.Module):
    """Super-resolution of LR slices in three steps, of which a subclass defines the second.

    `observe` solves the linear part on whole slices; `predict` runs the network, on tiles of the HR grid or on whole
    slices; `finish` corrects, bounds and mixes its two output maps, the perceptual and the faithful estimate, on whole
    slices again. Networks work on the HR grid, so they do not depend on the scale factor, only the operator does.

    Args:
        degradation: default of `observe`; the paper's by default.
        noise_model: damping of the linear estimate, from the noise of each slice; `NoiseModel` by default.
        front_end: maps LR slices, operator and damping to the linear estimate: `LinearInverse` by default, or
            `Interpolation`.
        back_end: corrects the maps: `DataConsistency` by default, or `NoConsistency`.

    Reference:
        Wang et al., Zero-Shot Image Restoration Using Denoising Diffusion Null-Space Model, 2023 (range-null-space
        decomposition).
    """

    guide_channels = 0
    """Number of guides that the network accepts, 0 or 1."""

    noise_channels = 0
    """Channels of the noise of a network that samples the posterior distribution, otherwise 0."""

    def __init__(
        self,
        degradation: Degradation | None = None,
        noise_model: NoiseModel | None = None,
        front_end: Callable[[Tensor, SeparableOperator, Tensor], Tensor] | None = None,
        back_end: Callable[[Tensor, Observation], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.degradation = degradation or Degradation()
        self.noise_model = noise_model or NoiseModel()
        self.front_end = front_end or LinearInverse()
        self.back_end = back_end or DataConsistency()

    @property
    def side(self) -> int | None:
        """Side of the tiles on the HR grid, or None for convolutions, which accept any multiple of ``stride``."""
        return None

    @property
    def stride(self) -> int:
        """Voxels of the HR grid for each position of the coarsest features."""
        raise NotImplementedError

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The parts that may compute in lower precision."""
        raise NotImplementedError

    @property
    def shared_layers(self) -> Sequence[nn.Module]:
        """The parts that must keep their precision, and are shared by the copies of `cast`."""
        return ()

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the layers."""
        return next(self.layers[0].parameters()).dtype

    def cast(self: Network, dtype: torch.dtype) -> Network:
        """Return a copy for inference whose layers compute in another precision; faster than autocast.

        Autocast casts every weight before each use, and many results back. The closed forms keep the precision of the
        image.

        Args:
            dtype: precision of the copied weights, such as `torch.bfloat16`.
        """
        with torch.inference_mode(False):  # tensors of inference mode could not be updated outside of it
            copy = deepcopy(self, {id(part): part for part in self.shared_layers})
            for part in copy.layers:
                part.to(dtype).requires_grad_(False)
        return copy

    def cast_from(self: Network, source: Network) -> None:
        """Update this copy, made by ``source.cast``, to the weights of ``source``, in a few kernel launches."""
        targets, sources = ([p.detach() for part in x.layers for p in part.parameters()] for x in (self, source))
        torch._foreach_copy_(targets, sources)

    def observe(
        self, lr: Tensor, operator: SeparableOperator | None = None, guide: Tensor | None = None
    ) -> Observation:
        """Estimate the noise of each slice and compute the linear estimate, damped by the noise.

        Args:
            lr: LR slices of any size, (B, 1, h, w).
            operator: operator of their degradation; ``self.degradation`` by default.
            guide: another contrast on the HR grid, scaled as the slices, for networks with ``guide_channels``:
                (B, 1, H, W); 0 where there is none.
        """
        operator = operator or self.degradation.for_lr(lr)
        damping, weight = self.noise_model(operator.noise_level(lr))  # (B, 1, 1, 1)
        linear = self.front_end(lr, operator, damping)
        if self.guide_channels and guide is None:
            guide = torch.zeros_like(linear)
        return Observation(lr, operator, linear, damping, self.noise_model.min_damping, weight, guide)

    def condition(self, observed: Observation) -> Tensor:
        """Return the conditioning vector of the network: (B, C, 1, 1)."""
        raise NotImplementedError

    def predict(
        self, images: Tensor, condition: Tensor, decoding: Decoding | None = None, with_entropy: bool = False
    ) -> Prediction:
        """Predict the output maps.

        Args:
            images: linear estimates of the tiles or slices and, as further channels, their guides:
                (B, 1 + guide_channels, H, W).
            condition: result of `condition`, (B, C, 1, 1).
            decoding: strategy and its settings, for networks with tokens.
            with_entropy: also return the entropy of the tokens, for networks with tokens.
        """
        raise NotImplementedError

    def sample(self, images: Tensor, condition: Tensor, noise: Tensor) -> Tensor:
        """Return an uncorrected sample of the posterior distribution of each image: (B, 1, H, W).

        Args:
            images: see `predict`.
            condition: see `condition`.
            noise: white noise, (B, noise_channels, H', W'); see `white_noise`.

        Raises:
            SettingError: if the network has no samples.
        """
        self.check_samples()
        raise NotImplementedError

    def check_samples(self) -> None:
        """Check that the network samples the posterior distribution.

        Raises:
            SettingError: if it does not.
        """
        if not self.noise_channels:
            raise SettingError(
                f"this {type(self).__name__} was not trained to sample, but samples were requested; use an Estimator"
                " with noise_channels, from train_posterior.json, or request none."
            )

    def correct(self, maps: Tensor, observed: Observation) -> Tensor:
        """Correct output maps (B, C, H, W) by the back end, in the precision of the LR slices."""
        return self.back_end(maps.to(observed.lr.dtype), observed)

    def finish(
        self,
        prediction: Prediction,
        observed: Observation,
        fidelity: float = 0.25,
        error_model: ErrorEstimator | None = None,
    ) -> Estimate:
        """Return the super-resolved images of a prediction: corrected, bounded and mixed.

        Voxels are not darker than the darkest of their LR slice, while local means are preserved. A slice on which the
        network has diverged is the linear estimate, with a network weight of 0: convolutional networks without
        normalization can amplify what they were not trained on by orders of magnitude. For inference only: clipped
        voxels have no gradient, so in training they would drift.

        Args:
            prediction: prediction for whole slices.
            observed: result of `observe`.
            fidelity: from 0, the perceptual estimate, to 1, the faithful estimate.
            error_model: predicts the error of the image; one that uses the entropy of tokens needs a prediction with
                entropy.
        """
        sound = self._sound(prediction.maps, observed).all(dim=1, keepdim=True)  # (B, 1, 1, 1)
        maps, network_weight = self._finished(prediction.maps, observed, sound)
        perceptual, faithful = maps.split(1, dim=1)
        image = torch.lerp(perceptual, faithful, fidelity)
        estimate = Estimate(image, perceptual, faithful, network_weight)
        if error_model is None:
            return estimate
        return estimate._replace(error=error_model(estimate, prediction.entropy, observed.suppressed_by_noise))

    @staticmethod
    def _sound(maps: Tensor, observed: Observation) -> Tensor:
        """Return on which maps (B, C, H, W) the network has not diverged: (B, C, 1, 1)."""
        departure = (maps - observed.linear).abs().amax(dim=(2, 3), keepdim=True)  # (B, C, 1, 1)
        span = observed.lr.amax(dim=(2, 3), keepdim=True) - observed.lr.amin(dim=(2, 3), keepdim=True)
        return departure <= _MAX_DEPARTURE * span.clamp(min=1)  # False for NaN

    def _finished(self, maps: Tensor, observed: Observation, sound: Tensor) -> tuple[Tensor, Tensor]:
        """Return corrected and bounded maps, (B, C, H, W), and the weight of the network in each, (B, 1 or C, 1, 1)."""
        observed = observed._replace(network_weight=observed.network_weight * sound)
        corrected = self.correct(torch.where(sound, maps, observed.linear), observed)
        darkest = observed.lr.amin(dim=(2, 3), keepdim=True)
        return observed.operator.bounded(corrected, darkest), observed.network_weight

    @torch.no_grad()
    def super_resolve(
        self,
        lr: Tensor,
        decoding: Decoding | None = None,
        fidelity: float = 0.25,
        operator: SeparableOperator | None = None,
        error_model: ErrorEstimator | None = None,
        predict: Callable[[Tensor, Tensor], Prediction] | None = None,
        guide: Tensor | None = None,
    ) -> Estimate:
        """Super-resolve LR slices: observe, predict, finish.

        Args:
            lr: LR slices, (B, 1, h, w), of one tile each, or of any size supported by ``predict``.
            decoding: strategy and its settings; greedy by default.
            fidelity: from 0, the perceptual estimate, to 1, the faithful estimate.
            operator: operator of the degradation; that of ``self.degradation`` by default.
            error_model: predicts the error of the images; see `finish`.
            predict: maps images (B, 1 + guide_channels, H, W) and conditions (B, C, 1, 1) to a prediction; `predict` by
                default.
            guide: another contrast on the HR grid; see `observe`.

        Raises:
            ConfigurationError: if ``lr`` has a size that ``predict`` does not support.
        """
        observed = self.observe(lr, operator, guide)
        predict = predict or partial(self.predict, decoding=decoding, with_entropy=error_model is not None)
        return self.finish(predict(observed.images, self.condition(observed)), observed, fidelity, error_model)

    def white_noise(
        self, operator: SeparableOperator, shape: Sequence[int], generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw white Gaussian noise for samples of the images of an operator.

        Args:
            operator: operator of the degradation.
            shape: number of images, or of images and of samples of each: (B,) or (B, N).
            generator: source of the noise, on any device; the default one of the operator's device by default.

        Returns:
            (B, noise_channels, H', W') or (B, N, noise_channels, H', W'), on the device of the operator, with H' and W'
            the sizes of the images rounded up to multiples of ``stride``.

        Raises:
            SettingError: if the network has no samples.
        """
        self.check_samples()
        size = [side + -side % self.stride for side in operator.hr_shape]
        device = operator.rows.matrix.device
        noise = torch.randn(
            *shape, self.noise_channels, *size, generator=generator, device=generator.device if generator else device
        )
        return noise.to(device)

    @torch.no_grad()
    def posterior_samples(
        self,
        lr: Tensor,
        noise: Tensor,
        operator: SeparableOperator | None = None,
        guide: Tensor | None = None,
        sample: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        error_model: ErrorEstimator | None = None,
        predict: Callable[[Tensor, Tensor], Prediction] | None = None,
    ) -> Tensor:
        """Return samples of the posterior distribution of super-resolved images, corrected and bounded as in `finish`.

        A sample on which the network has diverged is the linear estimate. With an error model, samples are limited
        where they are much further from the faithful estimate than expected; see `miar_monai.networks.sample_limit`.

        Args:
            lr: LR slices, (B, 1, h, w).
            noise: white noise of each sample, (B, N, noise_channels, H', W'); see `white_noise`.
            operator: operator of the degradation; that of ``self.degradation`` by default.
            guide: another contrast on the HR grid; see `observe`.
            sample: maps images (B · N, 1 + guide_channels, H, W), conditions (B · N, C, 1, 1) and noise
                (B · N, noise_channels, H', W') to uncorrected samples (B · N, 1, H, W); `sample` by default.
            error_model: predicts the error of the faithful estimate; without it, samples are not limited.
            predict: maps images and conditions to the prediction of the faithful estimate; `predict` by default.

        Returns:
            (B, N, H, W). The same noise gives the same samples.

        Raises:
            SettingError: if the network has no samples.

        Example:
            >>> from miar_monai.networks import Estimator
            >>> network = Estimator(channels=(8, 16), blocks=(1, 1), noise_channels=1).eval()
            >>> lr = torch.rand(2, 1, 8, 7)
            >>> operator = network.degradation.for_lr(lr)
            >>> noise = network.white_noise(operator, (2, 5), torch.Generator().manual_seed(0))
            >>> network.posterior_samples(lr, noise, operator).shape
            torch.Size([2, 5, 32, 28])
        """
        observed = self.observe(lr, operator, guide)
        count, inputs = noise.shape[1], (observed.images, self.condition(observed))
        images, conditions = (x.repeat_interleave(count, dim=0) for x in inputs)  # (B · N, C, H, W)
        samples = (sample or self.sample)(images, conditions, noise.flatten(0, 1)).unflatten(0, (len(lr), count))
        samples = samples.squeeze(2)  # (B, N, H, W)
        sound = self._sound(samples, observed)
        if error_model is not None:
            estimate = self.finish((predict or self.predict)(*inputs), observed, fidelity=1.0, error_model=error_model)
            assert estimate.error is not None
            too_much = excess(self.correct(samples, observed) - estimate.faithful, estimate.error)
            too_much = too_much / observed.network_weight.clamp(min=1e-3)  # by which the correction multiplies it
            samples = torch.where(sound, samples - too_much, samples)
        return self._finished(samples, observed, sound)[0]

    def forward(self, lr: Tensor) -> Tensor:
        """Super-resolve LR images (B, 1, h, w) by greedy decoding: (B, 1, H, W)."""
        return self.super_resolve(lr).image
