"""Derivatives that need no derivative: central differences, and which of two gradients they confirm."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

# Whose gradient differences confirm: the custom one, the reference's, both or neither; at a kink the
# custom one, as any between the slopes of both sides; or they cannot tell, for a value that is not finite
# or for what rounding leaves.
Verdict = Literal["custom", "reference", "both", "neither", "kink", "no value", "unknown"]

# Up to so many entries are judged one by one. Of more, up to three groups of arrays are, each along one
# direction, in so many evaluations in all, but for those of a contradiction or at kinks.
_ENTRIES = _EVALUATIONS = 20
_GROUPS = 3
_SOME = 4  # Where there are kinks, so many entries speak for all.

# Steps by whether the function computes in float64, the likeliest first. One that iterates to a tolerance
# shows nothing at shorter ones, and among many ReLUs there is always one that has its kink nearer.
_STEPS = {True: (2.0**-12, 2.0**-24, 2.0**-5, 2.0**-32), False: (2.0**-6, 2.0**-4, 2.0**-9)}

# Verdicts that the custom gradient is not what differences find.
_WRONG = "neither", "reference"

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


def are_few(disputed: Sequence[Any]) -> bool:
    """Whether there are so few entries that they are judged one by one."""
    return sum(int(mask.sum()) for mask in disputed) <= _ENTRIES


@np.errstate(all="ignore")  # What is not finite is not judged.
def judge(
    evaluate: Callable[[list[np.ndarray]], Arrays],
    arguments: Arrays,
    cotangents: Arrays,
    contradiction: Contradiction,
    eps: float,
) -> tuple[list[Verdict | None], list[np.ndarray], list[np.ndarray], list[Any], int]:
    """Which gradients the differences of a function agree with, by argument.

    With them come the true gradients as far as they are known, NaN elsewhere, and the custom ones where
    they are right at a kink; which entries these are; where a direction alone is known, the slopes along
    it by custom, reference and differences; and how often the function was evaluated.

    For a direction v, ⟨c, f(x + hv) − f(x − hv)⟩ / 2h is held against ⟨gradient, v⟩.

    Args:
        evaluate: The function's outputs for arguments in float64 or complex128.
        arguments: Where to differentiate.
        cotangents: c, for each output.
        contradiction: The gradients, and what of them is disputed.
        eps: That of the numbers that the function computes with.
    """
    judged = _Judge(_Line(evaluate, arguments, cotangents), arguments, contradiction, eps)
    if not math.isfinite(judged.line.size):
        judged.found = [["no value"] if mask.any() else [] for mask in contradiction.disputed]
    elif are_few(contradiction.disputed):
        judged.entries()
    else:
        judged.arrays()
    verdicts: list[Verdict | None] = [_gravest(each) for each in judged.found]
    return verdicts, judged.truths, judged.kinks, judged.slopes, judged.line.used


class _Judge:
    """Verdicts by argument, as far as they are found, and what goes with them."""

    def __init__(self, line, arguments, contradiction, eps):
        custom, self._reference, self._disputed, self._digits = contradiction
        self.line, self._custom, self._eps, self._precise = line, custom, eps, eps < 2.0**-40
        self._arguments = arguments
        self._steps = list(_STEPS[self._precise])
        self._generator = np.random.default_rng(0)
        self.found: list[list[Verdict]] = [[] for _ in arguments]
        self.kinks = [np.zeros(g.shape, bool) for g in custom]
        self.truths = [np.full(g.shape, np.nan, g.dtype) for g in custom]
        self.slopes: list[Any] = [None] * len(custom)
        # What is small beside the value may be rounding. An entry whose own size moves more goes by it.
        self._least = line.size * (2.0**-28 if self._precise else 2.0**-20)
        self._moves = [
            self._precise & (np.abs(np.nan_to_num(g * x)) > self._least)
            for x, g in zip(arguments, custom, strict=True)
        ]
        self._scales = [_scales(x, own) for x, own in zip(arguments, self._moves, strict=True)]
        # So may what is small beside the whole gradient.
        self._norms = [
            float(np.linalg.norm(_finite(g * s))) for g, s in zip(custom, self._scales, strict=True)
        ]

    def entries(self) -> None:
        """One entry after the other, a complex one in two directions; then all that are at kinks."""
        kinks = []
        for i, mask in enumerate(self._disputed):
            is_complex = np.iscomplexobj(self._custom[i])
            for at in map(tuple, np.argwhere(mask)):
                group = {i: _only(mask.shape, at)}
                first = self._direction(i, group[i])
                for direction in (first, 1j * first) if is_complex else (first,):
                    _, slope, verdict = self._along(group, {i: direction}, self._steps, alone=True)
                    self._steps.sort(key=lambda step, best=slope.step: step != best)
                    unit = np.nan if is_complex else direction[at]
                    self._tell(group, verdict, None, float(slope.value / unit))
                    if verdict == "kink" and not is_complex:
                        kinks.append((i, at, unit, slope))
        if len(kinks) > 1:
            self._together(kinks)

    def _together(self, kinks: list[Any]) -> None:
        """Entries at kinks all at once. Where they tie, what each may be they need not be together.

        Where the slopes of all are the sum of theirs they do not tie, and nothing more is to be seen.
        """
        far = np.median([abs(unit) for _, _, unit, _ in kinks])
        group = {i: np.zeros(self._custom[i].shape, bool) for i, *_ in kinks}
        direction = {i: np.zeros(self._custom[i].shape) for i in group}
        ahead = behind = size = 0.0
        for i, at, unit, slope in kinks:
            sign = -1.0 if self._custom[i][at] < 0 else 1.0
            group[i][at], direction[i][at] = True, sign * far
            turned = math.copysign(1, unit) * sign
            ahead += far * (turned * slope.value + slope.bend) / abs(unit)
            behind += far * (turned * slope.value - slope.bend) / abs(unit)
            size += far * (abs(slope.value) + abs(slope.bend)) / abs(unit)
        _, slope, verdict = self._along(group, direction, self._steps, alone=True)
        off = max(abs(slope.value + slope.bend - ahead), abs(slope.value - slope.bend - behind))
        if verdict in _WRONG and off > size / 128:
            self._tell(group, verdict, None, np.nan)
            for i, mask in group.items():
                self.truths[i][mask] = self._reference[i][mask] if verdict == "reference" else np.nan

    def arrays(self) -> None:
        """Up to three groups of arrays, each along one direction; then more of those that are wrong."""
        rows = [i for i, mask in enumerate(self._disputed) if mask.any()]
        groups = [part.tolist() for part in np.array_split(rows, min(len(rows), _GROUPS))]
        once, doubtful = len(groups), {}
        # A direction that is nearly across the gradient shows little: one or two have others besides.
        for position, part in enumerate(groups * (4 // once)):
            # The groups that come have a first try each.
            tries = (_EVALUATIONS - self.line.used) // 4 - max(once - position - 1, 0)
            if tries < 1:
                break
            group = {i: self._disputed[i] for i in part}
            # What is small may be wrong as well, and shows only beside what is not much larger.
            least = min(self._norms[i] for i in part)
            direction = {
                i: self._direction(i, mask) * max(least / self._norms[i] if self._norms[i] else 1, 1 / 32)
                for i, mask in group.items()
            }
            gradients, slope, verdict = self._along(group, direction, self._steps[:tries])
            if verdict == "unknown" and position >= once:
                continue
            self._steps.sort(key=lambda step, best=slope.step: step != best)
            if verdict in (*_WRONG, "kink"):
                doubtful.setdefault(tuple(part), (direction, slope, verdict, gradients))
            else:
                self._tell(group, verdict)
        for part, (direction, slope, verdict, gradients) in doubtful.items():
            group = {i: self._disputed[i] for i in part}
            if verdict == "kink" or self._bends(group, slope):
                self._apart(group)
            elif len(part) == 1:
                self._tell(group, verdict, (*gradients, slope.value))
            else:
                self._blame(group, direction)

    def _bends(self, group, slope) -> bool:
        """Whether there are kinks at x, where a gradient may be what no direction shows."""
        step = min(slope.step, max(_STEPS[self._precise][:2]))
        direction = {i: self._direction(i, mask, at_random=True) for i, mask in group.items()}
        along, bend = self.line.central(direction, step)
        norm = math.hypot(*(self._norms[i] for i in group))
        return not abs(bend) <= max(abs(along), norm) / 256 + 8 * self.line.noise(step, self._eps)

    def _apart(self, group) -> None:
        """Arrays with kinks, each by itself, and in it what is likely to be at a kink and what is not.

        A kink at x comes of numbers that are set, such as 0, or that tie. Beside one, an error below its
        bend is not seen.
        """
        for i, mask in group.items():
            is_set = _is_set(self._arguments[i])
            for some in (mask & ~is_set, mask & is_set):
                if not some.any():
                    continue
                one, direction = {i: some}, self._direction(i, some)
                gradients, slope, verdict = self._along(one, {i: direction}, self._steps[:2], alone=True)
                if verdict in _WRONG and self._bends(one, slope):
                    verdict = self._of_some(one)
                self._tell(one, verdict, (*gradients, slope.value))

    def _of_some(self, group) -> Verdict:
        """The verdict on the few entries that are most disputed, one by one."""
        off = {
            i: np.where(
                mask, np.nan_to_num(abs(self._custom[i] - self._reference[i]) * self._scales[i]), -1
            )
            for i, mask in group.items()
        }
        verdicts = []
        for _ in range(_SOME):
            i = max(off, key=lambda i: off[i].max())
            at = np.unravel_index(np.argmax(off[i]), off[i].shape)
            off[i][at] = -1
            one = {i: _only(off[i].shape, at)}
            verdicts.append(
                self._along(one, {i: self._direction(i, one[i])}, self._steps, alone=True)[-1]
            )
        worst = _gravest(verdicts)
        return "kink" if worst in ("custom", "both") else worst or "unknown"

    def _blame(self, group, direction) -> None:
        """Each array of a group by itself, as one of them is wrong."""
        told = {
            i: self._along({i: mask}, {i: direction[i]}, self._steps[:2]) for i, mask in group.items()
        }
        found = any(verdict in _WRONG for *_, verdict in told.values())
        for i, (gradients, slope, verdict) in told.items():
            self._tell({i: group[i]}, verdict if found else "unknown", (*gradients, slope.value))

    def _tell(self, group, verdict, slopes=None, truth=math.nan) -> None:
        for i, mask in group.items():
            self.found[i].append(verdict)
            differs = self._custom[i] != self._reference[i]
            self.kinks[i][mask] = differs[mask] & (verdict == "kink")
            if verdict in ("custom", "kink"):
                self.truths[i][mask] = self._custom[i][mask]
            elif verdict == "both":
                self.truths[i][mask] = self._reference[i][mask]
            elif verdict in _WRONG:
                self.truths[i][mask] = truth
                self.slopes[i] = slopes

    def _direction(self, i, mask, at_random=False) -> np.ndarray:
        """Along the difference of the gradients, which tells them best; anywhere where there is none."""
        difference = np.where(at_random, np.nan, self._custom[i] - self._reference[i])
        signs = self._generator.choice([-1.0, 1.0], mask.shape)
        if np.iscomplexobj(self._custom[i]):
            signs = (signs + 1j * self._generator.choice([-1.0, 1.0], mask.shape)) / math.sqrt(2)
        size = np.abs(difference)
        known = np.isfinite(difference) & (size > 0)
        signs = np.where(known, np.conj(difference) / np.where(known, size, 1), signs)
        return np.where(mask, signs * self._scales[i], 0)

    def _along(self, group, direction, steps, alone=False) -> tuple[list[Any], Any, Verdict]:
        """What both gradients say of a direction, what differences do, and who is right."""
        gradients = [
            sum(np.sum(np.real(g[i][mask] * direction[i][mask])) for i, mask in group.items())
            for g in (self._custom, self._reference)
        ]
        by_own_size = alone and all(self._moves[i][mask].all() for i, mask in group.items())
        floor = max(self._norms) / (256 if self._precise else 16)
        norm = np.linalg.norm(
            [np.linalg.norm(_finite(self._custom[i] * v)) for i, v in direction.items()]
        )
        scale = max(norm, self._least, 0 if by_own_size else floor)
        slope, verdict = self.line.slope(
            direction, scale, self._eps, steps, gradients, self._digits, finest=alone
        )
        # Not 0, but nothing beside the value.
        if scale == self._least and norm > self._least * (2.0**-16 if self._precise else 0.5):
            verdict = "unknown"
        return gradients, slope, verdict


class _Slope(NamedTuple):
    value: float = math.nan
    error: float = math.inf
    bend: float = 0.0  # Half of what the slope ahead is more than that behind.
    step: float = 0.0
    but_for_kinks: float = math.inf  # The error if the second difference is no kink's.

    def judge(self, gradients: list[Any], scale: Any, digits: float) -> Verdict:
        """Which of two numbers it is."""
        kink = abs(self.bend)
        scale = max(scale, abs(self.value), kink)
        slack = 4 * self.error + digits * scale
        if not slack <= scale / 128:  # Also where it is not finite.
            return "unknown"
        mine, others = (abs(number - self.value) <= kink + slack for number in gradients)
        if mine:
            return "kink" if kink else "both" if others else "custom"
        return "reference" if others else "neither"


class _Line:
    """A function's values ⟨c, f(x + hv)⟩ for any v and h.

    Attributes:
        used: How often the function was evaluated.
        size: How large what is summed is, at x.
    """

    def __init__(self, evaluate, arguments, cotangents):
        self._evaluate, self._arguments, self._cotangents, self.used = evaluate, arguments, cotangents, 0
        self._centre = self._outputs({}, 0.0)
        self.size = float(sum(np.abs(y).sum() for y in self._centre))

    def _outputs(self, direction, step):
        self.used += 1
        moved = self._evaluate(
            [x + step * direction[i] if i in direction else x for i, x in enumerate(self._arguments)]
        )
        return [c * y for c, y in zip(self._cotangents, moved, strict=True)]

    def noise(self, step: float, eps: float) -> float:
        """What rounding of the outputs leaves in a slope."""
        return 2 * eps * self.size / step

    def central(self, direction: dict[int, np.ndarray], step: float) -> tuple[float, float]:
        """Central and second difference, over 2h."""
        ahead, behind = self._outputs(direction, step), self._outputs(direction, -step)
        each = list(zip(self._centre, ahead, behind, strict=True))
        slope = sum(np.sum(np.real(y - z)) for _, y, z in each)
        bend = sum(np.sum(np.real((y - x) + (z - x))) for x, y, z in each)
        return float(slope / (2 * step)), float(bend / (2 * step))

    def slope(self, direction, scale, eps, steps, gradients, digits, finest) -> tuple[_Slope, Verdict]:
        """A derivative and what it says, by one step after the other until it confirms a gradient.

        Two steps h and h/2 give (4 D(h/2) − D(h)) / 3, and the difference of the two bounds its error. So
        does what rounding leaves. The second difference over h vanishes with h, but for a kink at h = 0.
        A kink may be nearby instead: the finest step shows it, where there is time for it. A second
        difference that falls with every step is no kink's, as that of |x|^1.5.
        """
        tries, flat = [], _Slope()
        for step in steps:
            tried = self._extrapolated(direction, scale, eps, step)
            if tried is None:
                # To the last bit the same everywhere: flat, or on a stair of what is rounded inside.
                flat = min(flat, _Slope(0.0, self.noise(step, eps), 0.0, step), key=_error)
                continue
            verdict = tried.judge(gradients, scale, digits)
            if verdict == "kink" and finest:
                return self._closer(direction, scale, eps, steps, gradients, digits, tried)
            if verdict not in ("neither", "unknown"):
                return tried, verdict
            tries.append(tried)
        if _fall(tries):
            tries = [each._replace(error=each.but_for_kinks) for each in tries]
        best = min(tries, key=_error, default=flat)
        best = best if math.isfinite(best.error) else flat
        return best, best.judge(gradients, scale, digits)

    def _closer(self, direction, scale, eps, steps, gradients, digits, kink) -> tuple[_Slope, Verdict]:
        """The kink that a step has shown, or what the finest step shows that can tell."""
        step = min(steps)
        while step < kink.step:
            near = self._extrapolated(direction, scale, eps, step) or _Slope()
            verdict = near.judge(gradients, scale, digits)
            if verdict != "unknown":
                return near, verdict
            step *= 16
        return kink, "kink"

    def _extrapolated(self, direction, scale, eps, step) -> _Slope | None:
        """A derivative by one step; None if nothing moves at all."""
        good = scale / 4096
        (coarse, bend), (fine, half_bend) = (self.central(direction, h) for h in (step, step / 2))
        if coarse == fine == bend == half_bend == 0:
            return None
        noise = self.noise(step, eps)
        error, jump = max(abs(fine - coarse), noise), abs(2 * half_bend - bend)
        if jump > max(abs(half_bend) / 2, 8 * noise, good):
            sides = _Slope(fine, max(error, 2 * abs(half_bend - bend)), half_bend, step)
            if sides.error <= good:
                return sides
        return _Slope((4 * fine - coarse) / 3, max(error, jump), 0.0, step, error)


def _error(slope: _Slope) -> float:
    return math.inf if math.isnan(slope.error) else slope.error


def _fall(slopes: list[_Slope]) -> bool:
    """Whether several errors fall with the step, at least as its root does, or nearly."""
    slopes = sorted(slopes, key=lambda slope: -slope.step)
    return len(slopes) > 2 and all(
        not fine.bend and fine.error <= coarse.error * (fine.step / coarse.step) ** 0.4
        for coarse, fine in itertools.pairwise(slopes)
    )


def _scales(x: Any, by_size: Any) -> np.ndarray:
    """How far each entry may go: by its own size, or by what is usual. What is infinite stays so."""
    size = np.abs(np.where(np.isfinite(x), x, 0))
    usual = np.median(size[size > 0]) if np.any(size > 0) else 1.0
    return np.asarray(np.where(by_size & (size > 0), size, np.maximum(size, usual)))


def _is_set(x: np.ndarray) -> np.ndarray:
    """Which entries are whole numbers, or occur more than once."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (counts[inverse].reshape(x.shape) > 1) | (x == np.round(x))


def _only(shape: tuple[int, ...], at: Any) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[at] = True
    return mask


def _finite(array: Any) -> np.ndarray:
    return array[np.isfinite(array)]


def _gravest(verdicts: list[Verdict]) -> Verdict | None:
    order: list[Verdict] = ["neither", "reference", "no value", "unknown", "kink", "custom", "both"]
    return min(verdicts, key=order.index, default=None)
