"""The recipes of docs/recipes.md, run as they stand there, against all logits in float64."""

import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close

import jaxsoftmax as js

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
INPUTS, CLASSES = 4, 7
QUICK = {"xla_backend_optimization_level": 0}  # to compile

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def recipe():
    """The page's functions by name."""
    names = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(code, PAGE.name, "exec"), names)
    return names


@pytest.fixture
def draw():
    """Normal numbers in float32, which the float64 truth sees too."""
    generator = np.random.default_rng(20)
    return lambda *shape, scale=1.0: (scale * generator.normal(size=shape)).astype(np.float32)


@pytest.fixture
def params(draw):
    return network(draw, 5)


def network(draw, hidden, classes=CLASSES):
    weights = draw(hidden, classes, scale=1.5)
    return {"hidden": draw(INPUTS, hidden), "weights": weights, "bias": draw(classes, scale=0.5)}


def wide(tree):
    """The same numbers in float64."""
    return jax.tree.map(lambda leaf: leaf.astype(np.float64) if leaf.dtype.kind == "f" else leaf, tree)


def assert_right(cost, dense, params, *rest, **options):
    """Value and gradient under jit are those of all logits in float64."""
    arrays = jax.tree.map(jnp.asarray, (params, *rest))
    cost = partial(cost, **options)
    found = jax.jit(jax.value_and_grad(cost))(*arrays)
    assert_close(found, with_gradient(partial(dense, **options), params, *rest), ulps=32)
    # The library refuses a label that is no class where it knows the batch.
    jax.eval_shape(lambda params: cost(params, *arrays[1:]), params)


def with_gradient(dense, params, *rest):
    """Value and gradient in float64; what is not differentiated can choose rows."""
    rest = wide(rest)
    with jax.enable_x64(True):
        function = jax.value_and_grad(lambda params: dense(params, *rest))
        truth = jax.jit(function, compiler_options=QUICK)(wide(params))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(truth))
    return truth


def numpy_logits(params, inputs):
    params, inputs = wide((params, inputs))
    return np.tanh(inputs @ params["hidden"]) @ params["weights"] + params["bias"]


def dense_logits(params, inputs):
    return jnp.tanh(inputs @ params["hidden"]) @ params["weights"] + params["bias"]


def known_likelihoods(z, labels):
    """ln a of each label, chosen by a sum over one-hot labels; 0 for a label that is no class."""
    return jnp.sum(jax.nn.one_hot(labels, z.shape[-1]) * jax.nn.log_softmax(z), axis=-1)


def test_policy_gradient(recipe, draw, params):
    generator = np.random.default_rng(1)
    allowed = generator.random((4, 6, CLASSES)) < 0.7
    actions = generator.integers(0, CLASSES, (4, 6)).astype(np.int32)
    np.put_along_axis(allowed, actions[..., None], True, axis=-1)
    mask = generator.random((4, 6)) < 0.75
    inputs, advantage = draw(4, 6, INPUTS), draw(4, 6)
    z = numpy_logits(params, inputs)
    new = np.take_along_axis(z, actions[..., None], -1)[..., 0]
    new = new - np.log(np.sum(np.exp(z), -1, where=allowed))
    old = (new + draw(4, 6, scale=0.4)).astype(np.float32)
    # Every side of the clip is met.
    far, good = np.abs(np.exp(new - old) - 1)[mask] > 0.3, advantage[mask] > 0
    higher = (new > old)[mask]
    assert all(np.any(far & (good == g) & (higher == h)) for g in (0, 1) for h in (0, 1))
    # What padding may hold.
    inputs[~mask], old[~mask], advantage[~mask], actions[~mask] = 100, np.nan, np.nan, -100
    allowed[~mask & (np.arange(6) < 3)] = False

    def dense(params, batch, clip, entropy_bonus):
        mask = batch["mask"]
        inputs, actions, old, a = (
            batch[name][mask] for name in ("inputs", "actions", "old_log_likelihood", "advantage")
        )
        z = jnp.where(batch["allowed"][mask], dense_logits(params, inputs), -1e30)
        ratio = jnp.exp(known_likelihoods(z, actions) - old)
        gain = jnp.where(a > 0, a * jnp.minimum(ratio, 1 + clip), a * jnp.maximum(ratio, 1 - clip))
        entropy = -jnp.sum(jax.nn.softmax(z) * jax.nn.log_softmax(z), axis=-1)
        return -jnp.mean(gain) - entropy_bonus * jnp.mean(entropy)

    batch = {
        "inputs": inputs, "actions": actions, "old_log_likelihood": old, "advantage": advantage,
        "mask": mask, "allowed": allowed,
    }  # fmt: skip
    assert_right(recipe["ppo_cost"], dense, params, batch, clip=0.3, entropy_bonus=0.1)


@pytest.mark.slow
def test_preference_optimization(recipe, draw, params):
    def answers(tokens, lengths):
        labels = np.random.default_rng(tokens).integers(0, CLASSES, (3, tokens)).astype(np.int32)
        place = np.arange(tokens)
        labels[(place < 1) | (place >= np.array(lengths)[:, None])] = -100
        return {"inputs": draw(3, tokens, INPUTS), "labels": labels}

    def dense(params, batch, beta):
        def of(name):
            z = dense_logits(params, batch[name]["inputs"])
            each = known_likelihoods(z, batch[name]["labels"])
            return jnp.sum(each, axis=1) - batch[f"{name}_reference"]

        return jnp.mean(jnp.log1p(jnp.exp(-beta * (of("chosen") - of("rejected")))))

    batch = {
        "chosen": answers(5, [5, 3, 2]), "chosen_reference": draw(3) - 4,
        "rejected": answers(6, [4, 6, 2]), "rejected_reference": draw(3) - 4,
    }  # fmt: skip
    assert_right(recipe["dpo_cost"], dense, params, batch, beta=0.3)


@pytest.mark.slow
def test_distillation(recipe, draw, params):
    teacher, batch = network(draw, 9), {"inputs": draw(3, 4, INPUTS)}

    def dense(params, batch, teacher, temperature):
        smaller = jax.nn.log_softmax(dense_logits(params, batch["inputs"]) / temperature)
        larger = jax.nn.log_softmax(dense_logits(teacher, batch["inputs"]) / temperature)
        divergence = jnp.sum(jnp.exp(larger) * (larger - smaller), axis=-1)
        return temperature**2 * jnp.mean(divergence)

    assert_right(recipe["distillation_cost"], dense, params, batch, teacher, temperature=3.0)


def test_distillation_from_a_stored_top_k(recipe, draw, params):
    z = draw(3, 4, CLASSES, scale=2)
    classes = np.argsort(-z, axis=-1)[..., :3].astype(np.int32)
    batch = {
        "inputs": draw(3, 4, INPUTS),
        "teacher_classes": classes,
        "teacher_logits": np.take_along_axis(z, classes, axis=-1),
    }

    def dense(params, batch, temperature):
        # The teacher's probabilities of all classes but those that are not among its k.
        largest = np.sort(z, axis=-1)[..., -3:-2]
        y = jax.nn.softmax(jnp.where(z >= largest, z / temperature, -jnp.inf))
        smaller = jax.nn.log_softmax(dense_logits(params, batch["inputs"]) / temperature)
        return -(temperature**2) * jnp.mean(jnp.sum(y * smaller, axis=-1))

    assert_right(recipe["top_k_cost"], dense, params, batch, temperature=3.0)


@pytest.mark.slow
def test_contrastive_cost(recipe, draw):
    params = {"image_tower": draw(4, 3), "text_tower": draw(5, 3), "log_scale": np.float32(1.5)}
    batch = {"images": draw(6, 4), "texts": draw(6, 5)}

    def dense(params, batch):
        images, texts = batch["images"] @ params["image_tower"], batch["texts"] @ params["text_tower"]
        lengths = jnp.sqrt(jnp.sum(images**2, axis=1)[:, None] * jnp.sum(texts**2, axis=1)[None])
        z = jnp.exp(params["log_scale"]) * (images @ texts.T) / lengths
        right = jnp.trace(jax.nn.log_softmax(z, axis=1)) + jnp.trace(jax.nn.log_softmax(z, axis=0))
        return -right / 12

    assert_right(recipe["clip_cost"], dense, params, batch)


def test_ranking_metrics(recipe, draw):
    users, items = 16, 25
    params, inputs = network(draw, 5, items), draw(users, INPUTS)
    generator = np.random.default_rng(3)
    seen = np.stack([generator.permutation(items)[:8] for _ in range(users)]).astype(np.int32)
    labels = seen[:, -1].copy()  # Not seen, but for the first two.
    seen[2:, -1] = items
    batch = {"inputs": inputs, "labels": labels, "seen": seen}
    scores = numpy_logits(params, inputs)
    hit = reciprocal = gain = 0.0
    for user in range(users):
        others = set(range(items)) - set(seen[user].tolist())
        order = sorted(others | {labels[user].item()}, key=lambda item: -scores[user, item])
        position = 1 + order.index(labels[user])
        hit += (position <= 10) / users
        reciprocal += 1 / position / users
        gain += (position <= 10) / np.log2(1 + position) / users
    assert 0 < hit < 1
    metrics = jax.jit(recipe["ranking_metrics"])(*jax.tree.map(jnp.asarray, (params, batch)))
    truth = {"HR@10": hit, "MRR": reciprocal, "NDCG@10": gain}
    assert metrics == pytest.approx(truth, rel=1e-6)


@pytest.mark.slow
def test_z_loss_on_some_tokens(recipe, draw, params):
    generator = np.random.default_rng(4)
    batch = {
        "inputs": draw(3, 4, INPUTS),
        "labels": generator.integers(0, CLASSES, (3, 4)).astype(np.int32),
        "penalised": generator.random((3, 4)) < 0.5,
    }

    def dense(params, batch, z_loss):
        z = dense_logits(params, batch["inputs"])
        penalty = jax.nn.logsumexp(z[batch["penalised"]], axis=-1) ** 2
        return z_loss * jnp.mean(penalty) - jnp.mean(known_likelihoods(z, batch["labels"]))

    assert_right(recipe["cost_with_z_loss"], dense, params, batch, z_loss=0.1)


def test_tied_embeddings(recipe, draw):
    params = {"embedding": draw(CLASSES, 5), "hidden": draw(5, 5)}
    generator = np.random.default_rng(8)
    words, labels = generator.integers(0, CLASSES, (2, 6)).astype(np.int32)

    def dense(params, batch):
        z = jnp.tanh(params["embedding"][batch["words"]] @ params["hidden"]) @ params["embedding"].T
        return -jnp.mean(known_likelihoods(z, batch["labels"]))

    batch = {"words": words, "labels": labels}
    assert_right(recipe["cost_with_tied_embeddings"], dense, params, batch)


@pytest.mark.parametrize("place", [(), ("model",)])
def test_an_embedding_on_a_mesh(recipe, draw, place):
    params = {"embedding": draw(8, 5), "hidden": draw(5, 5), "weights": draw(5, 8), "bias": draw(8)}
    generator = np.random.default_rng(8)
    words, labels = generator.integers(0, 8, (2, 6)).astype(np.int32)

    def dense(params, batch):
        z = jnp.tanh(params["embedding"][batch["words"]] @ params["hidden"]) @ params["weights"]
        return -jnp.mean(known_likelihoods(z + params["bias"], batch["labels"]))

    batch = {"words": words, "labels": labels}
    truth = with_gradient(dense, params, batch)
    spec = jax.sharding.PartitionSpec
    explicit = (jax.sharding.AxisType.Explicit,) * 2
    places = {"embedding": spec(*place), "hidden": spec(), "weights": spec(None, "model")}
    places["bias"] = spec("model")
    with jax.set_mesh(jax.make_mesh((2, 4), ("data", "model"), axis_types=explicit)):
        arrays = jax.device_put((params, batch), (places, dict.fromkeys(batch, spec("data"))))
        found = jax.jit(jax.value_and_grad(recipe["cost_on_a_mesh"]))(*arrays)
    assert_close(found, truth, ulps=32)


def test_dropout_in_an_epoch(recipe, draw, params):
    data = {"inputs": draw(8, INPUTS), "labels": np.arange(8, dtype=np.int32) % CLASSES}
    data = jax.tree.map(jnp.asarray, data) | {"keys": jax.random.split(jax.random.key(3), 8)}
    cost, arrays = recipe["cost_with_dropout"], jax.tree.map(jnp.asarray, params)
    kept = np.stack([jax.random.bernoulli(key, 0.5, (5,)) for key in data["keys"]])

    def dense(params, batch):
        features = jnp.tanh(batch["inputs"] @ params["hidden"]) * kept / 0.5
        z = features @ params["weights"] + params["bias"]
        return -jnp.mean(known_likelihoods(z, batch["labels"]))

    batch = {name: np.asarray(data[name]) for name in ("inputs", "labels")}
    found = jax.jit(jax.value_and_grad(partial(cost, rate=0.5)))(arrays, data)
    assert_close(found, with_gradient(dense, params, batch), ulps=32)
    # The keys go with their examples.
    optimizer = optax.sgd(0.1)
    epoch = js.make_epoch(cost, optimizer, batch_size=4)
    _, costs = jax.eval_shape(epoch, js.init_state(arrays, optimizer), data, jax.random.key(0))
    assert costs.shape == (2,)


@pytest.fixture
def text(draw, params):
    """Tokens of which half are predicted right, and a fifth are padding; their logits."""
    inputs = draw(12, 10, INPUTS, scale=0.5)
    z = numpy_logits(params, inputs)
    generator = np.random.default_rng(5)
    guess = generator.integers(0, CLASSES, (12, 10))
    labels = np.where(generator.random((12, 10)) < 0.5, np.argmax(z, axis=-1), guess)
    labels[generator.random((12, 10)) < 0.2] = -100
    return {"inputs": inputs, "labels": labels.astype(np.int32)}, z[labels >= 0], labels[labels >= 0]


@pytest.mark.slow
def test_perplexity_accuracy_and_calibration(recipe, params, text):
    batch, z, labels = text
    a = np.exp(z) / np.sum(np.exp(z), axis=-1, keepdims=True)
    confidence, right = np.max(a, axis=-1), np.argmax(a, axis=-1) == labels
    run = {4: recipe["evaluate"], 15: jax.jit(recipe["evaluate"], static_argnums=2)}
    # Without jit the library refuses a label that names no class.
    for bins in (4, 15):
        error = 0.0
        for low in range(bins):
            among = (confidence > low / bins) & (confidence <= (low + 1) / bins)
            if np.any(among):
                error += np.mean(among) * abs(np.mean(right[among]) - np.mean(confidence[among]))
        likelihood = a[np.arange(len(a)), labels]
        truth = {
            "perplexity": np.exp(-np.mean(np.log(likelihood))), "accuracy": np.mean(right), "ECE": error
        }  # fmt: skip
        arrays = jax.tree.map(jnp.asarray, (params, batch))
        assert run[bins](*arrays, bins) == pytest.approx(truth, rel=3e-6)


@pytest.mark.slow
def test_metrics_beside_the_training_cost(recipe, params, text):
    batch, z, labels = text

    def dense(params, batch):
        kept = batch["labels"] >= 0
        z = dense_logits(params, batch["inputs"])
        return -jnp.sum(known_likelihoods(z, batch["labels"])) / np.sum(kept)

    arrays = jax.tree.map(jnp.asarray, (params, batch))
    (cost, metrics), gradient = recipe["value_and_gradient"](*arrays)
    assert_close((cost, gradient), with_gradient(dense, params, batch), ulps=32)
    log_a = z - np.log(np.sum(np.exp(z), axis=-1, keepdims=True))
    of_label = log_a[np.arange(len(labels)), labels]
    assert metrics == pytest.approx(
        {
            "perplexity": np.exp(-np.mean(of_label)),
            "accuracy": np.mean(np.argmax(z, axis=-1) == labels),
            "entropy": -np.mean(np.sum(np.exp(log_a) * log_a, axis=-1)),
        },
        rel=3e-6,
    )

    # Three batches, the last one short.
    optimizer = optax.sgd(0.1)
    epoch = js.make_epoch(recipe["cost_and_metrics"], optimizer, batch_size=5, has_aux=True)
    state = js.init_state(arrays[0], optimizer)
    _, stacked = jax.eval_shape(epoch, state, arrays[1], jax.random.key(0))
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(lambda _: (3,), (cost, metrics))
