"""One base error and a leaf for each thing that can be wrong; the command line prints their message and exits 2."""


class HeadstartError(Exception):
    """Something the user can put right: the message says what was asked, what is wrong, what is allowed, what to do."""


class DataError(HeadstartError):
    """The pictures, their folders, their labels or their splits."""


class RecipeError(HeadstartError):
    """A recipe, a stage or an option: unknown key, value out of range."""


class ModelError(HeadstartError):
    """A backbone, a head, a freeze line, or the contract between what is frozen and what is trained."""


class CheckpointError(HeadstartError):
    """A weights file or a run folder that cannot be read, or does not fit."""


class ExportError(HeadstartError):
    """A model that cannot be written in another form, or that says something else in it."""


class SetupError(HeadstartError):
    """The machine: no network, a missing package, a device that is not there."""


class Interrupted(HeadstartError):
    """Training was stopped by hand; the run folder is usable, the message says how to go on. Exit code 130.

    `model` is the classifier in its best state so far, or None before there was one.
    """

    def __init__(self, message: str, model: object = None) -> None:
        super().__init__(message)
        self.model = model


def in_words(error: BaseException) -> str:
    """What went wrong inside, in one line: the error's kind and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error) or '-').splitlines()[0]}"


def near_matches(word: str, choices: list[str] | tuple[str, ...], n: int = 5) -> str:
    """`" Did you mean: a, b?"` for the choices spelled most like `word`; empty when none is close."""
    from difflib import get_close_matches

    close = get_close_matches(word, choices, n=n, cutoff=0.5)
    return f" Did you mean: {', '.join(close)}?" if close else ""
