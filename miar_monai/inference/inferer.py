"""MONAI's inferer interface to the networks, for slices and volumes of any in-plane size."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.inferers import Inferer
from torch import Tensor
from tqdm import tqdm

from miar_monai import acceleration
from miar_monai.acceleration.cuda_graphs import tensor_addresses
from miar_monai.data.grid import resized_size
from miar_monai.degradation import Degradation
from miar_monai.degradation.blur_estimation import MAX_BLUR, infer_degradation, without_overshoot
from miar_monai.errors import ConfigurationError, SettingError, check_range, check_whole
from miar_monai.inference.batches import concatenate, in_batches, plain_tensor, slices_of
from miar_monai.inference.devices import device_of, unwrapped
from miar_monai.inference.error_model import ErrorModel
from miar_monai.inference.samples import Sampling
from miar_monai.inference.slice_steps import SliceFunction, SliceSteps, warn_of_linear_estimates
from miar_monai.inference.steps import Steps, StepSettings
from miar_monai.inference.tiling import TileFunction, blend_tiles, counted, num_tiles
from miar_monai.networks import SuperResolutionNetwork
from miar_monai.networks.decoding import Decoding
from miar_monai.transforms.intensity_range import IntensityRange
from miar_monai.transforms.metatensor import finer_batch

__all__ = ["BeamSearchInferer"]


class BeamSearchInferer(Inferer):
    """Super-resolves 2D slices or the slices of 3D volumes; `MIAR` decodes its tokens by beam search.

    Slices larger than the network's tiles are cut into overlapping tiles, whose results are blended with weights that
    vanish at the tile borders; smaller slices are padded by replication. An `Estimator` has no tiles: it takes whole
    slices, or bands of rows of very large ones. The closed forms of both are solved on whole slices, because the blur
    near a border depends on voxels beyond it. Constant slices are returned unchanged, and the results of a
    `SuperResolutionNetwork` are not darker than the darkest voxel of their slice. A `MetaTensor` is
    returned with the affine of the finer grid: the field of view and the slice positions are unchanged.

    On a GPU, the thousand small kernels of a network are recorded as one CUDA graph per batch size, after three calls
    with it; if slices are one tile each, the graph includes the closed forms. Under autocast, the layers run in its
    precision throughout, on a copy of their weights. Only the graphs with their memory and this copy are kept between
    calls, until the network, its weights, the precision or the settings change. Sampling runs without graphs, which
    would repeat its seed.

    Args:
        lookahead_tokens: the paper's K: tokens of each scale that may take their second choice; 0 is greedy.
        alpha: weight of the margin in the choice of these tokens (Eq. 4).
        strategy: ``"beam"``, ``"greedy"``, ``"top_k"`` or ``"top_p"``.
        selection, score, top_k, top_p, temperature, seed: see `miar_monai.networks.decoding.Decoding`.
        fidelity: from 0, the perceptual estimate, to 1, the faithful estimate.
        blur: standard deviation of the input's blur in LR voxels, for a `SuperResolutionNetwork`: a number up to 1.25;
            ``"auto"`` to estimate it from the slices of each call (`infer_degradation`); or None for the blur of the
            training data.
        degradation: the degradation of the LR images, if known: results are then made consistent with it.
        damping: of that correction (`SeparableOperator.prox`): about 1e-3 for floating-point images, 1e-2 for 8 bits.
        tile_size: side of a tile in LR voxels, for networks of other classes.
        sw_batch_size: number of slices, and of their tiles, in a batch; halved when GPU memory runs out. By default 16
            on a GPU, where larger batches are faster per slice, and 2 elsewhere.
        overlap: fraction of a tile shared with its neighbor, in [0, 1).
        progress: show a progress bar on stderr.
        uncertainty: also return the expected absolute error of a `SuperResolutionNetwork`; the image is the same.
        error_model: predicts that error, and limits samples by it; fitted to the weights by ``miar fit-uncertainty``.
        lookahead_scales: number of scales, from the coarsest, whose tokens may branch; 0 for all. Fewer are faster for
            batches on a GPU: see `miar_monai.networks.decoding.Decoding`.
        intensity_range: lowest and highest intensity of the training data; intensities outside it are interpolated
            (`miar_monai.transforms.intensity_range.IntensityRange`). None for no limits.

    Raises:
        SettingError: if a setting is out of range, or ``uncertainty`` is on without an ``error_model``.

    Reference:
        Paper Sec. 3.3; tiles by `monai.inferers.sliding_window_inference`.

    Example:
        >>> from miar_monai.networks import MIAR
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
            check_range("blur", blur, 0, MAX_BLUR)
        if uncertainty and error_model is None:
            raise SettingError(
                "uncertainty is on but there is no error_model to predict the error; use a bundle whose inferer has"
                " one, fit one with miar fit-uncertainty, or turn uncertainty off."
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
        guide: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | dict[str, Tensor]:
        """Super-resolve slices (B, 1, h, w) or volumes (B, 1, h, w, D), whose slices lie along the last axis.

        Args:
            inputs: LR images in about [0, 1].
            network: a `SuperResolutionNetwork`, or any function of tiles (N, 1, t, t) to (N, 1, s · t, s · t).
            *args: passed on to networks of other classes.
            assumed: degradation of the inputs, whose scales determine the result; by default that of
                `input_degradation`.
            guide: another contrast on the grid of the result and scaled as the inputs, for a network with a guide.
            **kwargs: as ``args``.

        Returns:
            (B, 1, H, W) or (B, 1, H, W, D), H and W as in `Grid.resized`, on the device of ``inputs``. With
            ``uncertainty`` a dictionary of two such tensors: ``"image"``, and ``"error"``, its expected absolute error,
            0 in constant slices.

        Raises:
            ConfigurationError: if ``inputs`` has another shape, or ``uncertainty`` is on and the network is not a
                `SuperResolutionNetwork`.
        """
        result, weight = self.super_resolve(inputs, network, *args, assumed=assumed, guide=guide, **kwargs)
        warn_of_linear_estimates([] if weight is None else [weight])
        return {"image": result[:, :1], "error": result[:, 1:]} if self.uncertainty else result

    def super_resolve(
        self,
        inputs: Tensor,
        network: Callable[..., Tensor],
        *args: Any,
        assumed: Degradation | None = None,
        guide: Tensor | None = None,
        sampling: Sampling | None = None,
        collect: Callable[[Iterator[Tensor], int, torch.device], Tensor] = concatenate,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the result of a call and, for a `SuperResolutionNetwork`, its weight in each slice, (B · D,).

        The arguments are those of a call, which also warns of noise. The result is (B, C, H, W) or (B, C, H, W, D): its
        channels are the image and, with uncertainty, the error; with ``sampling`` they are posterior samples or their
        maps, without weights. ``collect`` turns its slices, (n, C, H, W) at a time, into (B · D, C, H, W).
        """
        if inputs.ndim not in (4, 5) or inputs.shape[1] != 1 or inputs.numel() == 0:
            raise ConfigurationError(
                f"the input of the inferer has shape {tuple(inputs.shape)}, but (B, 1, h, w) or (B, 1, h, w, D),"
                " not empty, is needed; pass one channel and two or three spatial axes."
            )
        plain, slices, guides = plain_tensor(inputs), slices_of(inputs), None if guide is None else slices_of(guide)
        device, module = device_of(network, plain), unwrapped(network)
        if assumed is None and isinstance(module, SuperResolutionNetwork):
            assumed = self.input_degradation(slices, module)
        size = self.sw_batch_size or (16 if device.type == "cuda" else 2)
        size = max(size // len(sampling.numbers), 1) if sampling else size
        tiles = self.num_tiles(slices.shape[2], slices.shape[3], network, assumed)
        with tqdm(total=len(slices) * tiles, desc="super-resolving", unit="tile", disable=not self.progress) as bar:
            super_resolve = self._function(network, args, kwargs, assumed, device, partial(counted, bar))
            parts = in_batches(
                partial(self._process_batch, super_resolve, slices, guides, sampling),
                len(slices),
                size,
                set_progress=lambda finished: bar.update(finished * tiles - bar.n),
                free_memory=self._clear_graphs,
            )
            result = collect(parts, len(slices), plain.device)  # (B * D, C, H, W)
        if plain.ndim == 5:
            result = result.unflatten(0, (len(plain), -1)).movedim(1, -1)  # (B, C, H, W, D)
        if isinstance(inputs, MetaTensor):
            scales = assumed.scales if isinstance(module, SuperResolutionNetwork) and assumed else None
            result = finer_batch(inputs, result, scales)
        if sampling:
            return result, None
        return result, super_resolve.network_weights if isinstance(super_resolve, SliceSteps) else None

    def num_tiles(
        self, height: int, width: int, network: Callable[..., Tensor], assumed: Degradation | None = None
    ) -> int:
        """Return the number of tiles of an LR slice; the computing time is proportional to it.

        Args:
            height: rows of the slice.
            width: columns of the slice.
            network: as in a call.
            assumed: as in a call; only its scales matter, by default those of the training.
        """
        module, sizes, side = unwrapped(network), [height, width], self.tile_size
        if isinstance(module, SuperResolutionNetwork):
            scales = (assumed or module.degradation).scales
            sizes = [resized_size(size, 1 / scale) for size, scale in zip(sizes, scales, strict=True)]
            if module.side is None:
                return 1
            side = module.side
        return prod(num_tiles(size, side, self.overlap) for size in sizes)

    def input_degradation(self, slices: Tensor, network: SuperResolutionNetwork) -> Degradation:
        """Return the assumed degradation of LR slices (N, 1, h, w), estimated or set."""
        training = network.degradation
        if self.blur is None:
            return training
        if isinstance(self.blur, str):
            clipped = self._clipped(slices)

            def restore(lr: Tensor, degradation: Degradation) -> Tensor:
                return network.observe(lr, degradation.for_lr(lr)).linear

            return without_overshoot(clipped, infer_degradation(clipped, training), restore)
        return replace(training, sigma=self.blur, blur_on="lr")

    def _clipped(self, slices: Tensor) -> Tensor:
        return slices if self.intensity_range is None else self.intensity_range.clip(slices)

    def _function(
        self,
        network: Callable[..., Tensor],
        args: tuple,
        kwargs: dict,
        assumed: Degradation | None,
        device: torch.device,
        count_tiles: Callable[[TileFunction], TileFunction],
    ) -> SliceFunction:
        """Return a function that super-resolves LR slices, given a batch size, on the device of the network."""
        module = unwrapped(network)
        if isinstance(module, SuperResolutionNetwork) and assumed is not None:
            settings = (self._settings, device, self.overlap, count_tiles, self.error_model)
            return SliceSteps(module, assumed, self._steps(module), *settings)
        if self.uncertainty:
            raise ConfigurationError(
                f"uncertainty is on for a {type(module).__name__}, but only a MIAR or an Estimator has it; turn"
                " uncertainty off."
            )
        predictor = count_tiles(lambda tiles: network(tiles.to(device), *args, **kwargs))
        return lambda chunk, size, _: blend_tiles(chunk, self.tile_size, self.overlap, size, predictor)

    @property
    def _settings(self) -> StepSettings:
        return StepSettings(self.decoding, self.fidelity, self.error_model if self.uncertainty else None)

    def _steps(self, network: SuperResolutionNetwork) -> Steps:
        """Return the steps of a network; on a GPU reuse those of the previous call if nothing has changed."""
        kind = next(network.parameters()).device.type
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        if kind != "cuda" or self.decoding.is_stochastic or not acceleration.graphs():
            return Steps.of(network, self._settings, precision)
        key = (tensor_addresses(network), precision, self._settings)
        if self._graphs is None or self._graphs[0] != key:
            self._graphs = key, Steps.of(network, self._settings, precision).as_graphs()
        return self._graphs[1]

    def _clear_graphs(self) -> None:
        if self._graphs is not None:
            self._graphs[1].clear()

    @torch.no_grad()
    def _process_batch(
        self,
        super_resolve: SliceFunction,
        slices: Tensor,
        guides: Tensor | None,
        sampling: Sampling | None,
        part: slice,
        batch_size: int,
    ) -> Tensor:
        """Super-resolve or sample a part of LR slices (N, 1, h, w), and finish the images: (n, C, H, W)."""
        slices, guide = slices[part], guides if guides is None else guides[part]
        if sampling is None:
            return self._finished(super_resolve(self._clipped(slices), batch_size, guide), slices)
        assert isinstance(super_resolve, SliceSteps)
        sources = sampling.generators(range(part.start, part.stop))
        samples = super_resolve.samples(self._clipped(slices), sources, guide)  # (n, S, H, W)
        repeated = slices.repeat_interleave(samples.shape[1], dim=0)  # (n · S, 1, h, w)
        finished = self._finished(samples.flatten(0, 1)[:, None], repeated)  # (n · S, 1, H, W)
        return sampling.finished(finished.view(samples.shape))

    def _finished(self, sr: Tensor, slices: Tensor) -> Tensor:
        """Finish super-resolved slices (n, 1, H, W), or (n, 2, H, W) with the error."""
        if self.degradation is not None:
            image = self.degradation.for_hr(sr).prox(sr[:, :1], self._clipped(slices).to(sr), self.damping)
            sr = torch.cat([image, sr[:, 1:]], dim=1)
        if self.intensity_range is not None:
            sr = self.intensity_range.restore(sr, slices)
        low, high = slices.amin(dim=(1, 2, 3), keepdim=True), slices.amax(dim=(1, 2, 3), keepdim=True)
        constant = F.pad(low.to(sr), (0, 0, 0, 0, 0, sr.shape[1] - 1))  # its error is 0
        return torch.where((low == high).to(sr.device), constant, sr)
