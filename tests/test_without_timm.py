"""Where timm is missing, its models say so, and nothing else asks for it."""

from __future__ import annotations

import importlib
import re
import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def _imported_anew(monkeypatch):
    for name in list(sys.modules):
        if name.split(".")[0] == "timm" or name == "catkernels.timm_models":
            monkeypatch.delitem(sys.modules, name)


def test_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        ImportError, match=r"needs timm \(.*timm.*\): pip install 'catkernels\[timm\]'"
    ):
        importlib.import_module("catkernels.timm_models")


class OfAnotherTorch:
    """Finds timm, whose import then fails as torchvision's does where it does not fit torch."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def find_spec(self, name: str, *_) -> None:
        if name.split(".")[0] == "timm":
            raise self.error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("operator torchvision::nms does not exist"),
        AttributeError("partially initialized module 'torchvision' has no attribute 'extension'"),
    ],
    ids=["at first", "again"],
)
def test_a_torchvision_of_another_torch_is_named(monkeypatch, error):
    monkeypatch.setattr(sys, "meta_path", [OfAnotherTorch(error), *sys.meta_path])
    minor = int(torch.__version__.split(".")[1])
    wanted = rf"fits torch {re.escape(torch.__version__)}, which is torchvision 0\.{minor + 15};"
    with pytest.raises(ImportError, match=wanted):
        importlib.import_module("catkernels.timm_models")


def test_other_faults_are_not_torchvisions(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [OfAnotherTorch(RuntimeError("disk")), *sys.meta_path])
    with pytest.raises(RuntimeError, match="disk"):
        importlib.import_module("catkernels.timm_models")
