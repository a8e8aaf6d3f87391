"""On a mesh of devices every function means what it means on one, and moves no logits."""

import itertools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from helpers import (
    assert_close,
    assert_norms_close,
    assert_relative,
    every,
    mostly_slow,
    random_labels,
    random_logits,
    random_targets,
    slow,
    unchecked,
)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsoftmax as js

ROWS, FEATURES, CLASSES = 16, 6, 24
SHAPES = [(8,), (1, 8), (2, 4), (4, 2)]
UNCHECKED = "manual, with check_vma False"
KINDS = [AxisType.Auto, AxisType.Explicit, AxisType.Manual, UNCHECKED]
HEAD_CASES = list(itertools.product([jnp.float32, jnp.bfloat16], ["mean", "sum", "none"], [None, 19]))


def make_mesh(shape, kind):
    # Manual ones are made by shard_map, out of automatic ones.
    kind = AxisType.Auto if kind in (AxisType.Manual, UNCHECKED) else kind
    return jax.make_mesh(shape, ("data", "model")[: len(shape)], axis_types=(kind,) * len(shape))


def place_on(mesh, arrays, specs):
    return tuple(jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs, strict=True))


def head_arguments(rows, features, classes, dtype, soft=False, num_classes=None):
    generator = np.random.default_rng(3)
    shapes = (rows, features), (features, classes), (classes,)
    layer = [jnp.asarray(generator.normal(size=shape), dtype) for shape in shapes]
    existing = (rows, num_classes or classes)
    labels = random_labels(existing)
    if soft:
        labels = random_targets(existing, jnp.float32)
        labels = jnp.pad(labels, ((0, 0), (0, classes - existing[1])))
    sample_weight = jnp.asarray(generator.random(rows), jnp.float32).at[1].set(0)
    class_weight = jnp.asarray(generator.random(classes), jnp.float32)
    return (*layer, labels, sample_weight, class_weight)


def head_specs(data, model, soft=False):
    return (
        P(data), P(None, model), P(model), P(data, model) if soft else P(data), P(data), P(model)
    )  # fmt: skip


def as_called(function, kind, specs, place, data="data", model="model"):
    """The head as it is called on this kind of mesh."""
    if kind == AxisType.Explicit:
        return function
    function = partial(function, batch_axis=data, class_axis=model)
    if kind == AxisType.Auto:
        return function
    return jax.shard_map(function, in_specs=specs, out_specs=place, check_vma=kind != UNCHECKED)


def value_and_gradients(function, arguments, cotangent):
    """The value, and the gradients by every floating-point argument."""
    is_float = [jnp.issubdtype(a.dtype, jnp.floating) for a in arguments]
    floats = [a for a, keep in zip(arguments, is_float, strict=True) if keep]

    def of_floats(*floats):
        given = iter(floats)
        return function(
            *(next(given) if keep else a for a, keep in zip(arguments, is_float, strict=True))
        )

    value, pull_back = jax.vjp(of_floats, *floats)
    return value, pull_back(cotangent)


MEETINGS = every(59, list(itertools.product(itertools.product(SHAPES, KINDS), enumerate(HEAD_CASES))))


@pytest.mark.parametrize(("on", "case"), mostly_slow(3, MEETINGS[::-1]))
def test_head_equals_that_of_one_device(on, case):
    (shape, kind), (number, (dtype, reduction, num_classes)) = on, case
    mesh = make_mesh(shape, kind)
    data, model = (*mesh.axis_names, None)[:2]
    soft = number % 3 == 0
    head = partial(
        js.linear_log_likelihood_cost,
        reduction=reduction,
        num_classes=num_classes,
        block_size=(None, 3)[number % 2],
    )
    arguments = head_arguments(ROWS, FEATURES, CLASSES, dtype, soft, num_classes)
    specs = head_specs(data, model, soft)
    place_of_cost = P(data) if reduction == "none" else P()
    shape_of_cost = ROWS if reduction == "none" else ()
    cotangent = jnp.asarray(np.random.default_rng(4).normal(size=shape_of_cost), jnp.float32)

    def cost(x, w, b, labels, sample_weight, class_weight, head=head, **axes):
        return head(
            x, w, b, labels, sample_weight=sample_weight, class_weight=class_weight,
            label_smoothing=0.1, z_loss=0.01, softcap=5.0, **axes,
        )  # fmt: skip

    expected = jax.jit(partial(value_and_gradients, cost))(arguments, cotangent)
    with jax.set_mesh(mesh):
        on_mesh = as_called(cost, kind, specs, place_of_cost, data, model)
        arguments = place_on(mesh, arguments, specs)
        cotangent = jax.device_put(cotangent, NamedSharding(mesh, place_of_cost))
        actual = jax.jit(partial(value_and_gradients, on_mesh))(arguments, cotangent)
    assert_norms_close(actual, expected, 2e-5 if dtype == jnp.float32 else 3e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_head_on_a_mesh_is_exact(kind):
    mesh = make_mesh((2, 4), kind)
    generator = np.random.default_rng(5)
    logits = generator.normal(size=(8, 16)).astype(np.float32)
    labels = generator.integers(0, 16, 8).astype(np.int32)
    logits[np.arange(8), labels] += np.float32(40)
    one_hot = np.eye(16)[labels]
    specs = P("data"), P(None, "model"), P("data")

    def cost(x, w, labels, **axes):
        return js.linear_log_likelihood_cost(x, w, None, labels, reduction="none", **axes)

    cost = as_called(cost, kind, specs, P("data"))
    with jax.set_mesh(mesh):
        # Each example picks its own row of the weights: its logits, and their gradient.
        x, w, y = place_on(mesh, (np.eye(8, dtype=np.float32), logits, labels), specs)
        costs, gradient = jax.jit(
            lambda x, w, y: (cost(x, w, y), jax.grad(lambda w: cost(x, w, y).sum())(w))
        )(x, w, y)
    assert_relative(costs, oracle.log_likelihood(logits, one_hot), eps_multiple=32)
    expected = oracle.log_likelihood_vjp(logits, one_hot, np.ones((8, 1)))
    assert_relative(gradient, expected, eps_multiple=32)


def moved(compiled):
    """The arrays that devices send one another, each with its operation."""
    pattern = r"= (.*?) (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\("
    return [
        (operation, tuple(int(n) for n in dims.split(",") if n))
        for shapes, operation in re.findall(pattern, compiled.as_text())
        for dims in re.findall(r"\w+\[([\d,]*)\]", shapes)
    ]


@pytest.mark.parametrize(
    ("kind", "block_size"),
    [slow(KINDS[0], 32), (KINDS[1], None), slow(KINDS[2], None), slow(KINDS[3], 32)],
)
def test_what_the_head_moves_and_computes(kind, block_size):
    rows, features, classes = 256, 96, 640
    mesh = make_mesh((2, 4), kind)
    specs = P("data"), P(None, "model"), P("model"), P("data")

    def cost(x, w, b, labels, **axes):
        return js.linear_log_likelihood_cost(x, w, b, labels, block_size=block_size, **axes)

    cost = as_called(cost, kind, specs, P())
    x, w, b, labels, *_ = head_arguments(rows, features, classes, jnp.float32)
    with jax.set_mesh(mesh):
        arguments = place_on(mesh, (x, w, b, labels), specs)
        compiled = jax.jit(jax.value_and_grad(cost, (0, 1, 2))).lower(*arguments).compile()
    own_rows, own_classes, block = rows // 2, classes // 4, block_size or rows // 2
    sent = moved(compiled)
    assert {operation for operation, _ in sent} == {"all-reduce"}
    sizes = [shape for _, shape in sent]
    # Once: d features, d weights, d bias. Otherwise single numbers, and columns of a number per row.
    for once in ((own_rows, features), (features, own_classes), (own_classes,)):
        assert sizes.count(once) == 1
        sizes.remove(once)
    assert set(sizes) <= {(), (block, 1), (block,)}
    # A loop's body is counted once: the first block is outside it, the others are one.
    share = 1 if block_size is None else 2 * block / own_rows
    products = share * 3 * 2 * rows * features * classes / 8
    # Beside them, 30 operations for each logit; and two for each number of the gradients, as with
    # check_vma False the cost's cotangent is not known to be 1.
    others = 30 * share * own_rows * own_classes
    others += 2 * (own_rows * features + features * own_classes + own_classes)
    assert 0 < compiled.cost_analysis()["flops"] - products < others


@pytest.mark.slow
def test_weights_spread_by_rows_are_gathered_once():
    mesh = make_mesh((2, 4), AxisType.Explicit)
    x, w, b, labels, *_ = head_arguments(ROWS, FEATURES, CLASSES, jnp.float32)
    cost = partial(js.linear_log_likelihood_cost, block_size=2)
    expected = jax.value_and_grad(cost, (0, 1))(x, w, b, labels)
    with jax.set_mesh(mesh):
        arguments = place_on(
            mesh, (x, w, b, labels), (P("data"), P("data", "model"), P("model"), P("data"))
        )
        compiled = jax.jit(jax.value_and_grad(cost, (0, 1))).lower(*arguments).compile()
        actual = compiled(*arguments)
    assert [shape for operation, shape in moved(compiled) if operation == "all-gather"] == [(FEATURES, 6)]
    assert actual[1][1].sharding.spec == P("data", "model")
    assert_close(actual, expected, ulps=8)


@pytest.mark.slow
def test_a_weight_of_an_infinite_cost_has_an_infinite_gradient_where_nothing_is_checked():
    mesh = make_mesh((8,), UNCHECKED)
    x, w, b, labels, v, _ = head_arguments(ROWS, FEATURES, CLASSES, jnp.float32)
    b, labels = b.at[3].set(-jnp.inf), labels.at[5].set(3)
    specs = P(), P(None, "data"), P("data"), P(), P()

    def cost(x, w, b, labels, v, **axes):
        head = js.linear_log_likelihood_cost
        return head(x, w, b, labels, sample_weight=v, reduction="sum", block_size=3, **axes)

    expected = jax.grad(cost, 4)(x, w, b, labels, v)
    assert jnp.isposinf(expected[5])
    on_mesh = as_called(cost, UNCHECKED, specs, P(), None, "data")
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(on_mesh, 4))(x, w, b, labels, v)
    assert_close(gradient, expected, ulps=8)


@pytest.mark.parametrize("kind", every(4, KINDS[1:] + KINDS[:1]))
@pytest.mark.slow
def test_statistics_and_formed_labels_on_a_mesh(kind):
    mesh = make_mesh((2, 4), kind)
    x, w, b, labels, v, u = head_arguments(ROWS, FEATURES, CLASSES, jnp.float32)
    generator = np.random.default_rng(8)
    teacher = [jnp.asarray(generator.normal(size=shape), jnp.float32) for shape in (x.shape, w.shape)]
    few = jnp.asarray(generator.integers(0, 19, (ROWS, 3)), jnp.int32)
    shares = jnp.asarray(generator.dirichlet(np.ones(3), ROWS), jnp.float32)
    exists = jnp.asarray(generator.random((ROWS, CLASSES)) < 0.8)
    exists = exists.at[jnp.arange(ROWS)[:, None], few].set(True).at[jnp.arange(ROWS), labels].set(True)
    arguments = x, w, b, labels, v, u, *teacher, few, shares, exists
    d, m = "data", "model"
    specs = P(d), P(None, m), P(m), P(d), P(d), P(m), P(d), P(None, m), P(d), P(d), P(d, m)

    def head(x, w, b, labels, v, u, x_t, w_t, few, shares, exists, **axes):
        bent = {"softcap": 5.0, "logit_scale": 1.5, "block_size": 3, "where": exists, **axes}
        statistics = js.head_statistics(x, w, b, labels, num_classes=19, **bent)
        kinds = js.TeacherLabels(x_t, w_t, logit_scale=2.0), js.SparseLabels(few, shares)
        weights = {"sample_weight": v, "class_weight": u, "label_smoothing": 0.1}
        costs = [js.linear_log_likelihood_cost(x, w, b, y, **weights, **bent) for y in kinds]
        both = js.linear_log_likelihood_cost(x, w, b, labels, return_statistics=True, **bent)
        straight = js.head_statistics(x, w, b, labels, **axes)
        each = js.linear_log_likelihood_cost(x, w, b, kinds[0], reduction="none", **bent)
        return (*costs, both[0]), (each, statistics, both[1], straight)

    def ints(statistics):
        return statistics.prediction, statistics.label_rank

    def run(head):
        def total(x, w, b, v, u, shares, *others):
            labels, x_t, w_t, few, exists = others
            costs, by_row = head(x, w, b, labels, v, u, x_t, w_t, few, shares, exists)
            each, statistics, beside, straight = by_row
            floats = statistics.entropy, statistics.log_normalizer, statistics.label_log_likelihood
            of_rows = [jnp.sum(c * jnp.arange(1.0, ROWS + 1)) for c in (each, *floats)]
            return sum(costs) + sum(of_rows), (by_row, costs, *map(ints, (statistics, beside, straight)))

        x, w, b, labels, v, u, x_t, w_t, few, shares, exists = arguments
        free = x, w, b, v, u, shares
        both = jax.jit(jax.value_and_grad(total, tuple(range(6)), has_aux=True))
        return both(*free, labels, x_t, w_t, few, exists)

    expected = run(head)
    by_row = P(d), *[js.HeadStatistics(P(d), P(d), P(d), P(d), P(d))] * 3
    on_mesh = as_called(head, kind, specs, ((P(), P(), P()), by_row))
    with jax.set_mesh(mesh):
        arguments = place_on(mesh, arguments, specs)
        actual = run(on_mesh)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(a.dtype, jnp.integer):
            np.testing.assert_array_equal(a, e)
        else:
            assert_close(a, e, ulps=32)


@pytest.mark.parametrize(("soft", "check_vma"), [(False, True), slow(True, True), slow(True, False)])
def test_classes_spread_inside_shard_map(soft, check_vma):
    mesh = make_mesh((2, 4), AxisType.Auto)
    logits = random_logits((8, 16), 10, jnp.float32)
    labels = random_targets((8, 16), jnp.float32) if soft else random_labels((8, 16)).at[3].set(99)
    exists = jnp.arange(16) != 3
    sample_weight, class_weight = jnp.arange(8.0), jnp.linspace(0.0, 2.0, 16)

    def every(logits, labels, exists, sample_weight, class_weight, class_axis=None):
        cost = js.log_likelihood_cost(
            logits, labels, where=exists, sample_weight=sample_weight, class_weight=class_weight,
            label_smoothing=0.1, z_loss=0.01, reduction="none", class_axis=class_axis,
        )  # fmt: skip
        return (
            js.softmax(logits, class_axis=class_axis),
            js.log_softmax(logits, where=exists, class_axis=class_axis),
            js.quadratic_cost(logits, labels, reduction="none", class_axis=class_axis),
            cost,
        )

    both = P("data", "model")
    specs = both, both if soft else P("data"), P("model"), P("data"), P("model")
    on_mesh = jax.shard_map(
        partial(every, class_axis="model"),
        mesh=mesh,
        in_specs=specs,
        out_specs=(both, both, P("data"), P("data")),
        check_vma=check_vma,
    )
    arguments = logits, labels, exists, sample_weight, class_weight
    for function, placed in ((every, arguments), (on_mesh, place_on(mesh, arguments, specs))):
        cotangent = tuple(
            random_logits(shape, 1, jnp.float32, seed=9) for shape in ((8, 16), (8, 16), (8,), (8,))
        )
        cotangent = (cotangent[0], cotangent[1].at[:, 3].set(0), *cotangent[2:])
        result = jax.jit(partial(value_and_gradients, function))(placed, cotangent)
        if function is every:
            expected = result
    assert_close(result, expected, ulps=32)


@pytest.mark.parametrize("soft", [False, slow(True)])
def test_second_derivatives_where_classes_are_spread(soft):
    mesh = make_mesh((1, 4), AxisType.Auto)
    logits, tangent = random_logits((3, 12), 3, jnp.float32), random_logits((3, 12), 1, jnp.float32, 5)
    labels = random_targets((3, 12), jnp.float32) if soft else random_labels((3, 12))
    classes = P(None, "model")

    def cost(logits, class_axis=None):
        spread = labels
        if soft and class_axis:
            start = 3 * jax.lax.axis_index(class_axis)
            spread = jax.lax.dynamic_slice_in_dim(labels, start, 3, axis=1)
        return js.log_likelihood_cost(logits, spread, class_axis=class_axis)

    on_mesh = jax.shard_map(partial(cost, class_axis="model"), mesh=mesh, in_specs=classes, out_specs=P())
    found, expected = (
        jax.jit(lambda z, t, f=f: jax.jvp(jax.grad(f), (z,), (t,))[1])(logits, tangent)
        for f in (on_mesh, cost)
    )
    assert_close(found, expected, ulps=32)


@pytest.mark.parametrize(
    ("place", "soft"), [(P("data", "model"), False), slow(P(None, "model"), True), slow(P("data"), False)]
)
def test_quadratic_cost_on_explicit_axes(place, soft):
    mesh = make_mesh((2, 4), AxisType.Explicit)
    logits = random_logits((8, 16), 2, jnp.float32)
    labels = random_targets((8, 16), jnp.float32) if soft else random_labels((8, 16))
    expected = jax.value_and_grad(js.quadratic_cost)(logits, labels)
    with jax.set_mesh(mesh):
        (logits,) = place_on(mesh, (logits,), (place,))
        assert_close(jax.jit(jax.value_and_grad(js.quadratic_cost))(logits, labels), expected, ulps=8)


def test_head_on_a_mesh_of_both_kinds_of_axes():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit, AxisType.Auto))
    arguments = head_arguments(ROWS, FEATURES, CLASSES, jnp.float32)[:4]
    expected = jax.value_and_grad(js.linear_log_likelihood_cost, (0, 1, 2))(*arguments)
    with jax.set_mesh(mesh):
        arguments = place_on(mesh, arguments, head_specs("data", "model")[:4])
        cost = partial(js.linear_log_likelihood_cost, class_axis="model")
        actual = jax.jit(jax.value_and_grad(cost, (0, 1, 2)))(*arguments)
    assert_close(actual, expected, ulps=8)


@pytest.mark.parametrize("classes", [16, slow(32_000)])
def test_logits_of_an_explicit_mesh_that_is_not_set(classes):
    mesh = make_mesh((8,), AxisType.Explicit)
    logits = random_logits((3, classes), 3, jnp.float32)
    (spread,) = place_on(mesh, (logits,), (P(None, "data"),))
    labels = jnp.array([0, 1, classes - 1])
    (same,) = place_on(mesh, (labels,), (P(),))
    for function in (js.log_likelihood_cost, lambda z, _: js.softmax(z), lambda z, _: js.log_softmax(z)):
        assert_close(jax.jit(function)(spread, same), jax.jit(function)(logits, labels), ulps=4)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.slow
def test_training_on_a_mesh_ends_as_on_one_device(explicit, key):
    mesh = make_mesh((8,), AxisType.Explicit if explicit else AxisType.Auto)
    x = jax.random.normal(key, (64, 5))
    data = x, jnp.argmax(x[:, :3], axis=-1).astype(jnp.int32)
    optimizer = optax.adam(1e-2)
    epoch = js.make_epoch(lambda params, batch: js.network_cost(params, *batch), optimizer, batch_size=16)
    state = js.init_state(js.init_network(key, 5, 8, 3), optimizer)
    expected, costs = epoch(state, data, key)
    with jax.set_mesh(mesh):
        data = place_on(mesh, data, (P("data"), P("data")))
        state = jax.device_put(state, NamedSharding(mesh, P()))
        actual, costs_on_mesh = epoch(state, data, jax.device_put(key, NamedSharding(mesh, P())))
    assert_close((actual.params, costs_on_mesh), (expected.params, costs), ulps=64)


def test_an_epoch_reads_the_mesh_from_its_data(key):
    data, optimizer = jnp.arange(40.0).reshape(20, 2), optax.sgd(0.1)
    epoch = js.make_epoch(lambda w, batch: jnp.mean((batch - w[None]) ** 2), optimizer, 8)
    state = js.init_state(jnp.zeros(2), optimizer)
    rows = NamedSharding(make_mesh((4, 2), AxisType.Explicit), P("data"))
    actual, expected = (epoch(state, d, key)[1] for d in (jax.device_put(data, rows), data))
    assert_close(actual, expected, ulps=4)


@pytest.mark.parametrize(
    ("what", "soft", "reduction"), [("weights", False, "sum"), ("labels", True, "none")]
)
@pytest.mark.slow
def test_what_one_argument_varies_along_the_others_need_not(what, soft, reduction):
    mesh = make_mesh((8,), AxisType.Auto)
    x, w, _, labels, *_ = head_arguments(ROWS, FEATURES, CLASSES, jnp.float32, soft)
    several = {
        "weights": (P(), P("data"), P(), (x, jnp.concatenate([w * (1 + i) for i in range(8)]), labels)),
        "labels": (P(), P(), P("data"), (x[: ROWS // 8], w, labels)),
    }

    def dense(x, w, labels):
        costs = js.log_likelihood_cost, js.quadratic_cost
        return sum(cost(x @ w, labels, reduction=reduction).sum() for cost in costs)

    def head(x, w, labels):
        return js.linear_log_likelihood_cost(x, w, None, labels, reduction=reduction, block_size=1).sum()

    *specs, arguments = several[what]
    for cost in (dense, head):

        def whole(*arguments, cost=cost):
            each = jax.shard_map(
                lambda *local: cost(*local)[None],
                mesh=mesh,
                in_specs=tuple(specs),
                out_specs=P("data"),
            )
            return each(*arguments).sum()

        split = [
            np.split(a, 8) if spec == P("data") else [a] * 8
            for spec, a in zip(specs, arguments, strict=True)
        ]
        one = jax.jit(jax.value_and_grad(cost, (0, 1)))
        values, gradients = zip(*(one(*part) for part in zip(*split, strict=True)), strict=True)
        expected = (
            sum(values),
            [
                np.concatenate(each) if spec == P("data") else sum(each)
                for spec, each in zip(specs, zip(*gradients, strict=True), strict=False)
            ],
        )
        assert_norms_close(jax.jit(jax.value_and_grad(whole, (0, 1)))(*arguments), expected, 2e-5)


def test_errors_say_what_to_do():
    head = unchecked(js.linear_log_likelihood_cost)
    x, w, b, labels, *_ = head_arguments(ROWS, FEATURES, CLASSES, jnp.float32)
    with pytest.raises(ValueError, match=r"batch_axis must name axes of the mesh.*jax\.set_mesh"):
        head(x, w, b, labels, batch_axis="data")
    with pytest.raises(ValueError, match=r"class_axis must name axes of the mesh.*jax\.set_mesh"):
        js.log_likelihood_cost(x @ w, labels, class_axis="model")
    with jax.set_mesh(make_mesh((2, 4), AxisType.Auto)):
        with pytest.raises(ValueError, match=r"must name axes of the mesh.*got 'rows'"):
            head(x, w, b, labels, batch_axis="rows")
        with pytest.raises(ValueError, match="rows and classes must be over different axes"):
            head(x, w, b, labels, batch_axis="data", class_axis=("model", "data"))
        with pytest.raises(
            ValueError, match=r"23 classes do not divide evenly over 4 devices.*num_classes"
        ):
            head(x, w[:, 1:], b[1:], labels, class_axis="model")
        with pytest.raises(ValueError, match=r"15 examples do not divide evenly over 2.*sample_weight 0"):
            head(x[1:], w, b, labels[1:], batch_axis="data")
        with pytest.raises(ValueError, match="labels must be in"):
            head(x, w, b, labels + CLASSES, batch_axis="data", class_axis="model")
        with pytest.raises(ValueError, match=r"class_axis must name axes of a jax\.shard_map around"):
            js.softmax(x @ w, class_axis="model")
        with pytest.raises(ValueError, match=r"logits must be spread over class_axis.*\['model'\]"):
            jax.shard_map(
                partial(js.log_likelihood_cost, class_axis="model"), in_specs=P(), out_specs=P()
            )(x @ w, labels)
