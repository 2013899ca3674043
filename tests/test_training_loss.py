"""The training loss that follows VMAF-NEG, and the mixing of checkpoints."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from training import loss  # noqa: E402

SIZE = 96


@pytest.fixture(scope="module")
def fidelity():
    return loss.Fidelity(SIZE, torch.device("cpu"))


@pytest.fixture
def planes():
    """Four smooth, structured pictures (4, 1, SIZE, SIZE) in 0..1."""
    rng = np.random.default_rng(5)
    rough = torch.from_numpy(rng.random((4, 1, SIZE // 8, SIZE // 8), np.float32))
    fine = torch.from_numpy(rng.random((4, 1, SIZE // 2, SIZE // 2), np.float32))
    large = torch.nn.functional.interpolate(rough, size=(SIZE, SIZE), mode="bilinear")
    small = torch.nn.functional.interpolate(fine, size=(SIZE, SIZE), mode="bilinear")
    return 0.15 + 0.5 * large + 0.2 * small


def blurred(planes, strength):
    soft = torch.nn.functional.avg_pool2d(planes, 3, 1, 1, count_include_pad=False)
    return planes + strength * (soft - planes)


def test_equal_planes_lose_nothing(fidelity, planes):
    assert abs(float(fidelity(planes, planes))) < 0.05


def test_more_blur_loses_more(fidelity, planes):
    lost = [float(fidelity(blurred(planes, s), planes)) for s in (0.25, 0.5, 1.0)]
    assert 0.5 < lost[0] < lost[1] < lost[2]


def test_noise_is_a_loss(fidelity, planes):
    noise = torch.from_numpy(np.random.default_rng(6).normal(0, 0.03, planes.shape))
    assert float(fidelity(planes + noise.float(), planes)) > 0.5


def test_contrast_beyond_the_original_gains_nothing(fidelity, planes):
    """NEG: what enhancement adds over the original does not count as fidelity."""
    stronger = planes + 0.2 * (planes - planes.mean((2, 3), keepdim=True))
    assert float(fidelity(stronger, planes)) > -0.05
    for value in fidelity.vif((stronger[:, 0] - 0.5) * 219, (planes[:, 0] - 0.5) * 219):
        assert float(value.max()) <= 1 + 1e-3


def test_figures_agree_with_the_definition_of_vif(fidelity, planes):
    """Scale 1 against a direct computation in float64 with loops over windows."""
    original = (planes[:, 0].double().numpy() - 0.5) * 219
    given = (blurred(planes, 0.6)[:, 0].double().numpy() - 0.5) * 219
    taps = 9
    window = np.exp(-((np.arange(taps) - taps // 2) ** 2) / (2 * (taps / 5) ** 2))
    window = np.outer(window, window) / window.sum() ** 2

    def filtered(stack):
        view = np.lib.stride_tricks.sliding_window_view(stack, (taps, taps), axis=(1, 2))
        return np.einsum("nijkl,kl->nij", view, window)

    o, p = filtered(original)[:, ::2, ::2], filtered(given)[:, ::2, ::2]
    mean_o, mean_p = filtered(o), filtered(p)
    var_o = np.maximum(filtered(o * o) - mean_o**2, 0)
    var_p = np.maximum(filtered(p * p) - mean_p**2, 0)
    both = np.maximum(filtered(o * p) - mean_o * mean_p, 0)
    assert (var_o > loss.EYE_NOISE).all()
    gain = both / (var_o + 1e-3)
    rest = np.maximum(var_p - gain * both, 0)
    gain = np.minimum(gain, 1)
    kept = np.log2(1 + gain**2 * var_o / (rest + loss.EYE_NOISE)).sum()
    expected = kept / np.log2(1 + var_o / loss.EYE_NOISE).sum()
    codes = (blurred(planes, 0.6)[:, 0] - 0.5) * 219, (planes[:, 0] - 0.5) * 219
    assert float(fidelity.vif(*codes)[0][0]) == pytest.approx(expected, abs=1e-3)


def test_the_slope_is_finite_and_leads_back(fidelity, planes):
    soft = blurred(planes, 0.8).requires_grad_()
    before = fidelity(soft, planes)
    before.backward()
    assert torch.isfinite(soft.grad).all()
    step = 2e-3 * soft.grad / soft.grad.abs().max()
    assert float(fidelity((soft - step).detach(), planes)) < float(before.detach())


def test_flat_planes_have_a_finite_slope(fidelity):
    flat = torch.full((4, 1, SIZE, SIZE), 0.5, requires_grad=True)
    fidelity(flat, torch.full_like(flat, 0.5)).backward()
    assert torch.isfinite(flat.grad).all()


def test_relative_loss_counts_the_share_of_the_error_that_is_left(planes):
    given = planes + 0.1
    whole = loss.loss_of("relative", given, planes, 0, given)
    half = loss.loss_of("relative", planes + 0.05, planes, 0, given)
    assert float(whole) == pytest.approx(0.01, rel=0.02)
    assert float(half) == pytest.approx(float(whole) / 4, rel=1e-3)


def test_contrast_acts_on_the_coded_crops_alone(planes):
    soft = blurred(planes, 1.0)
    plain = loss.loss_of("log", soft, planes, 0, soft)
    assert float(loss.loss_of("contrast", soft, planes, 2, soft)) > float(plain)
    clean = torch.cat((planes[:2], soft[2:]))
    assert float(loss.loss_of("contrast", clean, planes, 2, soft)) == pytest.approx(
        float(loss.loss_of("log", clean, planes, 0, soft))
    )


def state(model, value):
    return {"model": model, "average": {"w": torch.full((2,), value)}}


def test_mixed_checkpoints_are_their_weighted_mean():
    pytest.importorskip("onnx")
    export = pytest.importorskip("training.export")
    states = [state("fast-2x", 1.0), state("fast-2x", 3.0), state("fast-2x", 5.0)]
    weights = export.mixed(states, [0.5, 0.25, 0.25])
    assert weights["w"].tolist() == [2.5, 2.5]
    with pytest.raises(ValueError, match="expected sum 1"):
        export.mixed(states, [0.5, 0.25, 0.5])
    with pytest.raises(ValueError, match="expected one network"):
        export.mixed([state("fast-2x", 1.0), state("nano-2x", 1.0)], [0.5, 0.5])
