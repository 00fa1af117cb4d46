"""Execution of ``miar sr``: super-resolve the cases of a request, print messages, and write the report."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from miar_monai.cli.jobs import ALWAYS_FILES, Job, Request, auxiliary_outputs, check_outputs, list_jobs
from miar_monai.data.atomic_write import atomic_file
from miar_monai.data.cases import Case, cases_for_guide, find_cases, unpacked
from miar_monai.data.dicom_source import Guide, source_headers
from miar_monai.data.dicom_writer import check_series_folder, write_series
from miar_monai.data.grid import Grid
from miar_monai.data.grid_request import GridRequest
from miar_monai.data.io import (
    Volume,
    is_rounded_at_once,
    parts_to_save,
    quantity_of,
    read_labels,
    read_volume,
    write_volume,
)
from miar_monai.data.outputs import check_output
from miar_monai.errors import ImageError, SettingError, sentence_for_user
from miar_monai.inference.held_input import HeldInput
from miar_monai.inference.memory import MemoryForecast
from miar_monai.inference.passes import Plan
from miar_monai.inference.processes import part_of, processes
from miar_monai.inference.report import (
    capture_warnings,
    case_facts,
    case_message,
    case_report,
    derivation,
    model_report,
    run_report,
)
from miar_monai.inference.resolver import Prepared, SuperResolver
from miar_monai.transforms.acquired import to_acquired_spacing
from miar_monai.transforms.labels import carry_labels, label_volumes
from miar_monai.visualize.page import check_page, write_page
from miar_monai.visualize.preview import preview

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = ["CaseRunner", "run"]

_GRID_OPTIONS = "--isotropic, --spacing or --factor"
_LARGE = 2**30  # bytes; what needs less fits wherever the networks do


def run(request: Request) -> list[str]:
    """Super-resolve the cases of a request; under ``torchrun`` the processes share them.

    Returns:
        The inputs that failed, of all processes. The failure of a single case is raised instead.

    Raises:
        MiarError: if nothing can be done at all: a missing input, model or device, or a wrong option.
    """
    if request.overwrite and request.skip_existing:
        raise SettingError("--overwrite and --skip-existing exclude each other: give one of them.")
    GridRequest.of(request.factor, request.spacing, request.isotropic)  # refused before anything is loaded
    with processes() as group:
        cases = find_cases(request.source)
        if request.guide is not None:
            cases = cases_for_guide(cases, request.guide)
        single = len(cases) == 1 and cases[0].source == request.source
        if request.series and not single:
            raise SettingError(f"{request.source} is a folder of cases, but --series selects from one DICOM folder.")
        if request.labels and not single:
            raise SettingError(f"{request.source} is a folder of cases, but --labels belongs to one: give one case.")
        jobs = list_jobs(request, cases, single)
        check_outputs(request, [target for _, target in jobs] if single and not request.skip_existing else [])
        if request.part:
            part, parts = request.part
            jobs = part_of(jobs, part - 1, parts)
        group.wait()  # no result is written before all processes have listed the cases
        runner = CaseRunner(request, progress=not request.quiet and group.rank == 0)
        if not single:  # a single case is read before the model is loaded, so that a wrong file is reported at once
            runner.load()
        own_jobs = part_of(list(enumerate(jobs)), group.rank, group.size)
        reports = group.gather(runner.run_all(own_jobs, len(jobs), raise_errors=single and group.size == 1))
        failed = [report["input"] for report in reports if "error" in report]
        if group.rank == 0:
            runner.finish(reports, failed)
        group.wait()  # torchrun kills all processes when one exits with an error, and the report is not written yet
    return failed


class CaseRunner:
    """Super-resolves cases one after the other.

    Args:
        request: the request that they belong to.
        progress: show a progress bar.
    """

    def __init__(self, request: Request, progress: bool) -> None:
        self.request = request
        self.progress = progress

    @cached_property
    def resolver(self) -> SuperResolver:
        """The model, loaded at first use."""
        return SuperResolver(self.request.model, self.request.device, progress=self.progress, **self.request.settings)

    @cached_property
    def model(self) -> dict[str, Any]:
        """The model as in the report; the hash of its weights is that of the whole file."""
        return model_report(self.resolver)

    def load(self) -> None:
        """Load the model now."""
        _ = self.resolver

    def print(self, text: str) -> None:
        """Print to stderr unless the request is quiet; stdout is reserved for the paths of results."""
        if not self.request.quiet:
            click.echo(text, err=True)

    def run_all(self, numbered: Sequence[tuple[int, Job]], count: int, raise_errors: bool) -> dict[int, dict[str, Any]]:
        """Return the reports of some jobs by their numbers.

        Args:
            numbered: the jobs, numbered from 0.
            count: number of jobs of all processes.
            raise_errors: raise the error of a case instead of printing it and continuing with the next one.
        """
        reports = {}
        for number, (case, target) in numbered:
            if not raise_errors:
                self.print(f"[{number + 1}/{count}] {case.source}")
            try:
                reports[number] = self.run(case, target)
            except Exception as error:
                if raise_errors or self.request.debug or isinstance(error, BrokenPipeError):
                    raise
                sentence = sentence_for_user(error)
                reports[number] = {"input": str(case.source), "error": sentence}
                click.echo(f"error: {sentence}", err=True)
        return reports

    def run(self, case: Case, target: Path) -> dict[str, Any]:
        """Super-resolve a case and return its report."""
        request = self.request
        if case.problem:
            raise ImageError(case.problem)
        if request.skip_existing and os.path.exists(target):
            return {"input": str(case.source), "output": str(target), "skipped": True}
        check_output(target, request.overwrite, request.as_dicom)
        volume, headers = self._read(case)
        labels = None if request.labels is None else read_labels(request.labels)
        guide, described = self._read_guide()
        auxiliary = auxiliary_outputs(request, target, self.resolver.settings)
        self._check(target, auxiliary, headers)
        start = time.perf_counter()
        with capture_warnings() as captured:
            prepared = self.resolver.prepare(volume, guide)
            plan, limits, warnings = prepared.plan, prepared.limits, prepared.warnings
            held = HeldInput.of(volume, prepared.image, self.resolver.preprocessing)
            del volume, guide  # as little as possible is in memory while the network runs
            grid, forecast = self._forecast(held, prepared, labels, target)
            self._announce(plan, grid, forecast)
            carried = labels and carry_labels(labels, grid)
            result = self.resolver.volume(held.volume, prepared)
        volume = held.restored()
        del held, prepared  # whose image is as large as the volume
        seconds = time.perf_counter() - start
        if carried:  # in the same space as the image, and before it
            placed = carried._replace(affine=result.affine, space=result.space, qform=result.qform)
            write_volume(auxiliary["labels"], placed, self._replace_auxiliary)
        report = case_report(
            str(case.source),
            target,
            volume,
            result,
            plan,
            seconds,
            self.resolver.device,
            [*warnings, *captured],
            auxiliary,
            limits,
            request.guide,
        )
        report["acquired_spacing_mm"] = request.acquired_spacing
        report["memory_needed_bytes"] = forecast.needed
        if labels and carried:
            report["labels"] = {
                "input": str(request.labels),
                "volumes_mm3": {"before": label_volumes(labels), "after": label_volumes(carried)},
            }
        if "page" in auxiliary:
            facts, named = case_facts(report, self.model), result._replace(path=target)
            write_page(auxiliary["page"], volume, named, facts, report["warnings"], self._replace_auxiliary)
        self._write(volume, result, target, auxiliary, headers, described)
        self.print(case_message(report, warnings))
        if not request.quiet:
            click.echo(str(target))
        return report

    def _read(self, case: Case) -> tuple[Volume, list[Dataset]]:
        """Return the volume of a case, at its acquired spacing, and for DICOM output the headers of its slices."""
        with unpacked(case.source) as path:
            volume = read_volume(path, self.request.series, self.request.select)
            headers = source_headers(volume) if self.request.as_dicom else []
        if self.request.acquired_spacing:
            volume = to_acquired_spacing(volume, self.request.acquired_spacing)
        return volume, headers

    def _read_guide(self) -> tuple[Volume | None, Guide | None]:
        """Return the guide, if there is one, and for DICOM output its description."""
        if self.request.guide is None:
            return None, None
        with unpacked(self.request.guide) as path:
            guide = read_volume(path)
            described = Guide.of(guide) if self.request.as_dicom else None
        return guide._replace(path=self.request.guide), described

    def _forecast(
        self, held: HeldInput, prepared: Prepared, labels: Volume | None, target: Path
    ) -> tuple[Grid, MemoryForecast]:
        """Return the grid of the result of a case, and the memory that it needs with all that is in memory already."""
        grids, guide = prepared.plan.grids(held.volume.grid), prepared.guide
        images = held.nbytes + prepared.image.nbytes + (0 if guide is None else guide.nbytes)
        forecast = self.resolver.volume_inferer.forecast(prepared.plan, grids, guide is not None)._replace(
            inputs=images + (labels.array.nbytes if labels else 0),
            label_bytes=labels.array.itemsize if labels else 0,
            is_rounded_at_once=is_rounded_at_once(target, held.volume.dtype),
        )
        return grids[-1], forecast

    def _announce(self, plan: Plan, grid: Grid, forecast: MemoryForecast) -> None:
        """Print before the work what happens to the axes, and how much memory it needs; check that this suffices."""
        if self.request.with_page:
            check_page(grid.shape)
        for sentence in plan.sentences(_GRID_OPTIONS):
            self.print(sentence)
        if forecast.needed >= _LARGE:
            self.print(forecast.sentence)
        forecast.check()

    @property
    def _replace_auxiliary(self) -> bool:
        """Whether existing auxiliary files may be replaced; without an image they are left over from a killed run."""
        return self.request.overwrite or self.request.skip_existing

    def _check(self, target: Path, auxiliary: dict[str, Path], headers: list[Dataset]) -> None:
        """Check before the work that the result of a case can be written."""
        as_dicom = self.request.as_dicom
        for kind, path in auxiliary.items():
            is_series = as_dicom and kind not in ALWAYS_FILES
            check_output(path, self._replace_auxiliary, is_series)
            if is_series:
                check_series_folder(path, headers, self._replace_auxiliary)
        if as_dicom:
            check_series_folder(target, headers, self.request.overwrite)

    def _write(
        self,
        volume: Volume,
        result: Volume,
        target: Path,
        auxiliary: dict[str, Path],
        headers: list[Dataset],
        guide: Guide | None,
    ) -> None:
        """Write the result of a case; the image comes last, since it marks the case as done."""
        if "preview" in auxiliary:
            preview(volume, result, auxiliary["preview"], self._replace_auxiliary)
        for part, kind in parts_to_save(result):
            path, overwrite = target, self.request.overwrite
            if kind:
                path, overwrite = auxiliary[kind], self._replace_auxiliary
            if self.request.as_dicom:
                method = derivation(self.resolver, guide.name if guide else "")
                write_series(path, part, headers, method, overwrite, quantity_of(kind), guide)
            else:
                write_volume(path, part, overwrite)

    def finish(self, reports: list[dict[str, Any]], failed: list[str]) -> None:
        """Write the report of all cases, and print how many were skipped and which failed."""
        request = self.request
        if request.report_file is not None:
            content = json.dumps(run_report(self.resolver, reports), indent=2)
            with atomic_file(request.report_file, request.overwrite) as part:
                part.write_text(content + "\n", encoding="utf-8")
        if skipped := sum("skipped" in report for report in reports):
            self.print(f"{skipped} of {len(reports)} cases had a result already")
        if failed:
            click.echo(f"{len(failed)} of {len(reports)} cases failed: {', '.join(failed)}", err=True)
