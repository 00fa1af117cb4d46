"""The comparison table: MIAR beside what learns nothing and the trained peers, on the same slices, by the same code.

    python -m benchmarks.table --bundle bundles/miar_brats --dataset_dir BraTS --split_file split.json \
        --output_dir table_output [--contrasts t1,t2] [--peers_dir runs/peers] [--zero_shot other/models/model.pt] \
        [--section validation] [--device cuda:0] [--num_slices 2] ...

Data, degradation, networks, metrics and the inferer are what the bundle's ``evaluate.json`` says; every key at its top
can be set as an option. It writes ``table.csv`` (a row for each patient, contrast, slice and method), ``table.md`` and
``plane.png``. It needs the extras metrics, demo and bench.
"""

from __future__ import annotations

import logging
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import fire
import torch
from monai.bundle import ConfigParser
from monai.utils import ensure_tuple
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.paired import EXPLANATION, differences_table, headline_table
from benchmarks.plane import perception_distortion
from miar_monai.data.atomic_write import atomic_file
from miar_monai.data.outputs import check_output_folder, refuse_to_overwrite
from miar_monai.errors import ConfigurationError, report_errors_in_one_sentence
from miar_monai.evaluation import Row, SuperResolutionEvaluation, by_contrast
from miar_monai.inference.bundle import check_switches
from miar_monai.inference.inferer import BeamSearchInferer
from miar_monai.networks import MSVQVAE
from miar_monai.networks.weights import load_weights

logger = logging.getLogger(__name__)

Method = Callable[[Tensor], Tensor]
"""From LR slices (N, 1, h, w) to SR slices (N, 1, H, W), on one device."""

PEERS = {"swinir": "SwinIR", "rcan": "RCAN", "ldm": "LDM-SR"}
REFERENCE = "SwinIR"  # the peer of the headline
RESULTS = ("table.csv", "table.md", "plane.png")


class Volume(NamedTuple):
    """The slices of one volume."""

    subject: str
    contrast: str | None
    lr: Tensor
    """(N, 1, h, w)."""
    hr: Tensor
    """(N, 1, H, W)."""


def read_config(bundle: str, settings: Mapping[str, Any], *overlays: Path, workflow: str = "evaluate") -> ConfigParser:
    """Read a config of a bundle; nothing of it is built yet.

    Args:
        bundle: folder of the bundle.
        settings: values of keys.
        overlays: configs that are laid over it before.
        workflow: which of the bundle's configs.

    Raises:
        ConfigurationError: if there is no such config, or no such key in it.
    """
    path = Path(bundle, "configs", f"{workflow}.json")
    if not path.is_file():
        raise ConfigurationError(
            f"{path} does not exist: a bundle folder is needed; call from the repository's folder or give --bundle."
        )
    parser = ConfigParser()
    parser.read_config([path, *overlays])
    parser["bundle_root"] = bundle
    unknown = [key for key in settings if key not in parser]
    if unknown:
        raise ConfigurationError(
            f"{path} has no {' and no '.join(unknown)}: an option of the table or a key of this config is needed; "
            "correct the option."
        )
    for key, value in settings.items():
        parser[key] = value
    return parser


def open_run(
    bundle: str,
    dataset_dir: str | Sequence[str],
    output_dir: str,
    contrasts: str | Sequence[str] | None,
    settings: Mapping[str, Any],
    results: Iterable[str],
) -> tuple[ConfigParser, dict[str, Any]]:
    """Read the ``evaluate.json`` of a bundle as a benchmark is asked to, and find mistakes before the work.

    Args:
        bundle: folder of the bundle.
        dataset_dir: folder of the data, or several folders.
        output_dir: where the results will be.
        contrasts: of a BraTS folder; the bundle's by default.
        settings: values of other keys.
        results: names of the files that will be written.

    Returns:
        The config, and the values of keys that were given.

    Raises:
        ConfigurationError: if there is no such config or key, or a switch is no switch.
        OutputError: if the folder cannot be written to, or holds results that are not to be replaced.
    """
    given = with_contrasts(
        {"dataset_dir": dataset_dir, "output_dir": output_dir, "progress": False, **settings}, contrasts
    )
    config = read_config(bundle, given)
    overwrite = config.get_parsed_content("overwrite")
    check_switches(overwrite=overwrite, amp=config.get_parsed_content("amp"))
    result_files(output_dir, results, overwrite)
    return config, given


def with_contrasts(settings: Mapping[str, Any], contrasts: str | Sequence[str] | None) -> dict[str, Any]:
    """Return values of keys, and among them the contrasts of a BraTS folder unless they are the bundle's."""
    return {**settings, **({} if contrasts is None else {"datalist#contrasts": list(ensure_tuple(contrasts))})}


def result_files(output_dir: str | Path, names: Iterable[str], overwrite: bool) -> list[Path]:
    """Return where results will be written, checked before the work.

    Raises:
        OutputError: if the folder cannot be written to, or holds results that are not to be replaced.
    """
    check_output_folder(output_dir)
    files = [Path(output_dir, name) for name in names]
    for file in () if overwrite else files:
        refuse_to_overwrite(file)
    return files


def load_volumes(config: ConfigParser) -> list[Volume]:
    """Load the volumes that a bundle evaluates, degraded as it says."""
    dataset, volumes = config.get_parsed_content("dataset"), []
    for i in tqdm(range(len(dataset)), desc="loading", unit="volume"):
        item = dataset[i]
        lr, hr = (item[key].as_tensor().movedim(-1, 0).contiguous() for key in ("image", "label"))
        volumes.append(Volume(item["subject"], item.get("contrast"), lr, hr))
    return volumes


def batches(volume: Volume, size: int, device: torch.device) -> Iterator[tuple[range, Tensor, Tensor]]:
    """Yield the indices, the LR and the HR slices of a volume on a device, so many at a time."""
    for start in range(0, len(volume.hr), size):
        lr, hr = (images[start : start + size].to(device) for images in (volume.lr, volume.hr))
        yield range(start, start + len(hr)), lr, hr


def miar_inferers(bundle: str, settings: Mapping[str, Any]) -> tuple[dict[str, BeamSearchInferer], list[str], str]:
    """Return the inferers of MIAR's rows by name, the names of the fidelity sweep, and that of the bundle's default.

    Args:
        bundle: folder of the bundle.
        settings: values of keys of its ``evaluate.json``.
    """

    def inferer(**changes: Any) -> tuple[str, BeamSearchInferer]:
        built = read_config(bundle, {**settings, **changes, "progress": False}).get_parsed_content("inferer")
        decoding = built.decoding
        search = f"K = {decoding.num_branching}" if decoding.num_branching else "greedy"
        if decoding.strategy in ("top_k", "top_p"):
            search = decoding.strategy
        return f"MIAR, fidelity {built.fidelity:g}, {search}", built

    default = inferer()
    sweep = [inferer(strategy="greedy", fidelity=value) for value in sorted({0.0, default[1].fidelity, 1.0})]
    searches = [inferer(strategy="beam", lookahead_tokens=k) for k in (1, 2, 3)]
    return dict([*sweep, *searches, default]), [name for name, _ in sweep], default[0]


def peer_network(bundle: str, peer: str) -> Any:
    """Return a peer, untrained, as its overlay of the bundle's training describes it."""
    overlay = Path(__file__).with_name("peers") / f"{peer}.json"
    return read_config(bundle, {}, overlay, workflow="train").get_parsed_content("network_def")


def load_peers(bundle: str, peers_dir: str | None, tokenizer: Path) -> tuple[dict[str, nn.Module], list[str]]:
    """Return the trained peers whose weights are found, by their row's name, and one sentence for each other.

    Args:
        bundle: folder of the bundle, whose tokenizer the latent diffusion model uses.
        peers_dir: folder with ``<peer>.pt``.
        tokenizer: weights of the tokenizer.

    Raises:
        ConfigurationError: if ``peers_dir`` is not a folder.
        CheckpointError: if weights are damaged or belong to another network.
    """
    if peers_dir is not None and not Path(peers_dir).is_dir():
        raise ConfigurationError(f"{peers_dir} is not a folder: the folder of the peers' weights is needed.")
    found, missing = {}, []
    for peer, title in PEERS.items():
        needed = [Path(peers_dir or "", f"{peer}.pt")] + [tokenizer] * (peer == "ldm")
        absent = [path.name for path in needed if peers_dir is None or not path.is_file()]
        if absent:
            missing.append(f"{title} is left out: {' and '.join(absent)} not found; train it and give --peers_dir.")
            continue
        network = peer_network(bundle, peer)
        if peer == "ldm":
            load_weights(network.tokenizer, tokenizer, "give --tokenizer.")
        trained = network.denoiser if peer == "ldm" else network
        load_weights(trained, needed[0], "train the peer again.")
        found[title] = network
    return found, missing


def timed(method: Method, lr: Tensor) -> tuple[Tensor, float]:
    """Return what a method makes of LR slices (N, 1, h, w), and the milliseconds that a slice took."""
    synchronize = torch.cuda.synchronize if lr.is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    sr = method(lr)
    synchronize()
    return sr, 1e3 * (time.perf_counter() - start) / len(lr)


@torch.inference_mode()
def measure(
    evaluation: SuperResolutionEvaluation,
    volumes: Iterable[Volume],
    learned: Mapping[str, Method],
    batch_size: int,
) -> None:
    """Add the rows of the baselines and of the learned methods, the latter made data-consistent too.

    Every method takes the same batches; the first is given to it twice, and the first time is not counted.

    Args:
        evaluation: measures and collects.
        volumes: the slices.
        learned: the methods that were trained.
        batch_size: slices that a method takes at once.
    """
    warm = False
    for volume in tqdm(list(volumes), desc="measuring", unit="volume"):
        for slices, lr, hr in batches(volume, batch_size, evaluation.device):
            estimates, milliseconds = {}, {}
            for name, method in {**evaluation.baseline_methods, **learned}.items():
                if not warm:
                    method(lr)
                estimates[name], milliseconds[name] = timed(method, lr)
                if name in learned:
                    sr, consistent = estimates[name].float(), f"{name}, data-consistent"
                    estimates[consistent], more = timed(partial(evaluation.make_consistent, sr), lr)
                    milliseconds[consistent] = milliseconds[name] + more
            evaluation.add(estimates, hr, volume.subject, slices, volume.contrast, milliseconds)
            warm = True


@torch.inference_mode()
def tokenizer_report(
    evaluation: SuperResolutionEvaluation, volumes: Iterable[Volume], tokenizer: MSVQVAE, batch_size: int
) -> str:
    """Return, as Markdown, how well a tokenizer reconstructs HR slices, and what it uses of its codebook.

    Args:
        evaluation: empty; measures and collects.
        volumes: the slices.
        tokenizer: the tokenizer, on the evaluation's device.
        batch_size: slices that it takes at once.
    """
    usage: Tensor | int = 0
    for volume in tqdm(list(volumes), desc="tokenizer", unit="volume"):
        for slices, _, hr in batches(volume, batch_size, evaluation.device):
            tokens = tokenizer.encode(hr)
            estimates = {"reconstruction": tokenizer.decode(tokens)}
            estimates["without the quantizer"] = tokenizer.reconstruct_unquantized(hr)
            evaluation.add(estimates, hr, volume.subject, slices, volume.contrast)
            usage = usage + tokenizer.quantizer.usage(tokens)
    seen = torch.as_tensor(usage).flatten(1) > 0  # (K, codes of all codebooks)
    used = {f"{side} × {side}": codes for side, codes in zip(tokenizer.schedule.sides, seen, strict=True)}
    lines = [f"| scale | codes in use of {seen.shape[1]} | share |", "|---|---|---|"]
    for scale, codes in {**used, "all": seen.any(dim=0)}.items():
        lines.append(f"| {scale} | {int(codes.sum())} | {100 * codes.float().mean():.1f} % |")
    return "\n".join([evaluation.table(), *lines, ""])


def paired_report(rows: Sequence[Row], ours: Sequence[str], peers: Sequence[str], metrics: Sequence[str]) -> str:
    """Return, as Markdown, the paired differences of some methods and each peer, for each contrast and for all."""
    sections, lines = by_contrast(rows), [EXPLANATION, ""]
    for contrast, found in sections.items():
        lines += [f"### {contrast}", ""] * (len(sections) > 1)
        if REFERENCE in peers and {"PSNR", "LPIPS"} <= set(metrics):
            lines += [*headline_table(found, ours, REFERENCE), ""]
        for peer in peers:
            lines += [*differences_table(found, ours, peer, metrics), ""]
    return "\n".join(lines)


def provenance(bundle: str, config: ConfigParser, volumes: Sequence[Volume], batch_size: int) -> list[str]:
    """Return what a reader needs to get the same numbers: commit, weights, patients, machine."""
    split = config["split_file"]
    by = f"the split by {Path(split).name}" if split else f"the split by seed {config.get_parsed_content('seed')}"
    patients = ", ".join(dict.fromkeys(volume.subject for volume in volumes))
    device = torch.device(config.get_parsed_content("device"))
    precision = "bfloat16" if config.get_parsed_content("amp") else "float32"
    return [
        f"- Bundle {Path(bundle).name}, commit {commit()}.",
        f"- Section {config.get_parsed_content('section')} of {by}: {patients}.",
        f"- Time: median over batches of up to {batch_size} slices after a warm-up; {machine(device)}, {precision}, "
        f"torch {torch.__version__}. Data consistency is added to the time of the method it follows.",
    ]


def machine(device: torch.device) -> str:
    """Return what a device is called, and of a CPU how many of its cores work."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def commit() -> str:
    """Return the commit of the repository, marked if files were changed since."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def publish(text: str, path: Path, overwrite: bool) -> None:
    """Write a benchmark's text and print it."""
    with atomic_file(path, overwrite) as part:
        part.write_text(text, encoding="utf-8")
    print(text)


def main(
    dataset_dir: str | Sequence[str],
    bundle: str = "bundles/miar_brats",
    output_dir: str = "table_output",
    contrasts: str | Sequence[str] | None = None,
    peers_dir: str | None = None,
    tokenizer: str | None = None,
    zero_shot: str | None = None,
    **settings: Any,
) -> None:
    """Measure the table, the paired differences and the tokenizer; draw the perception-distortion plane.

    Args:
        dataset_dir: folder of the data, or several folders.
        bundle: folder of the bundle.
        output_dir: where ``table.csv``, ``table.md`` and ``plane.png`` are written.
        contrasts: of a BraTS folder; the bundle's by default.
        peers_dir: folder with ``swinir.pt``, ``rcan.pt`` and ``ldm.pt``; a missing one is named and left out.
        tokenizer: weights of the tokenizer; the bundle's ``models/tokenizer.pt`` by default.
        zero_shot: weights of the same network that were trained on other data, for a row of their own.
        settings: keys of the bundle's ``evaluate.json``: split_file, section, device, checkpoint, metrics, num_slices,
            sw_batch_size (slices that every method takes at once), overwrite, ...
    """
    config, given = open_run(bundle, dataset_dir, output_dir, contrasts, settings, RESULTS)
    get, folder = config.get_parsed_content, Path(output_dir)
    overwrite, batch_size = get("overwrite"), get("sw_batch_size")
    evaluation = get("evaluation")
    inferers, sweep, default = miar_inferers(bundle, given)
    networks = {name: get("network") for name in inferers}
    load_weights(get("network"), get("checkpoint"), "train the bundle (see its docs/README.md), or give --checkpoint.")
    if zero_shot is not None:
        other = read_config(bundle, given).get_parsed_content("network")
        networks["MIAR, zero-shot"] = load_weights(other, zero_shot, "give --zero_shot weights of the same network.")
        inferers["MIAR, zero-shot"] = copy(inferers[default])  # which keeps what it records of one network alone
    tokenizer_path = Path(tokenizer or Path(bundle, "models", "tokenizer.pt"))
    peers, missing = load_peers(bundle, peers_dir, tokenizer_path)
    for network in (*networks.values(), *peers.values()):
        network.to(evaluation.device).eval()
    learned: dict[str, Method] = dict(peers)
    for name, inferer in inferers.items():
        learned[name] = partial(inferer, network=networks[name])
    for sentence in (*missing, *evaluation.missing):
        logger.warning(sentence)

    volumes = load_volumes(config)
    with torch.autocast(evaluation.device.type, torch.bfloat16, enabled=get("amp")):
        measure(evaluation, volumes, learned, batch_size)
    evaluation.write_rows(folder / "table.csv", overwrite)
    if {"PSNR", "LPIPS"} <= set(evaluation.scores):
        sweeps = [sweep, [f"{name}, data-consistent" for name in sweep]]
        perception_distortion(evaluation.rows, folder / "plane.png", sweeps, overwrite)
    else:
        missing.append("plane.png is left out: it needs PSNR and LPIPS.")

    notes = [*provenance(bundle, config, volumes, batch_size), f"- The bundle's default is {default}."]
    notes += [f"- {sentence}" for sentence in missing]
    ours = list(dict.fromkeys([sweep[0], default, sweep[-1]]))
    text = ["# Comparison", "", *notes, "", evaluation.table(), "## Paired differences", ""]
    text.append(paired_report(evaluation.rows, ours, ["linear inverse", *peers], list(evaluation.scores)))
    text += ["## Tokenizer", "", _tokenizer_section(bundle, tokenizer_path, evaluation, volumes, batch_size)]
    publish("\n".join(text), folder / "table.md", overwrite)


def _tokenizer_section(
    bundle: str, weights: Path, evaluation: SuperResolutionEvaluation, volumes: Sequence[Volume], batch_size: int
) -> str:
    """Return the report on the tokenizer, or why there is none."""
    if not weights.is_file():
        return f"Left out: {weights.name} not found; train it (configs/train_stage1.json), and give --tokenizer.\n"
    tokenizer = read_config(bundle, {}, workflow="train").get_parsed_content("tokenizer_def")
    load_weights(tokenizer, weights, "give --tokenizer.")
    metrics = [name for name in ("PSNR", "SSIM", "LPIPS") if name in evaluation.metrics]
    own = SuperResolutionEvaluation(evaluation.degradation, metrics, device=evaluation.device)
    return tokenizer_report(own, volumes, tokenizer.to(evaluation.device).eval(), batch_size)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")  # to stderr
    report_errors_in_one_sentence()
    fire.Fire(main)
