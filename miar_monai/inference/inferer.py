"""MONAI's inferer interface around MIAR: slices and volumes of any in-plane size, streamed through the network."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, count
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.inferers import Inferer, sliding_window_inference
from torch import Tensor, nn
from tqdm import tqdm

from miar_monai.acceleration.cuda_graphs import CUDAGraphed
from miar_monai.data.geometry import upscaled_affine
from miar_monai.degradation.blur_estimation import MOST_BLUR, infer_degradation, without_overshoot
from miar_monai.degradation.operators import Degradation, Matrices, SquareDegradation
from miar_monai.errors import ConfigurationError, ImageError, SettingError, check_range, check_whole
from miar_monai.inference.error_model import ErrorModel
from miar_monai.networks import MIAR
from miar_monai.networks.decoding import Decoding
from miar_monai.networks.miar import Observation
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


def _addresses(network: nn.Module) -> tuple[int, ...]:
    """Return where weights and buffers lie. `nn.Module.parameters` takes four times as long, in each call."""
    modules, found = [network], []
    for module in modules:  # which grows
        tensors = chain(module._parameters.values(), module._buffers.values())
        found += [x.data_ptr() for x in tensors if x is not None]
        modules += [child for child in module._modules.values() if child is not None]
    return tuple(found)


class _Functions(NamedTuple):
    """What a `MIAR` does on its device without the host: on a GPU, each is a CUDA graph."""

    of_slices: Callable[..., dict[str, Tensor]]
    """LR slices of one tile (N, 1, h, h) and the `Matrices` of their degradation: all that the inferer needs."""
    of_tiles: Callable[..., dict[str, Tensor]]
    """Linear estimates (N, 1, H, H) and conditions (N, 2, 1, 1) of tiles: output maps (N, 2 or 3, H, H)."""

    def clear(self) -> None:
        """Forget all recordings, and give back the memory that they work in."""
        for function in self:
            if isinstance(function, CUDAGraphed):
                function.clear()


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
        damping: of that correction (see `Degradation.enforce`); about 1e-3 for floating-point images, 1e-2 for 8 bits.
        tile_size: in-plane size of a tile; the network's.
        sw_batch_size: slices, and tiles of them, that go through the network at once; halved where a GPU's memory does
            not hold them. By default 16 on a GPU, where a slice of many is faster than one alone, and 2 elsewhere.
        overlap: share of a tile that it has in common with its neighbor, in [0, 1).
        progress: show a progress bar on stderr.
        uncertainty: return the expected absolute error of a `MIAR` as a second channel; the first stays as it is.
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
        >>> inferer = BeamSearchInferer(lookahead_tokens=1, tile_size=8)
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
            strategy, lookahead_tokens, alpha, selection, score, top_k, top_p, temperature, seed, lookahead_scales
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
        self._graphs: tuple[Hashable, _Functions] | None = None
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
    ) -> Tensor:
        """Super-resolve slices (B, 1, h, w) or volumes (B, 1, h, w, D), whose slices lie along the last axis.

        Args:
            inputs: LR images in about [0, 1].
            network: a `MIAR` network, or any other that maps (N, 1, tile, tile) to (N, 1, s · tile, s · tile).
            *args: for a network that is not a `MIAR`.
            assumed: degradation of the inputs, of `input_degradation`, for a `MIAR`; by default it is measured here.
            **kwargs: as ``args``.

        Returns:
            (B, 1, s · h, s · w) or (B, 1, s · h, s · w, D), on the device of ``inputs``; with ``uncertainty`` two
            channels, the second one the expected absolute error of the first, 0 where a slice has no contrast.

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
        trusted: list[Tensor] = []
        device = _device(network, plain)
        size = self.sw_batch_size or (16 if device.type == "cuda" else 2)
        total = len(slices) * self.num_tiles(*slices.shape[2:])
        with tqdm(total=total, desc="super-resolving", unit="tile", disable=not self.progress) as bar:
            super_resolve = self._slicewise(network, args, kwargs, slices, trusted, assumed, device, bar)
            parts = self._stream(slices, super_resolve, size, bar)
            result = self._filled(len(slices), plain.device, parts)  # (B * D, C, H, W)
        if trusted and (share := float(torch.cat(trusted).mean())) < 0.9:
            logger.warning(
                "the input holds more noise than the slices of the training, or is sharper than its blur leaves it:"
                " %d %% of the result are what was learned, the rest is the linear estimate, which adds no detail.",
                round(100 * share),
            )
        if plain.ndim == 5:
            result = result.unflatten(0, (len(plain), -1)).movedim(1, -1)  # (B, C, H, W, D)
        return self._with_geometry(result, inputs) if isinstance(inputs, MetaTensor) else result

    def num_tiles(self, height: int, width: int) -> int:
        """Return how many tiles an LR slice is cut into; the time that it takes is proportional to it."""
        step = max(int(self.tile_size * (1 - self.overlap)), 1)
        return prod(max(-(-(side - self.tile_size) // step), 0) + 1 for side in (height, width))

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
            return without_overshoot(known, infer_degradation(known, own), lambda *lr: network.observe(*lr).linear)
        return replace(own, sigma=self.blur, blur_on="lr")

    def _clipped(self, slices: Tensor) -> Tensor:
        return slices if self.intensity_range is None else self.intensity_range.clip(slices)

    def _slicewise(
        self,
        network: Callable[..., Tensor],
        args: tuple,
        kwargs: dict,
        slices: Tensor,
        trusted: list[Tensor],
        assumed: Degradation | None,
        device: torch.device,
        bar: tqdm,
    ) -> Callable[[Tensor, int], Tensor]:
        """Return a function of LR slices and of how many tiles go through the network at once, on its device.

        A `MIAR` adds its trust in each of the slices.
        """
        module = _unwrapped(network)
        if not isinstance(module, MIAR):
            if self.uncertainty:
                raise ConfigurationError(
                    f"uncertainty is asked of a {type(module).__name__}, but only a MIAR network has it; leave it out."
                )
            return lambda chunk, size: self._tiled(
                chunk, 1, size, lambda x: network(x.to(device), *args, **kwargs), bar
            )
        degradation = assumed or self.input_degradation(slices, module)
        functions = self._functions(module)

        def super_resolve(chunk: Tensor, size: int) -> Tensor:
            height, width = chunk.shape[2:]
            padded = self._padded(chunk.to(device))  # before the inverse, whose ripples would be drawn out as streaks
            if padded.shape[2:] == (self.tile_size, self.tile_size):
                matrices = Matrices.of(degradation, self.tile_size * module.scale, padded)
                found = functions.of_slices(padded, *matrices)
            else:
                found = self._in_tiles(module, module.observe(padded, degradation), size, functions.of_tiles, bar)
            sr, trust = module.mix(found["estimates"], self.fidelity), found["trust"]
            if self.uncertainty and self.error_model is not None:
                share, damping = partial(degradation.share_lost, sr.shape[2], sr.shape[3]), found["damping"]
                noise = share(damping) - share(torch.full_like(damping, module.damping))
                error = self.error_model(sr, found["estimates"], found["entropy"], trust, noise)
                sr = torch.cat([sr, error], dim=1)
            trusted.append(trust.flatten())  # here, since a batch that memory does not hold is tried again
            top, left = ((x - y) // 2 * module.scale for x, y in zip(padded.shape[2:], (height, width), strict=True))
            return sr[..., top : top + height * module.scale, left : left + width * module.scale]

        return super_resolve

    def _in_tiles(
        self, network: MIAR, observed: Observation, size: int, function: Callable[..., dict[str, Tensor]], bar: tqdm
    ) -> dict[str, Tensor]:
        """Return what `_Functions.of_slices` does, of slices that the network sees in tiles."""
        condition = observed.condition.expand(-1, -1, *observed.linear.shape[2:])
        inputs = torch.cat([observed.linear, condition], dim=1)  # (N, 3, H, W), so that tiles keep their condition
        maps = self._tiled(
            inputs, network.scale, size, lambda tiles: function(tiles[:, :1], tiles[:, 1:, :1, :1])["maps"], bar
        )
        return self._results(network, maps, observed)

    @staticmethod
    def _results(network: MIAR, maps: Tensor, observed: Observation) -> dict[str, Tensor]:
        """Return corrected estimates (N, 2, H, W), and what the error they may have follows from."""
        return {
            "estimates": network.bounded(network.estimate(maps[:, :2], observed), observed),
            "entropy": maps[:, 2:],  # (N, 1 or 0, H, W)
            "trust": observed.trust,
            "damping": observed.damping,
        }

    def _functions(self, network: MIAR) -> _Functions:
        """Return what is done with a network; on a GPU that of an earlier call if nothing it holds has changed."""
        kind = next(network.parameters()).device.type
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        if kind != "cuda" or self.decoding.samples:
            return self._launched(network, precision)
        key = (_addresses(network), precision, self.decoding, self.uncertainty)
        if self._graphs is None or self._graphs[0] != key:
            self._graphs = key, _Functions(*(CUDAGraphed(f) for f in self._launched(network, precision)))
        return self._graphs[1]

    def _launched(self, network: MIAR, precision: torch.dtype | None) -> _Functions:
        """Return what is done with a network, its kernels launched one by one."""
        settings, with_entropy = self.decoding, self.uncertainty  # not self, which holds their recordings
        layers = network if precision is None else network.cast(precision)
        batches = count(settings.seed)  # sampling draws anew for each batch of tiles of a call

        def of_tiles(linear: Tensor, condition: Tensor) -> dict[str, Tensor]:
            decoding = replace(settings, seed=next(batches)) if settings.samples else settings
            if layers is not network:
                layers.cast_from(network)  # whose weights a training may have changed in place
            with torch.autocast(linear.device.type, enabled=False):
                return {"maps": layers.predict(linear, condition, decoding, with_entropy)[0]}

        def of_slices(lr: Tensor, *matrices: Tensor) -> dict[str, Tensor]:
            observed = network.observe(lr, SquareDegradation(network.scale, Matrices(*matrices)))
            maps = of_tiles(observed.linear, observed.condition)["maps"]
            return BeamSearchInferer._results(network, maps, observed)

        return _Functions(of_slices, of_tiles)

    def _padded(self, slices: Tensor) -> Tensor:
        """Return LR slices (N, 1, h, w), their border repeated on all sides until they fill a tile."""
        missing = [max(self.tile_size - size, 0) for size in (slices.shape[3], slices.shape[2])]
        return F.pad(slices, [part for size in missing for part in (size // 2, size - size // 2)], mode="replicate")

    def _tiled(self, images: Tensor, scale: int, size: int, predictor: Callable[[Tensor], Tensor], bar: tqdm) -> Tensor:
        """Return what a function of ``size`` tiles, ``scale`` times as large as those of LR, makes of images."""

        def counted(tiles: Tensor) -> Tensor:
            result = predictor(tiles)
            bar.update(len(tiles))
            return result

        side = self.tile_size * scale
        if images.shape[2:] == (side, side):
            return predictor(images)  # one tile each, and no more of them than fit, which `_stream` sees to
        # convolutions know least at a border; MONAI's own weights leave a thousandth of it, which shows as a seam
        weight = torch.sin(torch.pi * (torch.arange(side) + 0.5) / side).pow(4).clamp(min=1e-6)
        result = sliding_window_inference(
            images,
            roi_size=(side, side),
            sw_batch_size=size,
            predictor=counted,
            overlap=self.overlap,
            roi_weight_map=torch.outer(weight, weight).to(images),
            padding_mode="replicate",
        )
        assert isinstance(result, Tensor)
        return result

    @torch.no_grad()
    def _stream(
        self, slices: Tensor, super_resolve: Callable[[Tensor, int], Tensor], size: int, bar: tqdm
    ) -> Iterator[Tensor]:
        """Yield the results of ``size`` slices at a time, so that memory does not grow with their number."""
        start, known, tiles = 0, self.intensity_range, self.num_tiles(*slices.shape[2:])
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
                consistent = self.degradation.enforce(sr[:, :1], clipped.to(sr), self.damping)
                sr = torch.cat([consistent, sr[:, 1:]], dim=1)
            if known is not None:
                sr = known.restore(sr, chunk)
            low, high = chunk.amin(dim=(1, 2, 3), keepdim=True), chunk.amax(dim=(1, 2, 3), keepdim=True)
            constant = F.pad(low.to(sr), (0, 0, 0, 0, 0, sr.shape[1] - 1))  # without an error
            yield torch.where((low == high).to(sr.device), constant, sr)
            start += len(chunk)
            bar.update(start * tiles - bar.n)

    @staticmethod
    def _with_geometry(result: Tensor, inputs: MetaTensor) -> MetaTensor:
        """Give the result the input's metadata and the affine of the finer grid."""
        output = MetaTensor(result).copy_meta_from(inputs)
        scale = result.shape[2] / inputs.shape[2]
        affine = torch.as_tensor(inputs.affine, dtype=torch.float64)
        finer = [torch.from_numpy(upscaled_affine(a.numpy(), (scale, scale, 1))) for a in affine.view(-1, 4, 4).cpu()]
        output.affine = torch.stack(finer).view(affine.shape)
        return output
