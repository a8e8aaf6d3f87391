"""The examples run small, and their results are right."""

import argparse
import gc
import gzip
import importlib.util
import itertools
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import every

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture
def example(monkeypatch):
    """Imports an example by name, as running it would."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(sys, "argv", [f"{name}.py"])  # tokamax reads pytest's options otherwise
        spec.loader.exec_module(module)
        return module

    return load


def test_digits_learns_and_its_gradients_agree(example, tmp_path, capsys):
    picture = tmp_path / "digits.png"
    result = example("digits").main(["--output", str(picture)])
    assert result.history.test_accuracy[-1] >= 0.97
    assert result.history.train_accuracy[-1] >= 0.99
    assert list(result.gradient_errors) == [
        "custom_vjp", "plain jax.grad", "backpropagate", "central differences"
    ]  # fmt: skip
    for way, errors in result.gradient_errors.items():
        assert len(errors) == 4
        assert max(errors.values()) <= 16, way
    assert picture.stat().st_size > 20_000
    exact, custom, textbook = result.gradient_where_sure.values()
    assert custom == pytest.approx(exact, rel=1e-5)
    assert textbook == 0 > exact
    printed = capsys.readouterr().out
    assert "test accuracy     97" in printed
    assert "All four agree" in printed


def without_simulated_devices():
    return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}


SMALL = ["--hidden", "16", "--batch-size", "512"]


@pytest.fixture
def digits(example, monkeypatch):
    """The example without what comes after training."""
    module = example("digits")
    monkeypatch.setattr(module, "gradient_four_ways", lambda *_: {"left out": {"here": 0.0}})
    monkeypatch.setattr(module, "draw", lambda *_: None)
    return module


def assert_same_run(actual, expected):
    assert actual.history == expected.history
    for a, b in zip(jax.tree.leaves(actual.network), jax.tree.leaves(expected.network), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_digits_ends_with_the_same_bits_however_often_it_is_killed(digits, tmp_path, monkeypatch):
    options = [*SMALL, "--epochs", "30", "--output", str(tmp_path / "a.png")]
    folder = tmp_path / "run"
    # Forked from a process that has imported everything and started nothing.
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(EXAMPLES))
        starter = multiprocessing.get_context("forkserver")
        starter.set_forkserver_preload(["digits", "jax"])
        moments = np.random.default_rng().uniform(0, 1.5, 3)
        for moment in moments:
            process = starter.Process(target=digits.main, args=([*options, "--checkpoint", str(folder)],))
            process.start()
            # The first for certain while it trains, the others at any moment.
            while process.is_alive() and not (folder / "1").exists() and moment == moments[0]:
                time.sleep(0.05)
            time.sleep(moment)
            process.kill()
            process.join()
    assert list(folder.iterdir())
    resumed = digits.main([*options, "--checkpoint", str(folder)])
    assert_same_run(resumed, digits.main(options))
    assert resumed.history != digits.main([*options, "--seed", "1"]).history
    assert len(list(folder.iterdir())) == 3


def flipped(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


# Where a read fails, orbax leaves tasks that Python complains about when it finds them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "damage", every(2, [flipped, lambda file: os.truncate(file, 100), lambda file: file.unlink()])
)
@pytest.mark.slow
def test_digits_goes_on_from_the_checkpoint_before_a_damaged_one(digits, tmp_path, capsys, damage):
    def run(epochs):
        return digits.main([*SMALL, "--epochs", str(epochs), "--checkpoint", str(tmp_path / "run")])

    run(3)
    newest = tmp_path / "run" / "3" / "state"
    damage(max((file for file in newest.rglob("*") if file.is_file()), key=lambda f: f.stat().st_size))
    resumed = run(4)
    gc.collect()
    assert "the checkpoint of epoch 3 is damaged" in capsys.readouterr().err
    assert_same_run(resumed, digits.main([*SMALL, "--epochs", "4"]))


@pytest.mark.slow
def test_digits_stops_in_words_and_goes_on(digits, tmp_path, capsys, monkeypatch):
    options = [*SMALL, "--checkpoint", str(tmp_path / "run")]

    def interrupt(*_):
        raise KeyboardInterrupt

    digits.main([*options, "--epochs", "2"])
    with monkeypatch.context() as patch:
        patch.setattr(digits.Checkpoints, "save", interrupt)
        with pytest.raises(SystemExit) as stopped:
            digits.main([*options, "--epochs", "4"])
    assert stopped.value.code == 130
    assert "interrupted after 2 epochs: --checkpoint" in capsys.readouterr().err

    with monkeypatch.context() as patch:
        # Pressed while it gets ready, Ctrl-C waits until it is.
        ready = []
        prepare = digits.prepare
        patch.setattr(
            digits, "prepare", lambda *a: ready.extend([signal.raise_signal(signal.SIGINT), prepare(*a)])
        )
        with pytest.raises(SystemExit) as stopped:
            digits.main([*options, "--epochs", "4"])
    assert stopped.value.code == 130
    assert len(ready) == 2
    assert capsys.readouterr().err.endswith("\ninterrupted\n")

    import resource  # Not on Windows, where all else here can be imported.

    # A disk is full for whoever may write no file longer than 1 KiB, so here while it saves.
    save = digits.Checkpoints.save

    def save_on_full_disk(*arguments):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
        try:
            save(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch:
        patch.setattr(digits.Checkpoints, "save", save_on_full_disk)
        with pytest.raises(SystemExit) as stopped:
            digits.main([*options, "--epochs", "4"])
    assert re.search(
        r"^cannot write the checkpoint of epoch 3 to .*File too large.*\nthat of epoch 2 is kept$",
        str(stopped.value.code),
        re.DOTALL,
    )
    assert_same_run(digits.main([*options, "--epochs", "4"]), digits.main([*SMALL, "--epochs", "4"]))
    with pytest.raises(SystemExit, match="holds a run with hidden 16, not 8: use the options"):
        digits.main([*options, "--hidden", "8"])
    with pytest.raises(SystemExit, match="holds 4 epochs, more than --epochs 3: ask for at least"):
        digits.main([*options, "--epochs", "3"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "argument --epochs: must be a whole number from 1 to 100,000, got '0'"),
        (["--batch-size", "1.5"], "--batch-size: must be a whole number from 1"),
        (["--hidden", "many"], "--hidden: must be a whole number from 1"),
        (["--learning-rate", "0"], "--learning-rate: must be a number above 0, got '0'"),
        (["--learning-rate", "nan"], "--learning-rate: must be a number above 0, got 'nan'"),
        (["--penalty", "-1"], "--penalty: must be a number of at least 0, got '-1'"),
        (["--seed", "-1"], "--seed: must be a whole number from 0"),
        (["--output", "picture.xyz"], "--output: must end in one of ."),
        (["--output", "no/such/folder/a.png"], "--output: cannot be written: "),
        (["--data", "no/such/folder"], "--data: no/such/folder: no such folder"),
    ],
)
def test_digits_refuses_nonsense(example, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        example("digits").main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_digits_says_when_training_diverged(example, tmp_path):
    output = tmp_path / "a.png"
    with pytest.raises(SystemExit, match="training diverged"):
        example("digits").main(["--epochs", "3", "--learning-rate", "1e30", "--output", str(output)])
    assert not output.exists()


def idx(array):
    shape = np.array(np.shape(array), ">u4").tobytes()
    return bytes([0, 0, 8, np.ndim(array)]) + shape + np.asarray(array, np.uint8).tobytes()


@pytest.mark.slow
def test_digits_from_a_folder_train_as_scikit_learns_do(example, tmp_path, capsys, monkeypatch):
    digits = example("digits")
    monkeypatch.setattr(digits, "gradient_four_ways", lambda *_: {"another test's": {}})
    data = digits.load()
    data = data._replace(test=digits.Examples(data.test.x[:300], data.test.labels[:300]))
    for name, sign, part in (("train", "-", data.training), ("t10k", ".", data.test)):
        images = np.asarray(part.x * 240).reshape(-1, 8, 8)
        (tmp_path / f"{name}-images{sign}idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{name}-labels{sign}idx1-ubyte.gz").write_bytes(gzip.compress(idx(part.labels)))
    options = ["--epochs", "2", "--hidden", "16", "--output", str(tmp_path / "a.png")]
    result = digits.main([*options, "--data", str(tmp_path)])
    parsed = digits.parse(options)
    assert result.history == digits.train(parsed, data, digits.prepare(parsed, data))[1]
    assert "of 300 images" in capsys.readouterr().out


IMAGES, LABELS = idx(np.ones((3, 2, 2))), idx([0, 1, 2])
COMPRESSED = gzip.compress(IMAGES, mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images", None, "no such file, nor train-images.idx3-ubyte, train-images-idx3-ubyte.gz, "),
        ("train-images", b"", "ends after 0 of the 16 bytes of its header"),
        ("t10k-labels", LABELS[:6], "ends after 6 of the 8 bytes of its header"),
        ("train-images", IMAGES[:-1], "truncated: its header announces 3 × 2 × 2 bytes, 11 follow"),
        ("t10k-images", IMAGES + b"!", "too long: its header announces 3 × 2 × 2 bytes, 13 follow"),
        ("train-images", LABELS, "starts with 00 00 08 01, where bytes along 3 axes start with"),
        ("train-labels", b"P5 9", "starts with 50 35 20 39, where bytes along 1 axis start with"),
        ("t10k-images", idx(np.ones((0, 2, 2))), "holds nothing, its header announces 0 × 2 × 2 bytes"),
        ("train-labels", idx([0, 1]), "has 2 labels for 3 images in train-images-idx3-ubyte"),
        ("t10k-images", idx(np.ones((3, 1, 4))), "has images of 1 × 4 pixels, where those for"),
        ("t10k-labels", idx([0, 3, 1]), "has label 3, where those for training end with 2"),
        ("train-images.gz", IMAGES, "Not a gzipped file"),
        ("train-images.gz", COMPRESSED[:-9], "Compressed file ended before the end-of-stream marker"),
        ("train-images.gz", COMPRESSED[:-8] + b"!" * 8, "CRC check failed"),
        ("train-images.gz", COMPRESSED[:10] + b"!" * 20, "Error -3 while decompressing data"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_digits_says_which_file_is_damaged(example, tmp_path, capsys, name, content, message):
    for part in ("train", "t10k"):
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(IMAGES)
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(LABELS)
    name, _, end = name.partition(".")
    damaged = tmp_path / f"{name}-idx{3 if 'images' in name else 1}-ubyte"
    damaged.unlink()
    if end:
        damaged = damaged.with_suffix(".gz")
    if content is not None:
        damaged.write_bytes(content)
    output = tmp_path / "a.png"
    with pytest.raises(SystemExit) as stopped:
        example("digits").main(["--data", str(tmp_path), "--output", str(output)])
    assert stopped.value.code == 2
    assert f"argument --data: {damaged}: {message}" in capsys.readouterr().err
    assert not output.exists()


def test_derivation_agrees_with_autodiff(example):
    differences = example("derivation").main()
    assert len(differences) == 10
    assert max(differences.values()) < 1e-6


@pytest.mark.slow
def test_learning_slowdown(example, tmp_path):
    picture = tmp_path / "slowdown.png"
    runs = example("learning_slowdown").main(["--epochs", "30", "--output", str(picture)])
    quadratic, log_likelihood = runs["quadratic"], runs["log-likelihood"]
    assert quadratic.gradient_norm[0] < 0.02 * log_likelihood.gradient_norm[0]
    assert np.argmax(quadratic.accuracy >= 0.9) > 3 * np.argmax(log_likelihood.accuracy >= 0.9) > 0
    assert picture.exists()


@pytest.mark.slow
def test_softmax_collapse_stops_the_rounded_cost_alone(example, tmp_path):
    arguments = ["--modulus", "11", "--steps", "20000", "--learning-rate", "0.02"]
    runs = example("softmax_collapse").main([*arguments, "--output", str(tmp_path / "collapse.png")])
    rounded, exact = runs["optax"], runs["jaxsoftmax"]
    assert rounded.train_accuracy[-1] == exact.train_accuracy[-1] == 1
    assert np.max(rounded.silent_labels) > 0.5
    assert np.all(exact.silent_labels == 0)
    assert np.all(exact.silent_examples == 0)
    assert np.any(rounded.cost == 0)
    np.testing.assert_allclose(exact.cost, exact.true_cost, rtol=0.05)
    assert exact.true_cost[-1] < 1e-9
    assert rounded.true_cost[-1] > 100 * exact.true_cost[-1]


@pytest.mark.slow
def test_compare_gradients_finds_the_wrong_rule(example, capsys):
    found = example("compare_gradients").main()
    assert [name for name, each in found.items() if not all(row.is_right() for row in each.rows)] == [
        "the root for a constant"
    ]
    assert len(found) == 4
    assert [row.is_right() for row in found["the root for a constant"].rows] == [True, False, True]
    assert "state['hidden']['kernel']" in capsys.readouterr().out


@pytest.fixture(scope="module")
def small_text(tmp_path_factory):
    """Sentences whose last name is four words back, so that bigrams cannot tell it; 1,631 words."""
    generator = np.random.default_rng(0)
    names = [f"n{number}" for number in (3000 * generator.random((6000, 2)) ** 6).astype(int).flat]
    pairs = zip(names[::2], names[1::2], strict=True)
    path = tmp_path_factory.mktemp("text") / "small.txt"
    path.write_text("\n".join(f"{a} met {b} and {a} left." for a, b in pairs), encoding="utf-8")
    return path


def tiny(text, picture, *more):
    # A part of an epoch has 9,450 words: nine batches, and none of another size to compile for.
    options = ["--epochs", "2", "--batch-size", "1050", "--embedding", "16", "--hidden", "32"]
    return ["--text", str(text), *options, "--output", str(picture), *more]


@pytest.mark.slow
def test_language_model_beats_bigrams_with_few_logits_as_with_all(example, small_text, tmp_path, capsys):
    main, picture = example("language_model").main, tmp_path / "a.png"
    head = main(tiny(small_text, picture))
    assert len(head.history.perplexity) == 8
    assert head.history.perplexity[-1] < 0.6 * head.baseline.perplexity
    assert head.memory["head"] < 0.5 * head.memory["dense"]
    assert picture.stat().st_size > 20_000
    printed = capsys.readouterr().out
    assert "37,800 words to learn from, 2,070 of them distinct; 4,200 held out; 1,631 in" in printed
    assert f"{head.history.perplexity[-1]:.1f} by the model, {head.baseline.perplexity:.1f} by" in printed
    dense = main(tiny(small_text, picture, "--dense"))
    pairs = zip(jax.tree.leaves(dense.model), jax.tree.leaves(head.model), strict=True)
    assert any(np.any(a != b) for a, b in pairs)
    np.testing.assert_allclose(dense.history.cost, head.history.cost, rtol=1e-4)
    np.testing.assert_allclose(dense.history.perplexity, head.history.perplexity, rtol=1e-3)


@pytest.mark.slow
def test_language_model_gives_the_same_result_for_the_same_seed(
    example, small_text, tmp_path, monkeypatch
):
    module = example("language_model")
    monkeypatch.setattr(module, "draw", lambda *_: None)
    main = module.main
    first, again, other = (
        main(tiny(small_text, tmp_path / "a.png", "--epochs", "1", *more))
        for more in ([], [], ["--seed", "1"])
    )
    assert first.history[:2] == again.history[:2]
    assert first.samples == again.samples
    assert first.history.cost != other.history.cost
    assert first.samples != other.samples
    assert all(len(text.split()) > 20 and "<unknown>" not in text for text in first.samples)


def bigram_perplexity(training, held_out, vocabulary, weight):
    """Word by word, from the definition."""
    training, held_out = (
        ["<unknown>", *(word if word in vocabulary else "<unknown>" for word in words)]
        for words in (training, held_out)
    )
    single, first = Counter(training[1:]), Counter(training[:-1])
    pairs = Counter(itertools.pairwise(training))
    total = 0.0
    for a, b in itertools.pairwise(held_out):
        p = (single[b] + 1) / (len(training) - 1 + len(vocabulary) + 1)
        total += math.log(weight * pairs[a, b] / first[a] + (1 - weight) * p if first[a] else p)
    return math.exp(-total / (len(held_out) - 1))


def test_language_model_baseline_is_the_interpolated_bigram_model(example, small_text):
    words = small_text.read_text(encoding="utf-8").replace(".", " .").split()
    training, held_out = words[:37_800], words[37_800:]
    vocabulary = {word for word, count in Counter(training).items() if count > 1}
    module = example("language_model")
    numbers = {word: number for number, word in enumerate(["<unknown>", *vocabulary])}
    baseline = module.interpolated_bigrams([training], [held_out], numbers)
    expected = bigram_perplexity(training, held_out, vocabulary, baseline.weight)
    assert baseline.perplexity == pytest.approx(expected, rel=1e-9)
    counted, development = training[:34_020], training[34_020:]
    weights = [baseline.weight + step for step in (-0.01, 0, 0.01)]
    below, best, above = (bigram_perplexity(counted, development, vocabulary, w) for w in weights)
    assert best < min(below, above)


def test_language_model_holds_out_every_tenth_text_by_name(example, tmp_path):
    module = example("language_model")
    for number in range(20, 0, -1):
        text = f"text {number} isn't long: " + "so, " * 50
        (tmp_path / f"{number:02}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "other.json").write_bytes(b"\xff")
    training, held_out = module.split(module.read(str(tmp_path)))
    assert [text[:5] for text in held_out] == [
        ["text", number, "isn't", "long", ":"] for number in ("10", "20")
    ]
    assert len(training) == 18


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.txt", None, "no.txt: No such file"),
        ("folder", None, "folder: no *.txt in this folder"),
        ("a.txt", b"not \xff text", "a.txt: not UTF-8 at byte 4"),
        ("a.txt", b"word " * 1110, "a.txt: too little text, 999 words to learn from instead of 1,000"),
    ],
)
def test_language_model_refuses_what_it_cannot_read(example, tmp_path, capsys, name, content, message):
    (tmp_path / "folder").mkdir()
    if content:
        (tmp_path / name).write_bytes(content)
    picture = tmp_path / "picture.png"
    with pytest.raises(SystemExit) as stopped:
        example("language_model").main(["--text", str(tmp_path / name), "--output", str(picture)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not picture.exists()


def test_language_model_refuses_nonsense(example, small_text, tmp_path, capsys):
    main = example("language_model").main
    picture = tmp_path / "a.png"
    for option, value, message in (
        ("--context", "100000", "--context: must be a whole number from 1 to 100, got '100000'"),
        ("--temperature", "0", "--temperature: must be a number above 0, got '0'"),
        ("--epochs", "1.5", "--epochs: must be a whole number from 1"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(tiny(small_text, picture, option, value))
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert not picture.exists()


@pytest.mark.slow
def test_language_model_says_when_training_diverged(example, small_text, tmp_path):
    picture = tmp_path / "a.png"
    with pytest.raises(SystemExit, match="training diverged"):
        example("language_model").main(tiny(small_text, picture, "--learning-rate", "1e30"))
    assert not picture.exists()


@pytest.mark.slow
def test_distillation_teaches_the_student_without_logits(example, small_text, tmp_path, capsys):
    picture = tmp_path / "a.png"
    teacher = ["--teacher-every", "1", "--teacher-width", "16"]
    student = ["--student-every", "20", "--student-width", "8"]
    training = ["--epochs", "20", "--batch-size", "1050", "--learning-rate", "0.02"]
    options = ["--text", str(small_text), *teacher, *student, *training, "--output", str(picture)]
    result = example("distillation").main(options)
    teacher, alone, taught = result.runs.values()
    assert list(result.runs) == ["teacher", "alone", "taught"]
    assert len(taught.cost) == len(alone.perplexity) == 20
    assert taught.cost[-1] < 0.8 * taught.cost[0]
    assert teacher.perplexity[-1] < taught.perplexity[-1] < 0.9 * min(alone.perplexity)
    assert f"taught    {taught.perplexity[-1]:6.1f} at the end" in capsys.readouterr().out
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize("weight", every(2, [0.3, 1.0]))
@pytest.mark.slow
def test_distillation_has_the_gradient_of_all_logits(example, weight, monkeypatch):
    module = example("distillation")
    monkeypatch.setattr(module, "REPEATS", 1)
    options = argparse.Namespace(context=2, temperature=2.0, weight=weight)
    keys, generator = jax.random.split(jax.random.key(0)), np.random.default_rng(0)
    numbers = generator.integers(0, 5000, (600, 3))
    batch = module.lm.Examples(jax.numpy.asarray(numbers[:, :2]), jax.numpy.asarray(numbers[:, 2]))
    teacher, student = (module.untrained(2, w, k, batch, 5000) for w, k in zip((8, 4), keys, strict=True))
    # Sharper than a new model, so that its answers differ from row to row.
    teacher = teacher._replace(embedding=10 * teacher.embedding)
    costs = [partial(cost, options, teacher) for cost in (module.taught_cost, module.dense_cost)]
    found, expected = (jax.jit(jax.value_and_grad(cost))(student, batch) for cost in costs)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())
    steps = module.measure(dict(zip(("in blocks", "dense"), costs, strict=True)), student, batch)
    assert steps["in blocks"].memory < 0.5 * steps["dense"].memory


@pytest.mark.parametrize(("framework", "lines"), [("flax_nnx", 11), ("equinox_mlp", 0)])
@pytest.mark.slow
def test_frameworks_learn_the_same_with_one_line_changed(example, framework, lines, capsys):
    accuracy, difference = example(framework).main([])
    assert list(accuracy) == list(difference) == ["optax_cost", "dense_cost", "head_cost"]
    assert min(accuracy.values()) >= 0.97
    assert max(difference.values()) < 1e-6
    of_epochs = re.findall(r"make_epoch, .* accuracy ([\d.]+)%", capsys.readouterr().out)
    assert len(of_epochs) == lines
    assert all(float(percent) >= 97 for percent in of_epochs[-2:])


@pytest.mark.slow
def test_gradient_accumulation_needs_the_whole_weight(example):
    errors = example("gradient_accumulation").main()
    assert errors.pop("mean of the means") > 0.1
    assert len(errors) == 2
    assert max(errors.values()) < 1e-6


def distributed(*options):
    return subprocess.Popen(
        [sys.executable, str(EXAMPLES / "distributed.py"), *options],
        env=without_simulated_devices(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_distributed_refuses_no_epochs(example, capsys):
    with pytest.raises(SystemExit):
        example("distributed").main(["--epochs", "0"])
    assert "argument --epochs: must be a whole number from 1, got 0" in capsys.readouterr().err


@pytest.mark.slow
def test_distributed_processes_agree_with_one_device():
    process = distributed("--epochs", "2")
    output, errors = process.communicate(timeout=90)
    assert process.returncode == 0, errors
    for job in ("network on digits", "head of 9,999 classes"):
        assert f"{job}: the same bits in all 2 processes" in output
        costs = [float(cost) for cost in re.findall(rf"{job}, epoch \d: cost ([\d.]+)", output)]
        assert costs[1] < 0.7 * costs[0]
        (difference,) = re.findall(rf"{job}: (\S+) from one device", output)
        assert float(difference) < 1e-5


@pytest.mark.slow
def test_distributed_processes_end_when_one_is_killed():
    victim = 1
    process = distributed("--epochs", "100000")
    pids = [int(pid) for pid in process.stdout.readline().split()[2:]]
    while "epoch 2" not in process.stdout.readline():
        pass
    os.kill(pids[victim], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"process {victim} ended with code -9" in errors
    assert f"process {1 - victim}: stopped, as another one has" in errors or "another task died" in errors
