"""The figures of the documentation, one command each; ``make figures`` draws all of them.

    python -m benchmarks.figures side_by_side --bundle bundles/miar_brats --dataset_dir BraTS --split_file split.json \
        [--output_dir docs/images] [--volume 0] [--slice 20] [--peers_dir runs/peers] [--device cuda:0] ...
    python -m benchmarks.figures prefixes --tokenizers "{'with dropout': 'a.pt', 'without': 'b.pt'}" ...
    python -m benchmarks.figures codebook ...
    python -m benchmarks.figures curves --runs "{'MIAR': 'runs/brats'}" ...
    python -m benchmarks.figures all ...
    python -m benchmarks.figures all --paper runs/brats/paper ...

With ``--paper`` they are those of the paper's own system (`benchmarks.paper`): its Fig. 3b by `side_by_side`, 3a by
`prefixes`, 3d by `codebook` and 3c by `curves`.

The bundle's configs define networks, data, preprocessing and degradation: ``evaluate.json`` for the first figure,
``train_stage1.json`` for the next two. Each of their top-level keys is an option. Needs the extras demo, train and
bench.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.transforms import CropForeground
from torch import Tensor, nn

from benchmarks import paper_figures
from benchmarks.common import Method
from benchmarks.paper import DECODINGS, DEFAULT, paper_config, paper_methods
from benchmarks.peers.loading import peer_network
from miar_monai.cli.workflow import read_config
from miar_monai.data.outputs import refuse_to_overwrite
from miar_monai.errors import ConfigurationError, DatasetError, find_miar_error, report_errors_in_one_sentence
from miar_monai.evaluation.metrics import psnr
from miar_monai.inference.bundle import check_switches
from miar_monai.networks import MSVQVAE
from miar_monai.networks.weights import load_weights
from miar_monai.training import TokenizerEvaluator
from miar_monai.transforms import ScaleIntensityHUd
from miar_monai.visualize import figures

logger = logging.getLogger(__name__)

SHOWN_SCALES = (1, 3, 5, 7, 9, 10)  # the paper's Fig. 3a
DROPOUTS = {"with dropout": "full", "without dropout": "no-dropout"}
POSITIONS = {"with RoPE": "full", "without RoPE": "no-rope"}
"""Runs of the paper's system by their names in its Fig. 3."""
BODY = 0.05  # network intensity of the body, to which pictures are cropped


class Figures:
    """Draw the figures of one bundle; each method writes ``<output_dir>/<name of the bundle>_<method>.png``.

    With ``paper`` the files are ``<output_dir>/<name of the bundle>_paper_<method>.png``.

    Args:
        bundle: folder of the bundle.
        dataset_dir: folder of the data.
        split_file: JSON file with the patients of each section; by default they are split by seed.
        output_dir: folder of the pictures.
        volume: index of the volume in its section (test for `side_by_side`, validation for `prefixes`).
        slice: index of the slice; the middle one by default.
        peers_dir: folder with the weights of the peers (``swinir.pt``).
        tokenizers: weights of tokenizers by name, ``models/tokenizer.pt`` of the bundle by default; `codebook` shows
            the first.
        runs: output folders of training runs by name.
        paper: folder with the runs of the paper's own system, ``full``, ``no-rope`` and ``no-dropout``; those that
            exist are shown.
        overwrite: replace existing pictures.
        **settings: values of keys of the bundle's configs.

    Raises:
        ConfigurationError: if a setting is unknown, or ``tokenizers`` or ``runs`` is not a dictionary.
    """

    def __init__(
        self,
        bundle: str = "bundles/miar_brats",
        dataset_dir: str | None = None,
        split_file: str | None = None,
        output_dir: str = "docs/images",
        volume: int = 0,
        slice: int | None = None,
        peers_dir: str = "runs/peers",
        tokenizers: Mapping[str, str] | None = None,
        runs: Mapping[str, str] | None = None,
        paper: str | None = None,
        overwrite: bool = False,
        **settings: Any,
    ) -> None:
        check_switches(overwrite=overwrite)
        for option, value in {"tokenizers": tokenizers, "runs": runs}.items():
            if value is not None and not isinstance(value, Mapping):
                raise ConfigurationError(
                    f"{option} is {value!r}, but names and paths are needed: give --{option} \"{{'name': 'path'}}\"."
                )
        name = Path(bundle).name
        data = {"dataset_dir": dataset_dir, "split_file": split_file}
        self._bundle = bundle
        self._settings = {**settings, **{key: value for key, value in data.items() if value is not None}}
        self._paper = paper
        self._pictures = Path(output_dir, name if paper is None else f"{name}_paper")
        self._volume_index, self._slice_index = volume, slice
        self._swinir_weights = Path(peers_dir, "swinir.pt")
        self._tokenizer_weights = tokenizers or {"tokenizer": str(Path(bundle, "models", "tokenizer.pt"))}
        self._runs = runs or {"MIAR": str(Path("runs", name.removeprefix("miar_")))}
        if paper is not None:
            self._tokenizer_weights = tokenizers or self._paper_files(DROPOUTS, "tokenizer.pt")
            self._runs = runs or self._paper_files({**DROPOUTS, "without RoPE": "no-rope"}, "")
        self._overwrite = overwrite

    def side_by_side(self) -> Path:
        """Draw a test slice: bicubic, damped linear inverse, SwinIR if available, MIAR at two fidelities, truth.

        Of the paper's system, networks with and without RoPE are shown instead of the fidelities.
        """
        path = self._path("side_by_side")
        get = self._config("evaluate", section="test", progress=False).get_parsed_content
        ours = self._ours(get) if self._paper is None else self._ours_of_the_paper(get("device"))
        dataset, evaluation, inferer, device = get("dataset"), get("evaluation"), get("inferer"), get("device")
        volume = self._volume(dataset)
        lr, hr = (self._slice(volume[key]) for key in ("image", "label"))
        baselines = evaluation.baselines(lr)
        estimates = {"bicubic": baselines["bicubic"], "linear inverse": baselines["linear inverse"]}
        swinir = self._swinir()
        with torch.inference_mode():
            if swinir is not None:
                estimates["SwinIR"] = inferer(lr.to(device), swinir.to(device)).cpu()
            estimates |= {title: method(lr.to(device)).cpu() for title, method in ours.items()}
        panels = {f"{name}\n{_decibels(image, hr)}": image for name, image in estimates.items()}
        truth = "truth\n"  # two lines, as the other titles
        panels[truth] = hr
        spacing = tuple(float(size) for size in volume["label"].pixdim[:2])
        scaled, unit = _in_units(_cropped(panels, truth), dataset.transform.transforms)
        return figures.side_by_side(scaled, path, spacing, truth, unit, self._overwrite)

    def prefixes(self) -> Path:
        """Draw a validation slice decoded from its first scales, and the mean PSNR of all validation slices."""
        path, tokenizers = self._path("prefixes"), self._tokenizers()
        get = self._config("train_stage1").get_parsed_content
        dataset, loader, device = get("validate#dataset"), get("validate#dataloader"), get("device")
        hr = self._slice(self._volume(dataset)["image"])
        rows, means = {}, {}
        for name, tokenizer in tokenizers.items():
            num_scales = tokenizer.schedule.num_scales
            evaluator = TokenizerEvaluator(device, loader, tokenizer.to(device))
            evaluator.run()
            metrics = evaluator.state.metrics
            means[name] = [metrics[f"psnr_prefix_{k}"] for k in range(1, num_scales)] + [metrics["psnr"]]
            images = {}
            with torch.inference_mode():
                tokens = tokenizer.encode(hr.to(device))
                for k in [*(k for k in SHOWN_SCALES if k < num_scales), num_scales]:
                    image = tokenizer.decode(tokens, k).cpu()
                    scales = "1 scale" if k == 1 else f"{k} scales"
                    images[f"{scales}: {_decibels(image, hr)}"] = image
            rows[name] = _cropped({**images, "truth": hr}, "truth")
        truth = [row.pop("truth") for row in rows.values()][-1]
        return paper_figures.layer_wise(rows, truth, means, path, self._overwrite)

    def codebook(self) -> Path:
        """Draw the t-SNE of the codebook, and its use by the validation slices."""
        from sklearn.manifold import TSNE

        path, tokenizer = self._path("codebook"), next(iter(self._tokenizers().values()))
        get = self._config("train_stage1").get_parsed_content
        loader, device = get("validate#dataloader"), get("device")
        tokenizer.to(device)
        encoded = [tokenizer.encode(batch["image"].to(device)) for batch in loader]
        counts = tokenizer.quantizer.usage(torch.cat(encoded)).flatten(1).cpu()  # (K, codes of all codebooks)
        codes = tokenizer.quantizer.codes().flatten(0, 1).cpu().numpy()
        points = TSNE(perplexity=min(30, len(codes) / 4), init="pca", random_state=0).fit_transform(codes)
        return paper_figures.codebook_map(points, counts.numpy(), tokenizer.schedule.sides, path, self._overwrite)

    def curves(self) -> Path:
        """Draw the curves of training runs from their TensorBoard files."""
        path = self._path("curves")
        recorded = {}
        for run, folder in self._runs.items():
            stages = {f"stage {i}": _recorded(Path(folder, f"stage{i}")) for i in (1, 2)}
            recorded[run] = {stage: curves for stage, curves in stages.items() if curves}
            if not recorded[run]:
                raise DatasetError(
                    f"{folder} holds no TensorBoard files (stage1/events.out.tfevents.*): the output folder of a "
                    "training run is needed; train first, or give --runs."
                )
        return paper_figures.training_curves(recorded, path, self._overwrite)

    def all(self) -> None:
        """Draw all figures; a figure that fails is skipped with a warning."""
        for draw in (self.side_by_side, self.prefixes, self.codebook, self.curves):
            try:
                print(draw())
            except Exception as error:
                cause = find_miar_error(error)
                if cause is None:
                    raise
                logger.warning("%s is left out: %s", draw.__name__, cause)

    def _path(self, figure: str) -> Path:
        path = self._pictures.with_name(f"{self._pictures.name}_{figure}.png")
        if not self._overwrite:
            refuse_to_overwrite(path)
        return path

    def _config(self, workflow: str, **settings: Any) -> ConfigParser:
        given = {**self._settings, **settings}
        if self._paper is not None:
            return paper_config(self._bundle, given, workflow)
        return read_config(self._bundle, given, workflow=workflow)

    def _paper_files(self, runs: Mapping[str, str], file: str) -> dict[str, str]:
        """Return the paths of a file in runs of the paper's system, by name; runs without it are left out."""
        paths = {name: Path(str(self._paper), run, file) for name, run in runs.items()}
        return {name: str(path) for name, path in paths.items() if path.exists() or runs[name] == "full"}

    def _ours(self, get: Callable[[str], Any]) -> dict[str, Method]:
        """Return the network of the bundle at two fidelities, by title."""
        network = load_weights(get("network"), get("checkpoint"), "train the bundle first (see its docs/README.md).")
        faithful = self._config("evaluate", fidelity=1.0, progress=False).get_parsed_content("inferer")
        return {
            title: partial(inferer, network=network.eval())
            for title, inferer in (("MIAR", get("inferer")), ("MIAR, fidelity 1", faithful))
        }

    def _ours_of_the_paper(self, device: torch.device) -> dict[str, Method]:
        """Return the paper's system with and without RoPE, by title; of one alone, the title is its decoding."""
        search, methods = {DEFAULT: DECODINGS[DEFAULT]}, {}
        found = self._paper_files(POSITIONS, "model.pt")
        for title, weights in found.items():
            decoded = paper_methods(self._bundle, self._settings, weights, search, device, POSITIONS[title])
            methods[title if len(found) > 1 else f"paper, {DEFAULT}"] = decoded[DEFAULT]
        return methods

    def _volume(self, dataset: Any) -> Mapping[str, Any]:
        """Load the chosen volume."""
        if not 0 <= self._volume_index < len(dataset.data):
            raise ConfigurationError(
                f"volume is {self._volume_index}, but there are {len(dataset.data)}, counted from 0; give one of them."
            )
        return dataset.transform(dataset.data[self._volume_index])

    def _slice(self, volume: Tensor) -> Tensor:
        """Return the chosen slice, (1, 1, X, Y), of a volume (1, X, Y, Z)."""
        depth = volume.shape[-1]
        index = depth // 2 if self._slice_index is None else self._slice_index
        if not 0 <= index < depth:
            raise ConfigurationError(f"slice is {index}, but the volume has {depth}, counted from 0; give one of them.")
        return volume[..., index][None].as_subclass(Tensor)

    def _tokenizers(self) -> dict[str, MSVQVAE]:
        """Load the tokenizers."""
        hint = "train it (configs/train_stage1.json writes it into its --output_dir), or give --tokenizers."
        loaded = {}
        for name, path in self._tokenizer_weights.items():
            network = self._config("train_stage1").get_parsed_content("tokenizer_def")
            loaded[name] = load_weights(network, path, hint).eval()
        return loaded

    def _swinir(self) -> nn.Module | None:
        """Return SwinIR, or None if its weights are missing."""
        path = self._swinir_weights
        if not path.is_file():
            logger.warning("SwinIR is left out: there are no weights at %s; train it, or give --peers_dir.", path)
            return None
        return load_weights(peer_network(self._bundle, "swinir"), path, "train SwinIR again.").eval()


def _decibels(image: Tensor, hr: Tensor) -> str:
    """Return the PSNR of a slice as text."""
    return f"{psnr(image.clamp(0, 1), hr.clamp(0, 1)).item():.1f} dB"


def _cropped(images: Mapping[str, Tensor], truth: str) -> dict[str, np.ndarray]:
    """Return slices (1, 1, X, Y), clamped to [0, 1] and cropped to the body in the true one, as arrays."""
    stack = torch.cat([image[0] for image in images.values()]).clamp(0, 1)  # (N, X, Y)
    crop = CropForeground(lambda x: x > BODY, channel_indices=list(images).index(truth), margin=4, allow_smaller=True)
    return dict(zip(images, crop(stack).numpy(), strict=True))


def _in_units(images: Mapping[str, np.ndarray], preprocessing: Sequence[Any]) -> tuple[dict[str, np.ndarray], str]:
    """Return CT slices in HU, and MRI slices, which have no unit, in network intensities."""
    for transform in preprocessing:
        if isinstance(transform, ScaleIntensityHUd):
            low, high = transform.transform.low, transform.transform.high
            return {name: low + (high - low) * image for name, image in images.items()}, "HU"
    return dict(images), ""


def _recorded(folder: Path) -> dict[str, paper_figures.Curve]:
    """Return the losses and the validation PSNR among the curves in TensorBoard files.

    A run that was killed and resumed has several files, which may overlap; the last values count.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not any(folder.glob("events.out.tfevents.*")):
        return {}
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    curves = {}
    for tag in sorted(events.Tags()["scalars"], key=lambda tag: tag == "psnr"):  # the PSNR comes last
        if tag.endswith("_loss") or tag == "psnr":
            values = {event.step: event.value for event in sorted(events.Scalars(tag), key=lambda e: e.wall_time)}
            title = "validation PSNR (dB)" if tag == "psnr" else tag.replace("_", " ")
            curves[title] = (sorted(values), [values[step] for step in sorted(values)])
    return curves


if __name__ == "__main__":
    import fire

    logging.basicConfig(format="%(message)s")  # to stderr
    report_errors_in_one_sentence()
    fire.Fire(Figures)
