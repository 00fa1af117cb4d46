"""MONAI's inferer interface around MIAR: slices and volumes of any in-plane size, streamed through the network."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.inferers import Inferer
from torch import Tensor, nn
from tqdm import tqdm

from miar_monai import acceleration
from miar_monai.acceleration.cuda_graphs import tensor_addresses
from miar_monai.data.geometry import upscaled_affine
from miar_monai.degradation import Degradation, operators
from miar_monai.degradation.blur_estimation import MOST_BLUR, infer_degradation, without_overshoot
from miar_monai.errors import ConfigurationError, ImageError, SettingError, check_range, check_whole
from miar_monai.inference.error_model import ErrorModel
from miar_monai.inference.steps import Steps, StepSettings
from miar_monai.inference.tiling import Output, Padding, blend_tiles, num_tiles
from miar_monai.networks import MIAR
from miar_monai.networks.decoding import Decoding
from miar_monai.networks.results import Estimate, Prediction
from miar_monai.transforms.intensity_range import IntensityRange

__all__ = ["BeamSearchInferer"]

logger = logging.getLogger(__name__)


def _unwrapped(network: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a network without a wrapper for several GPUs."""
    return getattr(network, "module", network)


def _device(network: Callable[..., Tensor], images: Tensor) -> torch.device:
    """Return where a network computes: where its weights are, or, if it has none, where the images are."""
    module = _unwrapped(network)
    weights = module.parameters() if isinstance(module, nn.Module) else iter(())
    return next((p.device for p in weights), images.device)


@dataclass
class _Run:
    """One call of the inferer."""

    device: torch.device
    bar: tqdm
    network_weights: list[Tensor] = field(default_factory=list)
    """Of each slice."""

    def counted(self, predictor: Callable[[Tensor], Output]) -> Callable[[Tensor], Output]:
        """Return a function of tiles that moves the progress bar."""

        def predict(tiles: Tensor) -> Output:
            result = predictor(tiles)
            self.bar.update(len(tiles))
            return result

        return predict


class BeamSearchInferer(Inferer):
    """Super-resolves 2D slices or the slices of 3D volumes by beam-search decoding.

    In-plane sizes other than the network's are cut into overlapping tiles, whose results are blended with weights that
    vanish at their borders; smaller ones are padded with their border. What a `MIAR` solves in closed form it solves on
    whole slices, since a tile knows nothing of what its border was blurred with. Slices without contrast are returned
    as they are, and no result of a `MIAR` is darker than the darkest voxel of its slice. A `MetaTensor` comes back with
    the affine of the finer grid: same field of view, through-plane untouched.

    On a GPU the thousand small kernels of a `MIAR` are recorded as one CUDA graph for each size of a batch, once it has
    come up three times; where slices are one tile each, the closed forms with them. Under autocast the layers work in
    its precision throughout, on a copy of their weights. The recordings, the memory that they work in and that copy are
    all that is kept between calls: until the inferer meets another network, other weights, another precision or other
    settings. Sampling, whose seed a recording would repeat, goes without recordings.

    Args:
        lookahead_tokens: the paper's K: tokens of each scale that may take their second choice; 0 is greedy.
        alpha: weight of the margin in the choice of these tokens (Eq. 4).
        strategy: ``"beam"``, ``"greedy"``, ``"top_k"`` or ``"top_p"``.
        selection, score, top_k, top_p, temperature, seed: see `miar_monai.networks.decoding.Decoding`.
        fidelity: from 0, the most perceptual output, to 1, the most faithful.
        blur: standard deviation of the input's blur in LR voxels, for a `MIAR`: up to 1.25; ``"auto"``, which measures
            it in the slices of a call (`infer_degradation`); or None, that of the training.
        degradation: how the LR images came about, if that is known: the result is then made consistent with them.
        damping: of that correction (`SeparableOperator.prox`): about 1e-3 for floating-point images, 1e-2 for 8 bits.
        tile_size: side of a tile in LR voxels, for a network that is not a `MIAR`, which has its own.
        sw_batch_size: slices, and tiles of them, that go through the network at once; halved where a GPU's memory does
            not hold them. By default 16 on a GPU, where a slice of many is faster than one alone, and 2 elsewhere.
        overlap: share of a tile that it has in common with its neighbor, in [0, 1).
        progress: show a progress bar on stderr.
        uncertainty: return the expected absolute error of a `MIAR` besides the image, which stays as it is.
        error_model: gives that error; fitted to the weights by ``miar fit-uncertainty``.
        lookahead_scales: scales whose tokens may branch, from the coarsest; 0 is all. Batches of a GPU get faster with
            fewer: see `miar_monai.networks.decoding.Decoding`.
        intensity_range: lowest and highest intensity that the weights have met in training; what lies beyond is
            interpolated (`miar_monai.transforms.intensity_range.IntensityRange`). None: there are no limits.

    Raises:
        ConfigurationError: if a setting is out of range, or ``uncertainty`` has no ``error_model``.

    Reference:
        Paper Sec. 3.3; tiles by `monai.inferers.sliding_window_inference`.

    Example:
        >>> network = MIAR(scales=(1, 2, 4), channels=(8, 8, 16), num_res_blocks=1, latent_channels=8, num_codes=16,
        ...     dim=16, depth=1, num_heads=2).eval()
        >>> inferer = BeamSearchInferer(lookahead_tokens=1)
        >>> inferer(torch.rand(1, 1, 11, 9, 3), network).shape
        torch.Size([1, 1, 44, 36, 3])
    """

    def __init__(
        self,
        lookahead_tokens: int = 1,
        alpha: float = 1.0,
        strategy: str = "beam",
        selection: str = "uncertain",
        score: str = "lookahead",
        top_k: int = 900,
        top_p: float = 0.96,
        temperature: float = 1.0,
        seed: int = 0,
        fidelity: float = 0.25,
        blur: float | str | None = None,
        degradation: Degradation | None = None,
        damping: float = 1e-3,
        tile_size: int = 64,
        sw_batch_size: int | None = None,
        overlap: float = 0.25,
        progress: bool = False,
        uncertainty: bool = False,
        error_model: ErrorModel | None = None,
        lookahead_scales: int = 0,
        intensity_range: Sequence[float] | None = None,
    ) -> None:
        self.decoding = Decoding(
            strategy=strategy,
            lookahead_tokens=lookahead_tokens,
            lookahead_scales=lookahead_scales,
            alpha=alpha,
            selection=selection,
            score=score,
            top_k=top_k,
            top_p=top_p,
            temperature=temperature,
            seed=seed,
        )
        for name, value, low, high in (
            ("fidelity", fidelity, 0, 1),
            ("overlap", overlap, 0, 0.99),
            ("sw_batch_size", 1 if sw_batch_size is None else sw_batch_size, 1, float("inf")),
            ("tile_size", tile_size, 1, float("inf")),
            ("damping", damping, 0, float("inf")),
        ):
            check_range(name, value, low, high)
        check_whole("tile_size", tile_size)
        check_whole("sw_batch_size", 1 if sw_batch_size is None else sw_batch_size)
        if isinstance(blur, str) and blur != "auto":
            raise SettingError(f"blur is {blur!r}, but a number of LR voxels or 'auto' is needed; correct it.")
        if not (blur is None or isinstance(blur, str)):
            check_range("blur", blur, 0, MOST_BLUR)
        if uncertainty and error_model is None:
            raise SettingError(
                "uncertainty is asked for without an error_model, which says what error to expect: take a bundle whose"
                " inferer has one, fit it (miar fit-uncertainty), or leave uncertainty out."
            )
        self.fidelity = fidelity
        self.blur = blur
        self.degradation = degradation
        self.damping = damping
        self.tile_size = tile_size
        self.sw_batch_size = sw_batch_size
        self.overlap = overlap
        self.progress = progress
        self._graphs: tuple[Hashable, Steps] | None = None
        self.uncertainty = uncertainty
        self.error_model = error_model
        self.intensity_range = IntensityRange.of(intensity_range)

    def __call__(
        self,
        inputs: Tensor,
        network: Callable[..., Tensor],
        *args: Any,
        assumed: Degradation | None = None,
        **kwargs: Any,
    ) -> Tensor | dict[str, Tensor]:
        """Super-resolve slices (B, 1, h, w) or volumes (B, 1, h, w, D), whose slices lie along the last axis.

        Args:
            inputs: LR images in about [0, 1].
            network: a `MIAR` network, or any other that maps (N, 1, tile, tile) to (N, 1, s · tile, s · tile).
            *args: for a network that is not a `MIAR`.
            assumed: degradation of the inputs, of `input_degradation`, for a `MIAR`; by default it is measured here.
            **kwargs: as ``args``.

        Returns:
            (B, 1, s · h, s · w) or (B, 1, s · h, s · w, D), on the device of ``inputs``. With ``uncertainty`` two
            of them by name: ``"image"``, and ``"error"``, its expected absolute error, 0 where a slice has no contrast.

        Raises:
            ConfigurationError: if ``inputs`` has another number of axes, or ``uncertainty`` is asked of a network that
                is not a `MIAR`.
        """
        if inputs.ndim not in (4, 5) or inputs.shape[1] != 1 or inputs.numel() == 0:
            raise ConfigurationError(
                f"the inferer got a tensor of shape {tuple(inputs.shape)}, but it takes (B, 1, h, w) or"
                " (B, 1, h, w, D), not empty; give it one channel and two or three spatial axes."
            )
        plain = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        slices = plain if plain.ndim == 4 else plain.movedim(-1, 1).flatten(0, 1)  # (B * D, 1, h, w)
        device = _device(network, plain)
        size = self.sw_batch_size or (16 if device.type == "cuda" else 2)
        tiles = self.num_tiles(slices.shape[2], slices.shape[3], network)
        with tqdm(total=len(slices) * tiles, desc="super-resolving", unit="tile", disable=not self.progress) as bar:
            run = _Run(device, bar)
            super_resolve = self._function(network, args, kwargs, slices, assumed, run)
            parts = self._stream(slices, super_resolve, size, tiles, bar)
            result = self._filled(len(slices), plain.device, parts)  # (B * D, C, H, W)
        if run.network_weights and (weight := float(torch.cat(run.network_weights).mean())) < 0.9:
            logger.warning(
                "the input holds more noise than the slices of the training, or is sharper than its blur leaves it:"
                " %d %% of the result are what was learned, the rest is the linear estimate, which adds no detail.",
                round(100 * weight),
            )
        if plain.ndim == 5:
            result = result.unflatten(0, (len(plain), -1)).movedim(1, -1)  # (B, C, H, W, D)
        if isinstance(inputs, MetaTensor):
            result = self._with_geometry(result, inputs)
        return {"image": result[:, :1], "error": result[:, 1:]} if self.uncertainty else result

    def num_tiles(self, height: int, width: int, network: Callable[..., Tensor]) -> int:
        """Return how many tiles an LR slice is cut into; the time that it takes is proportional to it."""
        module, sizes, side = _unwrapped(network), [float(height), float(width)], self.tile_size
        if isinstance(module, MIAR):
            sizes = [size * scale for size, scale in zip(sizes, module.degradation.scales, strict=True)]
            side = module.side
        return prod(num_tiles(round(size), side, self.overlap) for size in sizes)

    @staticmethod
    def _filled(length: int, device: torch.device, parts: Iterator[Tensor]) -> Tensor:
        """Return what `torch.cat` returns, ``length`` images on a device, but never hold it twice."""
        first = next(parts)
        result = torch.empty(length, *first.shape[1:], dtype=first.dtype, device=device)
        end = 0
        for part in chain([first], parts):
            start, end = end, end + len(part)
            result[start:end] = part
        return result

    def input_degradation(self, slices: Tensor, network: MIAR) -> Degradation:
        """Return the degradation that is assumed of LR slices (N, 1, h, w), measured or set."""
        own = network.degradation
        if self.blur is None:
            return own
        if isinstance(self.blur, str):
            known = self._clipped(slices)

            def restore(lr: Tensor, degradation: Degradation) -> Tensor:
                return network.observe(lr, degradation.for_lr(lr)).linear

            return without_overshoot(known, infer_degradation(known, own), restore)
        return replace(own, sigma=self.blur, blur_on="lr")

    def _clipped(self, slices: Tensor) -> Tensor:
        return slices if self.intensity_range is None else self.intensity_range.clip(slices)

    def _function(
        self,
        network: Callable[..., Tensor],
        args: tuple,
        kwargs: dict,
        slices: Tensor,
        assumed: Degradation | None,
        run: _Run,
    ) -> Callable[[Tensor, int], Tensor]:
        """Return a function of LR slices and a batch size, which super-resolves them on the device of the network."""
        module = _unwrapped(network)
        if isinstance(module, MIAR):
            degradation = assumed or self.input_degradation(slices, module)
            return partial(self._with_miar, module, degradation, self._steps(module), run)
        if self.uncertainty:
            raise ConfigurationError(
                f"uncertainty is asked of a {type(module).__name__}, but only a MIAR network has it; leave it out."
            )

        predictor = run.counted(lambda tiles: network(tiles.to(run.device), *args, **kwargs))
        return lambda chunk, size: blend_tiles(chunk, self.tile_size, self.overlap, size, predictor)

    def _with_miar(
        self, network: MIAR, degradation: Degradation, steps: Steps, run: _Run, chunk: Tensor, size: int
    ) -> Tensor:
        """Super-resolve LR slices (N, 1, h, w), in batches of tiles: (N, 1 or 2, H, W)."""
        rows, columns = (
            Padding.of(lr_size, scale, network.side)
            for lr_size, scale in zip(chunk.shape[2:], degradation.scales, strict=True)
        )
        # before the inverse, whose ripples would be drawn out as streaks
        lr = Padding.pad(chunk.to(run.device), rows, columns)
        shape = (rows.padded_size, columns.padded_size)
        operator = operators((degradation,), shape, (lr.shape[2], lr.shape[3]), lr)
        if shape == (network.side, network.side):
            estimate = Estimate(**steps.of_slices(lr, *operator.tensors))
        else:
            predict = partial(self._predict_tiles, network.side, steps, run, size)
            estimate = self._settings.super_resolve(network, lr, operator, predict)
        run.network_weights.append(estimate.network_weight.flatten())
        images = [estimate.image] if estimate.error is None else [estimate.image, estimate.error]
        return Padding.crop(torch.cat(images, dim=1), rows, columns)

    def _predict_tiles(
        self, side: int, steps: Steps, run: _Run, size: int, linear: Tensor, condition: Tensor
    ) -> Prediction:
        """Return the prediction for linear estimates (N, 1, H, W) of any size, by tiles."""
        condition = condition.expand(-1, -1, *linear.shape[2:])
        inputs = torch.cat([linear, condition], dim=1)  # (N, 3, H, W), so that tiles keep their condition

        def predict(tiles: Tensor) -> dict[str, Tensor]:
            return steps.of_tiles(tiles[:, :1], tiles[:, 1:, :1, :1])

        return Prediction(**blend_tiles(inputs, side, self.overlap, size, run.counted(predict)))

    @property
    def _settings(self) -> StepSettings:
        return StepSettings(self.decoding, self.fidelity, self.error_model if self.uncertainty else None)

    def _steps(self, network: MIAR) -> Steps:
        """Return the steps of a network; on a GPU those of an earlier call if nothing has changed."""
        kind = next(network.parameters()).device.type
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        if kind != "cuda" or self.decoding.samples or not acceleration.graphs():
            return Steps.of(network, self._settings, precision)
        key = (tensor_addresses(network), precision, self._settings)
        if self._graphs is None or self._graphs[0] != key:
            self._graphs = key, Steps.of(network, self._settings, precision).as_graphs()
        return self._graphs[1]

    @torch.no_grad()
    def _stream(
        self, slices: Tensor, super_resolve: Callable[[Tensor, int], Tensor], size: int, tiles: int, bar: tqdm
    ) -> Iterator[Tensor]:
        """Yield the results of ``size`` slices at a time, so that memory does not grow with their number."""
        start, known = 0, self.intensity_range
        while start < len(slices):
            chunk = slices[start : start + size]
            clipped = self._clipped(chunk)
            try:
                sr = super_resolve(clipped, size)
            except torch.OutOfMemoryError as error:
                if size == 1:
                    raise ImageError(
                        "the memory of the GPU does not hold one slice of this size: a larger one is needed, or the"
                        " CPU; close what else runs on it, or choose another device."
                    ) from error
                if self._graphs is not None:
                    self._graphs[1].clear()
                size //= 2
                bar.update(start * tiles - bar.n)  # back to the slices that are done
                logger.warning("out of GPU memory: going on with %d at once instead of %d.", size, 2 * size)
                continue
            if self.degradation is not None:
                consistent = self._consistent(sr[:, :1], clipped.to(sr))
                sr = torch.cat([consistent, sr[:, 1:]], dim=1)
            if known is not None:
                sr = known.restore(sr, chunk)
            low, high = chunk.amin(dim=(1, 2, 3), keepdim=True), chunk.amax(dim=(1, 2, 3), keepdim=True)
            constant = F.pad(low.to(sr), (0, 0, 0, 0, 0, sr.shape[1] - 1))  # without an error
            yield torch.where((low == high).to(sr.device), constant, sr)
            start += len(chunk)
            bar.update(start * tiles - bar.n)

    def _consistent(self, sr: Tensor, lr: Tensor) -> Tensor:
        """Return images (N, 1, H, W) that are consistent with LR slices, whose degradation is known."""
        assert self.degradation is not None
        return self.degradation.for_hr(sr).prox(sr, lr, self.damping)

    @staticmethod
    def _with_geometry(result: Tensor, inputs: MetaTensor) -> MetaTensor:
        """Give the result the input's metadata and the affine of the finer grid."""
        output = MetaTensor(result).copy_meta_from(inputs)
        scale = result.shape[2] / inputs.shape[2]
        affine = torch.as_tensor(inputs.affine, dtype=torch.float64)
        finer = [torch.from_numpy(upscaled_affine(a.numpy(), (scale, scale, 1))) for a in affine.view(-1, 4, 4).cpu()]
        output.affine = torch.stack(finer).view(affine.shape)
        return output
