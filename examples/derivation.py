"""Softmax, the log-likelihood cost and their gradient, step by step, beside JAX's own autodiff.

Each step prints what a formula of the derivation gives, and beside it what the package computes, or what
`jax.jacobian` or `jax.grad` finds without knowing the formula.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

import jaxsoftmax as js

# The worked example: N = 2 examples of five classes. The second row's numbers are free; these are
# the same classes in another order.
PROBABILITIES = np.array([[0.1, 0.2, 0.25, 0.4, 0.05], [0.4, 0.05, 0.1, 0.2, 0.25]], np.float32)
LABELS = np.array([2, 0])


def show(what: str, formula: jax.Array, other: jax.Array, source: str = "autodiff") -> float:
    """Prints both, and returns their largest difference."""
    difference = float(jnp.max(jnp.abs(formula - other)))
    print(f"\n{what}")
    with np.printoptions(precision=4, suppress=True, floatmode="fixed"):
        for name, array in (("formula", formula), (source, other)):
            label = f"  {name + ':':12}"
            print(label + np.array2string(np.asarray(array), prefix=label))
    print(f"  largest difference {difference:.1e}")
    return difference


def main() -> dict[str, float]:
    """Runs the derivation and returns each step's largest difference from autodiff."""
    differences = {}
    # Logits with exactly these probabilities: the logarithm undoes the exponential, and the
    # normaliser is 1.
    logits = jnp.log(jnp.asarray(PROBABILITIES))
    z, label = logits[0], LABELS[0]
    y = jnp.zeros(5).at[label].set(1.0)

    print("1. Softmax: a_j = exp(z_j) / Σ_k exp(z_k)")
    a = jnp.exp(z - jnp.max(z)) / jnp.sum(jnp.exp(z - jnp.max(z)))
    differences["softmax"] = show(
        "the probabilities, and jaxsoftmax.softmax", a, js.softmax(z), "jaxsoftmax"
    )

    # The two cases, i = j and i ≠ j, in one matrix.
    jacobian = jnp.diag(a * (1 - a)) + (jnp.eye(5) - 1) * jnp.outer(a, a)
    plain_jacobian = jax.jacobian(jax.nn.softmax)(z)
    differences["jacobian"] = show(
        "∂a_j/∂z_i = a_j (1 − a_j) if i = j, −a_j a_i otherwise", jacobian, plain_jacobian
    )
    differences["softmax_jacobian"] = show(
        "the same, and jaxsoftmax.softmax_jacobian", jacobian, js.softmax_jacobian(z), "jaxsoftmax"
    )

    print("\n2. The log-likelihood cost: C = −Σ_k y_k ln a_k")
    cost = -jnp.sum(y * jnp.log(a))
    differences["cost"] = show(
        "one example's loss, −ln 0.25, and jaxsoftmax.log_likelihood_cost",
        cost,
        js.log_likelihood_cost(z, label),
        "jaxsoftmax",
    )
    d_a = -y / a
    differences["d_a"] = show(
        "step 1: ∂C/∂a_k = −y_k / a_k", d_a, jax.grad(lambda a: -jnp.sum(y * jnp.log(a)))(a)
    )
    plain_cost = js.without_custom_rules(js.log_likelihood_cost)
    d_z = d_a @ jacobian
    differences["chain"] = show(
        "steps 2 and 3: the chain rule through the two cases", d_z, jax.grad(plain_cost)(z, label)
    )
    differences["difference"] = show(
        "which is the difference of two vectors: ∂C/∂z_j = a_j − y_j", a - y, d_z
    )

    print("\n3. The worked example: a batch of N = 2, so the gradient carries 1/N")
    # The array version: copy the probabilities, subtract 1 at each row's label, divide by N.
    gradient = PROBABILITIES.copy()
    gradient[np.arange(2), LABELS] -= 1
    gradient /= 2
    plain = jax.grad(plain_cost)(logits, LABELS)
    differences["array"] = show("copy, subtract, divide", jnp.asarray(gradient), plain)
    one_hot = jax.nn.one_hot(LABELS, 5)
    for kind, labels in {"integer": LABELS, "one-hot": one_hot}.items():
        differences[kind] = show(
            f"the same, and jax.grad(jaxsoftmax.log_likelihood_cost), {kind} labels",
            jnp.asarray(gradient),
            jax.grad(js.log_likelihood_cost)(logits, labels),
            "jaxsoftmax",
        )
    return differences


if __name__ == "__main__":
    argparse.ArgumentParser(description="Softmax, cost and gradient in numbers.").parse_args()
    main()
