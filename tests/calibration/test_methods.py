"""Methods on single matrices, against their definitions and against rounding to nearest."""

import numpy as np
import pytest

from mllm_edge.calibration.methods import awq, descent, drift, gptq, smoothquant
from mllm_edge.calibration.methods.forward import decide_rows
from mllm_edge.calibration.methods.ranges import activation_range, entropy_limit, mse_limit, percentile_limit
from mllm_edge.calibration.statistics import Histogram, InputStatistics
from mllm_edge.graph import rtn

ROWS, OUT, IN, BLOCK = 1536, 96, 256, 64


def problem(boost: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Correlated inputs [ROWS, IN] with a few channels `boost` times larger, and a heavy-tailed weight [OUT, IN]."""
    random = np.random.default_rng(seed)
    mix = random.standard_normal((IN, IN)) * 0.1 + np.eye(IN)
    x = (random.standard_normal((ROWS, IN)) @ mix).astype(np.float32)
    x[:, random.choice(IN, 4, replace=False)] *= boost
    return x, (random.standard_t(5, (OUT, IN)) * 0.03).astype(np.float32)


def seen(x: np.ndarray) -> InputStatistics:
    statistics = InputStatistics(x.shape[1], with_gram=True)
    for part in np.array_split(x, 7):
        statistics.add(part)
    return statistics


def error(x: np.ndarray, weight: np.ndarray, quantized: np.ndarray) -> float:
    return float(np.square(x @ (quantized - weight).T).mean())


def nearest(weight: np.ndarray, bits: int, block: int = BLOCK) -> np.ndarray:
    codes, scales = rtn.quantize_blocks(weight, bits, block)
    return ((codes.astype(np.float32) - (1 << (bits - 1))) * scales[..., None]).reshape(weight.shape)


def rounded(bits: int) -> awq.Rounded:
    def apply(weight: np.ndarray) -> np.ndarray:
        grouped = weight.reshape(-1, BLOCK)
        scales = np.abs(grouped).max(axis=1) / ((1 << (bits - 1)) - 1)
        return rtn.rounded_blocks(grouped, scales, bits).reshape(weight.shape)

    return apply


def by_gptq(weight: np.ndarray, gram: np.ndarray, bits: int) -> np.ndarray:
    codes, scales = gptq.quantize(weight, gram, bits, BLOCK)
    assert codes.min() >= -(1 << (bits - 1))
    assert codes.max() <= (1 << (bits - 1)) - 1
    assert (scales > 0).all()
    return codes * np.repeat(scales, BLOCK, axis=1)


def by_awq(weight: np.ndarray, statistics: InputStatistics, bits: int) -> np.ndarray:
    factors = awq.scaling([weight], statistics.sample, statistics.channel_mean, rounded(bits))
    scales = awq.clipped_scales(weight * factors, statistics.sample / factors, bits, BLOCK)
    scaled = (weight * factors).reshape(-1, BLOCK)
    return rtn.rounded_blocks(scaled, scales.reshape(-1), bits).reshape(weight.shape) / factors


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("boost", [50, 100])
def test_outlier_channels_cost_at_most_half_of_what_rounding_loses(boost: float, bits: int) -> None:
    x, weight = problem(boost)
    statistics = seen(x)
    lost = error(x, weight, nearest(weight, bits))
    assert error(x, weight, by_gptq(weight, statistics.gram, bits)) <= lost * (0.5 if bits > 2 else 0.8)
    assert error(x, weight, by_awq(weight, statistics, bits)) <= lost * 0.5


def test_a_compensated_weight_gives_the_exact_outputs_from_inputs_that_drifted() -> None:
    exact, weight = problem(1)
    random = np.random.default_rng(1)
    # An earlier layer lost a tenth of each channel, leaked some of it into others, and has noise of its own.
    leak = 0.9 * np.eye(IN) + 0.02 * random.standard_normal((IN, IN))
    x = (exact @ leak + 0.01 * random.standard_normal(exact.shape)).astype(np.float32)
    statistics = InputStatistics(IN, with_gram=True)
    statistics.add(x[: ROWS // 2], exact=exact[: ROWS // 2])
    assert statistics.drift is not None
    better = drift.compensated(weight, statistics.gram, statistics.drift)
    outputs = exact[ROWS // 2 :] @ weight.T  # of inputs that were not seen
    lost = np.square(x[ROWS // 2 :] @ weight.T - outputs).mean()
    assert np.square(x[ROWS // 2 :] @ better.T - outputs).mean() <= 0.1 * lost


def test_without_drift_or_without_inputs_a_weight_stays() -> None:
    x, weight = problem(1)
    gram, none = seen(x).gram, np.zeros((IN, IN), np.float32)
    np.testing.assert_array_equal(drift.compensated(weight, gram, none), weight)
    np.testing.assert_array_equal(drift.compensated(weight, none, none), weight)


def test_methods_help_on_inputs_they_did_not_see() -> None:
    x, weight = problem(50)
    statistics = seen(x[: ROWS // 2])
    fresh = x[ROWS // 2 :]
    lost = error(fresh, weight, nearest(weight, 4))
    assert error(fresh, weight, by_gptq(weight, statistics.gram, 4)) <= lost * 0.5
    assert error(fresh, weight, by_awq(weight, statistics, 4)) <= lost * 0.5


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 61, 64])
def test_rows_are_decided_in_the_light_of_those_before_them(size: int) -> None:
    random = np.random.default_rng(0)
    values, coupling = random.standard_normal((size, 5)), random.standard_normal((size, size)) / size
    expected = values.copy()
    for i in range(size):
        expected[i] = np.rint(4 * (expected[i] - coupling[i, :i] @ expected[:i]))
    seen = []

    def decide(i: int, row: np.ndarray) -> np.ndarray:
        seen.append(i)
        return np.rint(4 * row)

    np.testing.assert_array_equal(decide_rows(values, coupling, decide), expected)
    assert seen == list(range(size))


def test_rows_of_a_weight_share_nothing_but_their_inputs() -> None:
    x, weight = problem(3)
    gram, many = seen(x).gram, np.concatenate([weight] * 24)  # several pieces of the work
    for one, all_of_them in zip(
        gptq.quantize(weight, gram, 4, BLOCK), gptq.quantize(many, gram, 4, BLOCK), strict=True
    ):
        differs = np.stack(np.split(all_of_them, 24)) != one
        assert differs.mean() < 0.01  # products of other shapes round a tie otherwise now and then


def test_gptq_follows_the_definition_column_by_column() -> None:
    """Against the plain algorithm: round a column, subtract its error's image from the rest, shrink the inverse."""
    x, weight = problem(3)
    weight, x = weight[:8, :64], x[:, :64]
    gram = (x.T @ x / len(x)).astype(np.float64)
    codes, scales = gptq.quantize(weight, gram.astype(np.float32), 4, 64)
    damped = gram + np.diag(np.full(64, 0.01 * np.diag(gram).mean()))
    left, work = list(np.argsort(-np.diag(gram), kind="stable")), weight.astype(np.float64)
    expected = np.zeros_like(work)
    while left:
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        column = left[0]
        expected[:, column] = np.clip(np.rint(work[:, column] / scales[:, 0]), -8, 7)
        difference = work[:, column] - expected[:, column] * scales[:, 0]
        work[:, left] -= np.outer(difference, inverse[0] / inverse[0, 0])
        left.pop(0)
    assert (codes != expected).mean() < 0.01  # float32 rounds a tie otherwise now and then


def test_gptq_bears_channels_that_are_never_used_and_rows_of_zeros() -> None:
    x, weight = problem(1)
    x[:, :40], weight[3] = 0, 0
    codes, scales = gptq.quantize(weight, x.T @ x, 4, None)
    assert scales.shape == (OUT, 1)
    assert np.isfinite(scales).all()
    assert not codes[3].any()
    assert error(x, weight, codes * scales) < error(x, weight, np.zeros_like(weight)) / 20


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_descent_mends_what_gptq_left(bits: int) -> None:
    x, weight = problem(boost=1)
    gram, fresh = seen(x[: ROWS // 2]).gram, x[ROWS // 2 :]
    codes, scales = gptq.quantize(weight, gram, bits, BLOCK)
    errors = []
    for sweeps in (0, 1, 2, 4):
        better, finer = descent.refine(weight, gram, codes, scales, bits, sweeps)
        assert better.min() >= -(1 << (bits - 1))
        assert better.max() <= (1 << (bits - 1)) - 1
        assert (finer > 0).all()
        errors.append(error(fresh, weight, better * np.repeat(finer, BLOCK, axis=1)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]


def test_descent_ends_where_no_code_and_no_scale_can_be_better() -> None:
    x, weight = problem(boost=1)
    x, weight = x[:, :8], weight[:5, :8]
    gram = x.T @ x / len(x)
    codes, scales = descent.refine(weight, gram, *gptq.quantize(weight, gram, 3, 4), 3, 50)
    damped = gram + 0.01 * np.diag(gram).mean() * np.eye(8)

    def lost(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
        missing = weight - codes * np.repeat(scales, 4, axis=1)
        return np.einsum("nk,kj,nj->n", missing, damped, missing)

    least = lost(codes, scales) * (1 - 1e-5)
    for channel in range(8):
        for value in range(-4, 4):
            other = codes.copy()
            other[:, channel] = value
            assert (lost(other, scales) >= least).all()
    for block in range(2):
        for factor in (0.98, 1.02):
            scaled = scales.copy()
            scaled[:, block] *= factor
            assert (lost(codes, scaled) >= least).all()


def test_descent_bears_channels_that_are_never_used_and_rows_of_zeros() -> None:
    x, weight = problem(boost=1)
    x[:, 3], weight[2] = 0, 0
    gram = x.T @ x
    start = gptq.quantize(weight, gram, 4, BLOCK)
    for used in (gram, np.zeros_like(gram)):
        codes, scales = descent.refine(weight, used, *start, 4, 2)
        assert np.isfinite(scales).all()
        assert not (codes[2] * np.repeat(scales[2], BLOCK)).any()
    np.testing.assert_array_equal(codes, start[0])  # nothing is known of the inputs: nothing changes


def test_smoothquant_balances_channels() -> None:
    """With α = ½ both sides of a product get the same maximum; products don't change."""
    x, weight = problem(80)
    factors = smoothquant.smoothing([weight], np.abs(x).max(axis=0))
    smooth, heavy = x / factors, weight * factors
    np.testing.assert_allclose(np.abs(smooth).max(axis=0), np.abs(heavy).max(axis=0), rtol=1e-4)
    np.testing.assert_allclose(smooth @ heavy.T, x @ weight.T, atol=1e-2)


@pytest.mark.parametrize("boost", [50, 100])
def test_smoothquant_halves_what_int8_loses(boost: float) -> None:
    x, weight = problem(boost)

    def int8(values: np.ndarray, axis: int | None) -> np.ndarray:
        scale = np.abs(values).max(axis=axis, keepdims=axis is not None) / 127
        return np.rint(values / scale) * scale

    exact = x @ weight.T
    plain = int8(x, None) @ int8(weight, 1).T
    factors = smoothquant.smoothing([weight], np.abs(x).max(axis=0))
    smooth = int8(x / factors, None) @ int8(weight * factors, 1).T
    assert np.square(smooth - exact).mean() <= 0.5 * np.square(plain - exact).mean()


def test_unused_channels_keep_factor_one() -> None:
    x, weight = problem(1)
    x[:, 5] = 0
    assert smoothquant.smoothing([weight], np.abs(x).max(axis=0))[5] == 1


def test_ranges_of_a_long_tail() -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((4096, 16)).astype(np.float32)
    x[7, 3] = 60.0
    statistics = InputStatistics(16)
    statistics.add(x)
    low, high = activation_range(statistics, "minmax")
    assert (low, high) == (x.min(), 60.0)
    for method in ("percentile", "entropy", "mse"):
        low, high = activation_range(statistics, method)  # type: ignore[arg-type]
        assert 3 < high < 60
        assert max(-high, x.min()) == low
    assert percentile_limit(statistics.histogram, 99.0) == pytest.approx(2.58, abs=0.1)


def test_limits_of_uniform_values_are_their_maximum() -> None:
    histogram = Histogram()
    histogram.add(np.linspace(-1, 1, 100_001))
    assert entropy_limit(histogram) == pytest.approx(1.0, abs=0.02)
    assert mse_limit(histogram) == pytest.approx(1.0, abs=0.02)


def test_range_holds_zero_and_is_never_empty() -> None:
    statistics = InputStatistics(4)
    assert activation_range(statistics, "mse") == (-1.0, 1.0)
    statistics.add(np.full((3, 4), 2.0))
    assert activation_range(statistics, "minmax") == (0.0, 2.0)


def test_range_after_factors() -> None:
    statistics = InputStatistics(2)
    statistics.add(np.array([[1.0, -100.0], [-2.0, 50.0]], np.float32))
    assert activation_range(statistics, "minmax", np.array([1.0, 100.0], np.float32)) == (-2.0, 1.0)


def test_awq_evens_out_columns_that_a_norm_can_take_back() -> None:
    """Columns and inputs times factors that cancel: what is left of the error must not know of them."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((96, 128)).astype(np.float32)
    rescale, sizes = np.exp(random.standard_normal((2, 128))).astype(np.float32)
    x = random.standard_normal((512, 128)).astype(np.float32) * sizes

    def rounded(w: np.ndarray) -> np.ndarray:
        grouped = w.reshape(-1, 64)
        return rtn.rounded_blocks(grouped, np.abs(grouped).max(axis=1) / 7, 4).reshape(w.shape)

    def error(w: np.ndarray, inputs: np.ndarray) -> float:
        factors = awq.scaling([w], inputs, np.abs(inputs).mean(axis=0), rounded)
        return float(np.linalg.norm(inputs @ (rounded(w * factors) / factors - w).T))

    assert error(weight * rescale, x / rescale) <= 1.05 * error(weight, x)
