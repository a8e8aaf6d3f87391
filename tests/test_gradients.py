"""Rules removed wherever they sit, and comparisons that see what is wrong."""

import json
import re

import equinox as eqx
import flax.nnx
import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
import pytest
from helpers import assert_close, every, random_labels, random_logits, slow, unchecked

import jaxsoftmax as js
from jaxsoftmax import __main__ as command


@jax.custom_vjp
def doubled(x):
    """2x, with a rule that says 3."""
    return 2 * x


doubled.defvjp(lambda x: (2 * x, None), lambda _, cotangent: (3 * cotangent,))


@jax.custom_vjp
def halved(x):
    """x/2, with its rule."""
    return x / 2


halved.defvjp(lambda x: (x / 2, None), lambda _, cotangent: (cotangent / 2,))


@jax.custom_jvp
def tripled(x):
    """3x, with a rule that says 5."""
    return 3 * x


tripled.defjvp(lambda primals, tangents: (tripled(*primals), 5 * tangents[0]))


@jax.custom_vjp
def around(x):
    """A rule around a rule."""
    return doubled(x) / 2


around.defvjp(lambda x: (x, None), lambda _, cotangent: (7 * cotangent,))


@jax.custom_jvp
def by_doubled(x):
    """2x, with a rule that holds a rule."""
    return 2 * x


by_doubled.defjvp(lambda primals, tangents: (by_doubled(*primals), doubled(*tangents)))


@jax.custom_batching.custom_vmap
def batched(x):
    """2x, with a rule for vmap around a rule."""
    return doubled(x)


batched.def_vmap(lambda _, mapped, x: (doubled(x), mapped[0]))

MESH = jax.make_mesh((3,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
SPEC = jax.sharding.PartitionSpec("data")


def in_scan(x):
    return jax.lax.scan(lambda carry, _: (doubled(carry) / 2, None), x, length=3)[0] * 2


NESTS = {
    "plain": doubled,
    "jit": jax.jit(lambda x: jax.jit(doubled)(x)),
    "checkpoint": jax.checkpoint(doubled),
    "vmap": jax.vmap(doubled),
    "scan": in_scan,
    "while": lambda x: jax.lax.fori_loop(0, 2, lambda _, y: doubled(y) / 2, x) * 2,
    "cond": lambda x: jax.lax.cond(x.sum() > -1e9, doubled, jnp.sin, x),
    "switch": lambda x: jax.lax.switch(1, [jnp.sin, doubled, jnp.cos], x),
    "rule in rule": lambda x: 2 * around(x),
    "captured array": lambda x: doubled(x * jnp.asarray(np.ones(3, np.float32))),
    "custom_jvp": lambda x: jax.nn.relu(doubled(x) + 10) - 10,
    "custom_jvp rule": lambda x: by_doubled(x),
    "custom_jvp rule in scan": lambda x: (
        jax.lax.scan(lambda c, _: (by_doubled(c) / 2, c), x, length=2)[0] * 2
    ),
    "custom_vmap": batched,
    "vmap of custom_vmap": lambda x: jax.vmap(batched)(x),
    "shard_map": jax.shard_map(doubled, mesh=MESH, in_specs=SPEC, out_specs=SPEC),
    "shard_map in jit": jax.jit(
        jax.shard_map(doubled, mesh=MESH, in_specs=SPEC, out_specs=SPEC, check_vma=False)
    ),
    "checkpoint in scan": lambda x: (
        jax.lax.scan(jax.checkpoint(lambda carry, _: (doubled(carry) / 2, carry)), x, length=2)[0] * 2
    ),
}


@pytest.mark.parametrize("nest", NESTS)
def test_rules_are_found_wherever_they_sit(nest):
    x = jnp.array([0.5, -1.0, 2.0])
    plain = js.without_custom_rules(NESTS[nest])

    def every_way(x):
        return (
            plain(x),
            jax.grad(lambda x: plain(x).sum())(x),
            jax.jvp(plain, (x,), (jnp.ones(3),))[1],
            jax.vmap(plain)(jnp.stack([x, x]))[1],
            jax.hessian(lambda x: (plain(x) ** 2).sum())(x),
        )

    value, twos = 2 * x, np.full(3, 2.0)
    # Without jit each operation is a program of its own.
    run = every_way if nest == "plain" else jax.jit(every_way)
    assert_close(run(x), (value, twos, twos, value, 8 * np.eye(3)), ulps=1)


def test_jvp_rules_stay_unless_asked():
    def slope(**options):
        return float(jax.grad(js.without_custom_rules(tripled, **options))(1.0))

    assert (slope(), slope(jvp=True)) == (5.0, 3.0)


def test_arguments_that_are_no_arrays_pass_through():
    def function(x, *, kind, scale):
        return {"double": doubled(x) * scale, "same": x}[kind]

    plain = js.without_custom_rules(function)
    assert_close(jax.grad(lambda x: plain(x, kind="double", scale=2))(jnp.float32(1)), 4.0, ulps=0)
    assert plain.__name__ == "function"


def test_without_rules_nothing_changes():
    def function(x):
        return jax.lax.scan(lambda c, y: (jnp.tanh(c * y), c), x, jnp.arange(3.0))[0].sum()

    def instructions(f):
        text = jax.jit(jax.grad(f)).lower(jnp.ones(4)).compile().as_text()
        return [re.sub(r", metadata=.*", "", line) for line in text.splitlines() if " = " in line]

    assert instructions(js.without_custom_rules(function)) == instructions(function)


def test_forward_mode_agrees_with_the_analytic_gradient():
    logits, labels = random_logits((16, 10), 3, jnp.float32), random_labels((16, 10))
    tangent = random_logits((16, 10), 1, jnp.float32, seed=1)
    cost = js.without_custom_rules(lambda z: js.log_likelihood_cost(z, labels))
    _, directional = jax.jit(lambda z, t: jax.jvp(cost, (z,), (t,)))(logits, tangent)
    gradient = jax.jit(jax.grad(lambda z: js.log_likelihood_cost(z, labels)))(logits)
    terms = np.asarray(gradient, np.float64) * np.asarray(tangent, np.float64)
    assert abs(float(directional) - terms.sum()) <= 8 * np.finfo(np.float32).eps * np.abs(terms).sum()


def ruled(fault):
    """Sine and cosine of x and the hyperbolic tangent of w, with a rule that may have a fault."""

    @jax.custom_vjp
    def function(x, w):
        return {"sine": jnp.sin(x), "cosine": jnp.cos(x), "tangent": jnp.tanh(w)}

    def backward(residuals, c):
        x, w = residuals
        if fault == "ignored cotangent":
            c = jax.tree.map(jnp.ones_like, c)
        d_x = c["sine"] * jnp.cos(x)
        if fault != "dropped output":
            d_x -= c["cosine"] * jnp.sin(x)
        d_w = c["tangent"] * (1 - jnp.square(jnp.tanh(w)))
        row = (x.shape[0] // 2,) if x.ndim > 1 else ()
        d_x = {
            "one percent": lambda: d_x * jnp.asarray(1.01, x.dtype),
            "zeroed row": lambda: d_x.at[row].set(0),
            "flipped sign": lambda: d_x.at[(*row, 1)].mul(-1),
            "one NaN": lambda: d_x.at[(*row, 1)].set(jnp.nan),
            "wrong dtype": lambda: d_x.astype(jnp.float32 if x.dtype != jnp.float32 else jnp.bfloat16),
        }.get(fault, lambda: d_x)()
        return d_x, d_w.T if fault == "transposed leaf" else d_w

    function.defvjp(lambda x, w: (function(x, w), (x, w)), backward)
    return function


def around_rule(f):
    @jax.custom_vjp
    def outer(x, w):
        return f(x, w)

    outer.defvjp(lambda x, w: jax.vjp(f, x, w), lambda pull_back, cotangent: pull_back(cotangent))
    return outer


ONE = jax.sharding.Mesh(np.array(jax.devices()[:1]), "data")
WHOLE = jax.sharding.PartitionSpec()
CONSTRUCTS = {
    "plain": lambda f: f,
    "jit": lambda f: jax.jit(lambda x, w: jax.jit(f)(x, w)),
    "checkpoint": jax.checkpoint,
    "vmap": lambda f: jax.vmap(f, (0, None)),
    "scan": lambda f: lambda x, w: jax.lax.scan(lambda c, row: (c, f(row, w)), None, x)[1],
    "fori": lambda f: (
        lambda x, w: jax.lax.fori_loop(
            0, 1, lambda _, _out: f(x, w), jax.tree.map(jnp.zeros_like, f(x, w))
        )
    ),
    "cond": lambda f: lambda x, w: jax.lax.cond(x[0, 0] < 9, f, f, x, w),
    "switch": lambda f: lambda x, w: jax.lax.switch((x[0, 0] < 9).astype(int), [f, f], x, w),
    "custom_jvp": lambda f: lambda x, w: jax.tree.map(lambda y: jax.nn.relu(y + 2), f(x, w)),
    "rule in rule": around_rule,
    "shard_map": lambda f: jax.shard_map(f, mesh=ONE, in_specs=WHOLE, out_specs=WHOLE),
    "Equinox": lambda f: eqx.filter_jit(eqx.filter_checkpoint(f)),
}
FAULTS = [
    "", "one percent", "zeroed row", "flipped sign", "ignored cotangent", "one NaN", "dropped output",
    "wrong dtype", "transposed leaf",
]  # fmt: skip
# Rows of 4 numbers; the largest hold a million.
ROWS = [3, 512, 250_000]
DTYPES = "float64", "float32", "bfloat16"
TABLE = [
    *every(17, [(f, "plain", rows, dtype) for f in FAULTS for rows in ROWS for dtype in DTYPES]),
    *every(25, [(fault, name, 3, "float32") for fault in FAULTS for name in CONSTRUCTS]),
    *every(17, [(f, name, 512, "bfloat16") for f in ("", "zeroed row") for name in CONSTRUCTS]),
]


@pytest.mark.parametrize(
    ("fault", "construct", "rows", "dtype"),
    [
        slow(*case) if case[2] == max(ROWS) or (case[0] == "" and case[1] == "plain") else case
        for case in TABLE
    ],
)
def test_wrong_rules_fail_and_right_ones_pass(fault, construct, rows, dtype):
    generator = np.random.default_rng(0)
    # No cosine or sine is so small that an error in its sign could pass for rounding.
    x = generator.uniform(0.4, 1.2, (rows, 4)) * generator.choice([-1, 1], (rows, 4))
    w = generator.normal(size=(4, 4))
    with jax.enable_x64(dtype == "float64"):
        function = CONSTRUCTS[construct](ruled(fault))
        arguments = jnp.asarray(x, dtype), jnp.asarray(w, dtype)
        if fault == "wrong dtype" and construct not in ("plain", "jit", "checkpoint"):
            # Where loops and calls need their own dtypes, JAX refuses it before there is a number.
            with pytest.raises((AssertionError, RuntimeError)):
                js.compare_gradients(function, *arguments).assert_close()
            return
        comparison = js.compare_gradients(function, *arguments)
    wrong = {row.path for row in comparison.rows if not row.is_right()}
    if fault == "" or (fault == "one percent" and dtype == "bfloat16"):
        comparison.assert_close()
    elif fault == "ignored cotangent":
        assert wrong == {"x", "w"}
    else:
        assert wrong == {"w"} if fault == "transposed leaf" else {"x"}
        with pytest.raises(AssertionError, match=rf"custom rules wrong in gradient of {wrong.pop()}:\n "):
            comparison.assert_close()


def test_a_wrong_value_is_found():
    @jax.custom_vjp
    def function(x):
        return jnp.sin(x)

    function.defvjp(lambda x: (jnp.sin(x) * 1.001, x), lambda x, c: (c * jnp.cos(x),))
    with pytest.raises(AssertionError, match="wrong in value of output:"):
        js.compare_gradients(function, jnp.arange(4.0)).assert_close()


@pytest.mark.slow
def test_a_gradient_that_is_truly_0_may_be_rounding():
    # The bias in front of a normalisation: its gradient is 0, and what comes out is what rounding leaves.
    @jax.jit
    def normalised(x, bias):
        return js.softmax(x + bias.sum())

    # Plain autodiff happens to be nearer to 0 than the rule.
    for precision, seed in (("float64", 22), ("float32", 25)):
        x = jax.random.normal(jax.random.key(seed), (64, 10))
        key = jax.random.key(seed + 100)
        js.compare_gradients(normalised, x, jnp.ones(3), precision=precision, key=key).assert_close()

    @jax.custom_vjp
    def function(x, bias):
        return normalised(x, bias)

    def backward(residuals, cotangent):
        d_x, d_bias = jax.vjp(normalised, *residuals)[1](cotangent)
        return d_x, d_bias + 1e-3

    function.defvjp(lambda x, bias: (normalised(x, bias), (x, bias)), backward)
    with pytest.raises(AssertionError, match="wrong in gradient of bias:"):
        js.compare_gradients(function, x, jnp.ones(3)).assert_close()


def test_what_has_no_gradient_is_said():
    def function(x, count, mask, name, aux):
        return jnp.where(mask, halved(x) * count.astype(x.dtype), 0), (name, aux)

    comparison = js.compare_gradients(
        function, jnp.ones(3), jnp.arange(3), jnp.ones(3, bool), "text", {"a": jnp.ones(2)}, has_aux=True
    )
    comparison.assert_close()
    assert comparison.skipped == ("count (int32)", "mask (bool)")
    assert "\nnot compared: count (int32), mask (bool)\n" in str(comparison)
    assert [(row.kind, row.path) for row in comparison.rows] == [
        ("value", "output"), ("gradient", "x"), ("gradient", "aux['a']")
    ]  # fmt: skip


@pytest.mark.slow
def test_float32_for_what_cannot_run_in_float64(key):
    @jax.jit
    def dropped(x):
        return jnp.where(jax.random.normal(key, x.shape) > 0, js.softmax(x) * x, 0)

    x = jnp.linspace(1, 2, 64)
    for precision in ("float64", "float32"):
        js.compare_gradients(dropped, x, precision=precision).assert_close()
    with pytest.raises(ValueError, match="'float64' or 'float32', got 'float16'"):
        unchecked(js.compare_gradients)(dropped, x, precision="float16")


@pytest.mark.slow
def test_a_plot_shows_every_gradient():
    figure = matplotlib.figure.Figure()
    axes = figure.add_subplot()
    function = ruled("flipped sign")
    js.compare_gradients(function, jnp.ones((3000, 4)), jnp.eye(4)).plot(axes)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["x, reference", "x, custom", "w, reference", "w, custom"]
    assert len(axes.lines[1].get_xdata()) <= 2000


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.slow
def test_libraries_that_know_nothing_of_it(key):
    import tokamax  # It takes two seconds, which each process that runs tests would spend.

    x = jax.random.normal(key, (8, 4))
    labels = jnp.arange(8) % 3
    layer = eqx.nn.MLP(4, 3, 8, 1, key=key)
    graph, state = flax.nnx.split(flax.nnx.Linear(4, 3, rngs=flax.nnx.Rngs(0)))

    def equinox(layer, x):
        return js.log_likelihood_cost(jax.vmap(layer)(x), labels)

    @jax.jit
    def nnx(state, x):
        return js.log_likelihood_cost(flax.nnx.merge(graph, state)(x), labels)

    @jax.jit
    def optax_loss(x):
        return optax.losses.sparsemax_loss(x[:, 0], labels > 0).sum() + optax.safe_norm(x, 0.1)

    @jax.jit
    def peer(x, w):
        return tokamax.linear_softmax_cross_entropy_loss(
            x, labels, w, reduction="sum", implementation="xla"
        )

    for function, *arguments in (
        (equinox, layer, x),
        (nnx, state, x),
        (optax_loss, x),
        (peer, x, jax.random.normal(key, (4, 3))),
    ):
        # What is called here of optax has no rules.
        reference = "differences" if function is optax_loss else None
        comparison = js.compare_gradients(function, *arguments, reference=reference)
        comparison.assert_close()
        assert len(comparison.rows) > 1


@pytest.mark.slow
def test_the_package_is_right_on_this_device(monkeypatch, capsys):
    every_case = list(command.cases("bfloat16"))
    assert len(every_case) == 12
    monkeypatch.setattr(command, "cases", lambda _: every(5, every_case))
    assert command.main(["--json", "--dtype", "bfloat16"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["jax"] == jax.__version__
    assert report["wrong"] == []
    assert [name for name, _, _ in every(5, every_case)] == list(
        dict.fromkeys(row["function"] for row in report["rows"])
    )
    assert {row["dtype"] for row in report["rows"] if row["kind"] == "gradient"} == {"bfloat16"}


def test_the_command_fails_if_a_rule_is_wrong(monkeypatch, capsys):
    x = jnp.full((3, 4), 0.7)
    cases = [("wrong one", ruled("one percent"), (x, x)), ("right one", ruled(""), (x, x))]
    monkeypatch.setattr(command, "cases", lambda _: cases)
    assert command.main(["--dtype", "float32"]) == 1
    printed = capsys.readouterr().out
    assert "wrong one, float32: WRONG" in printed
    assert "right one, float32: right" in printed
    assert printed.endswith("wrong: wrong one in float32\n")


def test_rows_are_plain_numbers(key):
    network = js.init_network(key, 3, 4, 2)
    x, labels = jax.random.normal(key, (5, 3)), jnp.zeros(5, jnp.int32)
    comparison = js.compare_gradients(jax.jit(js.network_cost), network, x, labels, argnums=0)
    comparison.assert_close(ulps=8)
    paths = [row.path for row in comparison.rows]
    assert paths == [
        "output", "network.hidden.weights", "network.hidden.bias", "network.output.weights",
        "network.output.bias",
    ]  # fmt: skip
    row = comparison.rows[3]
    gradient = jax.jit(jax.grad(js.network_cost))(network, x, labels).output.weights
    assert (row.shape, row.dtype) == ((4, 2), "float32")
    assert row.largest == pytest.approx(float(jnp.abs(gradient).max()), rel=1e-6)
    assert row.custom == float(gradient[row.worst])
    assert len(str(comparison).splitlines()) == 8
    assert "\nrules compared: _label_cost (custom_vjp) × 1" in str(comparison)


def test_a_reference_may_be_given(key):
    logits, labels = random_logits((4, 3), 1, jnp.float32), random_labels((4, 3))

    @jax.jit
    def article(logits, labels):
        probabilities = jax.nn.softmax(logits)
        return -jnp.mean(jnp.log(probabilities[jnp.arange(4), labels]))

    cost = jax.jit(js.log_likelihood_cost)
    js.compare_gradients(cost, logits, labels, reference=article, key=key).assert_close(ulps=8)
    with pytest.raises(ValueError, match=r"function's shapes \[\(\)\], got \[\(4, 3\)\]"):
        js.compare_gradients(cost, logits, labels, reference=lambda logits, _: logits)
    with pytest.raises(ValueError, match="floating-point array to differentiate in, found none"):
        js.compare_gradients(cost, logits, labels, argnums=1)


@pytest.mark.parametrize("argnums", [2, -3, (0, 7)])
def test_argnums_out_of_range_are_refused(argnums):
    x = jnp.ones(2)
    with pytest.raises(ValueError, match=r"argnums must be in \[-2, 2\) for 2 arguments"):
        js.compare_gradients(jnp.multiply, x, x, argnums=argnums)
    comparison = js.compare_gradients(jnp.multiply, x, x, argnums=-1, reference="differences")
    comparison.assert_close()
    assert len(comparison.rows) == 2


def test_a_function_without_floating_point_results_is_refused():
    with pytest.raises(ValueError, match="must return a floating-point array"):
        js.compare_gradients(lambda x: jnp.round(x).astype(jnp.int32), jnp.ones(2))


def test_the_table_says_which_of_two_is_right():
    logits, labels = jnp.array([[40.0, 0.0, 0.0]] * 2), jnp.array([0, 0])

    @jax.jit
    def textbook(logits, labels):
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1))

    cost = jax.jit(js.log_likelihood_cost)
    comparison = js.compare_gradients(cost, logits, labels, reference=textbook)
    comparison.assert_close()
    for row in comparison.rows:
        assert row.reference == 0
        assert row.relative == pytest.approx(1)
        assert row.custom == pytest.approx(row.truth, rel=1e-6)
    other_way = js.compare_gradients(textbook, logits, labels, reference=cost)
    assert not any(row.is_right() for row in other_way.rows)
    # Taken from the exact value, plain autodiff is right as well.
    js.compare_gradients(cost, logits, labels).assert_close(ulps=8)


@pytest.mark.slow
def test_a_reference_without_digits_excuses_nothing():
    logits = jnp.array([[40.0, 0.0, 0.0]])

    @jax.jit
    def textbook(logits):
        return -jax.nn.log_softmax(logits)[0, 0]

    @jax.jit
    def exact(logits):
        return js.log_likelihood_cost(logits, jnp.array([0]))

    @jax.custom_vjp
    def off(logits):
        return exact(logits)

    off.defvjp(lambda z: jax.value_and_grad(exact)(z), lambda gradient, c: (1.01 * c * gradient,))
    js.compare_gradients(exact, logits, reference=textbook).assert_close()
    with pytest.raises(AssertionError, match="wrong in gradient of logits:"):
        js.compare_gradients(off, logits, reference=textbook).assert_close()


def test_what_is_not_finite_excuses_nothing():
    @jax.custom_vjp
    def function(x, s):
        return 1000 * jnp.log(jnp.exp(x)) + s * jnp.log(jnp.exp(x)) / x

    function.defvjp(lambda x, s: (1000 * x + s, None), lambda _, c: (1000 * c, -c))
    with pytest.raises(AssertionError, match="gradient of s"):
        js.compare_gradients(function, jnp.array([1.0, 2.0, 100.0]), jnp.ones(3)).assert_close()


def test_an_exact_0_of_the_reference_stays():
    logits = jnp.array([-1e30, 1.0, 2.0])

    def forgotten(z):
        return jnp.sum(z[1:])

    def held(z):
        return jax.lax.stop_gradient(z[1]) + z[2]

    with pytest.raises(AssertionError, match="gradient of z"):
        js.compare_gradients(forgotten, logits, reference=held).assert_close()


def test_what_no_rule_has_changed_is_right():
    def cancels(x):
        return jax.nn.standardize(1000 + halved(x)), jnp.argmax(x), jnp.fft.rfft(x)

    comparison = js.compare_gradients(cancels, jnp.arange(4.0) / 3, argnums=np.int64(0))
    comparison.assert_close()
    assert comparison.skipped == ("output[1] (int32)",)
    assert comparison.rows[1].dtype == "complex64"
