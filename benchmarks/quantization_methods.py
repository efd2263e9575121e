"""Methods on single matrices: planted outlier channels, and other implementations on the same matrices."""

from pathlib import Path

import numpy as np

from benchmarks.report import Report
from mllm_edge.calibration.methods import awq, gptq, smoothquant
from mllm_edge.calibration.statistics import InputStatistics
from mllm_edge.graph import rtn

__all__ = ["add"]

_ROWS, _OUT, _IN, _BLOCK = 4096, 512, 1024, 128
_BOOSTS = (50, 100)


def add(report: Report, folder: Path, questions: int) -> None:
    """Ratios of output errors; the worst of the seeds and boosts counts."""
    gains: dict[str, list[float]] = {"smoothquant": [], "awq": [], "gptq": []}
    reference: dict[str, list[float]] = {"gptq": [], "hqq": [], "awq": []}
    for boost in _BOOSTS:
        for seed in range(3):
            x, weight = _problem(boost, seed)
            errors = _errors(x, weight)
            gains["smoothquant"].append(errors["int8"] / errors["smoothquant"])
            gains["awq"].append(errors["rtn"] / errors["awq"])
            gains["gptq"].append(errors["rtn"] / errors["gptq"])
            reference["gptq"].append(errors["gptq"] / errors["plain gptq"])
            reference["hqq"].append(errors["gptq"] / errors["onnxruntime hqq"])
            reference["awq"].append(errors["awq"] / errors["plain awq"])
            report.row({"outliers": f"×{boost}", "seed": seed, **errors})
    for name, values in gains.items():
        report.at_least(f"outliers_{name}: error of rounding over error", min(values), 2.0)
    for name, values in reference.items():
        report.at_most(f"vs_reference: our error over that of {name}", max(values), 1.05)


def _problem(boost: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    mix = random.standard_normal((_IN, _IN)) * (0.5 / np.sqrt(_IN)) + np.eye(_IN)
    x = (random.standard_normal((_ROWS, _IN)) @ mix).astype(np.float32)
    x[:, random.choice(_IN, 8, replace=False)] *= boost
    weight = random.standard_t(5, (_OUT, _IN)) * 0.02 * np.exp(0.5 * random.standard_normal((_OUT, 1)))
    return x, weight.astype(np.float32)


def _errors(x: np.ndarray, weight: np.ndarray) -> dict[str, float]:
    statistics = InputStatistics(_IN, with_gram=True)
    for part in np.array_split(x, 8):
        statistics.add(part)

    def of(quantized: np.ndarray) -> float:
        return float(np.square(x @ (quantized - weight).T).mean())

    codes, scales = rtn.quantize_blocks(weight, 4, _BLOCK)
    errors = {"rtn": of((codes.astype(np.float32) - 8).reshape(weight.shape) * np.repeat(scales, _BLOCK, axis=1))}
    codes, scales = gptq.quantize(weight, statistics.gram, 4, _BLOCK)
    errors["gptq"] = of(codes * np.repeat(scales, _BLOCK, axis=1))
    errors["awq"] = of(_awq(weight, statistics))
    errors["plain gptq"] = of(_plain_gptq(weight, statistics.gram))
    errors["onnxruntime gptq"] = of(_onnxruntime_gptq(weight, statistics.gram))
    errors["onnxruntime hqq"] = of(_onnxruntime_hqq(weight))
    errors["plain awq"] = of(_plain_awq(weight, x))
    exact = x @ weight.T
    factors = smoothquant.smoothing([weight], statistics.channel_max)
    errors["int8"] = float(np.square(_int8(x, None) @ _int8(weight, 1).T - exact).mean())
    smooth = _int8(x / factors, None) @ _int8(weight * factors, 1).T
    errors["smoothquant"] = float(np.square(smooth - exact).mean())
    return errors


def _awq(weight: np.ndarray, statistics: InputStatistics) -> np.ndarray:
    factors = awq.scaling([weight], statistics.sample, statistics.channel_mean, _rounded)
    scales = awq.clipped_scales(weight * factors, statistics.sample / factors, 4, _BLOCK)
    grouped = (weight * factors).reshape(-1, _BLOCK)
    return rtn.rounded_blocks(grouped, scales.reshape(-1), 4).reshape(weight.shape) / factors


def _rounded(weight: np.ndarray) -> np.ndarray:
    grouped = weight.reshape(-1, _BLOCK)
    return rtn.rounded_blocks(grouped, np.abs(grouped).max(axis=1) / 7, 4).reshape(weight.shape)


def _int8(values: np.ndarray, axis: int | None) -> np.ndarray:
    scale = np.abs(values).max(axis=axis, keepdims=axis is not None) / 127
    return np.rint(values / scale) * scale


def _onnxruntime_gptq(weight: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """ONNX Runtime's GPTQ, symmetric. In 1.32 it reads the wrong triangle of the factor (and its search for scales,
    mse=True, compares codes with weights), so that it is no better than rounding: shown, and no yardstick."""
    from onnxruntime.quantization.neural_compressor.weight_only import gptq as reference

    return reference(weight.T.copy(), gram.astype(np.float64), 4, _BLOCK, "sym", mse=False).T


def _plain_gptq(weight: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """The paper's algorithm written out: columns as they come, a block's scale from its weights when its turn comes."""
    damped = gram.astype(np.float64) + np.diag(np.full(len(gram), 0.01 * np.diag(gram).mean()))
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    work, result = weight.astype(np.float64), np.empty(weight.shape)
    for i in range(weight.shape[1]):
        if i % _BLOCK == 0:
            scale = np.abs(work[:, i : i + _BLOCK]).max(axis=1) / 7
        result[:, i] = np.clip(np.rint(work[:, i] / scale), -8, 7) * scale
        work[:, i:] -= np.outer((work[:, i] - result[:, i]) / upper[i, i], upper[i, i:])
    return result


def _onnxruntime_hqq(weight: np.ndarray) -> np.ndarray:
    """ONNX Runtime's HQQ, which has zero points and needs no data."""
    import torch
    from onnxruntime.quantization.matmul_nbits_quantizer import HQQWeightOnlyQuantConfig, HQQWeightOnlyQuantizer

    quantizer = HQQWeightOnlyQuantizer(HQQWeightOnlyQuantConfig(block_size=_BLOCK))
    codes, scales, zeros = quantizer.quantize_internal(torch.from_numpy(weight.copy()), group_size=_BLOCK)
    shape = (len(weight), -1, _BLOCK)
    values = (codes.reshape(shape) - zeros.reshape(len(weight), -1, 1)) * scales.reshape(len(weight), -1, 1)
    return values.reshape(weight.shape).float().numpy()


def _plain_awq(weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The paper's search written out: all rows of x, one scale exponent, then one clip for each block."""
    mean, best, found = np.abs(x).mean(axis=0), np.inf, weight
    for exponent in np.arange(20) / 20:
        s = mean**exponent
        s = s / np.sqrt(s.max() * s.min())
        candidate = _rounded(weight * s) / s
        error = float(np.square(x @ (candidate - weight).T).sum())
        if error < best:
            best, found, chosen = error, candidate, s
    result = found.copy()
    for start in range(0, weight.shape[1], _BLOCK):
        columns = slice(start, start + _BLOCK)
        part = weight[:, columns] * chosen[columns]
        losses, candidates = [], []
        for clip in np.linspace(1.0, 0.5, 11):
            scale = np.abs(part).max(axis=1, keepdims=True) * clip / 7
            candidate = np.clip(np.rint(part / scale), -8, 7) * scale / chosen[columns]
            losses.append(np.square(x[:, columns] @ (candidate - weight[:, columns]).T).sum(axis=0))
            candidates.append(candidate)
        winner = np.argmin(losses, axis=0)
        result[:, columns] = np.stack(candidates)[winner, np.arange(len(weight))]
    return result
