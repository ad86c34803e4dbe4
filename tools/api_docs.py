"""Write docs/api.md from the signatures and docstrings of what `headstart` exports.

python tools/api_docs.py            write the page
python tools/api_docs.py --check    exit 1 if it is not up to date
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import headstart

PAGE = Path(__file__).resolve().parents[1] / "docs" / "api.md"
INTRODUCTION = """# Python

Written by `make docs` from the docstrings; change those, not this page. Every name is imported from `headstart`. The
[guide](guide.md) shows them at work.
"""
GROUPS = {
    "Train": ("fine_tune", "fit", "FitResult", "StageResult"),
    "Recipes": (
        "Recipe", "Stage", "HeadSpec", "HiddenLayer", "AugmentSpec", "load_recipe", "tuned_on",
    ),
    "Pictures": (
        "load_images", "images_from_arrays", "split", "ImageTable", "Splits", "read_manifest", "write_manifest",
        "ManifestRow", "open_image", "load_view", "DataSpec", "show_batch", "preview_sheet",
    ),
    "Look at the data": ("audit", "AuditResult", "Finding", "DoubtfulLabel", "read_audit"),
    "Models": (
        "create_classifier", "Classifier", "set_freeze_line", "FreezeLine", "summary", "new_head", "change_classes",
        "Handover", "save", "load", "export", "Export",
    ),
    "Score and predict": (
        "evaluate", "evaluate_run", "Evaluation", "predict_files", "learn_familiar", "predict_logits", "serve",
        "make_app",
    ),
    "Choose a recipe, a backbone, a rate": (
        "advise", "Advice", "compare", "Budget", "Comparison", "shootout", "Entrant", "Shootout", "find_lr",
        "range_test", "RateCurve", "sweep", "Space", "Sweep",
    ),
    "Runs and plots": ("read_run", "write_report", "plot_history", "plot_confusion"),
    "Machine": ("make_runtime", "Runtime"),
    "Errors": (
        "HeadstartError", "DataError", "RecipeError", "ModelError", "CheckpointError", "ExportError", "SetupError",
        "Interrupted",
    ),
}  # fmt: skip
WIDTH, PROSE_WIDTH = 100, 120  # of signatures, and of words
SECTIONS = ("Args", "Attributes", "Returns", "Raises")
NAMED = ("Args", "Attributes", "Raises")  # whose entries begin with a name and a colon
HEAD = re.compile(r"([\w.]+(?:, [\w.]+)*): (.*)", flags=re.DOTALL)  # `name: words` and `one, other: words`


def page() -> str:
    """The page's text.

    Raises:
        LookupError: an exported name is in no group, or in two, or a group names what is not exported.
    """
    names = [name for group in GROUPS.values() for name in group]
    if sorted(names) != headstart.__all__:
        raise LookupError(f"groups and headstart.__all__ differ: {sorted({*names} ^ {*headstart.__all__}) or 'twice'}")
    links = anchors([heading for title, group in GROUPS.items() for heading in (title, *group)])
    parts = [INTRODUCTION]
    for title, group in GROUPS.items():
        listed = ", ".join(f"[`{name}`](#{links[name]})" for name in group)
        parts.append(_filled(f"[{title}](#{links[title]}): {listed}", "- "))
    for title, group in GROUPS.items():
        parts += ["", f"## {title}", *(_entry(name, getattr(headstart, name), links) for name in group)]
    return "\n".join(parts) + "\n"


def anchors(headings: Sequence[str]) -> dict[str, str]:
    """What GitHub makes of headings: the second of two that differ by letter case alone gets a number."""
    found: dict[str, str] = {}
    for heading in headings:
        plain = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        before = sum(re.fullmatch(rf"{re.escape(plain)}(-\d+)?", other) is not None for other in found.values())
        found[heading] = f"{plain}-{before}" if before else plain
    return found


def _entry(name: str, what: Any, links: Mapping[str, str]) -> str:
    parts = [f"\n### {name}\n"]
    links = {other: link for other, link in links.items() if other != name}
    is_class = inspect.isclass(what)
    is_error = is_class and issubclass(what, Exception)
    if not is_error:
        parts.append(f"```text\n{signature(name, what)}\n```\n")
    fields = [field.name for field in dataclasses.fields(what)] if dataclasses.is_dataclass(what) else []
    parts.append(_markdown(inspect.getdoc(what) or "", fields, links))
    members = [_member(*member, links) for member in _members(what)] if is_class and not is_error else []
    if members:
        parts += ["\nMethods and properties:\n", *members]
    return "\n".join(parts)


# ---- signatures ------------------------------------------------------------------------------------------------


def signature(name: str, what: Any) -> str:
    """`name(argument: type = default, ...) -> type`, broken between arguments."""
    parts = _parameters(what, annotated=True)
    returns = inspect.signature(what).return_annotation
    end = ")" if inspect.isclass(what) or returns is inspect.Signature.empty else f") -> {returns}"
    line = f"{name}({', '.join(parts)}{end}"
    if len(line) <= WIDTH:
        return line
    broken = textwrap.wrap(
        " ".join(f"{part},".replace(" ", "\0") if len(part) < WIDTH - 8 else f"{part}," for part in parts),
        WIDTH, initial_indent="    ", subsequent_indent="    ", break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return "\n".join([f"{name}(", *broken, end]).replace("\0", " ")


def _parameters(call: Any, *, annotated: bool) -> list[str]:
    """The arguments as they are written, `self` and `cls` left out."""
    parts = []
    for parameter in inspect.signature(call).parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        text = f"{'**' * (parameter.kind is parameter.VAR_KEYWORD)}{parameter.name}"
        text += f": {parameter.annotation}" if annotated else ""
        if parameter.default is not parameter.empty:
            default = value(_own_default(call, parameter.name, parameter.default))
            text += f" = {default}" if annotated else f"={default}"
        parts.append(text)
    return parts


def _own_default(what: Any, name: str, default: Any) -> Any:
    """What a dataclass makes anew for each of its objects stands in its signature as a mere sign."""
    if dataclasses.is_dataclass(what):
        field = {field.name: field for field in dataclasses.fields(what)}[name]
        if field.default_factory is not dataclasses.MISSING:
            return field.default_factory()
    return default


def value(default: Any) -> str:
    """A default as one would write it: of an object of ours, what differs from its class's own defaults."""
    if dataclasses.is_dataclass(default):
        own = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
        usual = {field.name: _own_default(default, field.name, field.default) for field in dataclasses.fields(default)}
        return f"{type(default).__name__}({', '.join(f'{k}={value(v)}' for k, v in own.items() if v != usual[k])})"
    if inspect.isfunction(default):
        return default.__name__
    if isinstance(default, tuple):
        return f"({', '.join(map(value, default))}{',' * (len(default) == 1)})"
    return repr(default)


# ---- docstrings ------------------------------------------------------------------------------------------------


def _markdown(docstring: str, fields: Sequence[str], links: Mapping[str, str]) -> str:
    """A docstring's paragraphs, and lists of what stands in its sections.

    Args:
        fields: of a dataclass, whose sentences `field: what it is.` become a list.
    """
    parts = []
    for section, lines in _sections(docstring):
        if section:
            entries = _entries(lines)
            lead = "- " if section in NAMED and all(map(HEAD.match, entries)) else ""
            parts.append(f"{section}:\n")
            parts.append("\n".join(_filled(_prose(entry, links), lead) for entry in entries))
        else:
            for paragraph in "\n".join(lines).strip("\n").split("\n\n"):
                start, *told = _of_fields(" ".join(paragraph.split()), fields)
                parts += [_filled(_prose(start, links))] if start else []
                parts += ["\n".join(_filled(_prose(one, links), "- ") for one in told)] if told else []
    return "\n\n".join(part.strip("\n") for part in parts)


def _sections(docstring: str) -> Iterator[tuple[str, list[str]]]:
    """(name, lines) in their order; the name is empty for what stands outside of the sections."""
    name, lines = "", list[str]()
    for line in docstring.splitlines():
        title = line.removesuffix(":") if line.endswith(":") else ""
        if title in SECTIONS or (name and line and not line.startswith(" ")):
            if any(lines):
                yield name, lines
            name, lines = (title, []) if title in SECTIONS else ("", [line])
        else:
            lines.append(line)
    if any(lines):
        yield name, lines


def _entries(lines: Sequence[str]) -> list[str]:
    """The entries of a section: each begins at its indent, and goes on further in."""
    entries: list[str] = []
    for line in filter(None, lines):
        if line.startswith(" " * 5):
            entries[-1] += f" {line.strip()}"
        else:
            entries += re.split(r"(?<=\.) (?=\w+Error: )", line.strip())
    return entries


def _of_fields(text: str, fields: Sequence[str]) -> list[str]:
    """What stands in front of the first `field: words` of a paragraph, and each of these."""
    one = "|".join(map(re.escape, fields))
    starts = [m.start() for m in re.finditer(rf"(?:(?<=^)|(?<=[.;] ))(?:{one})(?:, (?:{one}))*: ", text)] if one else []
    ends = [*starts, len(text)]
    return [text[: ends[0]].strip(), *(text[a:b].strip() for a, b in pairwise(ends))]


def _prose(text: str, links: Mapping[str, str]) -> str:
    """Markdown: the names that an entry begins with as code, exported ones linked, and no other sign has a meaning."""
    found = HEAD.match(text)
    lead = f"{', '.join(f'`{name}`' for name in found[1].split(', '))}: " if found else ""
    parts = re.split(r"(`[^`]*`)", found[2] if found else text)
    for i, part in enumerate(parts):
        name = part.strip("`")
        if not part.startswith("`"):
            parts[i] = re.sub(r"[*<\\]|(?<!\w)_|_(?!\w)", r"\\\g<0>", part)
        elif name in links and (re.search("[A-Z_]", name) or parts[i - 1].endswith(("as in ", "see "))):
            parts[i] = f"[{part}](#{links[name]})"
    return lead + "".join(parts)


def _filled(text: str, lead: str = "") -> str:
    """Broken into lines, of which none begins a list or a heading of its own."""
    lines = textwrap.wrap(
        text, PROSE_WIDTH, initial_indent=lead, subsequent_indent=" " * len(lead), break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
    return "\n".join([*lines[:1], *(re.sub(r"^( *)([-+>#])(?= )", r"\1\\\2", line) for line in lines[1:])])


# ---- members ---------------------------------------------------------------------------------------------------


def _members(what: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties, also those that another class of ours has defined, in the order of definition."""
    seen: set[str] = set()
    for owner in what.__mro__:
        for name, member in vars(owner).items() if owner.__module__.startswith("headstart.") else ():
            is_one = isinstance(member, (property, classmethod, staticmethod)) or inspect.isfunction(member)
            if is_one and not name.startswith("_") and name not in seen:
                seen.add(name)
                yield name, member


def _member(name: str, member: Any, links: Mapping[str, str]) -> str:
    if not isinstance(member, property):
        name += f"({', '.join(_parameters(getattr(member, '__func__', member), annotated=False))})"
    first = (inspect.getdoc(member) or "").partition("\n\n")[0]
    return _filled(f"`.{name}`: {_prose(' '.join(first.split()), links)}", "- ")


def main(arguments: list[str]) -> int:
    """Write or check the page; returns the exit code."""
    text = page()
    if arguments == ["--check"]:
        if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
            return 0
        print(f"{PAGE} is not what the docstrings say now. Run `make docs`.", file=sys.stderr)
        return 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
