"""The messages of the evaluator of a bundle: those of ``miar sr``."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.utils import ImageMetaKey

from miar_monai.data.cases import read_case
from miar_monai.data.outputs import ResultPaths, result_path
from miar_monai.data.volume import Volume, sample_maps
from miar_monai.inference.bundle import metadata
from miar_monai.inference.guide_checks import check_guide, guide_detail_warnings
from miar_monai.inference.input_checks import TrainingDomain, input_warnings
from miar_monai.inference.report import capture_warnings, case_message, case_report
from miar_monai.inference.volume_inferer import VolumeInferer, check_has_guide
from miar_monai.networks import SuperResolutionNetwork
from miar_monai.transforms.intensity import limits_in_units
from miar_monai.transforms.metatensor import metatensor_to_volume

__all__ = ["CaseReporter"]


class CaseReporter:
    """Prints a summary, the warnings and the output path of each case of an evaluator to stderr.

    It plans each case, for itself and for the inferer of the evaluator. Attach it after the handler that writes the
    results. Batches hold one case.

    Args:
        bundle_root: folder of the bundle, whose metadata describe the training data.
        output_dir: folder of the results.
        network: network of the evaluator.
        inferer: inferer of the evaluator.
    """

    def __init__(
        self,
        bundle_root: str | os.PathLike[str],
        output_dir: str,
        network: SuperResolutionNetwork,
        inferer: VolumeInferer,
    ) -> None:
        self.bundle_root = Path(bundle_root)
        self.output_dir = output_dir
        self.network = network
        self.inferer = inferer

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.STARTED, self._read_metadata)
        engine.add_event_handler(Events.ITERATION_STARTED, self._start)
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._stop)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._report)

    def _read_metadata(self) -> None:
        self._domain = TrainingDomain.of(metadata(self.bundle_root))

    def _start(self, engine: Any) -> None:
        self._about_guide = self._check_guide(engine.state.batch)
        self._capture = ExitStack()
        self._captured = self._capture.enter_context(capture_warnings())
        self._seconds = -time.perf_counter()
        self._plan = self.inferer.plan(engine.state.batch["image"][0], self.network)
        engine.inferer = partial(self.inferer, plan=self._plan)  # which would plan the case again

    def _check_guide(self, batch: Mapping[str, Any]) -> list[str]:
        """Check the guide of a case, if it has one, before the network runs; the case is read in its own units."""
        self._guide: Volume | None = None
        if "guide" not in batch:
            return []
        check_has_guide(self.network, batch["guide"])
        guide, image = (read_case(batch[key].meta[ImageMetaKey.FILENAME_OR_OBJ][0]) for key in ("guide", "image"))
        self._guide = guide
        return check_guide(guide, image)

    def _stop(self) -> None:
        self._seconds += time.perf_counter()
        self._capture.close()

    def _report(self, engine: Any) -> None:
        (data,) = engine.state.output
        image, name = data["image"], engine.state.batch[0].get("name", "")
        source = image.meta[ImageMetaKey.FILENAME_OR_OBJ]
        lr, sr = read_case(source), metatensor_to_volume(data["pred"])  # the image in the batch is preprocessed
        plan, slices = self._plan, self.inferer.inferer
        paths, auxiliary = ResultPaths.of(result_path(source, self.output_dir, name=name)), {}
        if "uncertainty" in data:
            sr = sr._replace(uncertainty=metatensor_to_volume(data["uncertainty"]).array)
            auxiliary["uncertainty"] = paths.uncertainty
        if "labels" in data:
            auxiliary["labels"] = paths.labels
        names = sample_maps(self.inferer.samples, self.inferer.keep_samples)
        auxiliary |= {name: paths.sampled(name) for name in names}
        limits = limits_in_units(image, slices.intensity_range)
        found = input_warnings(lr, self._domain, slices.blur, plan, limits)
        detail = [] if self._guide is None else guide_detail_warnings(self._guide, plan.factors)
        warnings = [*found, *self._about_guide, *detail, *self._captured]
        device = engine.state.device
        report = case_report(source, paths.image, lr, sr, plan, self._seconds, device, warnings, auxiliary, limits)
        lines = [*plan.sentences(), case_message(report, warnings), paths.image]
        print(*lines, sep="\n", file=sys.stderr, flush=True)
