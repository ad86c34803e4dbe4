"""Write docs/cli.md from what `headstart --help` and every `headstart COMMAND --help` print.

python tools/cli_docs.py            write the page
python tools/cli_docs.py --check    exit 1 if it is not up to date
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
INTRODUCTION = """# Command line

Written by `make docs` from the programs' own help; change that, not this page.
"""


def page() -> str:
    """The page's text; the same on every machine, whatever its terminal."""
    os.environ |= {"COLUMNS": "102", "NO_COLOR": "1"}
    from headstart.cli import build_parser

    parser, commands = build_parser()
    parts = [INTRODUCTION, _block(parser.format_help())]
    for name, command in commands.items():
        parts += [f"## headstart {name}\n", _block(command.format_help())]
    return "\n".join(parts)


def _block(text: str) -> str:
    return f"```text\n{text.strip()}\n```\n"


def main(arguments: list[str]) -> int:
    """Write or check the page; returns the exit code."""
    text = page()
    if arguments == ["--check"]:
        if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
            return 0
        print(f"{PAGE} is not what --help prints now. Run `make docs`.", file=sys.stderr)
        return 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
