"""Write examples/*.ipynb from the scripts beside them; a line `# %%` begins a cell, `# %% [markdown]` one of text.

python tools/notebooks.py            write the notebooks
python tools/notebooks.py --check    exit 1 if one is not up to date
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "examples"
MARK = "# %%"
TEXT_MARK = "# %% [markdown]"


def scripts() -> list[Path]:
    """The scripts that have cells; what they share has none."""
    return [path for path in sorted(FOLDER.glob("*.py")) if MARK in path.read_text(encoding="utf-8").splitlines()]


def notebook(source: str) -> str:
    """A script's notebook, nbformat 4.5, without outputs; the script's docstring is the first cell."""
    first, *rest = source.splitlines()
    docstring = ast.get_docstring(ast.parse(source))
    assert docstring, f"the script begins with {first!r}, not with a docstring"
    title, _, text = docstring.partition("\n")
    cells = [_cell(0, "markdown", f"# {title}\n{text}")]
    kind, lines = "", []
    for line in [*rest, MARK]:
        if line in (MARK, TEXT_MARK):
            if kind:
                cells.append(_cell(len(cells), kind, "\n".join(lines)))
            kind, lines = ("code" if line == MARK else "markdown"), []
        elif kind:  # what stands in front of the first mark is the docstring
            lines.append(line.removeprefix("#").removeprefix(" ") if kind == "markdown" else line)
    page = {
        "cells": cells,
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(page, indent=1, ensure_ascii=False) + "\n"


def _cell(number: int, kind: str, text: str) -> dict[str, Any]:
    cell: dict[str, Any] = {
        "cell_type": kind,
        "id": f"cell-{number}",
        "metadata": {},
        "source": text.strip("\n").splitlines(keepends=True),
    }
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def main(arguments: list[str]) -> int:
    """Write or check the notebooks; returns the exit code."""
    made = {path.with_suffix(".ipynb"): notebook(path.read_text(encoding="utf-8")) for path in scripts()}
    if arguments == ["--check"]:
        old = [path for path, text in made.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
        old += [path for path in FOLDER.glob("*.ipynb") if path not in made]
        for path in old:
            print(f"{path} is not what its script says now. Run `make docs`.", file=sys.stderr)
        return bool(old)
    for path, text in made.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
