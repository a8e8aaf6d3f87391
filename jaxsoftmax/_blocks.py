"""How a processor is fed with the head's products: rows in blocks, and what is kept of a block.

The logits z = x w + b of a block of rows are formed, used and dropped. Of C, a function of the logits,
and D = ∂C/∂z come the gradients ∂C/∂x = D wᵀ, ∂C/∂w = xᵀ D, ∂C/∂b = Σ_n D. CPUs and accelerators want
other blocks and other orders of the same products; both ways stand here side by side.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._checks import arithmetic_dtype, known_size
from ._mesh import spread, varying
from ._rows import by_processor, taken_once

ONE_BLOCK = 2**20  # So few logits are one block.
FIRST = 512  # Rows that begin a sum over several parts on an accelerator.
CHUNK = 2**19  # The most numbers of the weights' gradient that one product on a CPU adds to.


class Affine(NamedTuple):
    """A layer's weights and bias: z = x w + b."""

    weights: Float[Array, "features classes"]
    bias: Float[Array, " classes"] | None


class Given(NamedTuple):
    """What a step is given beside the logits: what has a gradient, and what has none."""

    free: Any
    fixed: Any


# What is made of a block's logits: from (z, shared, rows), results for each row and others without a
# gradient. The shared arrays are the same for all rows, of the others each row has its own part.
Step = Callable[[Array, Given, Given], tuple[Any, Any]]


def fits_one_block(rows: Any, classes: Any, block_size: int | None) -> bool:
    """Whether all rows are one block, of the size given or by themselves."""
    rows = known_size(rows)
    return rows * classes <= ONE_BLOCK if block_size is None else rows <= block_size


def in_one_block(
    step: Step, x: Float[Array, "rows features"], layer: Affine, shared: Given, rows: Given
) -> tuple[Any, Any]:
    """`step` on all logits at once, to be differentiated as it stands."""
    z = by_processor(_logits_on_cpu, logits_of, x, layer)
    return step(z, shared, rows)


def for_each_row(
    step: Step,
    block_size: int | None,
    share: float,
    follows: Literal["nothing", "gradient", "autodiff"],
    x: Float[Array, "rows features"],
    layer: Affine,
    shared: Given,
    rows: Given,
) -> tuple[Any, Any]:
    """What `step` gives for each row, block by block, each of which takes one product.

    What follows is nothing, a gradient by a rule, or autodiff of this as it stands, for which a block's
    logits are computed again rather than kept. On a CPU a block has the `share` told of the rows that it
    has for a cost of classes: fewer where `step` holds more arrays like a block's logits at once, or has
    no use for more.
    """

    def of_block(layer, shared, x, rows):
        return step(logits_of(x, layer), shared, rows)

    of_block = jax.checkpoint(of_block) if follows == "autodiff" else of_block
    # With a block apart, the compiler for TPU v5e keeps weights of up to 100 MB in fast memory: a value
    # alone takes 0.7 of the cycles. But it has two places for logits then, and D finds none in them.
    apart = "last" if follows == "nothing" else None

    def blocks(way, x, layer, shared, rows):
        size = block_size or way.rows_alone(known_size(x.shape[0]), layer.weights.shape[1], share)
        if way.is_first_apart:
            return _overlapping(partial(of_block, layer, shared), (x, rows), size)
        block = lambda _, __, own: (None, of_block(layer, shared, *own))  # noqa: E731
        return _in_turn(block, None, (x, rows), size, apart)[1]

    return by_processor(partial(blocks, CPU), partial(blocks, ACCELERATOR), x, layer, shared, rows)


class IsWhole(NamedTuple):
    """Whether this device's gradient is that of all devices, or a part of their sum."""

    by_features: bool
    by_weights: bool


def with_gradients(
    step: Step,
    block_size: int | None,
    share: float,
    is_whole: IsWhole,
    x: Float[Array, "rows features"],
    layer: Affine,
    shared: Given,
    rows: Given,
    cotangent: Any,
) -> tuple[tuple[Any, Any], tuple[Array, Affine, Given, Given]]:
    """What `step` gives for each row, and a cotangent of its results as one of all before it.

    `share` is as for `for_each_row`. Gradients are in float32 or wider, but whole ones by bfloat16 are
    rounded to it, once all is added: then they are never held in float32. What is float16 would lose its
    range.
    """
    ways = (partial(_gradients, way, step, block_size, share, is_whole) for way in (CPU, ACCELERATOR))
    return by_processor(*ways, x, layer, shared, rows, cotangent)


def _gradient_dtype(x, primal, is_whole):
    """The dtype of the gradient by features or weights."""
    wide = arithmetic_dtype(x.dtype)
    keeps_range = jnp.finfo(primal.dtype).maxexp >= jnp.finfo(jnp.float32).maxexp
    return primal.dtype if is_whole and keeps_range and not _has_units(x.dtype) else wide


def _product(a, b, dtype=None):
    """Product of operands as narrow as they are, accumulated in float32 or wider."""
    return jnp.matmul(a, b, preferred_element_type=dtype or arithmetic_dtype(a.dtype))


def logits_of(x: Float[Array, "rows features"], layer: Affine) -> Float[Array, "rows classes"]:
    """The logits of some rows."""
    z = _product(x, layer.weights.astype(x.dtype))
    return z if layer.bias is None else taken_once(z + layer.bias.astype(z.dtype)[None])


def _pulled_back(step, z, shared, rows, cotangent):
    """What `step` gives, D, and the gradients by what is shared and by what belongs to rows."""

    def of_free(z, of_all, of_rows):
        results, others = step(z, shared._replace(free=of_all), rows._replace(free=of_rows))
        wanted = [result for c, result in zip(cotangent, results, strict=True) if c is not None]
        return wanted, (results, others)

    wanted, pull_back, results = jax.vjp(of_free, z, shared.free, rows.free, has_aux=True)
    cotangent = jax.tree.leaves(cotangent)
    return results, *pull_back(jax.tree.map(lambda c, each: spread(c, varying(each)), cotangent, wanted))


def _narrowed(d_z, dtype):
    """The logits' gradient in the features' dtype, in units that fill its range: 1 but for float16."""
    if not _has_units(dtype):
        return d_z.astype(dtype), 1
    # A probability of 10⁻⁵ has few digits in float16, and a scaled loss may have no place in it.
    _, exponent = jnp.frexp(jax.lax.stop_gradient(jnp.max(jnp.abs(d_z))))
    unit = jnp.ldexp(jnp.ones((), d_z.dtype), jnp.maximum(exponent, -100) - 15)
    return (d_z / unit).astype(dtype), unit


def _has_units(dtype):
    return jnp.finfo(dtype).maxexp < jnp.finfo(jnp.float32).maxexp


def _in_turn(step, carry, rows, size, apart, done=0):
    """`step(carry, start, block)` for every block of rows: what it carries, and gives for each row.

    A loop, and the first block or the last, which may be shorter, apart; if told neither, a shorter one
    at the end. Rows that are done are left out.
    """
    count = jax.tree.leaves(rows)[0].shape[0] - done
    if known_size(count) <= size:
        return step(carry, done, jax.tree.map(lambda a: a[done:], rows))
    looped = (count - (apart is not None)) // size
    others = count - looped * size
    # No loop for one round: XLA on the CPU cannot run narrow products from one that it has unrolled.
    scan = partial(jax.lax.scan, xs=jnp.arange(looped), unroll=looped == 1)

    def block(carry, start, length):
        own = jax.tree.map(partial(_some_rows, apart == "first", done + start, length), rows)
        return step(carry, done + start, own)

    if apart == "first":
        # The results are carried, or the first block and the loop would be formed at the same time.
        def add(state, number):
            start = others + number * size
            carry, own = block(state[0], start, size)
            put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
            return (carry, jax.tree.map(put, state[1], own)), None

        carry, first = block(carry, 0, others)
        padded = jax.tree.map(
            lambda a: jnp.pad(a, [(0, count - others)] + [(0, 0)] * (a.ndim - 1)), first
        )
        return scan(add, (carry, padded))[0]
    carry, results = scan(lambda carry, number: block(carry, number * size, size), carry)
    results = jax.tree.map(lambda a: jax.lax.collapse(a, 0, 2), results)
    if not others:
        return carry, results
    carry, last = block(carry, looped * size, others)
    return carry, jax.tree.map(lambda many, one: jnp.concatenate([many, one]), results, last)


def _overlapping(step, rows, size):
    """`step` of every block of rows in one loop, some rows twice where blocks do not divide them.

    No block is apart: beside one of another loop, XLA on the CPU would store the constants of both.
    """
    count = jax.tree.leaves(rows)[0].shape[0]
    if known_size(count) <= size:
        return step(*rows)
    blocks = -(-count // size)
    size = -(-count // blocks)

    def block(_, start):
        return None, step(*jax.tree.map(partial(_some_rows, True, start, size), rows))

    starts = jnp.minimum(size * jnp.arange(blocks), count - size)
    return jax.tree.map(
        lambda a: jnp.concatenate([jax.lax.collapse(a, 0, 2)[: count - size], a[-1]]),
        jax.lax.scan(block, None, starts)[1],
    )


def _some_rows(is_on_cpu, start, count, array):
    if is_on_cpu and array.dtype == jnp.bfloat16:
        # XLA on the CPU cuts no bfloat16. It would widen all rows, once for all rounds of the loop.
        array, start = jax.lax.optimization_barrier((array, start))
    return jax.lax.dynamic_slice_in_dim(array, start, count)


class _Way(NamedTuple):
    """A processor's blocks and products."""

    rows: Callable[[int, int, float], int]  # In a block; of rows, classes and a share of them.
    rows_alone: Callable[[int, int, float], int]  # The same where no product follows the logits'.
    is_first_apart: bool  # Of the blocks, or the last.
    keeps: bool  # D of several blocks, which are a part then.
    sum_of_rows: Callable[[Array], Array]  # The gradient by the bias; of D
    by_features: Callable[..., Array]  # unit D wᵀ; of D, w, unit, dtype
    plus_by_weights: Callable[..., Array]  # total + unit xᵀ D; of total or None, x, D, unit, dtype


def _gradients(way, step, block_size, share, is_whole, x, layer, shared, rows, cotangent):
    (count, features), classes = x.shape, layer.weights.shape[1]
    few, part, size = _sizes(way, known_size(count), features, classes, x.dtype, block_size, share)
    if way.is_first_apart and block_size is None and size <= 2 and count % 2:
        # XLA on the CPU makes no product of one row, but forms its D twice: four arrays for one.
        more = jax.tree.map(
            lambda a: jnp.pad(a, [(0, 1)] + [(0, 0)] * (a.ndim - 1)), (x, rows, cotangent)
        )
        results, (d_x, *others, d_rows) = _gradients(
            way, step, block_size, share, is_whole, more[0], layer, shared, *more[1:]
        )
        results, d_x, d_rows = jax.tree.map(lambda a: a[:count], (results, d_x, d_rows))
        return results, (d_x, *others, d_rows)
    d_x_dtype = _gradient_dtype(x, x, is_whole.by_features)
    d_w_dtype = _gradient_dtype(x, layer.weights, is_whole.by_weights)
    has_one_part = known_size(count) <= part
    sum_dtype = d_w_dtype if has_one_part else arithmetic_dtype(x.dtype)
    bias = None if layer.bias is None else layer.bias.astype(arithmetic_dtype(x.dtype))
    layer = Affine(layer.weights.astype(x.dtype), bias)

    def of_part(carry, _, own):
        kept, total = carry
        # A barrier, or the slice would be taken again inside each product, which then runs half as fast.
        own = _apart(own)
        kept, unit, d_shared, results = _of_blocks(step, size, kept, layer, shared, *own)
        d_z = kept[: own[0].shape[0]]
        d_x = way.by_features(d_z, layer.weights, unit, d_x_dtype)
        d_w = way.plus_by_weights(total and total[0].weights, own[0], d_z, unit, sum_dtype)
        d_b = None if layer.bias is None else _scaled(unit, way.sum_of_rows(d_z))
        if total:
            d_b, d_shared = jax.tree.map(jnp.add, (total[0].bias, total[1]), (d_b, d_shared))
        return (kept if size < part else None, (Affine(d_w, d_b), d_shared)), (*results, d_x)

    # One buffer for all parts. It is not filled first: that would be a pass over it.
    kept = None if size >= part else spread(jax.lax.empty((part, classes), x.dtype), varying(x))
    carry, of_few, all_rows = (kept, None), None, (x, rows, cotangent)
    if few:
        # They begin the sum: zeros would be a pass over it, and a part's logits be held beside others.
        carry, of_few = of_part(carry, 0, jax.tree.map(lambda a: a[:few], all_rows))
    elif not (has_one_part or way.is_first_apart):
        # Behind a barrier, or the sum would begin with a selection between it and 0, no longer in place.
        carry = _apart((kept, (_zeros_like(spread(layer, varying(x))), _zeros_like(shared.free))))
    # On TPU v5e, the last in the loop takes 1.01 to 1.05 of the head's cycles.
    apart = "first" if way.is_first_apart else "last"
    carry, of_parts = _in_turn(of_part, carry, all_rows, part, apart, few)
    if of_few is not None:
        of_parts = jax.tree.map(lambda one, many: jnp.concatenate([one, many]), of_few, of_parts)
    results, d_rows, d_x = of_parts
    d_layer, d_shared = carry[1]
    d_w = d_layer.weights.astype(d_w_dtype)
    gradients = d_x, d_layer._replace(weights=d_w), Given(d_shared, None), Given(d_rows, None)
    return results, gradients


def _of_blocks(step, size, kept, layer, shared, x, rows, cotangent):
    """D of a part with its unit, the gradient by what is shared, and what each row has."""

    def of_block(x, rows, cotangent):
        z = logits_of(x, layer)
        results, d_z, d_shared, d_rows = _pulled_back(step, z, shared, rows, cotangent)
        return _narrowed(d_z, x.dtype), d_shared, (results, d_rows)

    if kept is None:
        (d_z, unit), d_shared, results = of_block(x, rows, cotangent)
        return d_z, unit, d_shared, results

    def block(carry, start, own):
        kept, total = carry
        # One block after the other: two at once would hold two blocks of logits.
        x, kept = jax.lax.optimization_barrier((own[0], kept))
        (d_z, _), d_shared, results = of_block(x, *own[1:])
        kept = jax.lax.dynamic_update_slice_in_dim(kept, d_z, start, axis=0)
        return (kept, jax.tree.map(jnp.add, total, d_shared)), results

    sums = kept, _zeros_like(shared.free)
    # On TPU v6e, the last in the loop takes 1.05 of the head's cycles.
    (kept, total), results = _in_turn(block, sums, (x, rows, cotangent), size, "last")
    return kept, 1, total, results


def _apart(tree):
    """Each array behind a barrier of its own: one for all would have them vary alike on a mesh."""
    return jax.tree.map(jax.lax.optimization_barrier, tree)


def _scaled(unit, array):
    # No factor, not even 1, may stand between a product and the sum that it is added to in place.
    return array if isinstance(unit, int) else (unit * array).astype(array.dtype)


def _zeros_like(tree):
    """Zeros to add gradients to, in float32 or wider."""

    def zeros(array):
        dtype = arithmetic_dtype(jnp.result_type(array))
        return spread(jnp.zeros(jnp.shape(array), dtype), varying(array))

    return jax.tree.map(zeros, tree)


def _precisely(a, b):
    """Product in full precision, which others are not everywhere."""
    dtype = arithmetic_dtype(b.dtype)
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=dtype)


# CPUs: blocks that stay near the caches, and the weights' gradient summed a chunk of columns at a time.


def _rows_on_cpu(rows, classes, share):
    """Rows in a block: enough to keep the products busy, few enough to keep the logits small.

    An eighth of many rows, but 4 MB of logits, or up to 480 rows in 20 MB: beyond, passes over a block
    meet slower caches, and from 32 MB on the allocator takes fresh pages at every call. An eighth took
    1.1 times the time at 2,048 x 64 x 32,000, 1.2 at 65,536 x 64 x 1,000.
    """
    many = max(ONE_BLOCK // classes, min(480, 5 * ONE_BLOCK // classes))
    most = max(64, min(-(-rows // 4), 128), min(-(-rows // 8), many))
    most = min(most, max(2, 2**24 // classes))
    if rows * classes <= ONE_BLOCK or rows <= 4:
        most = rows
    # Fewer logits than make a quarter of a block that is alone would only take more time.
    most = max(1, int(most * share), min(most, ONE_BLOCK // 4 // classes))
    # Products of many rows that are no multiple of 16 take longer.
    return most if most < 64 or most == rows else most - most % 16


def _by_features_on_cpu(d_z, weights, unit, dtype):
    # Weights first: faster on the CPU, as long as the compiler does not turn it round again.
    product = jax.lax.optimization_barrier(_product(weights, d_z.T)).T
    return _scaled(unit, product).astype(dtype)


def _plus_by_weights_on_cpu(total, x, d_z, unit, dtype):
    """Some columns at a time: at once takes a second array of the total's size."""
    classes = d_z.shape[1]
    width = max(1, CHUNK // max(1, x.shape[1]))
    if total is None or width >= classes:
        product = _scaled(unit, _product(x.T, d_z))
        return product.astype(dtype) if total is None else total + product

    def add(i, total):
        # The last columns overlap those before, to which their part has been added already.
        start = jnp.minimum(i * width, classes - width)
        part = _scaled(unit, _product(x.T, jax.lax.dynamic_slice_in_dim(d_z, start, width, axis=1)))
        so_far = jax.lax.dynamic_slice_in_dim(total, start, width, axis=1)
        part = jnp.where(start + jnp.arange(width) < i * width, so_far, so_far + part)
        return jax.lax.dynamic_update_slice_in_dim(total, part, start, axis=1)

    return jax.lax.fori_loop(0, -(-classes // width), add, total)


def _sums_few_rows(rows):
    """Whether a product with ones sums them.

    Of few rows and many classes XLA's own sum takes up to 50 times as long on JAX 0.10. Of more rows it
    takes as long, and is right to 1 ulp where a product of 60,000 rows loses 50.
    """
    return known_size(rows) <= 512


def _sum_of_rows_on_cpu(d_z):
    if _sums_few_rows(d_z.shape[0]):
        return _precisely(jnp.ones((1, d_z.shape[0]), d_z.dtype), d_z)[0]
    return jnp.sum(d_z, axis=0, dtype=arithmetic_dtype(d_z.dtype))


CPU = _Way(
    _rows_on_cpu,
    _rows_on_cpu,
    True,
    False,
    _sum_of_rows_on_cpu,
    _by_features_on_cpu,
    _plus_by_weights_on_cpu,
)


def _logits_on_cpu(x, layer):
    """The logits, to be differentiated as they stand."""
    # Not for more classes, which would have the larger gradient copied.
    weights = layer.weights.astype(x.dtype)
    product = _product(x, _turned(weights) if known_size(x.shape[0]) >= 8 * weights.shape[1] else weights)
    if layer.bias is None:
        return product
    bias = layer.bias.astype(product.dtype)[None]
    if not _sums_few_rows(product.shape[0]):
        return product + bias
    # As a product, whose gradient is one too.
    return product + _precisely(jnp.ones((product.shape[0], 1), product.dtype), bias)


# The weights themselves. Their gradient xᵀ D, a sum over many rows for few classes, is taken as the
# transpose of Dᵀ x: twice as fast on the CPU, as long as the compiler does not turn it round again.
@jax.custom_vjp
def _turned(weights):
    return weights


def _turned_fwd(weights):
    return weights, None


def _turned_bwd(_, cotangent):
    return (jax.lax.optimization_barrier(cotangent.T).T,)


_turned.defvjp(_turned_fwd, _turned_bwd)


# Accelerators: large products. The logits' gradient D of a part of the rows is formed block by block and
# kept in the features' dtype, so that each gradient of the part is one product. A part is what D may take
# no more memory for than the float32 accumulator of the weights' gradient, which several parts need. The
# accumulator is read and written once for a part: a hundredth of the products' time, where every block of
# 128 rows would take twice their time for it.


def _rows_elsewhere(rows, classes, _share):
    """Rows in a block: about 2²⁶ logits, in multiples of what a matrix unit takes at once."""
    most = 256 * round(2**18 / classes) or min(128, max(1, 2**26 // classes))
    return min(max(1, rows), most)


def _rows_alone_elsewhere(rows, classes, share):
    most = _rows_elsewhere(rows, classes, share)
    # The compiler for TPUs reduces logits where their product forms them. From 16,384 classes on, 512
    # rows at once take 1.25 times the product's cycles on v5e, and more rows up to three times.
    return most if classes < 2**14 else min(most, 512)


def _sizes(way, rows, features, classes, dtype, block_size, share):
    """Rows before the first of several parts, in a part, and in a block of it."""
    size = block_size or way.rows(rows, classes, share)
    if not way.keeps or rows == 0:
        return 0, size, size
    # D in the features' dtype against the accumulator in four bytes. A block with a unit is a part.
    most = 0 if _has_units(dtype) else 4 * features // jnp.dtype(dtype).itemsize
    most = max(size, most)
    # Where parts have several blocks, the products of so few rows would take longer than zeros on v6e.
    is_one_block = block_size is None and most * classes <= 2**27
    few = min(FIRST, size // 2) if is_one_block and rows > most else 0
    rows -= few
    part = -(-rows // -(-rows // most))
    part = min(-(-part // 128) * 128, most) if part > 128 else part
    if block_size is None and part * classes <= 2**27:
        size = part
    return few, part, min(size, part)


def _sum_of_rows_elsewhere(d_z):
    # As a product: a sum takes ten times as long on a TPU, which makes one of a product of one row.
    return _precisely(jnp.ones((8, d_z.shape[0]), d_z.dtype), d_z)[0]


def _by_features_elsewhere(d_z, weights, unit, dtype):
    return _scaled(unit, _product(d_z, weights.T, dtype))


def _plus_by_weights_elsewhere(total, x, d_z, unit, dtype):
    product = _scaled(unit, _product(x.T, d_z, dtype))
    return product if total is None else total + product


ACCELERATOR = _Way(
    _rows_elsewhere,
    _rows_alone_elsewhere,
    False,
    True,
    _sum_of_rows_elsewhere,
    _by_features_elsewhere,
    _plus_by_weights_elsewhere,
)
