"""A sample of the soak runs of tools/soak.py; the whole ones are `make soak`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    path = Path(__file__).parents[1] / "tools" / "soak.py"
    spec = importlib.util.spec_from_file_location("soak", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module
    spec.loader.exec_module(module)
    return module


def test_mutated_pictures_are_refused_by_name_or_decode(soak: ModuleType) -> None:
    outcome = soak.soak_pictures(400, seed=1)
    assert outcome.failures == []
    assert outcome.files == 400
    assert 100 < outcome.refused < 300  # neither everything nor nothing


def test_mutated_model_files_raise_the_readers_own_error_or_are_read(soak: ModuleType) -> None:
    outcome = soak.soak_models(400, seed=1)
    assert outcome.failures == []
    assert 200 < outcome.refused < 400


def test_a_file_is_a_function_of_its_number(soak: ModuleType) -> None:
    seeds = soak.seed_pictures()
    first = [soak.mutated_picture(seeds, 3, i) for i in range(60)]
    assert first == [soak.mutated_picture(seeds, 3, i) for i in range(60)]
    assert first != [soak.mutated_picture(seeds, 4, i) for i in range(60)]
    assert len({kind for kind, *_ in first}) > 6


def test_what_must_not_happen_is_a_failure(soak: ModuleType) -> None:
    outcome = soak.Outcome()
    outcome.take("bits", soak.MAY, "1.jpg", None)
    outcome.take("foreign", soak.MUST, "2.jpg", "no picture")
    assert outcome.failures == []
    outcome.take("foreign", soak.MUST, "3.jpg", None)
    outcome.take("name", soak.MUST_NOT, "4.jpg", "no picture")
    assert [line.partition(":")[0] for line in outcome.failures] == ["3.jpg", "4.jpg"]
