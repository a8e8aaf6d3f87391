"""How Sphinx builds these pages.

npm install --prefix docs    # MathJax, which the pages are served with
sphinx-build -W docs docs/_build/html
"""

import ast
import inspect
import re
import textwrap

project = "jaxsoftmax"
author = "jaxsoftmax contributors"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "myst_nb"]
exclude_patterns = ["_build", "node_modules"]

# Pages: Markdown, whose code cells run anew at every build.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_timeout = 120
nb_execution_raise_on_error = True
nb_output_stderr = "remove-warn"
nb_merge_streams = True

# Docstrings: a name in single backticks is code, and a link if it is public.
default_role = "py:obj"
add_module_names = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
autosummary_generate = False
python_maximum_signature_line_length = 80

html_title = "jaxsoftmax"
html_theme = "furo"
html_theme_options = {"light_css_variables": {"font-size--small--4": "var(--font-size--small--3)"}}
pygments_dark_style = "github-dark"
html_favicon = "_static/icon.svg"
html_show_copyright = False
html_show_sphinx = False
html_show_sourcelink = False
html_copy_source = False
# One file that renders to SVG needs no fonts; what its menu would load besides is not there.
html_static_path = ["_static", "node_modules/mathjax/es5/tex-svg.js"]
html_css_files = ["pages.css"]
mathjax_path = "tex-svg.js"
mathjax3_config = {"options": {"enableMenu": False}}


def signature_as_written(_app, _what, _name, obj, *_):
    """The signature with annotations as the source has them: `FloatArray`, not all it stands for."""
    node = ast.parse(textwrap.dedent(inspect.getsource(obj))).body[0]
    if isinstance(node, ast.FunctionDef):
        node.args.args = [argument for argument in node.args.args if argument.arg != "self"]
        return f"({ast.unparse(node.args)})", ast.unparse(node.returns)
    fields = [ast.unparse(part) for part in node.body if isinstance(part, ast.AnnAssign)]
    return f"({', '.join(fields)})", None


# A docstring's formulas, in plain characters, and what TeX calls these.
TEX = {
    "Σ": r"\sum", "∂": r"\partial ", "½": r"\tfrac12", "−": "-", "²": "^2", "ᵀ": r"^\top", "⊙": r"\odot",
    "≠": r"\ne ", "₁": "_1", "₂": "_2", "₃": "_3", "α": r"\alpha ", "δ": r"\delta", "ζ": r"\zeta ",
    "λ": r"\lambda ", "[": r"\bigl[", "]": r"\bigr]", "ln ": r"\ln ", "exp": r"\exp",
    "log1p": r"\mathrm{log1p}", "softmax": r"\mathrm{softmax}", "ReLU": r"\mathrm{ReLU}",
    "hidden": r"\mathrm{hidden}", " if ": r"\quad\text{if }", ", ": r",\qquad ",
    " otherwise": r"\quad\text{otherwise}",
}  # fmt: skip


def in_tex(formula):
    """A formula of a docstring."""
    formula = re.sub(r"\(([^()]*\(.*\).*)\)/(N)", r"\\frac{\1}{\2}", formula)
    formula = re.sub(r"(∂[^/ ]*|[1αλ])/(∂[^ ]+|[NK2])", r"\\frac{\1}{\2}", formula)
    formula = re.sub(r"(exp \S+) / (Σ_k exp \S+)", r"\\frac{\1}{\2}", formula)
    return re.sub("|".join(map(re.escape, TEX)), lambda found: TEX[found[0]], formula)


def with_formulas(lines):
    """The lines of a docstring, its formulas typeset: what is indented above the first section."""
    is_above = True
    for line in lines:
        is_above = is_above and not re.fullmatch(r"[A-Z]\w+:", line)
        if is_above and line.startswith("    "):
            yield from (f".. math:: {in_tex(line.strip())}", "")
        else:
            yield line


def docstring_as_markup(_app, _what, _name, obj, _options, lines):
    """What the docstrings leave to the reader's eye, said to Sphinx."""
    lines[:] = with_formulas(lines)
    arguments = "|".join(inspect.signature(obj).parameters)
    for number, line in enumerate(lines):
        # Before napoleon, which would take what stands before a colon for the type.
        line = ":returns:" if line == "Returns:" else line
        # A function's own argument is no link to the public function of that name.
        line = re.sub(rf"(?<!`)`({arguments})`(?!`)", r"``\1``", line)
        lines[number] = line.replace("(*batch", r"(\*batch")


def names_break_between_words(_app, _page, _template, context, _tree):
    """On a narrow screen a long name in code goes on after one of its own signs, not inside a word."""
    context["body"] = re.sub(
        r'(?<=<span class="pre">)[^<]+',
        lambda code: re.sub(r"(?<=[_.(,=/])(?=\w)|(?<=[a-z])(?=[A-Z])", "<wbr>", code[0]),
        context.get("body", ""),
    )


def setup(app):
    """Connects all, and docstrings ahead of napoleon."""
    app.connect("html-page-context", names_break_between_words)
    app.connect("autodoc-process-signature", signature_as_written)
    app.connect("autodoc-process-docstring", docstring_as_markup, priority=400)
