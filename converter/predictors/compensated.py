"""Low-bit copies fitted to the inputs that occur: the rounding errors of a row's weights are made to cancel.

Minimises E|(W - copy) x|^2 over codes, scales and biases, given E[x x'] of calibration text, at the bytes of a plain
copy. An FFN's inputs have a large mean and strong correlations, so the error falls to about a half. Three steps, each
kept row by row where it helps: rounding with error feedback (OPTQ, arXiv 2210.17323, as the equivalent LDLQ of QuIP,
arXiv 2307.13304), least-squares scales and biases, and coordinate descent on the codes (QuantEase, arXiv 2309.01885).
The layout and the plain copy that is the start are in `flashsparse.sparsity.low_bit`.
"""

from __future__ import annotations

import numpy as np
from threadpoolctl import threadpool_limits

from converter.predictors.products import matmul
from flashsparse.errors import UsageError
from flashsparse.sparsity.low_bit import LowBit, pack, quantize_rows, unpack

# Of the mean input power, added to every direction. A tenth is the best of 0.001 to 0.1 on other text, from as few
# tokens as d on; with many tokens it matters little.
DAMPING = 0.1
_SMALL = 1024  # up to this d three passes take seconds; beyond, one has most of the gain
_BLOCK = 64  # columns between products
_ELEMENTS = 1 << 22  # of a block of rows; about ten arrays of that size are in use
_RIDGE = 1e-6  # of the scales' and biases' normal equations, relative to their diagonal


def quantize_compensated(
    weight: np.ndarray,
    bits: int,
    group: int,
    second_moment: np.ndarray,
    damping: float = DAMPING,
    passes: int | None = None,
) -> LowBit:
    """The copy of `weight` [n, d] for E[x x'] = `second_moment` [d, d], with a scale and bias per row and group.

    No row's error, in the damped second moment, is above that of `quantize_rows` with the diagonal as importance.
    `passes` (3 up to d 1024, else 1) rounds of refitting and rounding follow the first rounding, then a last refit. A
    pass costs about 7 n d^2 flops, the rest 7 n d^2 and a decomposition in float64. Works in blocks of rows, beside a
    few matrices [d, d].
    Deterministic. Raises UsageError for what `quantize_rows` refuses, a second moment that is not [d, d], finite and
    positive semidefinite, and a damping that is not above 0.
    """
    columns = weight.shape[1]
    moment = _damped(second_moment, columns, damping)
    plain = quantize_rows(weight, bits, group, np.diagonal(moment))
    metric = _Metric(moment, group)
    del moment
    rounds = passes if passes is not None else 3 if columns <= _SMALL else 1
    copy = LowBit(plain.words.copy(), plain.scales.copy(), plain.biases.copy(), bits, group)
    step = max(16, _ELEMENTS // columns)
    for start in range(0, weight.shape[0], step):
        part = slice(start, start + step)
        fit = _Fit(metric, weight[part], plain, part)
        fit.improve(rounds)
        copy.words[part] = pack(fit.codes.T.astype(np.uint8), bits)
        copy.scales[part], copy.biases[part] = fit.scales.T, fit.biases.T
    return copy


def _damped(second_moment: np.ndarray, columns: int, damping: float) -> np.ndarray:
    """float64 [d, d] of mean diagonal 1 before damping; the identity where all inputs are zero."""
    moment = np.array(second_moment, np.float64)
    if moment.shape != (columns, columns) or not np.isfinite(moment).all():
        raise UsageError(f"second moment of shape {moment.shape}: expected {columns} x {columns} finite values")
    if not 0 < damping < np.inf:
        raise UsageError(f"damping {damping}: expected a number above 0")
    power = float(np.trace(moment)) / columns
    if not moment.any():
        return np.eye(columns)
    if power <= 0:
        raise UsageError(f"second moment with a mean power of {power:g}: expected one above 0")
    moment /= power
    moment[np.diag_indices(columns)] += damping
    if (np.diagonal(moment) <= 0).any():
        raise UsageError("second moment: found inputs of negative power, expected E[x x']")
    return moment


class _Metric:
    """What the steps need of a second moment [d, d], damped: itself and two couplings, float32.

    The best value of column k of a row, given the errors r of others, is w_k + sum_i r_i coupling[i, k]: `feedback` for
    the columns rounded before in `order` when the later ones will make up for the error, `descent` for all others.
    """

    def __init__(self, moment: np.ndarray, group: int) -> None:
        size = len(moment)
        power = np.diagonal(moment).copy()
        self.groups = np.arange(size) // group
        self.group = group
        self.order = np.argsort(-power, kind="stable")  # large inputs first: later columns correct their errors
        root = _upper(moment[np.ix_(self.order, self.order)])
        self.feedback = (np.triu(root, 1) / np.diagonal(root)).astype(np.float32)
        self.root = np.diagonal(root).astype(np.float32)  # of U with U U' = moment; U = (feedback + 1) root
        del root
        self.moment = moment.astype(np.float32)
        self.descent = self.moment / power.astype(np.float32)
        np.fill_diagonal(self.descent, 0)
        self.sums = moment.reshape(size, -1, group).sum(axis=2).astype(np.float32)  # [d, groups]

    def error(self, residual: np.ndarray) -> np.ndarray:
        """E|r' x|^2 = |U' r|^2, float64 [n], of residuals [d, n], columns first."""
        ordered, total = residual[self.order], np.zeros(residual.shape[1])
        for first in range(0, len(ordered), 4 * _BLOCK):
            block = slice(first, first + 4 * _BLOCK)
            part = self.correction(self.feedback, block, ordered[: block.stop]) + ordered[block]
            part *= self.root[block, None]
            total += np.einsum("kn,kn->n", part, part)
        return total

    @staticmethod
    def correction(coupling: np.ndarray, block: slice, residual: np.ndarray) -> np.ndarray:
        """What the residuals of the first columns, [m, n], add to the best values of a block of columns."""
        return matmul(np.ascontiguousarray(coupling[: len(residual), block].T), residual)


def _upper(moment: np.ndarray) -> np.ndarray:
    """The upper triangular U with U U' = moment."""
    try:
        return np.asarray(np.linalg.cholesky(moment[::-1, ::-1])[::-1, ::-1])
    except np.linalg.LinAlgError:
        raise UsageError("second moment: found directions of negative power, expected E[x x'] of inputs") from None


class _Fit:
    """The best copy so far of a block of rows, columns first: codes [d, n] (float32), scales, biases [groups, n]."""

    def __init__(self, metric: _Metric, weight: np.ndarray, plain: LowBit, part: slice) -> None:
        self.metric = metric
        self.levels = np.float32(2**plain.bits)
        self.weight = np.array(weight.T, np.float32, order="C")
        self.projected = matmul(metric.moment, self.weight)
        self.scales = np.array(plain.scales[part].T, np.float32, order="C")
        self.biases = np.array(plain.biases[part].T, np.float32, order="C")
        self.codes = np.array(unpack(plain.words[part], plain.bits).T, np.float32, order="C")
        self.error = metric.error(self._residual(self.codes, self.scales, self.biases))

    def improve(self, passes: int) -> None:
        self._round(feedback=True)
        for _ in range(passes):
            self._refit()
            self._round(feedback=True)
            self._round(feedback=False)
        self._refit()

    def _residual(self, codes: np.ndarray, scales: np.ndarray, biases: np.ndarray) -> np.ndarray:
        """What is left of the weights [d, n]."""
        grouped = codes.reshape(*self._grouped()) * scales[:, None]
        grouped += biases[:, None]
        return np.subtract(self.weight, grouped.reshape(self.weight.shape))

    def _grouped(self) -> tuple[int, int, int]:
        return (len(self.scales), self.metric.group, self.weight.shape[1])

    def _keep(self, codes: np.ndarray, scales: np.ndarray, biases: np.ndarray) -> None:
        """Takes the rows whose error is less."""
        error = self.metric.error(self._residual(codes, scales, biases))
        better = error < self.error
        for kept, found in ((self.codes, codes), (self.scales, scales), (self.biases, biases), (self.error, error)):
            np.copyto(kept, found, where=better)

    def _round(self, feedback: bool) -> None:
        """New codes for the scales and biases: from scratch with error feedback, or each in turn given all others."""
        metric, codes = self.metric, self.codes.copy()
        if feedback:
            order, coupling, residual = metric.order, metric.feedback, np.zeros_like(self.weight)
        else:
            order, coupling = np.arange(len(codes)), metric.descent
            residual = self._residual(codes, self.scales, self.biases)
        for first in range(0, len(codes), _BLOCK):
            columns = order[first : first + _BLOCK]
            block = slice(first, first + len(columns))
            known = residual[:first] if feedback and first else residual  # feedback: the others are zero
            targets = metric.correction(coupling, block, known)
            targets += self.weight[columns]
            self._round_block(codes, columns, targets, residual[block], coupling[block, block])
        self._keep(codes, self.scales, self.biases)

    def _round_block(
        self, codes: np.ndarray, columns: np.ndarray, targets: np.ndarray, residual: np.ndarray, coupling: np.ndarray
    ) -> None:
        """Rounds `columns` one after the other, telling the later ones of the block how its residual [b, n] changed."""
        for at, column in enumerate(columns):
            group = self.metric.groups[column]
            scale, bias = self.scales[group], self.biases[group]
            inverse = np.divide(1, scale, out=np.zeros_like(scale), where=np.abs(scale) > 1e-8)
            code = np.clip(np.rint((targets[at] - bias) * inverse), 0, self.levels - 1)
            left = self.weight[column] - (code * scale + bias)
            targets[at + 1 :] += coupling[at, at + 1 :, None] * (left - residual[at])
            codes[column], residual[at] = code, left

    def _refit(self) -> None:
        """The least-squares scales and biases for the codes, all groups of a row at once, rounded to float16."""
        middle = (self.levels - 1) / 2  # of the codes: keeps scales and biases nearly independent
        groups, _, rows = self._grouped()
        centred = (self.codes - middle).reshape(*self._grouped())
        scales, biases = np.empty((2, groups, rows), np.float32)
        step = max(1, _ELEMENTS // (8 * groups**2))
        for start in range(0, rows, step):
            part = slice(start, start + step)
            found = self._solve(np.ascontiguousarray(centred[:, :, part]), part)
            scales[:, part] = _half(found[:groups])
            biases[:, part] = _half(found[groups:] - middle * scales[:, part])
        fits = np.isfinite(scales).all(axis=0) & np.isfinite(biases).all(axis=0)
        self._keep(self.codes, np.where(fits, scales, self.scales), np.where(fits, biases, self.biases))

    def _solve(self, codes: np.ndarray, part: slice) -> np.ndarray:
        """Scales, then biases of the levels' middles, float64 [2 groups, n], for codes [groups, group, n]."""
        metric, (groups, group, rows) = self.metric, codes.shape
        projected = self.projected[:, part].reshape(codes.shape)
        wanted = np.concatenate([np.einsum("gkn,gkn->gn", codes, projected), projected.sum(axis=1)])
        normal = np.empty((rows, 2 * groups, 2 * groups))
        normal[:, groups:, groups:] = metric.sums.reshape(groups, group, groups).sum(axis=1, dtype=np.float64)
        cross = np.einsum("gkn,gkh->ngh", codes, metric.sums.reshape(groups, group, groups), optimize=True)
        normal[:, :groups, groups:], normal[:, groups:, :groups] = cross, cross.transpose(0, 2, 1)
        for at in range(groups):
            below = slice(at * group, None)
            product = matmul(metric.moment[below, at * group : (at + 1) * group], codes[at])
            products = np.einsum("gkn,gkn->ng", codes[at:], product.reshape(-1, group, rows))
            normal[:, at:groups, at] = normal[:, at, at:groups] = products
        diagonal = np.einsum("nii->ni", normal)
        diagonal += _RIDGE * diagonal + np.finfo(np.float32).tiny
        # A small system per row: BLAS's threads would wait for each other in each, 30 times as long on a busy machine.
        with threadpool_limits(1, user_api="blas"):
            return np.asarray(np.linalg.solve(normal, wanted.T[:, :, None])[:, :, 0].T)


def _half(values: np.ndarray) -> np.ndarray:
    """Rounded to float16; infinite beyond its reach."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)
