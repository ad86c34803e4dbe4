"""The direction of imports, read from the syntax trees; what starts without torch; what the package exports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import headstart

SOURCE = Path(headstart.__file__).parent
ROOMS = sorted(path.stem for path in SOURCE.glob("*.py") if path.stem != "__init__")

# A room imports from lower layers only; the pairs below are the ways sideways, within a layer.
LAYERS = (
    ("errors", "fields", "files", "recipe", "portable"),
    (
        *("tuned", "owners", "space", "study"),
        *("folders", "manifest", "groups", "prepared", "archives", "named_sets", "sources", "arrays", "sizes"),
        *(
            "decode",
            "isolate",
            "crews",
            "order",
            "threads",
            "dataset",
            "splitting",
            "dataspec",
            "transforms",
            "augment",
            "batchviews",
        ),
        *("metrics", "modelfile", "run", "run_record", "runtime", "store", "hashes", "terminal", "memory"),
        *(
            "autoaugment",
            "heads",
            "tracing",
            "settings",
            "cut",
            "fastconv",
            "fastops",
            "numerics",
            "frozenpass",
            "checkpointing",
        ),
        *("batchstats", "recording", "stock", "fxtrace", "passgraph"),
        *(
            "findings",
            "inspection",
            "intake",
            "duplicates",
            "shortcuts",
            "audit_files",
            "audit_copies",
            "audit_quick",
            "audit_kept",
            "doubtful",
            "clean",
        ),
    ),
    (
        *(
            "weights",
            "backbones",
            "blocks",
            "classifier",
            "freezing",
            "contract",
            "rates",
            "mixing",
            "handover",
            "checkpoint",
            "points",
            "familiar",
        ),
        *("trends", "verdicts", "cautions"),
        *("pixels", "pixelstore", "rowstore", "filling", "once"),
    ),
    (
        *("features", "evaluation", "probing", "harm", "averaging", "alarm", "linear", "schedule", "stage_result"),
        *("gradients", "attempt", "course", "train"),
    ),
    (
        *(
            "layers",
            "drawing",
            "plots",
            "sheets",
            "svg",
            "report",
            "report_charts",
            "report_page",
            "report_results",
            "report_audit",
        ),
        *("comparison_page", "shootout_page", "audit_sheet", "auditing", "audit_page", "review_script", "exporting"),
        *("answering", "serving", "serving_app", "serving_http", "serving_page"),
    ),
    (
        *("bench", "groundwork", "diary", "resume", "stage_run", "closing", "recipes", "asking", "demo"),
        *("advising", "comparison", "contest", "lr_finder", "sweeps"),
    ),
    (
        *("__main__", "cli", "cli_audit", "cli_cache", "cli_transforms", "cli_options", "cli_overrides"),
        *(
            "cli_advise",
            "cli_compare",
            "cli_export",
            "cli_familiar",
            "cli_predict",
            "cli_recipe",
            "cli_serve",
            "cli_shootout",
        ),
        "cli_tuning",
    ),
)
SIDEWAYS = {
    ("cli", "cli_export"),
    ("cli_export", "cli_options"),
    ("cli", "cli_familiar"),
    ("cli_familiar", "cli_options"),
    ("checkpoint", "backbones"),
    ("familiar", "classifier"),
    ("familiar", "contract"),
    ("plots", "drawing"),
    ("sheets", "drawing"),
    ("recipe", "errors"),
    ("recipe", "fields"),
    ("fields", "errors"),
    ("files", "errors"),
    ("cli_compare", "cli_recipe"),
    ("manifest", "folders"),
    ("arrays", "dataset"),
    ("arrays", "decode"),
    ("arrays", "prepared"),
    ("named_sets", "folders"),
    ("named_sets", "prepared"),
    ("named_sets", "terminal"),
    ("prepared", "decode"),
    ("prepared", "manifest"),
    ("prepared", "store"),
    ("archives", "folders"),
    ("archives", "manifest"),
    ("archives", "prepared"),
    ("sources", "archives"),
    ("sources", "folders"),
    ("sources", "named_sets"),
    ("sources", "manifest"),
    ("dataset", "folders"),
    ("dataset", "groups"),
    ("dataset", "manifest"),
    ("splitting", "dataset"),
    ("splitting", "groups"),
    ("splitting", "order"),
    ("dataset", "sources"),
    ("dataset", "decode"),
    ("crews", "decode"),
    ("crews", "isolate"),
    ("dataset", "crews"),
    ("isolate", "decode"),
    ("intake", "dataspec"),
    ("intake", "decode"),
    ("intake", "inspection"),
    ("intake", "crews"),
    ("intake", "isolate"),
    ("hashes", "store"),
    ("intake", "hashes"),
    ("transforms", "dataspec"),
    ("augment", "dataspec"),
    ("batchviews", "dataspec"),
    ("transforms", "dataset"),
    ("augment", "autoaugment"),
    ("transforms", "memory"),
    ("batchviews", "memory"),
    ("augment", "memory"),
    ("batchviews", "augment"),
    ("augment", "transforms"),
    ("doubtful", "audit_files"),
    ("doubtful", "dataset"),
    ("doubtful", "findings"),
    ("clean", "audit_copies"),
    ("clean", "dataset"),
    ("clean", "findings"),
    ("clean", "groups"),
    ("clean", "manifest"),
    ("inspection", "dataset"),
    ("inspection", "decode"),
    ("shortcuts", "inspection"),
    ("shortcuts", "metrics"),
    ("audit_files", "dataset"),
    ("audit_files", "findings"),
    ("shortcuts", "findings"),
    ("audit_files", "inspection"),
    ("audit_copies", "audit_files"),
    ("audit_copies", "dataset"),
    ("audit_copies", "duplicates"),
    ("audit_copies", "findings"),
    ("audit_copies", "inspection"),
    ("audit_kept", "audit_quick"),
    ("audit_kept", "dataset"),
    ("audit_kept", "decode"),
    ("audit_kept", "findings"),
    ("audit_kept", "store"),
    ("audit_quick", "audit_copies"),
    ("audit_quick", "audit_files"),
    ("audit_quick", "dataset"),
    ("audit_quick", "findings"),
    ("audit_quick", "inspection"),
    ("audit_quick", "shortcuts"),
    ("cut", "passgraph"),
    ("cut", "fxtrace"),
    ("fxtrace", "fastconv"),
    ("passgraph", "fxtrace"),
    ("fastops", "fxtrace"),
    ("checkpointing", "fxtrace"),
    ("passgraph", "fastconv"),
    ("passgraph", "stock"),
    ("fastops", "stock"),
    ("fastops", "passgraph"),
    ("fastops", "fastconv"),
    ("checkpointing", "passgraph"),
    ("backbones", "weights"),
    ("classifier", "backbones"),
    ("freezing", "backbones"),
    ("freezing", "blocks"),
    ("rates", "blocks"),
    ("freezing", "classifier"),
    ("contract", "classifier"),
    ("handover", "classifier"),
    ("rates", "classifier"),
    ("rates", "freezing"),
    ("mixing", "freezing"),
    ("checkpoint", "classifier"),
    ("checkpoint", "weights"),
    ("cautions", "trends"),
    ("cautions", "verdicts"),
    ("verdicts", "trends"),
    ("pixels", "pixelstore"),
    ("rowstore", "classifier"),
    ("rowstore", "contract"),
    ("rowstore", "pixels"),
    ("rowstore", "pixelstore"),
    ("filling", "rowstore"),
    ("once", "backbones"),
    ("once", "classifier"),
    ("once", "pixels"),
    ("once", "rowstore"),
    ("once", "filling"),
    ("evaluation", "features"),
    ("harm", "evaluation"),
    ("averaging", "evaluation"),
    ("train", "averaging"),
    ("train", "alarm"),
    ("alarm", "evaluation"),
    ("train", "evaluation"),
    ("train", "features"),
    ("train", "linear"),
    ("linear", "features"),
    ("audit_page", "report_page"),
    ("audit_page", "report_results"),
    ("audit_page", "review_script"),
    ("report", "report_audit"),
    ("report_audit", "report_page"),
    ("report_audit", "report_results"),
    ("report", "report_charts"),
    ("report", "report_page"),
    ("report", "report_results"),
    ("report_charts", "svg"),
    ("comparison_page", "report_charts"),
    ("comparison_page", "report_page"),
    ("comparison_page", "svg"),
    ("report_results", "report_charts"),
    ("report_results", "report_page"),
    ("recipes", "bench"),
    ("recipes", "groundwork"),
    ("groundwork", "bench"),
    ("asking", "groundwork"),
    ("run", "owners"),
    ("run", "run_record"),
    ("run", "terminal"),
    ("course", "alarm"),
    ("course", "averaging"),
    ("course", "evaluation"),
    ("train", "course"),
    ("resume", "closing"),
    ("resume", "diary"),
    ("recipes", "resume"),
    ("comparison", "resume"),
    ("asking", "closing"),
    ("comparison", "bench"),
    ("comparison", "groundwork"),
    ("comparison", "recipes"),
    ("lr_finder", "bench"),
    ("lr_finder", "groundwork"),
    ("lr_finder", "recipes"),
    ("lr_finder", "stage_run"),
    ("study", "owners"),
    ("study", "run_record"),
    ("study", "space"),
    ("sweeps", "bench"),
    ("sweeps", "groundwork"),
    ("sweeps", "comparison"),
    ("sweeps", "recipes"),
    ("demo", "recipes"),
    ("__main__", "cli"),
    ("cli", "cli_audit"),
    ("cli_audit", "cli_options"),
    ("cli", "cli_cache"),
    ("cli", "cli_options"),
    ("cli", "cli_compare"),
    ("cli", "cli_predict"),
    ("cli_predict", "cli_options"),
    ("cli_predict", "cli_transforms"),
    ("cli_transforms", "cli_options"),
    ("cli_compare", "cli_options"),
    ("cli", "cli_tuning"),
    ("cli_tuning", "cli_options"),
    ("augment", "order"),
    ("augment", "threads"),
    ("cli", "cli_overrides"),
    ("cli_compare", "cli_overrides"),
    ("cli_overrides", "cli_options"),
    ("cli_audit", "cli_overrides"),
    ("cli_transforms", "cli_overrides"),
    ("cli_tuning", "cli_overrides"),
    ("closing", "bench"),
    ("closing", "diary"),
    ("dataset", "order"),
    ("dataset", "threads"),
    ("demo", "closing"),
    ("frozenpass", "fxtrace"),
    ("frozenpass", "fastconv"),
    ("frozenpass", "fastops"),
    ("frozenpass", "memory"),
    ("frozenpass", "numerics"),
    ("frozenpass", "recording"),
    ("inspection", "threads"),
    ("recipes", "closing"),
    ("recipes", "diary"),
    ("recipes", "stage_run"),
    ("runtime", "memory"),
    ("runtime", "numerics"),
    ("runtime", "owners"),
    ("runtime", "terminal"),
    ("gradients", "averaging"),
    ("gradients", "features"),
    ("gradients", "schedule"),
    ("attempt", "gradients"),
    ("attempt", "averaging"),
    ("attempt", "evaluation"),
    ("attempt", "features"),
    ("attempt", "linear"),
    ("attempt", "schedule"),
    ("train", "attempt"),
    ("schedule", "linear"),
    ("stage_result", "evaluation"),
    ("stage_run", "bench"),
    ("stage_run", "diary"),
    ("train", "schedule"),
    ("train", "stage_result"),
    ("transforms", "threads"),
    ("cli", "cli_recipe"),
    ("cli", "cli_advise"),
    ("cli_advise", "cli_options"),
    ("cli_advise", "cli_overrides"),
    ("cli_advise", "cli_tuning"),
    ("probing", "linear"),
    ("advising", "bench"),
    ("advising", "groundwork"),
    ("contest", "closing"),
    ("contest", "bench"),
    ("contest", "groundwork"),
    ("contest", "comparison"),
    ("contest", "recipes"),
    ("shootout_page", "report_page"),
    ("shootout_page", "svg"),
    ("cli", "cli_shootout"),
    ("cli", "cli_serve"),
    ("cli_serve", "cli_options"),
    ("serving", "answering"),
    ("serving", "serving_app"),
    ("serving", "serving_http"),
    ("serving_app", "answering"),
    ("serving_app", "serving_page"),
    ("serving_page", "report_page"),
    ("cli_shootout", "cli_compare"),
    ("cli_shootout", "cli_options"),
    ("cli_shootout", "cli_overrides"),
    ("advising", "recipes"),
    ("cli_tuning", "cli_recipe"),
}
TORCH_FREE = (
    *(
        "errors",
        "recipe",
        "dataset",
        "dataspec",
        "intake",
        "metrics",
        "run",
        "run_record",
        "store",
        "hashes",
        "terminal",
        "verdicts",
    ),
    *(
        "audit_quick",
        "audit_sheet",
        "auditing",
        "audit_page",
        "review_script",
        "cli_audit",
        "cli_cache",
        "cli_options",
        "cli",
    ),
)


def layer_of(room: str) -> int:
    """The number of the layer that holds the room."""
    for number, rooms in enumerate(LAYERS):
        if room in rooms:
            return number
    pytest.fail(f"src/headstart/{room}.py has no place in LAYERS of {Path(__file__).name}: give it one")


def imported_rooms(source: str) -> set[str]:
    """Rooms of the package that the source text imports anywhere, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "headstart"):
            base = ("headstart." if node.level else "") + (node.module or "")
            # `from . import run` names rooms, `from .run import open_run` what is in one.
            bare = base.rstrip(".") == "headstart"
            names = [f"headstart.{alias.name}" for alias in node.names] if bare else [base]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("headstart.")}
    return found


IMPORTS = {room: imported_rooms((SOURCE / f"{room}.py").read_text(encoding="utf-8")) for room in ROOMS}


def test_every_form_of_import_is_seen() -> None:
    source = """
from . import run, terminal as t
from .dataset import split
import headstart.metrics
from headstart.heads import create_head
from headstart import plots
def later():
    from .train import fit
import numpy, os.path
from pathlib import Path
"""
    assert imported_rooms(source) == {"run", "terminal", "dataset", "metrics", "heads", "plots", "train"}


def test_every_room_has_one_place() -> None:
    placed = [room for rooms in LAYERS for room in rooms]
    assert sorted(placed) == ROOMS


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_to_lower_layers(room: str) -> None:
    wrong = [
        other
        for other in sorted(IMPORTS[room])
        if layer_of(other) >= layer_of(room) and (room, other) not in SIDEWAYS and (room, other) != (room, room)
    ]
    assert not wrong, f"{room} (layer {layer_of(room)}) imports {wrong}, which are not below it"


def test_ways_sideways_are_used_and_make_no_circle() -> None:
    assert all(other in IMPORTS[room] for room, other in SIDEWAYS), "a way that nobody goes: take it away"
    assert all(layer_of(room) == layer_of(other) for room, other in SIDEWAYS)
    left = set(SIDEWAYS)
    while left:  # take away the rooms that import nobody in what is left; a circle never goes
        ends = {other for _, other in left} - {room for room, _ in left}
        assert ends, f"these import each other in a circle: {sorted(left)}"
        left = {(room, other) for room, other in left if other not in ends}


def run_python(code: str) -> str:
    """What the code prints in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torch_free_rooms_import_without_torch() -> None:
    code = f"""
import sys, importlib
sys.modules["torch"] = None  # importing it now raises
for room in {TORCH_FREE!r}:
    importlib.import_module("headstart." + room)
    print(room)
"""
    assert run_python(code).split() == list(TORCH_FREE)


def test_import_headstart_is_light() -> None:
    heavy = ("torch", "numpy", "PIL", "timm", "sklearn", "matplotlib")
    code = f"import sys, headstart; print([name for name in {heavy!r} if name in sys.modules])"
    assert run_python(code).strip() == "[]"


def test_exports_are_sorted_and_there() -> None:
    assert len(headstart.__all__) > 20
    assert headstart.__all__ == sorted(set(headstart.__all__))
    assert dir(headstart) == headstart.__all__
    for name in headstart.__all__:
        assert getattr(headstart, name).__name__ == name
        assert name not in ROOMS, f"headstart.{name} would be a function or a room, depending on what was imported"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'fine_tun'"):
        headstart.fine_tun  # noqa: B018
