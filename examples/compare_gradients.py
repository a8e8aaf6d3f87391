"""Can a custom gradient be trusted? Three answers: for a rule of your own, in a model, of a library.

Root mean square normalisation y = w x / √(mean x²) gets a rule by hand, once right and once with the
mistake that is easily made: to take the root for a constant. Then the log-likelihood cost stands at the
end of a Flax model, and another library's fused layer and cost is looked at, where it is installed.
"""

import argparse
import importlib.util

import jax
import jax.numpy as jnp
from flax import nnx

import jaxsoftmax as js


def make_norm(root_is_constant: bool):
    """The normalisation of rows x (batch, features) by weights (features), with a rule by hand."""

    def scales(x):
        return jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True))

    @jax.custom_vjp
    def norm(x, weights):
        return weights * x * scales(x)

    def norm_fwd(x, weights):
        return norm(x, weights), (x, weights)

    # With s = 1/√(mean x²) and c the cotangent: ∂/∂w = Σ_n c x s, and s depends on every x_k, so
    # ∂/∂x_j = s w_j c_j − s³ x_j mean_k (w_k c_k x_k).
    def norm_bwd(residuals, cotangent):
        x, weights = residuals
        s = scales(x)
        d_x = s * weights * cotangent
        if not root_is_constant:
            d_x -= s**3 * x * jnp.mean(weights * cotangent * x, axis=-1, keepdims=True)
        return d_x, jnp.sum(cotangent * x * s, axis=0)

    norm.defvjp(norm_fwd, norm_bwd)
    return jax.jit(norm)


class Model(nnx.Module):
    """FC → ReLU → FC."""

    def __init__(self, rngs: nnx.Rngs):
        """Draws the first weights."""
        self.hidden = nnx.Linear(8, 16, rngs=rngs)
        self.output = nnx.Linear(16, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The logits (batch, 5) of x (batch, 8)."""
        return self.output(nnx.relu(self.hidden(x)))


def main() -> dict[str, js.GradientComparison]:
    """Prints the tables, and returns them by name."""
    key = jax.random.key(0)
    x = jax.random.normal(key, (32, 8))
    labels = jnp.arange(32) % 5
    found = {}

    def show(name, comparison):
        found[name] = comparison
        print(f"\n{name}\n{comparison}")

    weights = jnp.linspace(0.5, 1.5, 8)
    show("a right rule", js.compare_gradients(make_norm(root_is_constant=False), x, weights))
    show("the root for a constant", js.compare_gradients(make_norm(root_is_constant=True), x, weights))

    graph, state = nnx.split(Model(nnx.Rngs(0)))

    @jax.jit
    def cost(state, x):
        return js.log_likelihood_cost(nnx.merge(graph, state)(x), labels)

    show("a Flax model", js.compare_gradients(cost, state, x))

    if importlib.util.find_spec("tokamax"):
        import tokamax

        @jax.jit
        def fused(x, weights):
            return tokamax.linear_softmax_cross_entropy_loss(
                x, labels, weights, reduction="mean", implementation="xla"
            )

        show("tokamax's layer and cost", js.compare_gradients(fused, x, jax.random.normal(key, (8, 5))))
    else:
        print("\ntokamax is not installed: pip install tokamax to see its fused layer and cost here")

    # In a test, one line is enough: it raises with the table.
    found["a right rule"].assert_close()
    return found


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
