"""Every public name tells its shapes, dtypes, errors and edges, and shows an example."""

import inspect
import re

import pytest

import jaxsoftmax as js

PUBLIC = {name: value for name, value in vars(js).items() if name[0] != "_" and callable(value)}
FUNCTIONS = {name: value for name, value in PUBLIC.items() if not isinstance(value, type)}
CLASSES = {name: value for name, value in PUBLIC.items() if isinstance(value, type)}
RAISES_NOTHING = {"init_state"}  # It hands its arguments on.

SHAPE = re.compile(r"\(\*?\w+(, \w+)*,?\)|\(\)|\bshapes?\b|scalar|broadcastable to")
DTYPE = re.compile(r"float32|int32|float64|\bdtype\b|floating-point|[Ii]ntegers|\bbool\b|number for each")
# What may come in besides ordinary numbers, or nothing at all.
EDGE = re.compile(r"NaN|inf\b|infinity|No examples|weight 0")
AS_FOR = re.compile(r"[Aa]s (?:for|from) `(\w+)`(?: and `(\w+)`)?|as `(\w+)` defines")

functions = pytest.mark.parametrize("name", FUNCTIONS)
classes = pytest.mark.parametrize("name", CLASSES)


def parameters(name):
    return inspect.signature(FUNCTIONS[name]).parameters


def sections(value):
    """The docstring's text by section, what stands before the first one under ""."""
    parts = re.split(r"^(\w+):\n", inspect.getdoc(value), flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def entries(text):
    """Text by name in a section of names, or of types."""
    found = re.findall(r"^    \*{0,2}(\w+): (.*(?:\n {5,}.*)*)", text, re.MULTILINE)
    return {name: re.sub(r"\s+", " ", entry) for name, entry in found}


def with_what_it_names(text, look):
    """The text, and what `look` finds in each function that it says to read instead."""
    names = [name for groups in AS_FOR.findall(text) for name in groups if name]
    return " ".join([text, *(with_what_it_names(look(name), look) for name in names)])


def argument(function, name):
    def look(function):
        return entries(sections(PUBLIC[function])["Args"])[name]

    return with_what_it_names(look(function), look)


def section(function, title):
    def look(function):
        return sections(PUBLIC[function])[title]

    return with_what_it_names(look(function), look)


def is_array(annotation):
    return "Array, '...']" in str(annotation)


def test_all_public_names_are_looked_at():
    assert len(PUBLIC) == 26
    assert len(CLASSES) == 7
    assert sum(is_array(p.annotation) for p in parameters("log_likelihood_cost").values()) == 5


@pytest.mark.parametrize("name", PUBLIC)
def test_it_begins_with_one_line_and_has_an_example(name):
    first, *rest = inspect.getdoc(PUBLIC[name]).splitlines()
    assert first.endswith(".")
    assert rest[0] == ""
    assert ">>> " in sections(PUBLIC[name])["Example"]


@functions
def test_every_parameter_is_described_and_no_other(name):
    assert list(entries(sections(FUNCTIONS[name])["Args"])) == list(parameters(name))


@functions
def test_arrays_have_a_shape_and_a_dtype(name):
    for parameter in parameters(name).values():
        if is_array(parameter.annotation):
            text = argument(name, parameter.name)
            assert SHAPE.search(text), f"shape of {parameter.name}: {text}"
            assert DTYPE.search(text), f"dtype of {parameter.name}: {text}"


@functions
def test_what_is_returned_has_a_shape_a_dtype_and_edges(name):
    text = section(name, "Returns")
    # A function given back, a network of given sizes and a comparison hold no array of its own.
    if name not in ("without_custom_rules", "init_network", "compare_gradients"):
        assert SHAPE.search(text)
        assert DTYPE.search(text)
    if name not in ("without_custom_rules", "init_network"):
        assert EDGE.search(text)


@functions
def test_what_it_raises_is_told(name):
    if name not in RAISES_NOTHING:
        raised = entries(sections(FUNCTIONS[name])["Raises"])
        assert raised
        assert set(raised) <= {"TypeError", "ValueError", "RuntimeError"}
        for error, text in raised.items():
            # An error that is described elsewhere is raised there too.
            for other in [other for groups in AS_FOR.findall(text) for other in groups if other]:
                assert error in entries(sections(FUNCTIONS[other])["Raises"])


@classes
def test_every_field_is_described(name):
    fields = entries(sections(CLASSES[name])["Attributes"])
    assert tuple(fields) == CLASSES[name]._fields


@classes
def test_every_method_and_its_parameters_are_described(name):
    for method, function in vars(CLASSES[name]).items():
        if inspect.isfunction(function) and method[0] != "_":
            described = entries(sections(function).get("Args", ""))
            assert list(described) == list(inspect.signature(function).parameters)[1:], method
