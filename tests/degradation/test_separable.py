from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.phantoms import head
from hypothesis import example, given
from hypothesis import strategies as st

from miar_monai.degradation import AxisDegradation, Degradation, SeparableOperator, operators, with_blurs
from miar_monai.degradation.resampling import interpolation_matrix
from miar_monai.errors import ConfigurationError

DEGRADATIONS = [
    Degradation(),
    Degradation(blur_on="hr"),
    Degradation(sigma=0),
    Degradation(scale=2, sigma=0.8),
    Degradation(scale=(4, 1), sigma=(1.0, 0.0)),
    Degradation(scale=(1, 2.5), sigma=(0.0, 0.8)),
    Degradation(scale=(2, 4), sigma=0, profile="gaussian", thickness=1.25),
    Degradation(scale=4, sigma=0.5, profile="box", thickness=(0.75, 1.0)),
    Degradation(scale=(1, 4), sigma=0, profile=("bicubic", "gaussian"), thickness=(1.0, 0.8)),
]
WHOLE = [degradation for degradation in DEGRADATIONS if all(scale % 1 == 0 for scale in degradation.scales)]


def axis(degradation: Degradation, size: int, index: int = 0) -> AxisDegradation:
    """Return the degradation of the rows (0) or columns (1) of square images."""
    operator = degradation.for_hr(torch.empty(size, size))
    return degradation.axes(operator.hr_shape, operator.lr_shape)[index]


@pytest.fixture(params=DEGRADATIONS, ids=str)
def degradation(request: pytest.FixtureRequest) -> Degradation:
    return request.param


@pytest.fixture
def hr() -> torch.Tensor:
    return torch.from_numpy(head((64, 48, 5), seed=3)).movedim(-1, 0)


@pytest.mark.parametrize("index", [0, 1])
def test_lr_and_hr_lines_have_the_same_center(degradation: Degradation, index: int) -> None:
    one = axis(degradation, 150, index) if degradation.scales[index] % 1 else axis(degradation, 128, index)
    ramp = torch.arange(one.hr_size, dtype=torch.float64) - (one.hr_size - 1) / 2
    expected = one.factor * (torch.arange(one.lr_size, dtype=torch.float64) - (one.lr_size - 1) / 2)
    inner = slice(8, -8)
    tolerance = 1e-3 if one.factor % 1 else 1e-9  # of an HR voxel: the kernel is sampled, not integrated
    torch.testing.assert_close((one.matrix() @ ramp)[inner], expected[inner], atol=tolerance, rtol=0)


@pytest.mark.parametrize(("size", "factor"), [(64, 2), (128, 8), (30, 3), (48, 4)])
def test_resampling_by_whole_factors_agrees_with_torch(size: int, factor: int) -> None:
    line = AxisDegradation(size, size // factor, factor)
    down = interpolation_matrix(size, size // factor, "bicubic", antialias=True)
    torch.testing.assert_close(line.matrix(), down, atol=1e-14, rtol=0)
    up = interpolation_matrix(size // factor, size, "bicubic")
    torch.testing.assert_close(line.upsampling(), up, atol=1e-14, rtol=0)


@pytest.mark.parametrize("profile", ["gaussian", "box"])
@pytest.mark.parametrize("thickness", [0.6, 1.0, 1.5])
def test_the_thickness_is_the_width_at_half_maximum(profile: str, thickness: float) -> None:
    row = AxisDegradation(401, 9, 40.0, profile, thickness).matrix()[4]
    half = (row >= row.max() / 2 * (1 - 1e-9)).sum()
    assert abs(float(half) - 40 * thickness) <= 1
    mean = (row * (torch.arange(401, dtype=torch.float64) - 200)).sum()
    assert abs(float(mean)) < 1e-9


def test_a_factor_of_one_leaves_an_axis_unchanged() -> None:
    x = torch.rand(3, 32, 21, dtype=torch.float64)
    operator = Degradation(scale=(4, 1), sigma=(1.0, 0.0)).for_hr(x)
    assert operator.lr_shape == (8, 21)
    assert torch.equal(operator.columns.matrix, torch.eye(21, dtype=torch.float64))
    rows_alone = Degradation().for_hr(x.new_empty(32, 32)).rows.matrix @ x
    torch.testing.assert_close(operator.A(x), rows_alone)
    lr = operator.A(x)
    torch.testing.assert_close(operator.prox(x + 0.1, lr, 0.0).mean(dim=2), x.mean(dim=2), atol=0.2, rtol=0)


def test_constants_are_preserved(degradation: Degradation) -> None:
    lr = degradation(torch.full((2, 1, 64, 48), 0.7, dtype=torch.float64))
    rows, columns = degradation.scales
    assert lr.shape == (2, 1, round(64 / rows), round(48 / columns))
    torch.testing.assert_close(lr, torch.full_like(lr, 0.7))


def test_degradation_applies_a_matrix_to_each_axis(degradation: Degradation, hr: torch.Tensor) -> None:
    operator = degradation.for_hr(hr)
    rows, columns = (one.matrix() for one in degradation.axes(operator.hr_shape, operator.lr_shape))
    torch.testing.assert_close(degradation(hr), torch.einsum("ih,bhw,jw->bij", rows, hr, columns))


def test_adjoint_agrees_with_the_gradient(degradation: Degradation, hr: torch.Tensor) -> None:
    x = hr.clone().requires_grad_()
    lr = degradation(x)
    y = torch.randn(lr.shape, dtype=lr.dtype, generator=torch.Generator().manual_seed(0))
    (adjoint,) = torch.autograd.grad((lr * y).sum(), x)
    torch.testing.assert_close((adjoint * hr).sum(), (lr * y).sum())
    torch.testing.assert_close(degradation.for_hr(hr).A_adjoint(y), adjoint)


def test_the_undamped_inverse_is_the_moore_penrose_inverse(degradation: Degradation, hr: torch.Tensor) -> None:
    operator = degradation.for_hr(hr)
    inverse = torch.linalg.pinv(torch.kron(operator.rows.matrix, operator.columns.matrix), rcond=1e-12)
    lr = degradation(hr)
    expected = (lr.flatten(1) @ inverse.T).view_as(hr)
    torch.testing.assert_close(operator.A_dagger(lr), expected, atol=1e-6, rtol=0)


def test_blur_is_a_gaussian_on_the_given_side() -> None:
    image = torch.zeros(128, 128, dtype=torch.float64)
    image[64:68, 64:68] = 1

    def variance(lr: torch.Tensor) -> float:
        profile = lr.sum(0) / lr.sum()
        positions = torch.arange(len(profile), dtype=torch.float64)
        return float((profile * positions**2).sum() - (profile * positions).sum() ** 2)

    plain = variance(Degradation(sigma=0)(image))
    assert variance(Degradation(sigma=1)(image)) - plain == pytest.approx(1, abs=0.01)
    assert variance(Degradation(sigma=4, blur_on="hr")(image)) - plain == pytest.approx(1, abs=0.01)


def test_prox_with_exact_data_never_increases_the_error(degradation: Degradation, hr: torch.Tensor) -> None:
    lr, operator = degradation(hr), degradation.for_hr(hr)
    for noise in (0.0, 0.01, 0.2):
        estimate = hr + noise * torch.randn(hr.shape, dtype=hr.dtype, generator=torch.Generator().manual_seed(1))
        enforced = operator.prox(estimate, lr, damping=0)
        error, error_before = (((x - hr) ** 2).mean((1, 2)) for x in (enforced, estimate))
        assert (error <= error_before + 1e-12).all()
        torch.testing.assert_close(degradation(enforced), lr, atol=1e-9, rtol=0)
        torch.testing.assert_close(operator.prox(enforced, lr, damping=0), enforced, atol=1e-9, rtol=0)


@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_prox_is_the_tikhonov_solution_with_a_frequency_dependent_prior(sigma: float) -> None:
    degradation, damping = Degradation(sigma=sigma), 0.1
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(size, generator=generator, dtype=torch.float64) for size in [(16, 12), (4, 3)])
    (_, s_rows, v_rows), (_, s_columns, v_columns) = (
        torch.linalg.svd(axis(degradation, size).matrix(), full_matrices=False) for size in (16, 12)
    )
    vectors = torch.kron(v_rows, v_columns)  # (12, 192): of the row space
    rows, columns = (torch.arange(len(s)) * s[0] / s.sum() for s in (s_rows, s_columns))
    weight = torch.hypot(rows[:, None], columns).clamp(max=1).flatten()
    within = vectors.T @ torch.diag(weight**2) @ vectors
    without = torch.eye(16 * 12, dtype=torch.float64) - vectors.T @ vectors
    operator = torch.kron(axis(degradation, 16).matrix(), axis(degradation, 12).matrix())
    normal = operator.T @ operator + damping**2 * (within + without)
    correction = torch.linalg.solve(normal, operator.T @ (y.flatten() - operator @ x.flatten()))
    torch.testing.assert_close(degradation.for_hr(x).prox(x, y, damping), x + correction.reshape(16, 12))


@given(
    sigma=st.floats(0, 1.25),
    noise=st.floats(0, 0.02),
    levels=st.tuples(st.floats(-0.6, 0), st.floats(-0.15, 0)),  # offsets of networks trained with the correction
    seed=st.integers(0, 99),
)
@example(sigma=0.0, noise=0.02, levels=(-0.6, -0.13), seed=0)
def test_local_means_are_preserved_for_any_noise_blur_and_estimate(
    sigma: float, noise: float, levels: tuple[float, float], seed: int
) -> None:
    """The mean over any 8 × 8 LR voxels, with a tolerance of 0.1 % of the range and of the noise of such a mean."""
    degradation, generator = Degradation(sigma=sigma), torch.Generator().manual_seed(seed)
    hr = torch.from_numpy(head((160, 128, 1), seed=seed)[..., 0])
    lr = degradation(hr)
    lr = lr + noise * torch.randn(lr.shape, dtype=lr.dtype, generator=generator)
    inside, outside = levels
    uncorrected = torch.where(
        hr > 0.1, 0.5 * hr + inside, torch.full_like(hr, outside)
    )  # as uncorrected maps of a network
    damping = max(noise / 0.2, 1e-3)
    operator = degradation.for_lr(lr)
    for estimate in (operator.prox(uncorrected, lr, damping), operator.restore(lr, damping)):
        blocks = torch.nn.functional.avg_pool2d((degradation(estimate) - lr)[None], 8, stride=1)
        assert blocks.abs().max() < 1e-3 * float(lr.max() - lr.min()) + 4 * noise / 8
    darker, inner = estimate + inside, (slice(32, -32), slice(32, -32))  # without the border
    corrected = operator.prox(darker, degradation(estimate), damping)
    torch.testing.assert_close(corrected[inner], estimate[inner], atol=1.2e-3, rtol=0)


def test_damping_reduces_the_error_of_noisy_data(hr: torch.Tensor) -> None:
    degradation = Degradation()
    lr = degradation(hr)
    noisy = lr + 0.01 * torch.randn(lr.shape, dtype=lr.dtype, generator=torch.Generator().manual_seed(0))
    errors = [float(((degradation.for_lr(noisy).restore(noisy, damping) - hr) ** 2).mean()) for damping in (1e-6, 0.05)]
    assert errors[1] < errors[0] / 10


def test_bounded_estimates_keep_their_local_means(degradation: Degradation) -> None:
    hr = torch.zeros(128, 96, dtype=torch.float64)
    hr[32:88, 24:60] = 1
    lr = degradation(hr) + 0.25
    operator = degradation.for_hr(hr)
    estimate = operator.restore(lr, 1e-3)
    bounded = operator.bounded(estimate, 0.25)
    assert estimate.min() < 0.24
    assert bounded.min() >= 0.25

    def worst(x: torch.Tensor) -> float:
        return float(torch.nn.functional.avg_pool2d((degradation(x) - lr)[None], 8, stride=1).abs().max())

    assert worst(estimate) < 1e-4
    assert worst(bounded) < (4e-3 if degradation.profile == "bicubic" else 5e-3)
    assert worst(bounded) < worst(estimate.clamp(min=0.25)) / 2
    assert torch.equal(operator.bounded(estimate, -9), estimate)


def test_restore_is_better_than_bicubic_interpolation(degradation: Degradation, hr: torch.Tensor) -> None:
    lr = degradation(hr)
    bicubic = torch.nn.functional.interpolate(lr[None], size=hr.shape[-2:], mode="bicubic")[0]
    assert ((degradation.for_hr(hr).restore(lr, 1e-3) - hr) ** 2).mean() < ((bicubic - hr) ** 2).mean()


def test_dtype_and_autocast(hr: torch.Tensor) -> None:
    degradation, x = Degradation(), hr.float()
    lr = degradation(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(degradation(x), lr)
        operator = degradation.for_lr(lr)
        assert operator.restore(lr, 0.01).dtype == torch.float32
        assert operator.A_adjoint(lr).dtype == operator.A_dagger(lr, 0.1).dtype == torch.float32
    torch.testing.assert_close(lr.double(), degradation(hr), atol=1e-6, rtol=0)


def test_operators_built_in_inference_mode_can_be_used_in_training() -> None:
    degradation = Degradation(sigma=0.987)
    with torch.inference_mode():
        lr = degradation(torch.rand(1, 32, 32))
        degradation.for_lr(lr).restore(lr, 0.1)
    x = torch.rand(1, 32, 32, requires_grad=True)
    degradation.for_hr(x).prox(x * x, degradation(x * x), 0.1).sum().backward()
    assert np.isfinite(x.grad.numpy()).all()


def test_sizes_that_are_not_multiples_of_the_scale_are_refused() -> None:
    degradation = Degradation()
    sentence = "^an image side of 30 voxels cannot be downsampled by 4: it must be a multiple of 4; crop or pad"
    for call in (
        lambda: degradation.for_hr(torch.zeros(1, 30, 32)),
        lambda: degradation(torch.zeros(1, 32, 30)),
    ):
        with pytest.raises(ConfigurationError, match=sentence):
            call()


@pytest.mark.parametrize(
    "settings",
    [
        {"scale": 0}, {"scale": 0.5}, {"scale": (4, 65)}, {"scale": float("inf")}, {"thickness": 0},
        {"sigma": -1}, {"sigma": 1e9}, {"sigma": float("nan")},
        {"blur_on": "sr"},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings: dict) -> None:
    with pytest.raises(ConfigurationError, match=r"^Degradation\(.*\) is out of range: scale must be from 1 to 64"):
        Degradation(**settings)


def test_unknown_profiles_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"^profile is 'sinc', but it must be one of bicubic, gaussian,"):
        Degradation(profile="sinc")


@pytest.mark.parametrize("level", [0.001, 0.01, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_estimated_from_the_stop_band(level: float, dtype: torch.dtype) -> None:
    degradation, generator = Degradation(), torch.Generator().manual_seed(0)
    hr = torch.rand(3, 1, 32, 48, generator=generator, dtype=dtype).repeat_interleave(8, 2).repeat_interleave(8, 3)
    lr = degradation(hr)
    assert degradation.for_lr(lr).noise_level(lr).shape == (3, 1, 1, 1)
    assert (degradation.for_lr(lr).noise_level(lr) < 3e-4).all()
    noisy = lr + level * torch.randn(lr.shape, generator=generator, dtype=dtype)
    expected = torch.full_like(lr[..., :1, :1], level)
    torch.testing.assert_close(degradation.for_lr(lr).noise_level(noisy), expected, atol=0, rtol=0.2)
    scaled = degradation.for_lr(lr).noise_level(40 * noisy - 3)
    torch.testing.assert_close(scaled, 40 * degradation.for_lr(lr).noise_level(noisy), atol=0, rtol=1e-3)


def test_noise_above_the_detail_is_estimated_without_a_blur() -> None:
    degradation, generator = Degradation(sigma=0), torch.Generator().manual_seed(0)
    lr = degradation(torch.rand(1, 1, 6, 6, generator=generator).repeat_interleave(16, 2).repeat_interleave(16, 3))
    level = degradation.for_lr(lr).noise_level(lr)
    noisy = degradation.for_lr(lr).noise_level(lr + 0.1 * torch.randn(lr.shape, generator=generator))
    assert level < 0.05
    torch.testing.assert_close(noisy, torch.full_like(noisy, 0.1), atol=0, rtol=0.25)


KINDS = with_blurs(Degradation(), [0.0, 0.5, 1.3])


@pytest.mark.parametrize("size", [(64, 48), (32, 32)])
def test_select_gives_each_image_the_operator_of_its_index(size: tuple[int, int], hr: torch.Tensor) -> None:
    hr = hr[:, None, : size[0], : size[1]]
    index = torch.tensor([3, 0, 1, 2, 0])
    mixed = operators(KINDS, size, (size[0] // 4, size[1] // 4), hr).select(index)
    lr = mixed.A(hr)
    damping = torch.linspace(0.01, 0.1, 5, dtype=torch.float64).view(5, 1, 1, 1)
    for i, kind in enumerate(index.tolist()):
        single, row = KINDS[kind].for_hr(hr), slice(i, i + 1)
        torch.testing.assert_close(lr[row], single.A(hr[row]))
        torch.testing.assert_close(mixed.A_adjoint(lr)[row], single.A_adjoint(lr[row]))
        torch.testing.assert_close(mixed.noise_level(lr)[row], single.noise_level(lr[row]))
        torch.testing.assert_close(mixed.restore(lr, damping)[row], single.restore(lr[row], damping[row]))
        torch.testing.assert_close(mixed.prox(hr, lr, damping)[row], single.prox(hr[row], lr[row], damping[row]))
        torch.testing.assert_close(mixed.bounded(hr, 0.1)[row], single.bounded(hr[row], 0.1))
        assert mixed.sigma[i].item() == pytest.approx(KINDS[kind].lr_sigma)


def test_an_operator_can_be_rebuilt_from_its_tensors(degradation: Degradation, hr: torch.Tensor) -> None:
    """The tensors are inputs of a CUDA graph."""
    operator, lr = degradation.for_hr(hr), degradation(hr)
    again = SeparableOperator.from_tensors([x.clone() for x in operator.tensors])
    assert torch.equal(again.restore(lr, 1e-2), operator.restore(lr, 1e-2))
    assert torch.equal(again.noise_level(lr), operator.noise_level(lr))
    assert (again.hr_shape, again.lr_shape) == (tuple(hr.shape[1:]), tuple(lr.shape[1:]))
    single = operator.to(torch.empty(0))
    assert {x.dtype for x in single.tensors} == {torch.float32}


def test_operators_are_cached() -> None:
    hr = torch.empty(24, 16)
    assert Degradation(sigma=0.321).for_hr(hr) is Degradation(sigma=0.321).for_hr(hr)


def test_the_suppressed_fraction_is_that_of_white_noise(degradation: Degradation) -> None:
    """Measured by applying the damped inverse and the degradation to white noise."""
    damping = torch.tensor([1e-3, 0.05, 0.5], dtype=torch.float64)[:, None, None]
    white = torch.randn(3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1)
    operator = degradation.for_lr(white)
    kept = operator.A(operator.A_dagger(white, damping))
    lost = ((white - kept) * white).mean(dim=(1, 2)) / white.square().mean(dim=(1, 2))
    fraction = operator.suppressed_fraction(damping).flatten()
    torch.testing.assert_close(fraction, lost, atol=0.03, rtol=0)
    assert fraction.tolist() == sorted(fraction.tolist())


def test_lr_sigma_is_in_lr_voxels() -> None:
    assert Degradation(sigma=2.0, blur_on="hr").lr_sigma == 0.5
    assert Degradation(sigma=2.0).lr_sigma == 2.0
    assert Degradation(scale=(4, 1), sigma=(1.0, 0.0)).lr_sigma == 0.5


def test_settings_may_be_lists_as_in_json() -> None:
    assert Degradation(scale=[4, 1], sigma=[1.0, 0.0]) == Degradation(scale=(4, 1), sigma=(1.0, 0.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("level", [0.0, 0.01, 0.5])
def test_a_replicated_padding_does_not_change_the_noise_level(level: float, hr: torch.Tensor) -> None:
    lr = Degradation()(hr)[:, None]
    lr = lr + level * torch.randn(lr.shape, generator=torch.Generator().manual_seed(0), dtype=lr.dtype)
    padded = torch.nn.functional.pad(lr, (12, 20, 24, 9), mode="replicate")
    alone, together = (Degradation().for_lr(x).noise_level(x).mean().item() for x in (lr, padded))
    assert together == pytest.approx(alone, rel=0.3, abs=2e-4)
