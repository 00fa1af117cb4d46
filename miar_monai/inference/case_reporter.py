"""What the evaluator of a bundle says of each case: the same as ``miar sr``."""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.utils import ImageMetaKey

from miar_monai.data.cases import read_case
from miar_monai.data.outputs import ResultPaths, result_path
from miar_monai.inference.bundle import metadata
from miar_monai.inference.inferer import BeamSearchInferer
from miar_monai.inference.input_checks import TrainingDomain, input_warnings
from miar_monai.inference.report import case_report, warnings_said, what_is_said
from miar_monai.networks import MIAR
from miar_monai.transforms.intensity import limits_in_units
from miar_monai.transforms.metatensor import metatensor_to_volume

__all__ = ["CaseReporter"]


class CaseReporter:
    """Prints, on stderr, the line of each case that an evaluator did, what it is warned of, and where its result lies.

    It comes after the handler that writes results; batches hold one case.

    Args:
        bundle_root: folder of the bundle, whose metadata say what the weights were trained on.
        output_dir: folder of the results.
        network: what the inferer runs.
        inferer: of the evaluator.
    """

    def __init__(
        self, bundle_root: str | os.PathLike[str], output_dir: str, network: MIAR, inferer: BeamSearchInferer
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
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._say)

    def _read_metadata(self) -> None:
        self._domain = TrainingDomain.of(metadata(self.bundle_root))

    def _start(self) -> None:
        self._listening = ExitStack()
        self._said = self._listening.enter_context(warnings_said())
        self._seconds = -time.perf_counter()

    def _stop(self) -> None:
        self._seconds += time.perf_counter()
        self._listening.close()

    def _say(self, engine: Any) -> None:
        (data,) = engine.state.output
        image, name = data["image"], engine.state.batch[0].get("name", "")
        source = image.meta[ImageMetaKey.FILENAME_OR_OBJ]
        lr, sr = read_case(source), metatensor_to_volume(data["pred"])  # preprocessing has changed what was read
        assumed = self.inferer.input_degradation(image.as_tensor().movedim(-1, 0), self.network)
        paths, beside = ResultPaths.of(result_path(source, self.output_dir, name=name)), {}
        if "uncertainty" in data:
            sr = sr._replace(uncertainty=metatensor_to_volume(data["uncertainty"]).array)
            beside = {"uncertainty": paths.uncertainty}
        limits = limits_in_units(image, self.inferer.intensity_range)
        warnings = [*input_warnings(lr, self._domain, self.inferer.blur, image.shape[1:3], limits), *self._said]
        device = engine.state.device
        report = case_report(source, paths.image, lr, sr, assumed, self._seconds, device, warnings, beside, limits)
        print(what_is_said(report, warnings), paths.image, sep="\n", file=sys.stderr, flush=True)
