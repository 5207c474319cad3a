"""A docstring says what a thing is or does: a noun phrase for things, an imperative for functions, no question word."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import qeval

PACKAGE = Path(qeval.__file__).parent
_QUESTION = re.compile(r"(What|Where|How|Whether|Which|When|Who|Why)\b")


def test_no_docstring_opens_with_a_question_word():
    lines = [line for path in sorted(PACKAGE.rglob("*.py")) for line in questions(path)]
    assert not lines, "write a noun phrase for a thing, an imperative for a function:\n" + "\n".join(lines)


@pytest.mark.parametrize(
    "source",
    [
        '"""What it does."""',
        'class A:\n    """Where it lies."""',
        'class A:\n    @property\n    def n(self):\n        """How many there are."""',
        'async def _f():\n    """Which one."""',
    ],
)
def test_question_words_are_seen(tmp_path, source):
    module = tmp_path / "m.py"
    module.write_text(source)
    assert len(list(questions(module))) == 1
    module.write_text(re.sub(_QUESTION, "The thing that", source))
    assert not list(questions(module))


def questions(path: Path) -> Iterator[str]:
    """Yield the docstrings of a module that open with a question word, with where they are."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            if _QUESTION.match(text):
                yield f"{path}:{getattr(node, 'lineno', 1)}: {text.splitlines()[0]}"
