"""How a processor goes through a row of logits: its sums without one class.

XLA's compiler for CPUs and those for accelerators want different programs for the same sums. Both stand
here side by side, and which of them runs is settled when a program is lowered for its platform.
"""

import math
from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from ._checks import arithmetic_dtype, known_size
from ._mesh import (
    Axes,
    across,
    class_count,
    class_numbers,
    first_class,
    from_its_device,
    is_local,
    is_sharded,
    largest,
    smallest,
    total,
)


class RowSums(NamedTuple):
    """The sums over each row of logits z, without one class of it, from which everything exact is made.

    With m = max_k z_k and e_k = exp(z_k − m), the class i is a label or a winner, told by its number. Its
    own e_i stays out of the sum of the others, which it would swallow where it is far ahead:
        a_i = e_i / (e_i + Σ_{k≠i} e_k),    1 − a_i = Σ_{k≠i} e_k / (e_i + Σ_{k≠i} e_k)
    lose no digit, however near a_i is to 0 or 1.
    """

    number: Integer[Array, "*batch 1"]  # i, counted from this device's first class.
    maximum: Float[Array, "*batch 1"]  # m, or 0 where all logits are −inf. It is held fixed.
    ahead: Float[Array, "*batch 1"]  # z_i − m
    others: Float[Array, "*batch 1"]  # Σ_{k≠i} e_k

    @property
    def own(self) -> Float[Array, "*batch 1"]:
        """e_i."""
        return jnp.exp(self.ahead)

    @property
    def total(self) -> Float[Array, "*batch 1"]:
        """Σ_k e_k."""
        return self.own + self.others


def by_processor(
    cpu: Callable[..., Any],
    other: Callable[..., Any],
    *arguments: Any,
    tpu: Callable[..., Any] | None = None,
) -> Any:
    """`cpu(*arguments)` where the program runs on a CPU, `other(*arguments)` elsewhere.

    `tpu`, if given, is for TPUs.
    """
    of_tpu = {} if tpu is None else {"tpu": tpu}
    return jax.lax.platform_dependent(*arguments, cpu=cpu, default=other, **of_tpu)


def _of_rows(cpu, other, axes, z, *index):
    """What a way makes of rows. Long ones go in parts, on a TPU in others than elsewhere."""
    is_long = is_local(z) and known_size(z.shape[-1]) * z.dtype.itemsize > MOST_BYTES
    tpu = partial(other, axes, _slices, _reduced) if is_long else None
    reduced = partial(_reduced_in_parts, MOST_BYTES // z.dtype.itemsize) if is_long else _reduced
    return by_processor(partial(cpu, axes), partial(other, axes, _whole, reduced), z, *index, tpu=tpu)


def rounded(logits: Array) -> Array:
    """The same logits, so that all uses of them see the same numbers.

    Of logits that end in a product, a compiler may take the product again for each use and merge it with
    what is subtracted from it, without rounding it first: no class would be exactly the largest. Nothing
    is merged through a selection, of which this one is always the first.
    """
    return jnp.where(logits == logits, logits, -logits)  # but for NaN


@jax.custom_jvp
def taken_once(logits: Array) -> Array:
    """The same logits, made of others by what is cheap.

    XLA on the CPU would do it anew in each pass over them, and hold beside them what they are made of.
    Only what is dear, as a quotient, is done once for all its uses.
    """
    return by_processor(_once, lambda z: z, logits)


@taken_once.defjvp
def _taken_once_jvp(primals, tangents):
    return taken_once(*primals), *tangents


def _once(z):
    # A constant 1 would be stored in the logits' size, outside of a loop that is differentiated.
    return z / (1 + (z != z).astype(z.dtype))


def bounded(difference: Array) -> Array:
    """The difference, as far as there are numbers, since 0 · ∞ is NaN."""
    return jnp.minimum(difference, jnp.finfo(difference.dtype).max / 2)


def is_class(values: Float[Array, "*batch classes"], index: Integer[Array, "*batch 1"]) -> Array:
    """Whether each class is the one of its row at `index`."""
    return class_numbers(values) == index


def sum_over_classes(values: Float[Array, "*batch classes"], axes: Axes) -> Float[Array, "*batch 1"]:
    """The sum over each row, the classes of other devices included."""
    return total(jnp.sum(values, axis=-1, keepdims=True), axes)


@partial(jax.jit, static_argnums=0)  # Outside jit each function below would be traced at every call.
def sums_without_winner(axes: Axes, logits: Float[Array, "*batch classes"]) -> RowSums:
    """The sums of each row without the first class with the largest logit.

    NaN where a logit is NaN or +inf.
    """
    number, *sums = _of_rows(_winner_sums_on_cpu, _winner_sums_elsewhere, axes, logits)
    return RowSums(number, *_differentiable(axes, logits, number, *sums))


@partial(jax.jit, static_argnums=(0, 1))
def shares(
    axes: Axes, in_place: bool, logits: Float[Array, "*batch classes"]
) -> tuple[Float[Array, "*batch classes"], Integer[Array, "*batch 1"]]:
    """Each class's exponential over the sum of all, and a class with the largest; NaN as above.

    What a share lacks to 1 is lost. The shares may take the logits' place, for several uses, if so told.
    Their derivative is not exact.
    """
    on_cpu = partial(_shares_on_cpu, axes, in_place)
    return by_processor(on_cpu, partial(_shares_elsewhere, axes), logits)


@partial(jax.jit, static_argnums=(0, 1))
def sums_and_kept(
    axes: Axes,
    in_place: bool | None,
    logits: Float[Array, "*batch classes"],
    index: Integer[Array, "*batch 1"],
) -> tuple[RowSums, Float[Array, "*batch classes"]]:
    """The sums of each row without the class at `index`, and what `scaled_exponentials` is made of.

    That is one array in the logits' shape and dtype. It may take the logits' place, if so told, and if
    nothing else uses them. None tells that nobody will use it. It stands for the logits: its tangent is
    theirs.
    """
    sums = _of_rows(partial(_kept_on_cpu, in_place), _kept_elsewhere, axes, logits, index)
    *sums, kept = _differentiable(axes, logits, index, *sums)
    return RowSums(index, *sums), kept


@partial(jax.jit, static_argnums=0)
def kept_of(
    axes: Axes, logits: Float[Array, "*batch classes"], sums: RowSums, read: Float[Array, "*batch 1"]
) -> tuple[RowSums, Float[Array, "*batch classes"]]:
    """The same in place of a row whose winner is known; `read` is what was made of it before."""
    index, maximum, ahead, others = sums
    ways = partial(_kept_again_on_cpu, axes), lambda z, _, __, others, ___: (others, z)
    others, kept = by_processor(*ways, logits, index, maximum, others, read)
    maximum, ahead, others, kept = _differentiable(axes, logits, index, maximum, ahead, others, kept)
    return RowSums(index, maximum, ahead, others), kept


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable(axes, z, index, maximum, ahead, others, *kept):
    """What was made of z, with one derivative for all processors."""
    del axes, z, index
    return maximum, ahead, others, *kept


@_differentiable.defjvp
def _differentiable_jvp(axes, primals, tangents):
    # The maximum is held fixed, so d Σ e_k = Σ e_k dz_k.
    (z, index, m, *others), (d_logits, *_) = primals, tangents
    is_own, d_z = is_class(z, index), d_logits.astype(m.dtype)
    e = jnp.where(is_own, 0, jnp.exp(rounded(z.astype(m.dtype)) - m))
    d_ahead = sum_over_classes(jnp.where(is_own, d_z, 0), axes)
    d_others = sum_over_classes(e * d_z, axes)
    d_kept = (d_logits,) * (len(others) - 2)
    return (m, *others), (jnp.zeros_like(m), d_ahead, d_others, *d_kept)


@partial(jax.jit, static_argnums=0)
def scaled_exponentials(
    are_logits: bool,
    kept: Float[Array, "*batch classes"],
    maximum: Float[Array, "*batch 1"],
    factor: Float[Array, "*batch 1"],
) -> Float[Array, "*batch classes"]:
    """The factor times e_k for each class k, but any number for the class that the sums went without.

    Logits may stand for what is kept of them.
    """
    on_cpu = _scaled_elsewhere if are_logits else _scaled_on_cpu
    return by_processor(on_cpu, _scaled_elsewhere, kept, maximum, factor)


@partial(jax.jit, static_argnums=0)
def winner(axes: Axes, values: Float[Array, "*batch classes"]) -> Integer[Array, "*batch 1"]:
    """The first class of each row with the largest value, counted from the first of all devices.

    Where none is found, for NaN, any will do.
    """
    values = jax.lax.stop_gradient(values)
    return by_processor(partial(_winner_on_cpu, axes), partial(_winner_elsewhere, axes), values)


@partial(jax.jit, static_argnums=0)
def rank(
    axes: Axes, values: Float[Array, "*batch classes"], index: Integer[Array, "*batch 1"]
) -> Integer[Array, "*batch 1"]:
    """How many of each row's values are larger than that at `index`, or as large and before it.

    Any number where that is −inf or NaN.
    """
    values = jax.lax.stop_gradient(values)
    own = rounded(pick(values, index, axes))
    return total(by_processor(_ahead_on_cpu, _ahead_elsewhere, values, own, index), axes)


@partial(jax.jit, static_argnums=0)
def behind_in_all(
    axes: Axes, logits: Float[Array, "*batch classes"], sums: RowSums
) -> Float[Array, "*batch 1"]:
    """Σ_{k≠i} e_k (z_i − z_k) of each row."""
    # Where the others are small they are measured from further below, so that none underflows.
    m = sums.maximum
    low = m - jax.lax.stop_gradient(jnp.where(sums.others < 1e-9, 40, jnp.zeros_like(m)))
    return _behind(axes, logits, sums.number, m, low) * jnp.exp(low - m) + sums.ahead * sums.others


@partial(jax.jit, static_argnums=0)
def behind_in_kept(
    axes: Axes, kept: Float[Array, "*batch classes"], sums: RowSums
) -> Float[Array, "*batch 1"]:
    """The same of what the exponentials are made of, held fixed."""
    on_cpu, elsewhere = partial(_behind_in_kept_on_cpu, axes), partial(behind_in_all, axes)
    return by_processor(on_cpu, elsewhere, *jax.lax.stop_gradient((kept, sums)))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _behind(axes, z, index, m, low):
    """Σ_{k≠i} exp(z_k − low) (m − z_k)."""
    ways = (partial(way, axes) for way in (_behind_on_cpu, _behind_elsewhere))
    return by_processor(*ways, z, index, m, low)


@_behind.defjvp
def _behind_jvp(axes, primals, tangents):
    # The maximum is held fixed.
    (z, index, m, low), (d_logits, *_) = primals, tangents
    wide = rounded(z.astype(m.dtype))
    slope = jnp.exp(wide - low) * (bounded(m - wide) - 1)
    d_behind = sum_over_classes(jnp.where(is_class(z, index), 0, slope * d_logits.astype(m.dtype)), axes)
    return _behind(axes, *primals), d_behind


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def targets_behind(
    axes: Axes,
    logits: Float[Array, "*batch classes"],
    index: Integer[Array, "*batch 1"],
    maximum: Float[Array, "*batch 1"],
    targets: Float[Array, "... classes"],
) -> Float[Array, "*batch 1"]:
    """Σ_{k≠i} t_k (m − z_k) of each row; 0 for a target of 0 and a logit of −inf.

    i = `index` is a class whose logit is m, or no class.
    """
    ways = _targets_behind_on_cpu, _targets_behind_elsewhere
    return total(by_processor(*ways, logits, index, maximum, targets), axes)


@targets_behind.defjvp
def _targets_behind_jvp(axes, primals, tangents):
    # The maximum is held fixed.
    (z, index, m, t), (d_z, _, _, d_t) = primals, tangents
    slope = d_t * _distance_unless_0(z, m, t) - t * d_z
    d_behind = sum_over_classes(jnp.where(is_class(z, index), 0, slope), axes)
    return targets_behind(axes, *primals), d_behind


@partial(jax.jit, static_argnums=0)
def sum_of_all_but(
    axes: Axes, values: Float[Array, "*batch classes"], index: Integer[Array, "*batch 1"]
) -> Float[Array, "*batch 1"]:
    """The sum over each row without the value at `index`."""

    def on_cpu(values, index):
        def others(values, first, index, own):
            _, is_other = _is_other(values, index - first, own)
            return values * is_other

        terms = lambda values, *_: values  # noqa: E731
        return _sum_without(terms, others, values, index, pick(values, index))

    def elsewhere(values, index):
        return jnp.sum(jnp.where(is_class(values, index), 0, values), axis=-1, keepdims=True)

    return total(by_processor(on_cpu, elsewhere, values, index), axes)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def centred(
    axes: Axes,
    weights: Float[Array, "*batch classes"],
    values: Float[Array, "*batch classes"],
    index: Integer[Array, "*batch 1"],
) -> Float[Array, "*batch classes"]:
    """v_k − v_i − Σ_j w_j (v_j − v_i) of each class k, with i = `index`: v_k less its mean by weights."""

    def on_cpu(w, v, own):
        def terms(w, _, v, own):
            return w * (_settled(v, own) - own)

        # Through a selection: what follows in one pass with the sum would be stored beside the weights.
        # And behind a barrier, or the difference would be stored that both take.
        return rounded(_reduce_row(jnp.sum, terms, w, v, own)), _barrier(own)

    def elsewhere(w, v, own):
        return jnp.sum(w * (rounded(v) - own), axis=-1, keepdims=True), own

    own = rounded(pick(values, index, axes))
    mean, own = by_processor(on_cpu, elsewhere, weights, values, own)
    return (rounded(values) - own) - total(mean, axes)


@centred.defjvp
def _centred_jvp(axes, primals, tangents):
    (w, v, index), (d_w, d_v, _) = primals, tangents
    d_difference = differences(axes, d_v, index)
    slope = d_w * differences(axes, v, index) + w * d_difference
    return centred(axes, *primals), d_difference - sum_over_classes(slope, axes)


def differences(
    axes: Axes, values: Float[Array, "*batch classes"], index: Integer[Array, "*batch 1"]
) -> Float[Array, "*batch classes"]:
    """v_k − v_i of each class k: 0 for i = `index`, in derivatives too."""
    return jnp.where(is_class(values, index), 0, values - pick(values, index, axes))


def pick(
    values: Float[Array, "*batch classes"], index: Integer[Array, "*batch 1"], axes: Axes = ()
) -> Float[Array, "*batch 1"]:
    """The value of each row at `index`."""
    if is_sharded(values):
        # A gather along a sharded axis is refused; a sum over it is not.
        return jnp.sum(jnp.where(is_class(values, index), values, 0), axis=-1, keepdims=True)
    picked = jnp.take_along_axis(values, index, axis=-1, mode="clip")
    return from_its_device(picked, index, values, axes)


# Accelerators: one pass over the logits. A reduction carries the largest of the others, their sum
# measured from it, and the class's own logit; or all that of the winner, and its number. Nothing of the
# logits' size is stored, and no exponential of the others underflows however far the class is ahead. The
# part with the smaller maximum is rescaled when two are joined. Compiled for TPU v5e it takes half of the
# cycles of a maximum and a sum.


# Long rows. Of a few of them the compiler for TPUs makes a program that takes twenty to a thousand
# times as long: of 512 whole rows of 151,936 classes on v5e, and of 128,256 on v5p. So a TPU goes
# through them slice by slice. The compiler for GPUs cuts a row into parts of 256 classes, eight for
# a thread, and joins the threads in five steps more. Measured on an H100 the sums took 1.17 to 1.28
# of the time of parts of 32 kB, and value and gradient 1.06 to 1.12. A TPU would copy what is cut
# so, and a GPU read the slices once more.

MOST_BYTES = 2**15  # of a row that is reduced at once
MOST_AT_ONCE = 2**16  # classes of a slice


def _whole(z):
    return [(0, z)]


def _slices(z):
    """The first class of each slice, and the slice."""
    return [(i, z[..., i : i + MOST_AT_ONCE]) for i in range(0, z.shape[-1], MOST_AT_ONCE)]


def _reduced(terms, join):
    """The terms of each row joined to one, in whatever order the device likes; the first are maxima."""
    joined = jax.lax.reduce(terms, _start(terms), join, (terms[0].ndim - 1,))
    return tuple(jnp.expand_dims(each, -1) for each in joined)


def _reduced_in_parts(length, terms, join):
    """The same, part by part."""
    classes = terms[0].shape[-1]
    fewest = -(-classes // length)
    count = next((n for n in range(fewest, 2 * fewest) if classes % n == 0), fewest)
    spare = -classes % count

    def cut(term, start):
        no_padding = [(0, 0, 0)] * (term.ndim - 1)
        padded = jax.lax.pad(term, start, [*no_padding, (0, spare, 0)])
        return _in_parts(padded, padded.shape[-1] // count)

    parts = _reduced(tuple(map(cut, terms, _start(terms))), join)
    return _reduced(tuple(part[..., 0] for part in parts), join)


def _start(terms):
    """What changes nothing when it is joined."""
    return jnp.asarray(-jnp.inf, terms[0].dtype), *(jnp.zeros((), term.dtype) for term in terms[1:])


def _sums_elsewhere(axes, cut, reduced, z, index):
    def of_part(start, z):
        number, dtype = index - start, arithmetic_dtype(z.dtype)
        is_own, wide = is_class(z, number), jax.lax.stop_gradient(z).astype(dtype)
        terms = (
            jnp.where(is_own, -jnp.inf, wide),
            jnp.where(is_own, 0, jnp.ones((), dtype)),
            jnp.where(is_own, wide, 0),
        )
        return reduced(terms, _joined)

    of_others, others, own = reduce(_joined, (of_part(*part) for part in cut(z)))
    own = total(own, axes)
    m = jnp.maximum(largest(of_others, axes), own)
    m = jnp.where(m == -jnp.inf, 0, m)
    # By its root twice: the product may be representable where the exponential is not.
    root = jnp.exp((of_others - m) / 2)
    return m, own - m, total(others * root * root, axes)


def _joined(a, b):
    """Two parts of a row in one: the larger maximum, sums measured from it, own logits."""
    (m_a, sum_a, own_a), (m_b, sum_b, own_b) = a, b
    m = jnp.maximum(m_a, m_b)
    # Selected where they are equal, as −inf − (−inf) is NaN.
    rescale = jnp.exp(jnp.where(m_a == m_b, 0, jnp.minimum(m_a, m_b) - m))
    is_first = m_a >= m_b
    larger, smaller = jnp.where(is_first, sum_a, sum_b), jnp.where(is_first, sum_b, sum_a)
    return m, larger + smaller * rescale, own_a + own_b


def _winner_sums_elsewhere(axes, cut, reduced, z):
    def of_part(start, z):
        wide = jax.lax.stop_gradient(z).astype(arithmetic_dtype(z.dtype))
        m, rest, number = reduced((wide, jnp.zeros_like(wide), class_numbers(z)), _won)
        return number + start + first_class(z, axes), m, rest / UNIT

    parts = [of_part(*part) for part in cut(z)]
    own = largest(reduce(jnp.maximum, (m_part for _, m_part, _ in parts)), axes)
    last = class_count(z, axes) - 1
    numbers = (jnp.where(m_part == own, number, last) for number, m_part, _ in parts)
    winner = smallest(reduce(jnp.minimum, numbers), axes)
    m = jnp.where(own == -jnp.inf, 0, own)
    others = 0
    for number, m_part, rest in parts:
        root = jnp.exp((m_part - m) / 2)
        others += root * (root * (rest + jnp.where(number == winner, 0, 1)))
    return winner - first_class(z, axes), m, own - m, total(others, axes)


def _won(a, b):
    """Two parts of a row in one: the larger maximum, the sum of all others, the winner's number."""
    (m_a, rest_a, i_a), (m_b, rest_b, i_b) = a, b
    m, low = jnp.maximum(m_a, m_b), jnp.minimum(m_a, m_b)
    is_first = (m_a > m_b) | ((m_a == m_b) & (i_a < i_b))
    of_winner, of_loser = jnp.where(is_first, rest_a, rest_b), jnp.where(is_first, rest_b, rest_a)
    root = jnp.where(low == -jnp.inf, 0, jnp.exp((low - m) / 2))
    return m, of_winner + (UNIT + of_loser) * root * root, jnp.where(is_first, i_a, i_b)


UNIT = 2.0**60  # So much is an exponential of 1, far from the smallest numbers and the largest.


def _kept_elsewhere(axes, cut, reduced, z, index):
    return *_sums_elsewhere(axes, cut, reduced, z, index), z


def _shares_elsewhere(axes, z):
    sums = sums_without_winner(axes, z)
    return _scaled_elsewhere(z, sums.maximum, 1 / sums.total), sums.number


def _scaled_elsewhere(kept, maximum, factor):
    return factor * jnp.exp(rounded(kept.astype(maximum.dtype)) - maximum)


def _ahead_elsewhere(values, own, index):
    values = rounded(values)
    is_ahead = (values > own) | ((values == own) & (class_numbers(values) < index))
    return jnp.sum(is_ahead, axis=-1, keepdims=True, dtype=jnp.int32)


def _behind_elsewhere(axes, z, index, m, low):
    z = rounded(z.astype(m.dtype))
    return sum_over_classes(jnp.where(is_class(z, index), 0, jnp.exp(z - low) * bounded(m - z)), axes)


def _targets_behind_elsewhere(z, index, m, t):
    behind = jnp.where(is_class(z, index), 0, t * _distance_unless_0(z, m, t))
    return jnp.sum(behind, axis=-1, keepdims=True)


def _distance_unless_0(z, m, t):
    distance = m - rounded(z)
    return jnp.where((t == 0) & jnp.isposinf(distance), 0, distance)


def _winner_elsewhere(axes, values):
    number = jnp.argmax(values, axis=-1, keepdims=True).astype(jnp.int32)
    return _of_all_devices(axes, values, number, jnp.max(values, axis=-1, keepdims=True))[0]


def _of_all_devices(axes, values, number, of_device):
    """The first class with the largest value of all devices, and the value, from each one's own."""
    m = largest(of_device, axes)
    number += first_class(values, axes)
    if not axes:
        return number, m
    return smallest(jnp.where(of_device == m, number, class_count(values, axes) - 1), axes), m


# CPUs: a pass each for the maximum, the sum, and the winner. XLA runs a reduction, and what it reduces,
# as one pass over the logits that stores nothing, as long as everything between is arithmetic on rows and
# columns. A comparison or a select there would store one more array of the logits' size, and take three
# to five times as long. So classes are told apart by arithmetic on their numbers; or, in long rows, by
# the part they are in, of which alone a select stores little. There the winner takes no pass of its own.
# Only a rank is counted by comparisons, in a loop of XLA's own that adds slices of them.
# For the gradient the exponentials are stored where it will stand: they are formed, summed and scaled in
# its buffer, as in optax's loss, and one number in a row is set to 0 before the sum. To form them twice
# and store nothing takes 1.2 to 1.9 times as long.


FEW = 10  # classes
MOST_COLUMNS = 24  # classes that a loop over the rows goes through one by one
MOST_FLOATS = 2**24  # classes that float32 can number. More are numbered by integers, more slowly.


def _sums_on_cpu(axes, z, index, of_winner=None):
    """The sums without the class at `index`: the winner, whose logit and maximum are told, or any."""
    if 0 < known_size(z.shape[-1]) <= MOST_COLUMNS and is_local(z):
        return _sums_of_columns(axes, z, index, of_winner)
    own, m = of_winner or _references(axes, z, index)

    def terms(z, _, low):
        if of_winner:
            return _exponentials(z, low)
        (low,) = _for_itself(low)
        return jnp.exp(_settled(z, low) - low)

    def others(z, first, index, low):
        # The smaller of a distance and e_k: 0 for the class at index, e_k for all others.
        low, before = _places_before(z, index - first, low, 2.0**100)
        return jnp.minimum(jnp.abs(before), terms(z, first, low))

    # Where the class at index leads, the others' sum may be small. Measured from so far below, none that
    # counts beside 10⁻³⁸ underflows, and differences are rounded to 8 eps at most. Squares lose
    # less, and take 1.15 of the time of a cost alone; of a log-softmax 1.07 to 1.14 at 4,096 classes.
    low = m if of_winner else m - jnp.where(own == m, 31, 0)
    unit = 1 / UNIT if of_winner else jnp.exp(low - m)
    sums = _sum_without(terms, others, z, index, low)
    # In place of NaN, XLA's passes may take the distance.
    return m, own - m, unit * total(jnp.where(sums < 2.0**90, sums, jnp.nan), axes)


def _sums_of_columns(axes, z, index, of_winner):
    """The same of few classes, one by one, so that one loop over the rows makes all.

    A cost alone takes 0.5 to 0.9 of the time of a pass for each sum.
    """
    wide = arithmetic_dtype(z.dtype)
    columns = [rounded(z[..., k : k + 1].astype(wide)) for k in range(z.shape[-1])]
    if of_winner:
        own, m = of_winner
    else:
        own = total(sum(jnp.where(index == k, column, 0) for k, column in enumerate(columns)), axes)
        m = largest(jax.lax.stop_gradient(reduce(jnp.maximum, columns)), axes)
        m = jnp.where(m == -jnp.inf, 0, m)
    others = (jnp.where(index == k, 0, _exponentials(column, m)) for k, column in enumerate(columns))
    # Or XLA would store the exponentials class by class, and add them for each use.
    return m, own - m, total(_once(sum(others)), axes) / UNIT


def _winner_sums_on_cpu(axes, z):
    number, m = _first_largest(axes, jax.lax.stop_gradient(z))
    number -= first_class(z, axes)
    # Its value is the maximum, and its derivative the logit's.
    own = _logit_at(axes, z, number)
    return number, *_sums_on_cpu(axes, z, number, (own, jnp.where(m == -jnp.inf, 0, m)))


def _kept_on_cpu(in_place, axes, z, index):
    if in_place is None or z.dtype != arithmetic_dtype(z.dtype):
        # Nobody uses the exponentials, or narrow logits are narrower than they are.
        return *_sums_on_cpu(axes, z, index), z
    own, m = _references(axes, z, index, in_place)
    return m, own - m, *_stored(in_place, axes, z, index, m)


def _kept_again_on_cpu(axes, z, index, m, others, read):
    if z.dtype != arithmetic_dtype(z.dtype):
        return others, z
    # Of what was read as well: so it is read before the exponentials take the logits' place.
    return _stored(True, axes, z, index, jnp.where(read == read, m, rounded(m)))


def _stored(in_place, axes, z, index, m):
    """The sum of the exponentials but the one at `index`, and the exponentials."""
    e = _set_zero(in_place, _exponentials(z, m), index)
    return total(_reduce_row(jnp.sum, lambda e, _: e, e), axes) / UNIT, e


def _shares_on_cpu(axes, in_place, z):
    def exponentials(z, _, m):
        (m,) = _for_itself(m)
        return jnp.exp(_settled(z, m) - m)

    z = _apart(z)
    m = _maximum(axes, z)
    if in_place:
        e = jnp.exp(_settled(z, m) - m)
        a = taken_once(e / total(_reduce_row(jnp.sum, lambda e, _: e, e), axes))
    else:
        a = _scaled_elsewhere(z, m, 1 / total(_reduce_row(jnp.sum, exponentials, z, m), axes))
    return a, _winner_on_cpu(axes, jax.lax.stop_gradient(a)) - first_class(a, axes)


def _ahead_on_cpu(values, own, index):
    classes = known_size(values.shape[-1])
    if not MOST_COLUMNS < classes <= MOST_FLOATS or not is_local(values):
        return _ahead_elsewhere(values, own, index)

    # Numbers are compared and not subtracted, so nothing is merged with a product that they are made by.
    def ahead(values, places, own, before):
        return ((values > own) | ((values == own) & (places < before))).astype(jnp.int32)

    def counted(values, *columns):
        return jnp.sum(_slices_added(ahead, values, 16, *columns), axis=-1)

    # Of parts with more slices, the loop would store the values of some rows before it reads them.
    length = 128
    count = classes // length
    last = count * length
    # How many classes there are from a part's first to the one at index.
    before = index - across(jnp.arange(0, classes, length, dtype=index.dtype), index.ndim)
    parts = _in_parts(values[..., :last], length)
    counts = counted(parts, own[..., None], before[..., :count, None])
    if last < classes:
        of_rest = counted(values[..., last:], own, before[..., count:])
        counts = jnp.concatenate((counts, of_rest[..., None]), axis=-1)
    # The library makes this sum at once. A loop would wait until the rank is wanted, and read the logits
    # until then, so that nothing could take their place.
    return _sum_by_library(counts.astype(jnp.float32)).astype(jnp.int32)


def _behind_on_cpu(axes, z, index, m, low):
    del index  # The winner's own distance is 0.

    def others(z, _, m, low):
        low, most = _for_itself(low, jnp.finfo(m.dtype).max / 2)
        z = _settled(z, m)
        return jnp.exp(z - low) * jnp.minimum(m - z, most)

    return total(_reduce_row(jnp.sum, others, z, m, low), axes)


def _behind_in_kept_on_cpu(axes, kept, sums):
    if kept.dtype != sums.maximum.dtype:
        return behind_in_all(axes, kept, sums)

    def others(e, _, unit):
        # The class that the sums went without has 0 there, and so has what is too small to count.
        return e * jnp.log(jnp.maximum(e * unit, jnp.finfo(e.dtype).tiny))

    # ln e_k, so that near classes keep their digits; or, where all others are far, ln (UNIT e_k), so that
    # none of them is too small.
    unit = jnp.where(sums.others < 1e-9, 1, 1 / UNIT).astype(kept.dtype)
    classes = known_size(kept.shape[-1])
    if classes and is_local(kept):
        # Of 16 slices. JAX 0.12 forms the gradient in place after them, and not before: a block less.
        behind = _sum_by_library(_slices_added(others, kept, -(-classes // 256) * 16, unit))
    else:
        behind = _reduce_row(jnp.sum, others, kept, unit)
    behind = -total(behind, axes) / UNIT
    return behind + jnp.log(UNIT * unit) * sums.others


def _targets_behind_on_cpu(z, index, m, t):
    if known_size(z.shape[-1]) <= FEW:
        return _targets_behind_elsewhere(z, index, m, t)

    # The distance of the class at index is 0.
    def others(z, _, t, m):
        m, much = _for_itself(m, jnp.finfo(m.dtype).max)
        # 0 · ∞ is NaN. So the smaller of the distance and ∞, or 0 where t is 0.
        return t * jnp.minimum(m - _settled(z, m), jnp.abs(t) * much * much)

    return _reduce_row(jnp.sum, others, z, t, m)


def _reduce_row(reduce, terms, z, *columns):
    """A reduction over each row of `terms(z, first, *columns)`; long rows in parts.

    `first` is the number of a part's first class. Two reductions one after the other round less, and take
    a fifth of the time of one at 131,072 classes.
    """
    length = _part_length(z)
    if length:
        return reduce(_of_parts(reduce, terms, length, z, *columns), axis=-1, keepdims=True)
    row, *columns = (z, *columns) if z.dtype.itemsize >= 4 else _barrier((z, *columns))
    reduced = reduce(terms(row, 0, *columns), axis=-1, keepdims=True)
    # Or XLA would make one reduction of this and a later one over all rows, on JAX 0.12 in 2 to 4
    # times the time at 1,000 classes and more.
    return reduced if known_size(z.shape[-1]) <= FEW else _barrier(reduced)


def _sum_without(terms, others, z, index, *columns):
    """The sum over each row of `terms(z, first, *columns)` without the one at `index`.

    `others(z, first, index, *columns)` are the same terms, but 0 there. Of a long row, that class's part
    is gone through twice instead: `terms` alone take 0.6 to 0.75 of the time.
    """
    # Of narrow logits what is held of the parts would be no longer small beside them.
    length = _short_length(z) if z.dtype.itemsize >= 4 else 0
    if not length:
        return _reduce_row(jnp.sum, others, z, index, *columns)
    number = index // length
    of_parts = _of_parts(jnp.sum, terms, length, z, *columns)
    own = _part(z, length, number)
    is_own = is_class(own, index - length * number)
    of_own = jnp.sum(jnp.where(is_own, 0, terms(own, 0, *columns)), axis=-1, keepdims=True)
    return jnp.sum(jnp.where(is_class(of_parts, number), of_own, of_parts), axis=-1, keepdims=True)


def _slices_added(terms, z, width, *columns):
    """`terms(z, places, *columns)` of slices of that many classes, added to one by a loop of XLA's own.

    `places` number the classes of z. Columns hold one number for all of them.

    XLA's library for reductions goes through a tile once for each operation. An XLA loop does so once for
    all, but would add floats of a row one by one. So it adds slices, and the library the rest: of
    logarithms in 0.85 of the library's time alone, of a rank's comparisons in 0.3 to 0.7.
    """
    # Of their own, or what two passes have in common would be stored before both.
    columns = _barrier(columns)

    def of_slice(start):
        part = z[..., start : start + width]
        places = jnp.arange(start, start + part.shape[-1], dtype=jnp.int32)
        own = terms(part, across(places, part.ndim), *columns)
        return jnp.pad(own, [(0, 0)] * (own.ndim - 1) + [(0, width - own.shape[-1])])

    return reduce(jnp.add, map(of_slice, range(0, z.shape[-1], width)))


def _sum_by_library(added):
    # Through a selection, which the library does not take: so it only adds what is left.
    return jnp.sum(rounded(added), axis=-1, keepdims=True)


def _of_parts(reduce, terms, length, z, *columns):
    """The reduction over each part of each row."""
    classes = z.shape[-1]
    # Behind a barrier, or the compiler would form the terms first.
    part, *columns = _barrier(
        [
            _in_parts(each, length) if each.shape[-1] == classes else each[..., None]
            for each in (z, *columns)
        ]
    )
    first = across(length * jnp.arange(classes // length, dtype=jnp.int32)[:, None], part.ndim)
    # Through a selection, or XLA's library would make one pass of this reduction and the next, which at
    # some sizes, of 2²⁵ logits and more, stores all terms: ten times the time.
    return rounded(reduce(terms(part, first, *columns), axis=-1))


def _in_parts(z, length):
    """The rows cut in parts. There may be no row, of which the number of parts could not be told."""
    return z.reshape(*z.shape[:-1], z.shape[-1] // length, length)


def _part(z, length, number):
    """The part of that number of each row, or the nearest."""
    parts = _barrier(_in_parts(z, length))
    return jnp.take_along_axis(parts, number[..., None], axis=-2, mode="clip")[..., 0, :]


def _short_length(z):
    """Of parts of which one is gone through twice; 0 for one part, and where a gather is dear."""
    return _part_length(z, 256) if is_local(z) else 0


def _part_length(z, best=4096):
    """Of the parts of a long row, the nearest to the best; 0 for one part."""
    classes = known_size(z.shape[-1])
    lengths = range(64, 4097) if classes > 4096 and not is_sharded(z) else ()
    fitting = (length for length in lengths if classes % length == 0)
    # Parts must not cross the boundary between two devices' classes, whose number is mostly a power of
    # two, such as 16.
    return max(fitting, key=lambda n: (math.gcd(classes // n, 16), -abs(n - best)), default=0)


_barrier = jax.lax.optimization_barrier


def _set_zero(in_place, e, index):
    """The exponentials in their own buffer, but 0 for the class of each row at `index`."""
    if in_place or is_sharded(e) or known_size(e.shape[-1]) < 10 * FEW:
        zeroed = jnp.where(is_class(e, index), 0, e)
        return taken_once(zeroed) if in_place else zeroed

    # XLA gives what is scattered into a buffer of its own. With many classes, the cost takes 0.9 so.
    def of_row(e, index):
        return e.at[jnp.where(index < 0, e.size, index)].set(0, mode="drop")

    # Row by row: so no device needs another's numbers where an automatic mesh spreads classes.
    for _ in range(e.ndim - 1):
        of_row = jax.vmap(of_row)
    return of_row(e, index[..., 0])


def _scaled_on_cpu(kept, maximum, factor):
    if kept.dtype == maximum.dtype:
        # Not factor / UNIT, which may be 0. A constant would be moved there by the compiler.
        return factor * (jnp.where(maximum == maximum, 1 / UNIT, maximum) * kept)
    return factor * jnp.exp(_settled(kept, maximum) - maximum)


def _references(axes, z, index, in_place=False):
    """The logit at `index`, and the maximum."""
    own = _logit_at(axes, z, index)
    m = _maximum(axes, z)
    if in_place:
        # Of the logit as well: so it is read before the exponentials take the logits' place.
        m = jnp.maximum(m, jax.lax.stop_gradient(own))
    return own, jnp.where(m == -jnp.inf, 0, m)


def _logit_at(axes, z, index):
    return rounded(pick(_apart(z), index, axes).astype(arithmetic_dtype(z.dtype)))


def _maximum(axes, z):
    """The maximum, held fixed. It may pass over NaN in long rows, or give −inf. The sums do not."""
    m = _reduce_row(jnp.max, lambda z, _: z, jax.lax.stop_gradient(z))
    return largest(m.astype(arithmetic_dtype(z.dtype)), axes)


def _exponentials(z, m):
    """e_k in units of 1 / UNIT, as squares: no root that counts beside 10⁻³⁸ underflows."""
    # A maximum of their own, or the differences would be stored for whoever else takes them.
    is_short = known_size(z.shape[-1]) <= FEW
    half_m, half, unit = (m / 2, 0.5, UNIT) if is_short else _for_itself(m / 2, 0.5, UNIT)
    # Halves are exact, and a product and a difference one operation: 0.99 of a cost's time.
    root = jnp.exp(half * _settled(z, m) - half_m)
    return root * (unit * root)


def _is_other(values, index, column):
    """The column for itself, and 0 for the class at `index`, 1 for all others."""
    column, before = _places_before(values, index, column)
    column, one = _for_itself(column, 1.0)
    return column, jnp.minimum(jnp.abs(before), one)


def _places_before(values, index, column, unit=1.0):
    """The column for itself, and how many places before `index` each class is, times the unit."""
    numbers = jnp.arange(values.shape[-1], dtype=index.dtype)
    if known_size(values.shape[-1]) > MOST_FLOATS:
        column, index, numbers = _barrier((column, index, numbers))
        return column, unit * (index - across(numbers, index.ndim)).astype(column.dtype)
    column, numbers = _for_itself(column, unit * numbers.astype(column.dtype))
    # Where labels are constants, XLA's library would be wrong by a column of one constant.
    index = jnp.where(column == column, unit * index.astype(column.dtype), column)
    return column, index - across(numbers, index.ndim)


def _for_itself(data, *small):
    """What a pass goes through, and numbers, or a row of them, that no other pass shares.

    What two passes of a program have in common XLA would store before both, as large as the logits.
    """
    small = (jnp.asarray(each, arithmetic_dtype(data.dtype)) for each in small)
    return _barrier((data, *small))


def _apart(z):
    """Narrow logits as if nothing else used them: what is widened for two uses would be stored."""
    return z if z.dtype.itemsize >= 4 else jax.lax.optimization_barrier(z)


def _settled(z, m):
    """The logits in m's dtype, rounded where XLA makes loops of its own: its library merges nothing.

    Copies are stored in such loops, so large arrays are spared what they do not need.
    """
    z = _apart(z).astype(m.dtype)
    return rounded(z) if known_size(z.size) < 2**12 or z.dtype == jnp.float64 else z


def _winner_on_cpu(axes, values):
    return _first_largest(axes, values)[0]


def _first_largest(axes, values):
    """The number of the first class with the largest value, and the value."""
    dtype, count = arithmetic_dtype(values.dtype), class_count(values, axes)
    length = _short_length(values)
    if length:
        of_parts = _of_parts(jnp.max, lambda values, _: values, length, values)
        part = jnp.argmax(of_parts, axis=-1, keepdims=True)
        number = length * part + jnp.argmax(_part(values, length, part), axis=-1, keepdims=True)
        m = jnp.max(of_parts, axis=-1, keepdims=True).astype(dtype)
        return _of_all_devices(axes, values, number.astype(jnp.int32), m)
    if known_size(count) > MOST_FLOATS:
        return _winner_elsewhere(axes, values), _maximum(axes, values)
    # In units of which all classes together make 1, less than the smallest difference times `much`.
    numbers = jnp.arange(values.shape[-1], dtype=dtype)
    if axes:
        numbers += jnp.asarray(first_class(values, axes), dtype)
    much = 2.0 ** (jnp.finfo(dtype).maxexp - 1)
    # The maximum and what it is subtracted from must be the same numbers, whatever computes them.
    values, numbers, much = _for_itself(values, numbers / MOST_FLOATS, much)
    m = largest(jnp.max(values, axis=-1, keepdims=True).astype(dtype), axes)
    behind = (m - _settled(values, m)) * much
    first = smallest(jnp.min(across(numbers, m.ndim) + behind, axis=-1, keepdims=True), axes)
    return jnp.minimum(MOST_FLOATS * first, count - 1).astype(jnp.int32), m
