"""The inferer: slices, volumes, tiles, geometry, settings, and recordings on a GPU."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.affines import upscaled_affine
from helpers.tiny import started, tiny_miar
from hypothesis import given
from hypothesis import strategies as st
from monai.data import MetaTensor
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from miar_monai.acceleration.cuda_graphs import CUDAGraphed, tensor_addresses
from miar_monai.data.geometry import fov_corners
from miar_monai.degradation import Degradation
from miar_monai.errors import ConfigurationError, ImageError, SettingError
from miar_monai.inference import tiling
from miar_monai.inference.error_model import ErrorModel
from miar_monai.inference.inferer import BeamSearchInferer
from miar_monai.networks import Estimator
from miar_monai.networks.decoding import Decoding
from miar_monai.networks.linear import NoiseModel

TILE = 10  # of the tiny network


class Nearest(nn.Module):
    """Nearest-neighbor upsampling by 4."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=4, mode="nearest")


class Linear(nn.Module):
    """Bilinear upsampling by 4."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=4, mode="bilinear")


def inferer(**options: object) -> BeamSearchInferer:
    return BeamSearchInferer(**{"tile_size": TILE, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(1, 1, 37, 31, 7), (2, 1, 10, 10, 3), (1, 1, 7, 5, 2), (3, 1, 23, 9)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
def test_tiles_of_a_nearest_neighbor_network_are_joined_exactly(shape: tuple[int, ...], overlap: float) -> None:
    x = torch.rand(shape)
    expected = x.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    torch.testing.assert_close(inferer(overlap=overlap)(x, Nearest()), expected)


@pytest.mark.parametrize("network", [Linear(), started(tiny_miar()).eval()])
def test_the_result_does_not_depend_on_the_batch(network: nn.Module) -> None:
    x = torch.rand(1, 1, 13, 11, 5, dtype=next((p.dtype for p in network.parameters()), torch.float32))
    one, many = (inferer(sw_batch_size=n, lookahead_tokens=1)(x, network) for n in (1, 7))
    torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "expected"), [(None, [2, 2, 1]), (3, [3, 2]), (9, [5])])
def test_slices_are_processed_in_batches(size: int | None, expected: list[int]) -> None:
    sizes = []

    def network(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return x

    inferer(sw_batch_size=size)(torch.rand(5, 1, TILE, TILE), network)
    assert sizes == expected


def test_slices_are_independent() -> None:
    network, x = started(tiny_miar()).eval(), torch.rand(1, 1, 10, 10, 4)
    volume = inferer()(x, network)
    for z in range(4):
        torch.testing.assert_close(inferer()(x[..., z], network), volume[..., z], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(inferer()(x.flip(-1), network), volume.flip(-1), rtol=1e-4, atol=1e-5)


def test_slices_of_one_tile_are_the_output_of_the_network() -> None:
    network = started(tiny_miar()).eval()
    lr = network.degradation(torch.rand(3, 1, 4 * TILE, 4 * TILE))
    expected = network.super_resolve(lr, Decoding("beam"), 0.25).image
    assert torch.equal(inferer(sw_batch_size=3)(lr, network), expected)  # nothing to blend


def test_constant_tiles_are_blended_without_seams() -> None:
    x = torch.full((1, 1, 37, 31, 2), 0.7)
    torch.testing.assert_close(inferer()(x, Linear()), torch.full((1, 1, 148, 124, 2), 0.7))


def test_constant_slices_are_returned_unchanged() -> None:
    network = started(tiny_miar()).eval()
    x = torch.rand(1, 1, 10, 10, 3).to(next(network.parameters()))
    x[..., 1] = 0.25
    result = inferer()(x, network)
    assert (result[..., 1] == 0.25).all()
    assert result[..., 0].std() > 0


def test_calls_do_not_change_the_inferer() -> None:
    network, decode = started(tiny_miar()).eval(), inferer(strategy="top_k", top_k=3, seed=5)
    x = torch.rand(1, 1, 12, 10).to(next(network.parameters()))
    state = dict(vars(decode))
    first = decode(x, network)
    assert torch.equal(first, decode(x, network))
    assert vars(decode) == state


def test_settings_are_passed_to_the_network() -> None:
    network = started(tiny_miar()).eval()
    x = torch.rand(2, 1, TILE, TILE).to(next(network.parameters()))
    greedy = inferer(strategy="greedy")(x, network)
    assert torch.equal(greedy, inferer(lookahead_tokens=0)(x, network))
    torch.testing.assert_close(greedy, network(x))
    assert not torch.equal(inferer(fidelity=0.0)(x, network), inferer(fidelity=1.0)(x, network))
    assert not torch.equal(inferer(strategy="top_k", seed=1)(x, network), inferer(strategy="top_k", seed=2)(x, network))


def test_noisy_input_causes_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    network = started(tiny_miar()).eval()
    hr = torch.rand(2, 1, TILE // 2, TILE // 2).repeat_interleave(8, 2).repeat_interleave(8, 3)
    lr = network.degradation(hr)  # (2, 1, TILE, TILE)
    inferer()(lr, network)
    assert not caplog.records
    volume = (lr + 0.5 * torch.randn_like(lr)).movedim(0, -1)[None]  # (1, 1, TILE, TILE, 2)
    inferer(sw_batch_size=1)(volume, network)
    assert caplog.messages == [
        "the input is noisier than the training data, or sharper than the assumed blur allows: the networks contribute"
        " 0 % of the result, and the rest is the linear estimate, which adds no detail."
    ]
    network.noise_model.max_training_noise = 10.0
    inferer()(volume, network)
    assert len(caplog.records) == 1


def tiny_estimator(**options: Any) -> Estimator:
    return started(Estimator(channels=(8, 16), blocks=(1, 1), **options)).eval()


def test_slices_on_which_the_network_diverges_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    network = tiny_estimator()
    hr = torch.rand(3, 1, 12, 10).repeat_interleave(4, 2).repeat_interleave(4, 3)
    x = network.degradation(hr).movedim(0, -1)[None]  # (1, 1, 12, 10, 3)
    inferer()(x, network)
    assert not caplog.records
    network.unet.conv_out.weight.data.mul_(1e4)
    result = inferer()(x, network)
    assert caplog.messages == [
        "the network diverged on 3 of 3 slices, which are unlike the training data: their result is the linear"
        " estimate, which adds no detail."
    ]
    assert -2 < result.min() < result.max() < 3


@pytest.mark.parametrize("guide_channels", [0, 1])
@pytest.mark.parametrize("assumed", [Degradation(), Degradation((1, 2.5), 0), Degradation((3, 1.5), (0.5, 0))])
def test_a_network_without_tiles_takes_whole_slices(guide_channels: int, assumed: Degradation) -> None:
    network, lr = tiny_estimator(guide_channels=guide_channels), torch.rand(3, 1, 11, 7)
    operator = assumed.for_lr(lr)
    guide = torch.rand(3, 1, *operator.hr_shape) if guide_channels else None
    expected = network.super_resolve(lr, operator=operator, guide=guide).image
    result = inferer(sw_batch_size=2)(lr, network, assumed=assumed, guide=guide)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    assert inferer().num_tiles(11, 7, network, assumed) == 1


def test_bands_of_very_large_slices_are_joined_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    network, lr = tiny_estimator(guide_channels=1), torch.rand(3, 1, 60, 7)
    guide = torch.rand(3, 1, 240, 28)
    whole = inferer()(lr, network, guide=guide)
    monkeypatch.setattr("miar_monai.inference.slice_steps.MAX_BAND", 1000)
    monkeypatch.setattr(tiling.in_bands, "__defaults__", (1000, 64))
    heights = []
    predict = network.predict
    monkeypatch.setattr(network, "predict", lambda x, *a, **k: (heights.append(x.shape[2]), predict(x, *a, **k))[1])
    torch.testing.assert_close(inferer()(lr, network, guide=guide), whole, rtol=1e-4, atol=1e-5)
    assert max(heights) <= 32 + 2 * 64
    assert len(heights) == 3 * 8


@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 9)),
    stride=st.sampled_from([1, 2, 4]),
    max_voxels=st.integers(1, 400),
)
def test_bands_have_rows_of_context(size: tuple[int, int], stride: int, max_voxels: int) -> None:
    images = torch.rand(2, 3, *size)

    def predictor(band: Tensor) -> dict[str, Tensor]:
        padded = F.pad(band, (0, 0, 4, 4), mode="replicate")
        return {"sum": padded.unfold(2, 9, 1).sum(-1)[:, :2]}

    result = tiling.in_bands(images, stride, predictor, max_voxels, context=8)
    torch.testing.assert_close(result["sum"], predictor(images)["sum"])


@pytest.mark.parametrize("size", [(27, 16), (10, 31)])
@pytest.mark.usefixtures("unbounded")
def test_tiled_results_are_consistent_with_the_input_up_to_the_border(size: tuple[int, int]) -> None:
    network = started(tiny_miar(noise_model=NoiseModel(1e-6, 1e9, 1e9))).double().eval()
    hr = torch.rand(2, 1, 4 * size[0], 4 * size[1], dtype=torch.float64)
    lr = network.degradation(hr)
    sr = inferer()(lr, network)
    torch.testing.assert_close(network.degradation(sr), lr, rtol=0, atol=1e-3)
    assert (sr - network.observe(lr).linear).abs().max() > 0.1  # the networks add detail


@pytest.mark.parametrize("size", [(10, 10), (17, 23)])
def test_results_are_not_darker_than_their_slice_and_keep_its_mean(
    size: tuple[int, int], request: pytest.FixtureRequest
) -> None:
    network, lr = started(tiny_miar(noise_model=NoiseModel(1e-3, 1e9, 1e9))).eval(), torch.full((2, 1, *size), 0.1)
    lr[0, :, 3:7, 2:8], lr[1, :, 4:, :6] = 0.8, 0.5
    sr = inferer()(lr, network)
    request.getfixturevalue("unbounded")
    clipped = inferer()(lr, network).clamp(min=0.1)
    assert sr.min() >= 0.1
    error, worse = ((network.degradation(x) - lr).mean(dim=(1, 2, 3)) for x in (sr, clipped))
    assert (error.abs() < worse / 3).all()


def test_padding_keeps_its_value_and_metal_does_not_ring() -> None:
    network, lr = started(tiny_miar()).eval(), torch.full((1, 1, 17, 13, 2), 0.02)
    lr[:, :, 4:12, 3:9] = 0.5
    plain = inferer(intensity_range=(0, 2))(lr, network)
    torch.testing.assert_close(plain, inferer()(lr, network))
    padded, metal = lr.clone(), lr.clone()
    padded[:, :, :2], padded[:, :, :, -1] = -1.0, -0.7
    metal[:, :, 8:10, 5:7] = 7.3
    result = inferer(intensity_range=(0, 2))(padded, network)
    for x in (result, padded):
        assert sorted(x[x < -0.1].unique().tolist()) == pytest.approx([-1.0, -0.7])
    assert (result[:, :, :8, :-4] == -1).all()
    assert (result[:, :, 8:, -4:] == torch.tensor(-0.7)).all()
    assert result[:, :, 8:, :-4].min() >= 0
    clipped = inferer()(metal.clamp(max=2), network)
    beyond = F.interpolate(metal[..., 0] - metal[..., 0].clamp(max=2), scale_factor=4, mode="bilinear")
    for result in inferer(intensity_range=(0, 2))(metal, network).unbind(-1):
        torch.testing.assert_close(result, clipped[..., 0] + beyond)
        assert result.min() >= 0.02
    assert inferer()(metal, network).max() > 1.2 * 7.3  # without a limit
    both = inferer(intensity_range=(0, 2), uncertainty=True, error_model=ErrorModel(0, 0, 0, 0))(padded, network)
    assert (both["error"][:, 0, :8] == 0).all()
    assert (both["error"][:, 0, 8:, :-4] == 1).all()


def test_padding_just_below_the_range_is_recognized_by_its_single_value() -> None:
    network, lr = started(tiny_miar()).eval(), torch.full((1, 1, 17, 13, 1), 0.02)
    lr[:, :, 4:12, 3:9] = 0.5
    lr[:, :, :2] = -0.1  # as padding of a CT
    lr[:, :, 14, 5:7] = -0.05  # noise
    result = inferer(intensity_range=(0, 2))(lr, network)
    assert (result[:, :, :8] == -0.1).all()
    assert result[:, :, 8:].min() >= 0
    lr[:, :, :2] = 0.02
    lr[:, :, 2, 2] = -0.1
    assert inferer(intensity_range=(0, 2))(lr, network).min() >= 0


@pytest.mark.parametrize("limits", [(1, 0), (0, 0), (float("nan"), 1)])
def test_an_intensity_range_needs_a_lower_and_a_higher_limit(limits: tuple[float, float]) -> None:
    with pytest.raises(SettingError, match=r"^intensity_range is .* a lower and a higher limit are needed"):
        inferer(intensity_range=limits)


class Limited(Nearest):
    """A network that runs out of memory with too many tiles."""

    def __init__(self, max_tiles: int) -> None:
        super().__init__()
        self.max_tiles = max_tiles
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if len(x) > self.max_tiles:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(x)


@pytest.mark.parametrize("shape", [(1, 1, 10, 10, 7), (2, 1, 25, 10)])
def test_running_out_of_memory_halves_the_batch_with_a_warning(
    shape: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    x, network = torch.rand(shape), Limited(max_tiles=1)
    torch.testing.assert_close(inferer(sw_batch_size=4)(x, network), inferer(sw_batch_size=1)(x, Nearest()))
    assert caplog.messages == [
        "out of GPU memory: continuing with batches of 2 instead of 4.",
        "out of GPU memory: continuing with batches of 1 instead of 2.",
    ]
    assert set(network.sizes[2:]) == {1}  # larger batches are not tried again


def test_running_out_of_memory_for_one_slice_is_an_error() -> None:
    with pytest.raises(ImageError, match=r"^the GPU is out of memory for a single slice of this size"):
        inferer()(torch.rand(1, 1, 10, 10), Limited(max_tiles=0))


def test_small_slices_are_padded_before_the_linear_inverse() -> None:
    network = started(tiny_miar()).eval()
    lr = network.degradation(torch.rand(2, 1, 28, 20))  # (2, 1, 7, 5)
    padded = F.pad(lr, (2, 3, 1, 2), mode="replicate")
    expected = network.super_resolve(padded, Decoding("beam"), 0.25).image[..., 4 : 4 + 28, 8 : 8 + 20]
    torch.testing.assert_close(inferer()(lr, network), expected)


def test_weights_of_tiles_vanish_at_inner_borders() -> None:
    class Marked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.zeros(len(x), 1, 40, 40)
            y[..., [0, -1], :] = y[..., [0, -1]] = 1
            return y

    seams = inferer(overlap=0.5)(torch.rand(1, 1, 30, 30), Marked())
    assert seams[..., 10:-10, 10:-10].max() < 2e-3
    assert seams[..., 0, :].min() == 1  # borders of the slice belong to one tile only


def test_the_blur_setting_determines_the_degradation() -> None:
    network = started(tiny_miar()).eval()
    lr = Degradation(sigma=0.0)(torch.rand(2, 1, 4 * TILE, 4 * TILE))
    plain, sharp = inferer()(lr, network), inferer(blur=0.0)(lr, network)
    operator = Degradation(sigma=0.0).for_lr(lr)
    torch.testing.assert_close(sharp, network.super_resolve(lr, Decoding("beam"), 0.25, operator).image)
    assert torch.equal(plain, inferer(blur=1.0)(lr, network))
    assert not torch.allclose(plain, sharp, atol=0.01)
    assert torch.equal(plain, inferer(blur="auto")(lr, network))  # too small for an estimate


def test_the_blur_is_estimated_from_all_slices_of_a_call() -> None:
    network = started(tiny_miar()).eval()
    x = torch.linspace(0, 9, 192)
    hr = (torch.sin(x[:, None] * x) + torch.rand(192, 192, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    lr = Degradation(sigma=0.0)(hr)[None, None]
    assert inferer(blur="auto").input_degradation(lr, network).sigma == 0
    torch.testing.assert_close(inferer(blur="auto")(lr, network), inferer(blur=0.0)(lr, network))


@pytest.mark.parametrize(
    ("blur", "sentence"),
    [
        ("none", "^blur is 'none', but a number of LR voxels or 'auto' is"),
        (-0.1, "^blur is -0.1, but it must lie"),
        (1.3, "^blur is 1.3, but it must lie between 0 and 1.25"),
    ],
)
def test_invalid_blurs_are_refused(blur: Any, sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        inferer(blur=blur)


def test_extra_arguments_are_passed_to_other_networks() -> None:
    def network(x: Tensor, factor: float, offset: float = 0.0) -> Tensor:
        return Nearest()(x) * factor + offset

    x = torch.rand(1, 1, 10, 10)
    torch.testing.assert_close(inferer()(x, network, 2.0, offset=1.0), Nearest()(x) * 2 + 1)


def test_data_consistency_reproduces_the_input() -> None:
    degradation = Degradation()
    lr = degradation(torch.rand(1, 1, 64, 48)).double()
    plain = inferer()(lr, Nearest())
    consistent = inferer(degradation=degradation, damping=1e-9)(lr, Nearest())
    torch.testing.assert_close(degradation(consistent), lr, rtol=0, atol=1e-6)
    assert (degradation(plain) - lr).abs().max() > 0.01


@given(
    st.lists(st.floats(-3, 3), min_size=12, max_size=12).filter(
        lambda v: abs(np.linalg.det(np.array(v).reshape(3, 4)[:, :3])) > 0.1
    )
)
def test_the_field_of_view_is_preserved(entries: list[float]) -> None:
    affine = np.vstack([np.array(entries).reshape(3, 4), [0, 0, 0, 1]])
    x = MetaTensor(torch.rand(1, 7, 5, 3), affine=torch.from_numpy(affine))
    for batch in (x[None], torch.stack([x, x])):
        result = inferer()(batch, Nearest())
        assert isinstance(result, MetaTensor)
        for affine_of_result in torch.as_tensor(result.affine).view(-1, 4, 4).numpy():
            np.testing.assert_allclose(
                fov_corners(affine_of_result, result.shape[2:]), fov_corners(affine, x.shape[1:]), rtol=0, atol=1e-9
            )
    np.testing.assert_array_equal(x.affine.numpy(), affine)


def test_slices_keep_their_metadata() -> None:
    x = MetaTensor(torch.rand(1, 1, 7, 5), affine=torch.diag(torch.tensor([2.0, 3, 4, 1])), meta={"origin": "here"})
    result = inferer()(x, Nearest())
    assert result.meta["origin"] == "here"
    np.testing.assert_allclose(result.affine.numpy(), upscaled_affine(np.diag([2.0, 3, 4, 1]), (4, 4, 1)))


@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 3, 8, 8), (1, 1, 8, 8, 2, 2), (1, 1, 8, 8, 0)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigurationError, match=r"but \(B, 1, h, w\) or \(B, 1, h, w, D\)"):
        inferer()(torch.rand(shape), Nearest())


@pytest.mark.parametrize(
    ("name", "value"),
    [("fidelity", 1.5), ("overlap", 1.0), ("sw_batch_size", 0), ("damping", -1.0), ("lookahead_tokens", 99)],
)
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} is {value}, but it must lie between"):
        BeamSearchInferer(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["sw_batch_size", "tile_size", "top_k"])
@pytest.mark.parametrize("value", [2.5, float("inf")])
def test_sizes_and_counts_must_be_whole_numbers(name: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} is {value}, but it must be a whole number"):
        BeamSearchInferer(**{name: value})  # type: ignore[arg-type]


def test_progress_is_shown_on_stderr_if_enabled(capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.rand(1, 1, 10, 10, 2)
    inferer()(x, Nearest())
    assert capsys.readouterr() == ("", "")
    inferer(progress=True)(x, Nearest())
    out, err = capsys.readouterr()
    assert out == ""
    assert "super-resolving" in err
    assert "2/2" in err


@pytest.mark.parametrize("size", [(10, 10), (25, 10), (37, 26)])
def test_progress_counts_tiles(size: tuple[int, int], capsys: pytest.CaptureFixture[str]) -> None:
    batch_sizes: list[int] = []

    class Counting(Nearest):
        def forward(self, x: Tensor) -> Tensor:
            batch_sizes.append(len(x))
            return super().forward(x)

    x = torch.rand(1, 1, *size, 3)
    tiles = inferer().num_tiles(*size, Nearest())
    inferer(progress=True, sw_batch_size=1)(x, Counting())
    assert sum(batch_sizes) == 3 * tiles
    assert f"{3 * tiles}/{3 * tiles}" in capsys.readouterr().err
    inferer(progress=True, sw_batch_size=2)(x, Limited(max_tiles=1))  # which repeats batches
    assert f"{3 * tiles}/{3 * tiles}" in capsys.readouterr().err


def test_each_batch_of_tiles_is_sampled_with_another_seed() -> None:
    network = started(tiny_miar()).eval()
    x = torch.rand(1, 1, TILE, TILE, 1).to(next(network.parameters())).expand(-1, -1, -1, -1, 2)
    result = inferer(strategy="top_k", sw_batch_size=1)(x, network)
    assert not torch.equal(result[..., 0], result[..., 1])


def test_layers_run_in_the_precision_of_autocast() -> None:
    network = started(tiny_miar()).float().eval()
    resolve, lr = inferer(lookahead_tokens=0), torch.rand(2, 1, TILE, TILE)
    for turn in range(3):
        if turn == 2:  # weights that change in place
            network.load_state_dict({name: 0.9 * value for name, value in network.state_dict().items()})
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(turn % 2 == 0):
            result = resolve(lr, network)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, network.cast(torch.bfloat16).super_resolve(lr).image)
        assert (result - network.super_resolve(lr).image).abs().max() > 1e-4
        assert {p.dtype for p in network.parameters()} == {torch.float32}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lookahead_tokens", [0, 2])
def test_a_recording_agrees_with_the_network(lookahead_tokens: int, precision: torch.dtype) -> None:
    network = started(tiny_miar()).float().cuda().eval()
    resolve = inferer(lookahead_tokens=lookahead_tokens, sw_batch_size=2)
    for turn in range(6):  # launched three times, recorded, replayed
        if turn == 5:
            network.load_state_dict({name: 0.9 * value for name, value in network.state_dict().items()})
        lr = torch.rand(2, 1, TILE, TILE, device="cuda")
        with torch.autocast("cuda", precision, enabled=precision != torch.float32), torch.inference_mode(turn % 2 == 0):
            result = resolve(lr, network)
        plain = network if precision == torch.float32 else network.cast(precision)
        expected = plain.super_resolve(lr, Decoding("beam", lookahead_tokens)).image
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)
    assert resolve._graphs is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_one_recording_is_used_for_all_blurs() -> None:
    network = started(tiny_miar()).float().cuda().eval()
    resolve = inferer(lookahead_tokens=0)
    for blur in (None, 0.5, 0.0, 1.1, 0.5, 1.2):  # launched three times, recorded, replayed
        resolve.blur, lr = blur, torch.rand(1, 1, TILE, TILE, device="cuda")
        operator = (Degradation() if blur is None else Degradation(sigma=blur)).for_lr(lr)
        result = resolve(lr, network)
        torch.testing.assert_close(result, network.super_resolve(lr, operator=operator).image, rtol=1e-3, atol=1e-4)
    assert resolve._graphs is not None
    of_slices = resolve._graphs[1].of_slices
    assert isinstance(of_slices, CUDAGraphed)
    assert len(of_slices._recordings) == 1


@pytest.mark.parametrize("side", [TILE, TILE + 3])
def test_inference_uses_no_float64_which_mps_does_not_support(side: int) -> None:
    dtypes = set()

    class Precisions(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            dtypes.update(x.dtype for x in tree_leaves(result) if isinstance(x, Tensor))
            return result

    network, lr = started(tiny_miar()).float().eval(), torch.rand(1, 1, side, side)
    model = ErrorModel(offset=0.0, disagreement=1.0, edges=0.0, entropy=0.0)
    resolve = inferer(lookahead_tokens=1, uncertainty=True, error_model=model)
    resolve(lr, network)  # caches the operators
    with torch.no_grad(), Precisions():
        resolve(lr, network)
    assert torch.float32 in dtypes
    assert torch.float64 not in dtypes


def test_addresses_of_replaced_weights_and_buffers_change() -> None:
    network = tiny_miar()
    before = tensor_addresses(network)
    assert set(before) == {x.data_ptr() for x in (*network.parameters(), *network.buffers())}
    network.load_state_dict(network.state_dict())  # in place
    assert tensor_addresses(network) == before
    network.decoder = deepcopy(network.decoder)
    assert tensor_addresses(network) != before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_other_weights_precisions_and_settings_need_new_recordings() -> None:
    resolve, lr, recordings = inferer(), torch.rand(1, 1, TILE, TILE), []
    networks = [started(tiny_miar()).float().cuda().eval() for _ in range(2)]
    for network, enabled in ((networks[0], False), (networks[1], False), (networks[1], True)):
        with torch.autocast("cuda", torch.bfloat16, enabled=enabled):
            resolve(lr, network)
            resolve(lr, network)
        assert resolve._graphs is not None
        recordings.append(resolve._graphs[1])
    resolve.decoding = Decoding("greedy")
    resolve(lr, networks[1])
    recordings.append(resolve._graphs[1])
    assert len(set(map(id, recordings))) == 4
    inferer(strategy="top_k")(lr, networks[1])  # without a recording
