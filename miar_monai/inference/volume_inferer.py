"""Super-resolution of volumes along any axes, by passes over their slices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.utils import convert_to_tensor
from torch import Tensor

from miar_monai.data.grid import Grid
from miar_monai.data.grid_request import GridRequest
from miar_monai.data.volume import SAMPLE_MAPS, sample_maps
from miar_monai.degradation import Degradation
from miar_monai.errors import ConfigurationError, SettingError, check_choice, check_range, check_whole
from miar_monai.inference.acquisition import SLICE_PROFILES, Acquisition
from miar_monai.inference.batches import average, concatenate, plain_tensor, slices_of
from miar_monai.inference.devices import unwrapped
from miar_monai.inference.inferer import BeamSearchInferer
from miar_monai.inference.memory import MemoryForecast
from miar_monai.inference.passes import Pass, Plan, plan_passes
from miar_monai.inference.samples import Sampling, summarized
from miar_monai.inference.slice_steps import warn_of_linear_estimates
from miar_monai.networks import SuperResolutionNetwork
from miar_monai.transforms.guide import resample_guide
from miar_monai.transforms.metatensor import grid_of, with_affine

__all__ = ["VolumeInferer", "check_has_guide"]

_BLOCK = 16  # layers of the samples of a volume that are summarized at once


class VolumeInferer(Inferer):
    """Super-resolves a volume to any finer grid: slice by slice, in one plane or in several.

    The planes, their order and the degradations of their slices are those of `plan_passes`. The result has exactly the
    requested spacing and the center of the input (`miar_monai.data.grid.Grid.resized`). Without a request, the axial
    plane, or that of a single slice, becomes finer by the factor of the training. The volume stays where it is; its
    slices are sent to the device in batches.

    With uncertainty, the expected errors of the planes that are averaged are averaged too, as if their errors were the
    same, which is an upper bound. Those of successive stages are independent, and are combined in quadrature.

    With samples, the posterior distribution is sampled too, by a network that was trained for it. Where a stage has two
    planes, they sample in turn: a mean of two samples would have half their variance. Each sample passes through all
    stages. If there are several passes, all samples are in memory at the same time.

    Args:
        inferer: super-resolves the slices.
        factor: how many times finer the patient axes become, from 1 to 8, whole or not: one number, or three for
            left-right, posterior-anterior and inferior-superior; also as text, ``"1,1,5"``.
        spacing: distance of the new voxels in millimeters, likewise; at most that of the input.
        isotropic: whether all axes get the smallest spacing of the input.
        slice_thickness: full width at half maximum of the slice profile in millimeters; by default that of the DICOM
            headers or, without one, the distance of the slices.
        slice_profile: the slice profile to assume: ``"slr"`` (Shinnar-Le Roux pulses of MRI), ``"gaussian"`` (helical
            CT) or ``"box"``; see `miar_monai.inference.acquisition.SLICE_PROFILES`.
        samples: number of posterior samples, at least 2, or 0 for none.
        seed: seed of their noise; the same seed gives the same samples, on a CPU and a GPU up to rounding.
        keep_samples: return the samples too, not only their maps.
        interval_factor: widens the interval, see `miar_monai.inference.samples.SampleSummary`.

    Raises:
        SettingError: if a setting is out of range or unknown, or more than one of factor, spacing and isotropic is
            given.

    Example:
        >>> from miar_monai.networks import Estimator
        >>> network = Estimator(channels=(8, 16), blocks=(1, 1)).eval()
        >>> thick = MetaTensor(torch.rand(1, 1, 11, 9, 3), affine=torch.diag(torch.tensor([1.0, 1, 5, 1])))
        >>> VolumeInferer(BeamSearchInferer(lookahead_tokens=0), spacing="1,1,2")(thick, network).shape
        torch.Size([1, 1, 11, 9, 8])
    """

    def __init__(
        self,
        inferer: BeamSearchInferer,
        factor: Any = None,
        spacing: Any = None,
        isotropic: bool = False,
        slice_thickness: float | None = None,
        slice_profile: str = SLICE_PROFILES[0],
        samples: int = 0,
        seed: int = 0,
        keep_samples: bool = False,
        interval_factor: float = 1.0,
    ) -> None:
        self.inferer = inferer
        self.request = GridRequest.of(factor, spacing, isotropic)
        if slice_thickness is not None:
            check_range("slice_thickness", slice_thickness, 0, float("inf"))
        check_choice("slice_profile", slice_profile, SLICE_PROFILES)
        for name, value in (("samples", samples), ("sampling_seed", seed)):
            check_range(name, value, 0, 2**63 - 1)
            check_whole(name, value)
        if samples == 1:
            raise SettingError("samples is 1, but at least 2 are needed for a spread; request more, or 0 for none.")
        if keep_samples and not samples:
            raise SettingError("save_samples is on, but samples is 0; request some, or turn save_samples off.")
        check_range("interval_factor", interval_factor, 0, float("inf"))
        self.slice_thickness = slice_thickness
        self.slice_profile = slice_profile
        self.samples = int(samples)
        self.seed = int(seed)
        self.keep_samples = keep_samples
        self.interval_factor = interval_factor

    def plan(self, image: Tensor, network: SuperResolutionNetwork) -> Plan:
        """Return the passes for a volume, whose blur is measured if the setting of the inferer is "auto".

        Args:
            image: preprocessed, (1, X, Y, Z); without an affine, its axes are those of the patient.
            network: the network.

        Raises:
            SettingError: if the requested grid is not possible for this volume.
        """
        grid = grid_of(image)
        voxels = plain_tensor(image)

        def in_plane(plane: tuple[int, int]) -> Degradation:
            rows, columns = (1 + grid.patient_axes.index(axis) for axis in plane)
            slices = voxels.movedim((0, rows, columns), (1, 2, 3))  # (N, 1, h, w)
            return self.inferer.input_degradation(slices, network)

        default = [*network.degradation.scales]
        default.insert(grid.normal_axis, 1.0)
        factors = self.request.factors(grid, default)
        acquisition = Acquisition.of_image(image, self.slice_thickness, self.slice_profile)
        plan = plan_passes(factors, grid.patient_spacing, in_plane, acquisition)
        return plan._replace(request=self.request)

    def forecast(self, plan: Plan, grids: Sequence[Grid], has_guide: bool = False) -> MemoryForecast:
        """Return the memory that a volume needs.

        Args:
            plan: from `plan`.
            grids: of the input and of the results of all stages, from `Plan.grids`.
            has_guide: whether there is a guide.
        """
        return MemoryForecast(
            [grid.shape for grid in grids[1:]],
            sum(map(len, plan.stages)),
            self.inferer.uncertainty,
            self.samples,
            self.keep_samples,
            has_guide,
        )

    def __call__(
        self,
        inputs: Tensor,
        network: Callable[..., Tensor],
        *args: Any,
        plan: Plan | None = None,
        guide: Tensor | Callable[[Grid], Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor | dict[str, Tensor]:
        """Super-resolve a volume.

        Args:
            inputs: one preprocessed volume, (1, 1, X, Y, Z).
            network: a `SuperResolutionNetwork`.
            *args: ignored.
            plan: from `plan`; by default it is made here.
            guide: another contrast of the same patient, scaled as the volume, for a network with a guide: on any grid
                in the same millimeters, (1, 1, X, Y, Z), see `miar_monai.transforms.guide.resample_guide`; or a
                function that returns it on a given grid, (1, X, Y, Z), and is called for the grid of each stage.
            **kwargs: ignored.

        Returns:
            The result on the finer grid, (1, 1, X', Y', Z'), or a dictionary as from the inferer of the slices. With
            samples, it also has the maps of these by the names of `miar_monai.data.volume.sample_maps`.

        Raises:
            ConfigurationError: if ``inputs`` has another shape.
            SettingError: if the requested grid is not possible for this volume, or the network has no guide or samples.
            ImageError: if the memory of the machine does not suffice for the result.
        """
        if inputs.ndim != 5 or inputs.shape[:2] != (1, 1):
            raise ConfigurationError(
                f"the input of the inferer has shape {tuple(inputs.shape)}, but one volume (1, 1, X, Y, Z) is needed;"
                " pass volumes one by one."
            )
        check_has_guide(network, guide)
        if self.samples:
            unwrapped(network).check_samples()  # type: ignore[attr-defined]
        on_grid = partial(_on_grid, guide[0]) if isinstance(guide, Tensor) else guide
        plan = plan or self.plan(inputs[0], getattr(network, "module", network))  # type: ignore[arg-type]
        grids = plan.grids(grid_of(inputs[0]))
        self.forecast(plan, grids, guide is not None).check()
        guides = [None if on_grid is None else on_grid(grid)[None] for grid in grids[1:]]
        result, weights = plain_tensor(inputs), []
        for stage, grid, other in zip(plan.stages, grids[1:], guides, strict=True):
            earlier, first = result, None
            for one in stage:
                result, weight = self._slices(earlier[:, :1], other, one, grid, network, first=first)
                weights.append(weight)
                first = result
            _add_error(result, earlier)
        warn_of_linear_estimates([weight for weight in weights if weight is not None])
        names = ["image", "error"] if self.inferer.uncertainty else ["image"]
        volumes = dict(zip(names, result.split(1, dim=1), strict=True))
        if self.samples:
            volumes |= self._sampled(plain_tensor(inputs), guides, plan, grids, network)
        if isinstance(inputs, MetaTensor):
            affine = grids[-1].affine.reshape(tuple(inputs.affine.shape))
            volumes = {name: with_affine(inputs, x, affine) for name, x in volumes.items()}
        return volumes if self.inferer.uncertainty or self.samples else volumes["image"]

    def _sampled(
        self,
        image: Tensor,
        guides: list[Tensor | None],
        plan: Plan,
        grids: list[Grid],
        network: Callable[..., Tensor],
    ) -> dict[str, Tensor]:
        """Return the maps of the samples of a volume (1, 1, X, Y, Z) by name, and the samples if they are kept."""
        names = sample_maps(self.samples, self.keep_samples)
        first = Sampling(self.seed, (), factor=self.interval_factor, keep=self.keep_samples)
        if sum(map(len, plan.stages)) == 1:
            sampling = first._replace(numbers=tuple(range(self.samples)), summarize=True)
            maps, _ = self._slices(image, guides[0], plan.stages[0][0], grids[1], network, sampling)
            return dict(zip(names, maps.split(1, dim=1), strict=True))
        volumes = [image] * self.samples
        for number, (stage, grid, guide) in enumerate(zip(plan.stages, grids[1:], guides, strict=True)):
            for i, one in enumerate(stage):
                own = tuple(range(i, self.samples, len(stage)))
                # all samples have the same input in the first stage, and each has its own in a later one
                for numbers in [own] if number == 0 else [(each,) for each in own]:
                    sampling = first._replace(numbers=numbers, stage=number)
                    result, _ = self._slices(volumes[numbers[0]], guide, one, grid, network, sampling)
                    for each, sample in zip(numbers, result.split(1, dim=1), strict=True):
                        volumes[each] = sample
        size = volumes[0].shape[2:]
        summary = image.new_empty(1, len(SAMPLE_MAPS), *size)
        for start in range(0, size[0], _BLOCK):
            block = slice(start, start + _BLOCK)
            samples = torch.cat([volume[:, :, block] for volume in volumes], dim=1)
            summary[:, :, block] = summarized(samples, self.interval_factor)
        kept = volumes if self.keep_samples else []
        return dict(zip(names, [*summary.split(1, dim=1), *kept], strict=True))

    def _slices(
        self,
        volume: Tensor,
        guide: Tensor | None,
        one: Pass,
        grid: Grid,
        network: Callable[..., Tensor],
        sampling: Sampling | None = None,
        first: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Super-resolve the slices of a volume (1, 1, X, Y, Z) in one plane: (1, C, X', Y', Z').

        Those of the second plane of a stage are averaged with the result of the first one, in its memory. Also return
        the weights of the network.
        """
        axes = [2 + grid.patient_axes.index(axis) for axis in one.plane]
        guide = guide if guide is None else guide.movedim(axes, (2, 3))
        result, weight = self.inferer.super_resolve(
            volume.movedim(axes, (2, 3)),
            network,
            assumed=one.degradation,
            guide=guide,
            sampling=sampling,
            collect=concatenate if first is None else partial(average, slices_of(first.movedim(axes, (2, 3)))),
        )
        return result.movedim((2, 3), axes), weight


def check_has_guide(network: Callable[..., Tensor], guide: Any) -> None:
    """Check that a network can use a guide, if there is one.

    Raises:
        SettingError: if it cannot.
    """
    if guide is not None and not getattr(unwrapped(network), "guide_channels", 0):
        raise SettingError(
            "a guide is given, but this model was trained without one; leave it out, or choose a model with a guide."
        )


def _on_grid(guide: Tensor, grid: Grid) -> Tensor:
    return resample_guide(convert_to_tensor(guide, track_meta=True), grid).as_tensor()


def _add_error(result: Tensor, earlier: Tensor) -> None:
    """Add the expected error of an earlier stage, if it has one, to that of a later one, (1, 2, X, Y, Z), in place."""
    if earlier.shape[1] > 1:
        error = F.interpolate(earlier[:, 1:], result.shape[2:], mode="trilinear", align_corners=False)
        torch.hypot(error, result[:, 1:], out=result[:, 1:])
