"""headstart: fine-tune pretrained image classifiers, fast and without the traps.

Names are imported when first used, so `import headstart` and `headstart --help` do not wait for torch.
"""

from importlib import import_module
from typing import Any

_ROOMS = {
    "advising": ("Advice", "advise"),
    "auditing": ("audit",),
    "arrays": ("images_from_arrays",),
    "checkpoint": ("load", "save"),
    "classifier": ("Classifier", "create_classifier"),
    "comparison": ("Budget", "Comparison", "compare"),
    "contest": ("Entrant", "Shootout", "shootout"),
    "dataset": ("ImageTable", "Splits", "load_images", "open_image"),
    "splitting": ("split",),
    "errors": (
        "CheckpointError", "DataError", "ExportError", "HeadstartError", "Interrupted", "ModelError", "RecipeError",
        "SetupError",
    ),
    "evaluation": ("Evaluation", "evaluate", "predict_files", "predict_logits"),
    "exporting": ("Export", "export"),
    "findings": ("AuditResult", "DoubtfulLabel", "Finding", "read_audit"),
    "freezing": ("FreezeLine", "set_freeze_line"),
    "handover": ("Handover", "change_classes", "new_head"),
    "lr_finder": ("RateCurve", "find_lr", "range_test"),
    "plots": ("plot_confusion", "plot_history"),
    "sheets": ("preview_sheet", "show_batch"),
    "recipe": ("AugmentSpec", "HeadSpec", "HiddenLayer", "Recipe", "Stage", "load_recipe"),
    "closing": ("FitResult",),
    "asking": ("evaluate_run", "learn_familiar"),
    "recipes": ("fine_tune", "fit"),
    "report": ("write_report",),
    "serving": ("make_app", "serve"),
    "run_record": ("read_run",),
    "runtime": ("Runtime", "make_runtime"),
    "layers": ("summary",),
    "manifest": ("ManifestRow", "read_manifest", "write_manifest"),
    "space": ("Space",),
    "sweeps": ("Sweep", "sweep"),
    "stage_result": ("StageResult",),
    "dataspec": ("DataSpec",),
    "transforms": ("load_view",),
    "tuned": ("tuned_on",),
}  # fmt: skip
_HOME = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'headstart' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
