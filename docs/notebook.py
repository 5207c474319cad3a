"""The notebook of these pages: `python -m docs.notebook` executes it and stores its output.

Executing takes minutes, so `docs.generate` makes the page from the stored output alone.
"""

import ast
import base64
import contextlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

NOTEBOOK = Path(__file__).parent / "guides" / "notebook.ipynb"
_RESOLUTION = 80
"""Dots an inch of a stored figure."""


def execute(notebook: dict[str, Any]) -> None:
    """Run the code cells in order, in one namespace and an empty folder, and store their output in the notebook.

    Args:
        notebook: A notebook of format 4, as JSON; its outputs are replaced.
    """
    names: dict[str, Any] = {}
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for count, cell in enumerate(_code_cells(notebook), 1):
                cell |= {"execution_count": count, "outputs": _outputs("".join(cell["source"]), names, count)}
        finally:
            os.chdir(home)


def _outputs(source: str, names: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Return what a cell prints, and the value of its last line where that is an expression."""
    body = ast.parse(source).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body, []), "<cell>", "exec"), names)
        value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names) if last else None

    outputs: list[dict[str, Any]] = []
    if text := printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)})
    if value is not None:
        result = {"output_type": "execute_result", "execution_count": count, "metadata": {}, "data": _shown(value)}
        outputs.append(result)
    return outputs


def _shown(value: Any) -> dict[str, Any]:
    """Return a value's forms by media type, as a notebook shows them."""
    forms: dict[str, Any] = {"text/plain": repr(value).splitlines(keepends=True)}
    if isinstance(value, Figure):
        image = io.BytesIO()
        value.savefig(image, format="png", dpi=_RESOLUTION, bbox_inches="tight", metadata={"Software": None})
        forms["image/png"] = base64.b64encode(image.getvalue()).decode()
    elif hasattr(value, "_repr_html_"):
        forms["text/html"] = value._repr_html_().splitlines(keepends=True)
    return forms


def page(notebook: Mapping[str, Any]) -> str:
    """Return a notebook as a Markdown page: texts, code, and what it printed or showed."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        parts += [_output(cell["execution_count"], output) for output in cell["outputs"]]
    return "\n\n".join(parts) + "\n"


def _output(count: int, output: Mapping[str, Any]) -> str:
    """Return one output as Markdown: its figure, its HTML, or its text."""
    forms = output.get("data", {})
    if "image/png" in forms:
        return f"![The figure that cell {count} shows](notebook/figure-{count}.png)"
    if "text/html" in forms:
        html = re.sub(r"<style.*?</style>", "", "".join(forms["text/html"]), flags=re.S)
        return "\n".join(line for line in html.splitlines() if line.strip())  # a blank line would end it in Markdown
    return "```text\n" + "".join(forms.get("text/plain", output.get("text", ()))).rstrip() + "\n```"


def figures(notebook: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the PNG of each figure that the page shows."""
    for cell in _code_cells(notebook):
        for output in cell["outputs"]:
            if image := output.get("data", {}).get("image/png"):
                yield f"figure-{cell['execution_count']}.png", base64.b64decode(image)


def _code_cells(notebook: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def read() -> dict[str, Any]:
    """Return the stored notebook."""
    notebook: dict[str, Any] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return notebook


def main() -> None:
    """Execute the notebook, and write it with its figures; `docs.generate` writes the page."""
    notebook = read()
    execute(notebook)
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    folder = NOTEBOOK.with_suffix("")
    folder.mkdir(exist_ok=True)
    for name, image in figures(notebook):
        (folder / name).write_bytes(image)


if __name__ == "__main__":
    main()
