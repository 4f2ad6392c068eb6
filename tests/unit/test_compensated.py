"""Copies fitted to the inputs' second moment: the steps against definitions, and what must hold for any inputs."""

from __future__ import annotations

import numpy as np
import pytest

from converter.predictors.compensated import _Fit, _half, _Metric, quantize_compensated
from converter.predictors.copies import fit_gate_copy
from converter.predictors.low_rank import Moments
from flashsparse.errors import UsageError
from flashsparse.sparsity.low_bit import LowBit, quantize_rows

D, WIDTH = 96, 40


def inputs(tokens: int, columns: int = D, mean: float = 1.0, seed: int = 0) -> np.ndarray:
    """Correlated inputs float32 [tokens, columns] about a mean, the same law for every seed."""
    law, rng = np.random.default_rng(99), np.random.default_rng(seed)
    mix = law.standard_normal((columns, columns)) * np.geomspace(2, 0.1, columns) / np.sqrt(columns)
    centre = mean * law.standard_normal(columns)
    return (rng.standard_normal((tokens, columns)) @ mix.T + centre).astype(np.float32)


def weights(rows: int = WIDTH, columns: int = D, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def moment_of(x: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64)
    return np.asarray(wide.T @ wide / len(wide))


def damped(moment: np.ndarray, damping: float = 0.1) -> np.ndarray:
    return moment + damping * np.trace(moment) / len(moment) * np.eye(len(moment))


def errors(weight: np.ndarray, copy: LowBit, moment: np.ndarray) -> np.ndarray:
    """Of each row, in float64."""
    left = weight.astype(np.float64) - copy.dequantize()
    return np.asarray(np.einsum("nd,de,ne->n", left, moment, left))


def started(weight: np.ndarray, moment: np.ndarray, bits: int, group: int) -> _Fit:
    plain = quantize_rows(weight, bits, group, np.diagonal(moment))
    return _Fit(_Metric(moment, group), weight, plain, slice(None))


@pytest.mark.parametrize(("bits", "group"), [(1, 32), (2, 32), (3, 32), (4, 32)])
def test_no_row_is_worse_than_its_plain_copy_and_their_sum_is_far_less(bits: int, group: int) -> None:
    moment, weight = moment_of(inputs(2000)), weights()
    metric = damped(moment)
    plain = errors(weight, quantize_rows(weight, bits, group, np.diagonal(metric)), metric)
    by_passes = [errors(weight, quantize_compensated(weight, bits, group, moment, passes=p), metric) for p in (0, 1, 3)]
    for found in by_passes:
        assert (found <= plain * (1 + 1e-4)).all()
    assert by_passes[0].sum() < 0.4 * plain.sum()
    assert by_passes[2].sum() < by_passes[1].sum() < by_passes[0].sum()


def test_other_text_from_the_same_source_gains_too_even_after_few_tokens() -> None:
    weight, judged = weights(64, 256), inputs(2000, 256, seed=5)
    for tokens, most in ((128, 0.8), (512, 0.5), (4096, 0.4)):
        moment = moment_of(inputs(tokens, 256, seed=6))
        plain = quantize_rows(weight, 2, 64, np.diagonal(moment))
        copy = quantize_compensated(weight, 2, 64, moment)
        assert errors(weight, copy, moment_of(judged)).sum() < most * errors(weight, plain, moment_of(judged)).sum()


def test_feedback_rounds_every_column_to_the_best_level_given_that_later_ones_follow() -> None:
    moment, weight = damped(moment_of(inputs(500))), weights(6)
    fit = started(weight, moment, 2, 32)
    scales, biases, order = fit.scales.copy(), fit.biases.copy(), fit.metric.order
    fit._round(feedback=True)
    work, codes = weight.astype(np.float64), np.empty((D, len(weight)))
    for at, column in enumerate(order):  # OPTQ by its definition
        later = order[at:]
        inverse = np.linalg.inv(moment[np.ix_(later, later)])[0]
        scale, bias = scales[column // 32], biases[column // 32]
        codes[column] = np.clip(np.rint((work[:, column] - bias) / scale), 0, 3)
        work[:, later] -= np.outer(work[:, column] - (codes[column] * scale + bias), inverse / inverse[0])
    assert (fit.codes == codes).mean() > 0.99  # ties within float32


def test_descent_ends_where_no_single_code_can_be_bettered() -> None:
    moment, weight = damped(moment_of(inputs(500))), weights(5)
    fit = started(weight, moment, 2, 32)
    before = fit.error.copy()
    for _ in range(20):
        fit._round(feedback=False)
    least = fit.error.copy()
    assert (least < before).all()
    for column in range(D):
        for code in range(4):
            tried = fit.codes.copy()
            tried[column] = code
            left = fit._residual(tried, fit.scales, fit.biases).T.astype(np.float64)
            assert (np.einsum("nd,de,ne->n", left, moment, left) > least * (1 - 1e-4)).all()


def test_refitted_scales_and_biases_are_the_least_squares_ones() -> None:
    moment, weight = damped(moment_of(inputs(500))), weights(4)
    fit = started(weight, moment, 2, 32)
    root = np.linalg.cholesky(moment)
    expected = []
    for row, codes in zip(weight, fit.codes.T, strict=True):
        design = np.zeros((D, 6))
        for column, code in enumerate(codes):
            design[column, column // 32], design[column, 3 + column // 32] = code, 1
        expected.append(np.linalg.lstsq(root.T @ design, root.T @ row, rcond=None)[1][0])
    fit._refit()
    np.testing.assert_allclose(fit.error, expected, rtol=1e-3)
    for values in (fit.scales, fit.biases):
        assert np.array_equal(values, _half(values))


def test_weights_on_a_plain_grid_are_copied_exactly() -> None:
    rng = np.random.default_rng(3)
    weight = ((rng.integers(0, 4, (WIDTH, D)) - 1.5) * np.repeat(rng.choice([0.25, 0.5, 2], (WIDTH, 3)), 32, 1)).astype(
        np.float32
    )
    assert np.array_equal(quantize_compensated(weight, 2, 32, moment_of(inputs(500))).dequantize(), weight)


def test_a_constant_input_loses_next_to_nothing() -> None:
    x = inputs(1)
    weight, moment = weights(), moment_of(x)
    exact = x @ weight.T
    lost = x @ quantize_compensated(weight, 2, 32, moment, 1e-4).dequantize().T - exact
    plain = x @ quantize_rows(weight, 2, 32, np.diagonal(moment)).dequantize().T - exact
    assert np.abs(lost).max() < 0.01 * np.abs(exact).mean() < np.abs(plain).max()


def test_a_constant_input_of_a_gate_with_a_bias_is_left_to_the_bias() -> None:
    moments, weight, x = Moments(D), weights(), inputs(1)
    moments.add(np.repeat(x, 300, axis=0))
    copy = fit_gate_copy(weight, np.ones(WIDTH, np.float32), 2, 32, moments)
    assert copy.bias is not None
    found = x @ copy.gate.dequantize().T + copy.bias
    np.testing.assert_allclose(found, x @ weight.T + 1, atol=1e-4)


def test_silent_and_dependent_inputs() -> None:
    weight, silent = weights(), np.zeros((D, D))
    assert errors(weight, quantize_compensated(weight, 2, 32, silent), np.eye(D)).sum() <= (
        errors(weight, quantize_rows(weight, 2, 32), np.eye(D)).sum() * (1 + 1e-6)
    )
    x = inputs(500)
    x[:, 40:] = 0
    x[:, 5] = x[:, 6]
    for scale in (1e-12, 1e12):
        copy = quantize_compensated(weight, 2, 32, moment_of(x) * scale)
        assert np.isfinite(copy.dequantize()).all()
        assert (
            errors(weight, copy, moment_of(x)).sum() < errors(weight, quantize_rows(weight, 2, 32), moment_of(x)).sum()
        )


def test_the_result_does_not_depend_on_blocks_of_rows_or_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    moment, weight = moment_of(inputs(500)), weights()
    whole, again = (quantize_compensated(weight, 3, 32, moment) for _ in range(2))
    assert np.array_equal(whole.words, again.words) and np.array_equal(whole.scales, again.scales)
    monkeypatch.setattr("converter.predictors.compensated._ELEMENTS", 17 * D)
    split = quantize_compensated(weight, 3, 32, moment)
    metric = damped(moment)  # BLAS rounds by shape: a tie may go the other way
    assert errors(weight, split, metric).sum() == pytest.approx(errors(weight, whole, metric).sum(), rel=0.02)


def test_rows_not_a_multiple_of_the_block_of_columns() -> None:
    weight, moment = weights(9, 160), moment_of(inputs(900, 160))
    copy = quantize_compensated(weight, 2, 32, moment)
    plain = quantize_rows(weight, 2, 32, np.diagonal(moment))
    assert errors(weight, copy, moment).sum() < 0.5 * errors(weight, plain, moment).sum()
    assert (copy.words.shape, copy.scales.shape, copy.nbytes) == (plain.words.shape, plain.scales.shape, plain.nbytes)


def test_large_weights_stay_within_float16() -> None:
    moment = moment_of(inputs(500))
    weight = weights() * np.float32(32000 / 5)
    copy = quantize_compensated(np.clip(weight, -32000, 32000), 1, 32, moment)
    assert np.isfinite(copy.scales).all() and np.isfinite(copy.biases).all()
    assert np.isposinf(_half(np.array([7e4]))).all()


def test_a_refit_beyond_float16_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = started(weights(), damped(moment_of(inputs(500))), 2, 32)
    before = fit.scales.copy(), fit.biases.copy()
    found = np.full((6, WIDTH), 1e6)
    monkeypatch.setattr(fit, "_solve", lambda codes, part: found)
    fit._refit()
    assert np.array_equal(fit.scales, before[0]) and np.array_equal(fit.biases, before[1])


def test_what_cannot_be_fitted_is_refused() -> None:
    moment, weight = moment_of(inputs(500)), weights()
    broken = weight.copy()
    broken[7, 3] = np.nan
    with pytest.raises(UsageError, match="row 7"):
        quantize_compensated(broken, 2, 32, moment)
    with pytest.raises(UsageError, match="group size 64"):
        quantize_compensated(weight, 2, 64, moment)
    with pytest.raises(UsageError, match="expected 96 x 96 finite"):
        quantize_compensated(weight, 2, 32, moment[:5, :5])
    with pytest.raises(UsageError, match="expected 96 x 96 finite"):
        quantize_compensated(weight, 2, 32, moment * np.nan)
    for damping in (0.0, -1.0, np.nan):
        with pytest.raises(UsageError, match="damping"):
            quantize_compensated(weight, 2, 32, moment, damping)
    with pytest.raises(UsageError, match="mean power"):
        quantize_compensated(weight, 2, 32, -moment)
    for turned, message in ((np.diag([-9.0] + [9.0] * (D - 1)), "inputs of negative"), (np.eye(D), "directions of")):
        turned[0, 1] = turned[1, 0] = 5
        with pytest.raises(UsageError, match=message):
            quantize_compensated(weight, 2, 32, turned)
