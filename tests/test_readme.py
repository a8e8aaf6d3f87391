"""Every code block of the README runs, in order, as a reader would paste it."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.usefixtures("standard_promotion")
def test_every_python_block_runs(capsys):
    text = README.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", text, re.DOTALL)
    assert len(blocks) >= 2
    names = {}
    for code, output in blocks:
        exec(compile(code, "README.md", "exec"), names)
        printed = capsys.readouterr().out
        if output:
            assert printed == output


def test_the_two_commands_are_in_it():
    text = README.read_text(encoding="utf-8")
    assert "pip install '.[examples]' && python examples/digits.py" in text
    assert "pip install '.[test]' && pytest" in text


def test_every_public_name_is_in_it():
    import jaxsoftmax as js

    text = README.read_text(encoding="utf-8")
    public = [name for name, value in vars(js).items() if name[0] != "_" and callable(value)]
    assert [name for name in public if f"`{name}" not in text] == []
