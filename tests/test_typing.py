"""What type checkers make of a user's program."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import catkernels
from catkernels.cat import CATOptions

PROGRAM = Path(__file__).with_name("user_program.py")


def test_every_public_name_is_in_the_program():
    body = PROGRAM.read_text().partition("\ndef ")[2]
    for name in catkernels.__all__:
        assert re.search(rf"\b{name}\b", body), name


def test_the_options_of_cat_are_its_arguments():
    parameters = inspect.signature(catkernels.CAT).parameters
    options = CATOptions.__annotations__
    assert list(options) == list(parameters)
    for name, annotation in options.items():
        assert annotation.__forward_arg__ == parameters[name].annotation, name


# mypy reads all of PyTorch first
@pytest.mark.full
def test_mypy_objects_to_the_mistakes_alone(tmp_path):
    """In a folder beside no code of ours. In ours, mypy reads the program with the package."""
    pytest.importorskip("mypy")
    shutil.copy(PROGRAM, tmp_path)
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", PROGRAM.name],
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(Path(catkernels.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
