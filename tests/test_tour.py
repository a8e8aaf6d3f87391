"""The notebook is made from its text, and what its cells compute is right."""

from pathlib import Path

import jax
import jupytext
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import oracle
import pytest
from helpers import assert_close

TEXT = Path(__file__).parents[1] / "examples" / "tour.md"
NOTEBOOK = TEXT.with_suffix(".ipynb")

pytestmark = pytest.mark.usefixtures("standard_promotion")


def outputs_of(cell, kind):
    return [output for output in cell.get("outputs", []) if output.output_type == kind]


def test_the_notebook_is_made_from_the_text():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    made = jupytext.read(TEXT)
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in made.cells
    ]
    assert len(notebook.cells) == 12
    assert sum(len(outputs_of(cell, "display_data")) for cell in notebook.cells) == 4
    assert not any(outputs_of(cell, "error") for cell in notebook.cells)
    # Nothing tells when, where or by whom it was made.
    assert all(cell.metadata == {} for cell in notebook.cells)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.language_info == {"name": "python"}
    assert NOTEBOOK.stat().st_size < 400_000


@pytest.fixture
def after(capsys):
    """Each cell's names after it ran, by its number; "printed" and "figures" among them."""
    names, after = {}, {}
    plt.switch_backend("agg")
    with np.printoptions(), plt.rc_context():
        for number, cell in enumerate(jupytext.read(TEXT).cells, start=1):
            if cell.cell_type == "code":
                exec(compile(cell.source, f"cell {number}", "exec"), names)
                plt.gcf().canvas.draw()
                after[number] = {
                    **names,
                    "printed": capsys.readouterr().out,
                    "figures": plt.get_fignums(),
                }
        plt.close("all")
    return after


@pytest.mark.slow
def test_what_the_cells_compute_is_right(after):
    row = np.array([0.1, 0.2, 0.25, 0.4, 0.05])
    np.testing.assert_allclose(after[2]["a"], row, rtol=1e-6)
    np.testing.assert_allclose(after[2]["jacobian"], np.diag(row) - np.outer(row, row), atol=1e-7)

    # The worked example; the second row has the same classes in another order.
    first, second = [0.1, 0.2, -0.75, 0.4, 0.05], [-0.6, 0.05, 0.1, 0.2, 0.25]
    np.testing.assert_allclose(after[4]["chain"], first, rtol=1e-6)
    for gradient in ("worked", "plain", "analytic", "one_hot"):
        np.testing.assert_allclose(after[4][gradient], np.array([first, second]) / 2, rtol=1e-6)

    names = after[6]
    parameters = jax.tree.leaves(names["network"])
    _, truth = oracle.network_gradient(parameters, names["x"], names["labels"])
    for gradient in ("by_formula", "from_library", "from_autodiff"):
        assert_close(jax.tree.leaves(names[gradient]), truth, ulps=16)

    # The slowdown: nearly no gradient at the start, and several times as many epochs.
    gradients, accuracies = after[8]["gradient_norms"], after[8]["accuracies"]
    assert gradients["quadratic"][0] < gradients["log-likelihood"][0] / 100
    needed = {name: np.argmax(np.array(each) >= 0.9) for name, each in accuracies.items()}
    assert needed["quadratic"] >= 2 * needed["log-likelihood"] > 0
    assert accuracies["log-likelihood"][-1] > 0.95

    lead = np.arange(81, dtype=np.float64)
    costs, slopes = after[10]["costs"], after[10]["slopes"]
    np.testing.assert_allclose(costs["jaxsoftmax"], np.log1p(np.exp(-lead)), rtol=1e-5)
    np.testing.assert_allclose(slopes["jaxsoftmax"], -1 / (1 + np.exp(lead)), rtol=1e-5)
    assert not costs["optax"][15:].any()
    assert not slopes["optax"][17:].any()
    assert costs["optax"][14] > 0
    assert slopes["optax"][16] < 0
    rows = after[10]["comparison"].rows
    assert [row.kind for row in rows] == ["value", "gradient"]
    assert all(row.custom_ulps < 8 and row.reference == 0 for row in rows)

    network, x, labels = (after[12][name] for name in ("state", "test_x", "test_labels"))
    w, b, v, c = (np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(network.params))
    predicted = np.argmax(np.maximum(x @ w + b, 0) @ v + c, axis=1)
    assert np.mean(predicted == labels) == pytest.approx(after[12]["test_accuracies"][-1])
    assert np.mean(predicted == labels) > 0.96
    assert after[12]["mean_costs"][-1] < after[12]["mean_costs"][0] / 20

    assert len(after[12]["figures"]) == 4
    # What training prints may differ in its last digit.
    for number, cell in enumerate(nbformat.read(NOTEBOOK, as_version=4).cells, start=1):
        if number in (2, 4, 6, 10):
            assert (
                "".join(output.text for output in outputs_of(cell, "stream")) == after[number]["printed"]
            )
