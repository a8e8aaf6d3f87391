"""What a comparison of gradients found: rows of numbers, their verdicts, and all as a table."""

import math
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from ._differences import Verdict
from ._rules import Rule


class GradientRow(NamedTuple):
    """One output's values or one argument's gradients: the function's own beside the reference's.

    Errors are largest absolute ones. `ulps` are errors in units of the last place of the leaf's largest
    true entry, in the leaf's dtype. The truth is the reference in float64. Where that has no value or is
    wrong itself, it is the custom gradient in float64, if differences have confirmed it.
    """

    path: str
    kind: Literal["value", "gradient"]
    shape: tuple[int, ...]
    dtype: str  # The dtype that the function's result must have.
    custom_dtype: str  # The dtype that it has.
    norm: float  # Euclidean norm of the truth.
    largest: float  # Largest absolute entry of the truth.
    difference: float  # Largest absolute difference between custom and reference.
    relative: float  # The same over `largest`.
    ulps: float  # The same in ulps.
    worst: tuple[int, ...]  # Where custom is furthest from the truth; at a kink, from the reference.
    custom: float | complex  # The values there.
    reference: float | complex  # NaN where there is none.
    truth: float | complex  # NaN at a kink.
    custom_ulps: float  # The custom result's own error, and the reference's.
    reference_ulps: float
    custom_nonfinite: int  # How many entries are NaN or infinite.
    reference_nonfinite: int
    unknown: int  # How many entries have no finite truth.
    as_close: float  # Ulps up to which custom counts as close to the truth as the reference is.
    linear: bool  # Whether the gradient is linear in the cotangent, as each gradient must be.
    differences: Verdict | None  # Whose gradient they agree with; None: not asked.

    def verdict(self, ulps: float | int | None = None) -> str:
        """A word, and its reason: right, wrong or not judged; see `compare_gradients` for the rule."""
        if self.custom_dtype != self.dtype:
            return f"wrong: should be {self.dtype}"
        if not self.linear:
            return "wrong: not linear in the cotangent"
        if self.differences in ("neither", "reference"):
            if math.isnan(abs(self.reference)) or self.unknown:
                return "wrong by differences"
            other = "the reference" if self.differences == "reference" else "neither"
            return f"wrong: differences agree with {other}"
        if self.unknown:
            many = f"{self.unknown} of {math.prod(self.shape)}"
            rough = self.differences == "unknown" and self.custom_nonfinite < self.unknown
            why = "differences are too rough" if rough else "not finite"
            return f"not judged: {many}, {why}"
        ulps = usual_ulps(self.dtype) if ulps is None else ulps
        if self.custom_ulps > max(ulps, self.as_close):
            return f"wrong: {self.custom_ulps:.3g} ulp off, {max(ulps, self.as_close):.3g} allowed"
        return "right" + {"custom": " by differences", "kink": " at a kink"}.get(
            self.differences or "", ""
        )

    def is_right(self, ulps: float | int | None = None) -> bool:
        """Whether the verdict is right."""
        return self.verdict(ulps).startswith("right")


class GradientComparison(NamedTuple):
    """What `compare_gradients` found: `rows` as plain data, `str()` as a table.

    The table has the true array's norm; the largest difference between custom and reference, and the
    same over the largest true entry; where custom is worst, with the values of all three there; and the
    largest error of custom and of reference. One ulp is the distance of neighbouring numbers of the
    array's dtype, at its largest true entry. 32 are right in any case, 4 in bfloat16 and float16.

    Attributes:
        rows: A row of numbers for each output and each argument, with its path, shape and dtype.
        skipped: Arguments and outputs that are no real or complex floating-point arrays.
        rules: Each custom rule that was found, with its `kind`, its `name`, how many `calls` of it there
            are, and whether it was `compared`.
        notes: Sentences on what was not as usual: what could not run, what no comparison can see.
        given: Whether a reference was given.
        arrays: For each row its custom, reference and true arrays, all in NumPy's float64 or complex128.

    Example:
        >>> from jaxsoftmax import compare_gradients
        >>> comparison = compare_gradients(jnp.tanh, jnp.array([0.5]), reference="differences")
        >>> [row.verdict() for row in comparison.rows]
        ['right', 'right']
    """

    rows: tuple[GradientRow, ...]
    skipped: tuple[str, ...]
    rules: tuple[Rule, ...]
    notes: tuple[str, ...]
    given: bool
    arrays: tuple[tuple[np.ndarray, np.ndarray, np.ndarray], ...]

    def __repr__(self) -> str:
        """The verdicts, without the arrays."""
        verdicts = (f"{row.kind} of {row.path}: {row.verdict()}" for row in self.rows)
        return f"<GradientComparison: {'; '.join(verdicts)}>"

    def __str__(self) -> str:
        """The rows as a table, and what is to be said of them."""
        header = (
            "", "path", "verdict", "shape", "dtype", "norm", "difference", "relative", "worst at",
            "custom", "reference", "float64", "custom error", "reference error",
        )  # fmt: skip
        lines = [
            (
                row.kind, row.path, row.verdict(), str(row.shape), row.custom_dtype,
                _number(row.norm, ".3g"), _number(row.difference, ".1e"), _number(row.relative, ".1e"),
                str(row.worst), f"{row.custom:.7g}", f"{row.reference:.7g}", f"{row.truth:.7g}",
                _error(row, row.custom_ulps, row.custom_nonfinite),
                _error(row, row.reference_ulps, row.reference_nonfinite),
            )
            for row in self.rows
        ]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in (header, *lines)
        ]
        said = [f"not compared: {', '.join(self.skipped)}"] * bool(self.skipped)
        for compared in (True, False):
            named = [f"{r.name} ({r.kind}) × {r.calls}" for r in self.rules if r.compared == compared]
            said += [f"rules {'' if compared else 'not '}compared: {', '.join(named)}"] * bool(named)
        return "\n".join([*table, *said, *self.notes])

    def assert_close(self, ulps: float | int | None = None) -> None:
        """Does nothing if every custom value and gradient is right, and something was compared.

        Args:
            ulps: How far from the truth is right in any case. None takes 32 for float32 and float64, 4
                for bfloat16 and float16.

        Raises:
            AssertionError: With the table, if a custom value or gradient is wrong or could not be judged,
                or if no rule was compared and no reference was given, or no argument has an entry.
        """
        __tracebackhide__ = True  # Under pytest the table alone is shown.
        found = {}
        for row in self.rows:
            if not row.is_right(ulps):
                word = row.verdict(ulps).split(":")[0].removesuffix(" by differences")
                found.setdefault(word, []).append(f"{row.kind} of {row.path}")
        texts = {"wrong": "custom rules wrong in", "not judged": "not judged:"}
        problems = [f"{text} {', '.join(found[word])}" for word, text in texts.items() if word in found]
        if not self.given and not any(rule.compared for rule in self.rules):
            problems.append("no rule was compared")
        if not any(math.prod(row.shape) for row in self.rows if row.kind == "gradient"):
            problems.append("the arguments have no entry to compare")
        if problems:
            raise AssertionError(f"{'; '.join(problems)}:\n{self}")

    def plot(self, axes: Any) -> None:
        """Draws every gradient entry's custom and reference value over its true value.

        Args:
            axes: Matplotlib axes. Rows of more than 2,000 entries are thinned out evenly.
        """
        for row, arrays in zip(self.rows, self.arrays, strict=True):
            if row.kind == "gradient" and row.largest > 0:
                step = -(-arrays[2].size // 2000) or 1
                custom, reference, truth = (np.real(a).ravel()[::step] / row.largest for a in arrays)
                axes.plot(truth, reference, "x", markersize=6, label=f"{row.path}, reference")
                axes.plot(truth, custom, ".", markersize=4, label=f"{row.path}, custom")
        axes.axline((0, 0), slope=1, color="gray", linewidth=0.8)
        axes.set(xlabel="float64, over the largest entry", ylabel="gradient, over the same")
        axes.legend()


def usual_ulps(dtype: Any) -> int:
    """How many ulps off is right in any case."""
    return 4 if jnp.finfo(dtype).bits < 32 else 32


def _number(number: float, form: str) -> str:
    return format(number, form) if math.isfinite(number) else "-"


def _error(row: GradientRow, ulps: float, nonfinite: int) -> str:
    size = math.prod(row.shape)
    if size and size in (row.unknown, nonfinite):
        return "-" if nonfinite < size else "not finite"
    # Beside a truth that is 0, no number of ulps says anything.
    text = f"{ulps:.3g} ulp" if row.largest or not ulps else "not 0"
    return text + (f", {nonfinite} not finite" if nonfinite else "")
