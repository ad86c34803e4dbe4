"""What an audit says: findings with severity, files and advice, the queue of doubtful labels, and counts.

`AuditResult.to_dict` is what `audit.json` holds; `AuditResult.from_dict` reads it back and refuses anything else.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import DataError

SEVERITIES = ("error", "warning", "note")
EXAMPLES = 7  # pictures that show a class or one side of a shortcut: a row of the page
UNOPENED = ("unreadable", "left-out")  # kinds about files that no one opens to show them: one may have hung a checker


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    kind: a short word for programs, such as `near-duplicates`. severity: `error` (the result of a fit would be wrong or
    there is none), `warning` (it is likely to suffer), `note` (worth knowing). title: one sentence with figures.
    advice: one sentence. files: relative to the data's root. details: one per file, or none. groups: files that belong
    together, where the finding is about that; `files` then holds them one after the other. examples: the finding is
    about a class or a property, and the files show it; else they are all that it is about.
    """

    kind: str
    severity: str
    title: str
    advice: str
    files: tuple[str, ...] = ()
    details: tuple[str, ...] = ()
    groups: tuple[tuple[str, ...], ...] = ()
    examples: bool = False

    def __post_init__(self) -> None:
        assert self.severity in SEVERITIES, self.severity
        assert not self.details or len(self.details) == len(self.files), self.kind


@dataclass(frozen=True)
class DoubtfulLabel:
    """A picture whose label does not fit what models trained without it say.

    label_prob, suggested_prob: out-of-fold probabilities of its label and of the likeliest class. quality: 0 .. 1, low
    is doubtful; the queue is sorted by it. flagged: confident learning counts it among the wrong ones. relabel: the
    suggestion is sure enough to follow unseen.
    """

    file: str
    split: str
    label: str
    suggested: str
    label_prob: float
    suggested_prob: float
    quality: float
    flagged: bool
    relabel: bool


@dataclass(frozen=True)
class AuditResult:
    """What was found in N pictures. Findings come most severe first, doubtful labels most doubtful first.

    counts: split (`all` for a folder without splits) -> class -> pictures. traits: what (`format`, `mode`,
    `orientation`) -> split -> class -> value -> pictures. shortcuts: each property's figures, reported or not.
    seconds: per part. doubtful: None where labels were not looked at (no features).
    """

    root: str
    class_names: tuple[str, ...]
    pictures: int
    counts: Mapping[str, Mapping[str, int]]
    traits: Mapping[str, Mapping[str, Mapping[str, Mapping[str, int]]]]
    findings: tuple[Finding, ...]
    shortcuts: tuple[Mapping[str, Any], ...] = ()
    doubtful: tuple[DoubtfulLabel, ...] | None = None
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def of_kind(self, kind: str) -> tuple[Finding, ...]:
        """The findings of one kind."""
        return tuple(one for one in self.findings if one.kind == kind)

    @property
    def unopened(self) -> frozenset[str]:
        """Files that cannot be read, and are not opened for a thumbnail."""
        return frozenset(file for one in self.findings if one.kind in UNOPENED for file in one.files)

    @property
    def split_sizes(self) -> dict[str, int]:
        """Split -> pictures; empty for a folder without splits."""
        return {split: sum(classes.values()) for split, classes in self.counts.items() if split != "all"}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `audit.json` holds them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AuditResult:
        """The result that `to_dict` wrote.

        Raises:
            DataError: an unknown or missing key.
        """
        values = _closed(cls, values, "audit.json")
        doubtful = values["doubtful"]
        return cls(
            **{
                **values,
                "class_names": tuple(values["class_names"]),
                "findings": tuple(_finding(one) for one in values["findings"]),
                "shortcuts": tuple(values["shortcuts"]),
                "doubtful": None
                if doubtful is None
                else tuple(DoubtfulLabel(**_closed(DoubtfulLabel, one, "doubtful label")) for one in doubtful),
            }
        )


def read_audit(path: str | Path) -> AuditResult:
    """Read an `audit.json`.

    Raises:
        DataError: no such file, no JSON, or not what an audit writes.
    """
    try:
        values = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read as the JSON of an audit: {error}. Run `headstart audit` again."
        ) from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(values).__name__}.")
    return AuditResult.from_dict(values)


def by_severity(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Errors first, then warnings, then notes; within one severity in the order given."""
    return tuple(sorted(findings, key=lambda one: SEVERITIES.index(one.severity)))


def _finding(values: Mapping[str, Any]) -> Finding:
    values = _closed(Finding, values, "finding")
    groups = tuple(tuple(group) for group in values["groups"])
    return Finding(**{**values, "files": tuple(values["files"]), "details": tuple(values["details"]), "groups": groups})


def _closed(kind: type[Any], values: Mapping[str, Any], what: str) -> dict[str, Any]:
    known = {one.name for one in dataclasses.fields(kind)}
    if set(values) != known:
        odd = sorted(set(values) ^ known)
        raise DataError(f"{what}: unknown or missing: {', '.join(odd)}. Write it anew with `headstart audit`.")
    return dict(values)
