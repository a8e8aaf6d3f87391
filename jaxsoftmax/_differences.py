"""Derivatives that need no derivative: central differences, and which of two gradients they confirm."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

# Whose gradient differences confirm: the custom one, the reference's, both or neither; at a kink the
# custom one, as any between the slopes of both sides; or they cannot tell, for a value that is not finite
# or for what rounding leaves.
Verdict = Literal["custom", "reference", "both", "neither", "kink", "no value", "unknown"]

# Up to so many entries are judged one by one. Of more, up to three groups of arrays are, each along one
# direction, in so many evaluations in all.
ENTRIES = _EVALUATIONS = 20
_GROUPS = 3

# Steps by whether the function computes in float64, the likeliest first. One that iterates to a tolerance
# shows nothing at shorter ones, and among many ReLUs there is always one that has its kink nearer.
_STEPS = {True: (2.0**-12, 2.0**-24, 2.0**-5, 2.0**-32), False: (2.0**-6, 2.0**-4, 2.0**-9)}

Arrays = Sequence[np.ndarray]


class Contradiction(NamedTuple):
    """Entries of gradients that need a judge.

    Attributes:
        custom: The gradients by rule, for each argument.
        reference: The same by the reference; NaN where it has none.
        disputed: Which entries are to be judged.
        digits: How near a gradient must be to the differences, relative to its norm; below 1/128.
    """

    custom: Arrays
    reference: Arrays
    disputed: Arrays
    digits: float


@np.errstate(all="ignore")  # What is not finite is not judged.
def judge(
    evaluate: Callable[[list[np.ndarray]], Arrays],
    arguments: Arrays,
    cotangents: Arrays,
    contradiction: Contradiction,
    eps: float,
) -> tuple[list[Verdict | None], list[np.ndarray], list[Any], int]:
    """Which gradients the differences of a function agree with, by argument.

    With them come the true gradients as far as they are known, NaN elsewhere; where a direction alone is
    known, the slopes along it by custom, reference and differences; and how often the function was
    evaluated.

    For a direction v, ⟨c, f(x + hv) − f(x − hv)⟩ / 2h is held against ⟨gradient, v⟩.

    Args:
        evaluate: The function's outputs for arguments in float64 or complex128.
        arguments: Where to differentiate.
        cotangents: c, for each output.
        contradiction: The gradients, and what of them is disputed.
        eps: That of the numbers that the function computes with.
    """
    custom, reference, disputed, digits = contradiction
    precise = eps < 2.0**-40
    generator = np.random.default_rng(0)
    rows = [i for i, mask in enumerate(disputed) if mask.any()]
    alone = sum(int(disputed[i].sum()) for i in rows) <= ENTRIES
    if alone:
        groups = [{i: _only(disputed[i].shape, at)} for i in rows for at in np.argwhere(disputed[i])]
    else:
        groups = [
            {i: disputed[i] for i in part} for part in np.array_split(rows, min(len(rows), _GROUPS))
        ]
    once = len(groups)
    if not alone:
        # A direction that is nearly across the gradient shows little: one or two have others besides.
        groups *= 4 // once
    found: list[list[Verdict]] = [[] for _ in arguments]
    truths = [np.full(g.shape, np.nan, g.dtype) for g in custom]
    slopes: list[Any] = [None] * len(custom)

    line = _Line(evaluate, arguments, cotangents)
    if not np.isfinite(line.size):
        return ["no value" if mask.any() else None for mask in disputed], truths, slopes, line.used
    # What is small beside the value may be rounding. An entry whose own size moves more goes by it.
    least = line.size * (2.0**-28 if precise else 2.0**-20)
    moves = [np.abs(np.nan_to_num(g * x)) > least for x, g in zip(arguments, custom, strict=True)]
    scales = [_scales(x, own) for x, own in zip(arguments, moves, strict=True)]
    # So may what is small beside the whole gradient.
    overall = max(np.linalg.norm(_finite(g * s)) for g, s in zip(custom, scales, strict=True))
    steps = list(_STEPS[precise])

    def along(group, direction, tries):
        """What both gradients say of a direction, what differences do, and who is right."""
        gradients = [
            sum(np.sum(np.real(g[i][mask] * direction[i][mask])) for i, mask in group.items())
            for g in (custom, reference)
        ]
        by_own_size = alone and precise and all(moves[i][mask].all() for i, mask in group.items())
        floor = least if by_own_size else overall / (256 if precise else 16)
        norm = np.linalg.norm([np.linalg.norm(_finite(custom[i] * direction[i])) for i in group])
        scale = max(norm, floor, least)
        slope, verdict = line.slope(direction, scale, eps, steps[:tries], gradients, digits)
        return gradients, slope, verdict

    ties: dict[int, np.ndarray] = {}
    for position, group in enumerate(groups):
        # The groups that come have a first try each.
        tries = len(steps) if alone else (_EVALUATIONS - line.used) // 4 - max(once - position - 1, 0)
        if tries < 1:
            break
        direction = [np.zeros(x.shape) for x in arguments]
        for i, mask in group.items():
            direction[i] = _direction(custom[i] - reference[i], scales[i], mask, generator)
        gradients, slope, verdict = along(group, direction, tries)
        if verdict == "unknown" and position >= once:
            continue
        steps.sort(key=lambda step: step != slope.step)
        for i, mask in group.items():
            found[i].append(verdict)
            if verdict in ("custom", "kink"):
                truths[i][mask] = custom[i][mask]
            elif verdict == "both":
                truths[i][mask] = reference[i][mask]
            elif verdict != "unknown" and alone and not np.iscomplexobj(custom[i]):
                truths[i][mask] = slope.value / direction[i][mask]
            elif verdict != "unknown":
                slopes[i] = (*gradients, slope.value)
            if verdict == "kink" and alone:
                ties[i] = ties.get(i, False) | mask
    if sum(mask.sum() for mask in ties.values()) > 1:
        # What ties moves together: between the slopes of each may be outside of those of all.
        far = np.median(np.concatenate([scales[i][mask] for i, mask in ties.items()]))
        direction = [far * ties.get(i, np.zeros(x.shape)) for i, x in enumerate(arguments)]
        verdict = along(ties, direction, len(steps))[-1]
        if verdict in ("neither", "reference"):
            for i, mask in ties.items():
                found[i].append(verdict)
                truths[i][mask] = reference[i][mask] if verdict == "reference" else np.nan
    return [_gravest(verdicts) for verdicts in found], truths, slopes, line.used


class _Slope(NamedTuple):
    value: float = math.nan
    error: float = math.inf
    kink: float = 0.0  # How far the slopes of both sides are from it.
    step: float = 0.0

    def judge(self, gradients: list[Any], scale: Any, digits: float) -> Verdict:
        """Which of two numbers it is."""
        scale = max(scale, abs(self.value), self.kink)
        slack = 4 * self.error + digits * scale
        if not slack <= scale / 128:  # Also where it is not finite.
            return "unknown"
        mine, others = (abs(number - self.value) <= self.kink + slack for number in gradients)
        if mine:
            return "kink" if self.kink else "both" if others else "custom"
        return "reference" if others else "neither"


class _Line:
    """A function's values ⟨c, f(x + hv)⟩ for any v and h.

    Attributes:
        used: How often the function was evaluated.
        size: How large what is summed is, at x.
    """

    def __init__(self, evaluate, arguments, cotangents):
        self._evaluate, self._arguments, self._cotangents, self.used = evaluate, arguments, cotangents, 0
        self._centre = self._outputs([np.zeros(x.shape) for x in arguments], 0.0)
        self.size = sum(np.abs(y).sum() for y in self._centre)

    def _outputs(self, direction, step):
        self.used += 1
        moved = self._evaluate([x + step * v for x, v in zip(self._arguments, direction, strict=True)])
        return [c * y for c, y in zip(self._cotangents, moved, strict=True)]

    def _central(self, direction, step):
        """Central and second difference, over 2h."""
        ahead, behind = self._outputs(direction, step), self._outputs(direction, -step)
        each = list(zip(self._centre, ahead, behind, strict=True))
        slope = sum(np.sum(np.real(y - z)) for _, y, z in each)
        bend = sum(np.sum(np.real((y - x) + (z - x))) for x, y, z in each)
        return slope / (2 * step), bend / (2 * step)

    def slope(self, direction, scale, eps, steps, gradients, digits) -> tuple[_Slope, Verdict]:
        """A derivative and what it says, by one step after the other until it confirms a gradient.

        Two steps h and h/2 give (4 D(h/2) − D(h)) / 3, and the difference of the two bounds its error. So
        does what rounding leaves. The second difference over h vanishes with h, but for a kink at h = 0.
        """
        best, good = _Slope(), scale / 4096
        for step in steps:
            (coarse, bend), (fine, half_bend) = (self._central(direction, h) for h in (step, step / 2))
            noise = 2 * eps * self.size / step
            error, jump = max(abs(fine - coarse), noise), abs(2 * half_bend - bend)
            tried = _Slope((4 * fine - coarse) / 3, max(error, jump), 0.0, step)
            if jump > max(abs(half_bend) / 2, 8 * noise, good):
                sides = _Slope(fine, max(error, 2 * abs(half_bend - bend)), abs(half_bend), step)
                tried = sides if sides.error <= good else tried
            verdict = tried.judge(gradients, scale, digits)
            if verdict not in ("neither", "unknown"):
                return tried, verdict
            best = min(best, tried, key=lambda slope: slope.error)
        return best, best.judge(gradients, scale, digits)


def _scales(x: Any, by_size: Any) -> np.ndarray:
    """How far each entry may go: by its own size, or by what is usual. What is infinite stays so."""
    size = np.abs(np.where(np.isfinite(x), x, 0))
    usual = np.median(size[size > 0]) if np.any(size > 0) else 1.0
    return np.asarray(np.where(by_size & (size > 0), size, np.maximum(size, usual)))


def _direction(difference, scales, mask, generator) -> np.ndarray:
    """Along the difference of two gradients, which tells them best, or anywhere where there is none."""
    signs = generator.choice([-1.0, 1.0], mask.shape)
    if np.iscomplexobj(difference):
        signs = (signs + 1j * generator.choice([-1.0, 1.0], mask.shape)) / math.sqrt(2)
    size = np.abs(difference)
    known = np.isfinite(difference) & (size > 0)
    signs = np.where(known, np.conj(difference) / np.where(known, size, 1), signs)
    return np.where(mask, signs * scales, 0)


def _only(shape: tuple[int, ...], at: np.ndarray) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[tuple(at)] = True
    return mask


def _finite(array: Any) -> np.ndarray:
    return array[np.isfinite(array)]


def _gravest(verdicts: list[Verdict]) -> Verdict | None:
    order: list[Verdict] = ["neither", "reference", "unknown", "kink", "custom", "both"]
    return min(verdicts, key=order.index, default=None)
