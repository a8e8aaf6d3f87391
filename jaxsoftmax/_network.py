"""FC → FC → softmax: the article's network, and its gradient written by hand."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, PRNGKeyArray, UInt32

from ._checks import (
    FloatArray,
    LabelArray,
    Number,
    WeightArray,
    as_count,
    as_floats,
    as_labels,
    as_number,
    as_weights,
)
from ._cost import (
    label_row,
    log_likelihood_cost,
    log_likelihood_gradient,
    weight_penalty,
)
from ._mesh import across
from ._softmax import softmax


class Dense(NamedTuple):
    """A fully connected layer: z = x · weights + bias.

    Attributes:
        weights: Floating-point numbers (inputs, outputs).
        bias: Floating-point numbers (outputs,), as a rule of the weights' dtype.

    Example:
        >>> layer = Dense(weights=jnp.ones((4, 3)), bias=jnp.zeros(3))
        >>> jax.tree.map(jnp.shape, layer)
        Dense(weights=(4, 3), bias=(3,))
    """

    weights: Float[Array, "inputs outputs"]
    bias: Float[Array, " outputs"]


class Network(NamedTuple):
    """FC → FC → softmax, as a pytree of its parameters. A gradient has the same form.

    Attributes:
        hidden: The `Dense` layer from features to hidden units.
        output: The `Dense` layer from hidden units to classes, whose outputs are the logits.

    Example:
        >>> hidden = Dense(jnp.zeros((4, 8)), jnp.zeros(8))
        >>> network = Network(hidden, output=Dense(jnp.zeros((8, 3)), jnp.zeros(3)))
        >>> print(predict_probabilities(network, jnp.ones(4)))
        [0.33333333 0.33333333 0.33333333]
    """

    hidden: Dense
    output: Dense


def init_network(
    key: PRNGKeyArray | UInt32[Array, "2"],
    features: int,
    hidden: int,
    classes: int,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Network:
    """Random weights and zero biases for FC → FC → softmax.

    Args:
        key: Source of randomness; the same key gives the same network.
        features: Numbers in one example.
        hidden: Units in the hidden layer.
        classes: Units in the output layer.
        dtype: Floating-point dtype of every parameter.

    Returns:
        A `Network` with weights (features, hidden) and (hidden, classes). The hidden weights have
        variance 2/features, which a ReLU layer needs to pass signals on at their size; the output
        weights 1/hidden.

    Raises:
        TypeError: If a size is not an integer or `dtype` is not floating-point.
        ValueError: If a size is below 1.

    Example:
        >>> init_network(jax.random.key(0), features=64, hidden=128, classes=10).output.weights.shape
        (128, 10)

    References:
        He et al. (2015), "Delving deep into rectifiers", equation 10.
        LeCun et al. (1998), "Efficient BackProp", equation 16.
    """
    features, hidden = as_count("features", features), as_count("hidden", hidden)
    classes = as_count("classes", classes)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be floating-point, got {jnp.dtype(dtype)}")
    key_hidden, key_output = jax.random.split(key)
    w_hidden = jax.nn.initializers.he_normal()(key_hidden, (features, hidden), dtype)
    w_output = jax.nn.initializers.lecun_normal()(key_output, (hidden, classes), dtype)
    return Network(
        hidden=Dense(w_hidden, jnp.zeros(hidden, dtype)),
        output=Dense(w_output, jnp.zeros(classes, dtype)),
    )


def logits(
    network: Network, x: FloatArray, activation: Callable[[Array], Array] = jax.nn.relu
) -> Float[Array, "..."]:
    """Logits of FC → FC: the weighted inputs z of the softmax layer.

    Args:
        network: The parameters.
        x: Examples (*batch, features), floating-point.
        activation: What the hidden layer applies to its weighted inputs.

    Returns:
        Logits (*batch, classes), in the common dtype of `x` and the parameters. NaN and ±inf in `x`
        pass on to their own example.

    Raises:
        TypeError: If `x` is not real floating-point numbers.
        ValueError: If the last axis of `x` is not the network's number of features.

    Example:
        >>> network = init_network(jax.random.key(0), features=4, hidden=8, classes=3)
        >>> logits(network, jnp.ones((5, 4))).shape
        (5, 3)
    """
    x = _as_examples(network, x)
    hidden_inputs = _apply(network.hidden, x)
    return _apply(network.output, activation(hidden_inputs))


def predict_probabilities(
    network: Network, x: FloatArray, activation: Callable[[Array], Array] = jax.nn.relu
) -> Float[Array, "..."]:
    """Probabilities of the classes: the softmax of the logits.

    Args:
        network: As for `logits`.
        x: As for `logits`.
        activation: As for `logits`.

    Returns:
        Probabilities (*batch, classes) in the logits' dtype, as `softmax` defines them at the edges.

    Raises:
        TypeError: As for `logits`.
        ValueError: As for `logits`.

    Example:
        >>> network = init_network(jax.random.key(0), features=4, hidden=8, classes=3)
        >>> print(predict_probabilities(network, jnp.zeros(4)))
        [0.33333333 0.33333333 0.33333333]
    """
    return softmax(logits(network, x, activation))


def predict(
    network: Network, x: FloatArray, activation: Callable[[Array], Array] = jax.nn.relu
) -> Integer[Array, "..."]:
    """The most probable class of each example.

    Args:
        network: As for `logits`.
        x: As for `logits`.
        activation: As for `logits`.

    Returns:
        int32 classes (*batch); the first of several that are equally probable, or of those that are
        NaN.

    Raises:
        TypeError: As for `logits`.
        ValueError: As for `logits`.

    Example:
        >>> network = init_network(jax.random.key(0), features=4, hidden=8, classes=3)
        >>> int(predict(network, jnp.zeros(4)))
        0
    """
    return jnp.argmax(logits(network, x, activation), axis=-1).astype(jnp.int32)


def network_cost(
    network: Network,
    x: FloatArray,
    labels: LabelArray,
    *,
    penalty: Number = 0.0,
    activation: Callable[[Array], Array] = jax.nn.relu,
    sample_weight: WeightArray | None = None,
    **options: Any,
) -> Float[Array, "..."]:
    """Log-likelihood cost of FC → FC → softmax, plus a penalty on the weights.

        C = −1/N Σ_n Σ_k y_k ln a_k + λ/2 Σ w²

    The last sum is over the weights of both layers, not the biases.

    Args:
        network: The parameters.
        x: Examples (*batch, features), floating-point.
        labels: Integers (*batch) or probabilities (*batch, classes).
        penalty: λ, added once to a "mean" or "sum" and to each example's cost for "none".
        activation: As for `logits`.
        sample_weight: As for `log_likelihood_cost`; an example of weight 0 may hold NaN in `x` as well.
        **options: The other options of `log_likelihood_cost` but `axis`.

    Returns:
        Cost in nats, as from `log_likelihood_cost`, edges included.

    Raises:
        TypeError: As for `logits` and `log_likelihood_cost`.
        ValueError: As for `logits` and `log_likelihood_cost`.

    Note:
        Forward mode and second derivatives: as for `log_likelihood_cost`.

    Example:
        >>> network = init_network(jax.random.key(0), features=4, hidden=8, classes=3)
        >>> gradient = jax.grad(network_cost)(network, jnp.ones((5, 4)), jnp.zeros(5, int))
        >>> gradient.hidden.weights.shape
        (4, 8)
    """
    if sample_weight is not None:
        x = _as_examples(network, x)
        # ∂C/∂w = xᵀ ∂C/∂z: there 0 · NaN would be NaN.
        ignored = (as_weights(sample_weight, x.shape[:-1], x.dtype) == 0)[..., None]
        x = jnp.where(ignored & ~jnp.isfinite(x), 0, x)
    z = logits(network, x, activation)
    cost = log_likelihood_cost(z, labels, sample_weight=sample_weight, **options)
    penalty = as_number("penalty", penalty, cost.dtype)
    if isinstance(penalty, float) and penalty == 0:
        return cost
    return cost + penalty * weight_penalty(network).astype(cost.dtype)


def backpropagate(
    network: Network, x: FloatArray, labels: LabelArray
) -> tuple[Float[Array, ""], Network]:
    """Cost and gradient of FC → FC → softmax with ReLU, written out by hand.

    The gradient runs from the cost back to the first layer. Each layer has its δ = ∂C/∂z. With y the
    targets and w the output layer's weights, these are

        δ = (softmax(z) − y)/N
        δ_{hidden} = δ wᵀ ⊙ ReLU'(z_{hidden})

    and with a each layer's input, its gradients are

        ∂C/∂w = aᵀ δ
        ∂C/∂b = Σ_n δ_n

    No factor σ'(z) stands in the output layer. This is what `jax.value_and_grad(network_cost)` gives,
    without automatic differentiation.

    Args:
        network: The parameters.
        x: Examples (*batch, features), floating-point.
        labels: Integers (*batch) or probabilities (*batch, classes).

    Returns:
        The mean cost in nats, as from `network_cost`, and its gradient as a `Network` with each
        parameter's own shape and dtype. No examples: 0 and zeros.

    Raises:
        TypeError: As for `network_cost`.
        ValueError: As for `network_cost`.

    Example:
        >>> network = init_network(jax.random.key(0), features=4, hidden=8, classes=2)
        >>> cost, gradient = backpropagate(network, jnp.zeros((1, 4)), jnp.array([0]))
        >>> print(gradient.output.bias)
        [-0.5  0.5]

    References:
        Rumelhart, Hinton and Williams (1986), "Learning representations by back-propagating errors".
    """
    x = _as_examples(network, x)
    hidden_inputs = _apply(network.hidden, x)
    hidden = jnp.maximum(hidden_inputs, 0)
    z = _apply(network.output, hidden)
    cost = log_likelihood_cost(z, labels)

    labels = as_labels(labels, z.shape, (z.ndim - 1,), None)
    labels = labels if labels.dtype == jnp.int32 else labels.astype(cost.dtype)
    # softmax(z) − y, in the form that loses no digits.
    row = label_row(z.astype(cost.dtype), labels)
    d_z = log_likelihood_gradient(row, row.probabilities, labels)
    d_z = (d_z / max(1, z[..., 0].size)).astype(z.dtype)
    d_hidden = d_z @ network.output.weights.T
    d_hidden_inputs = jnp.where(hidden_inputs > 0, d_hidden, 0)
    return cost, Network(
        hidden=_gradient(network.hidden, x, d_hidden_inputs),
        output=_gradient(network.output, hidden, d_z),
    )


def _apply(layer, x):
    return x @ layer.weights + across(layer.bias, x.ndim)


def _gradient(layer, x, d_output):
    """∂C/∂w = xᵀ ∂C/∂z and ∂C/∂b = Σ ∂C/∂z, over every example."""
    x = x.reshape(-1, x.shape[-1])
    d_output = d_output.reshape(-1, d_output.shape[-1])
    d_bias = jnp.sum(d_output, axis=0)
    return Dense((x.T @ d_output).astype(layer.weights.dtype), d_bias.astype(layer.bias.dtype))


def _as_examples(network, x):
    if not isinstance(network, Network):
        raise TypeError(f"network must be a Network, as init_network makes one, got {type(network)}")
    array = as_floats("x", x)
    features = network.hidden.weights.shape[0]
    if array.ndim == 0 or array.shape[-1] != features:
        raise ValueError(
            f"x must have shape (*batch, {features}) for this network's {features} features, "
            f"got {array.shape}"
        )
    return array
