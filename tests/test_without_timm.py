"""Where timm is missing, its models say so, and nothing else asks for it."""

from __future__ import annotations

import importlib
import sys

import pytest


def test_the_extra_is_named(monkeypatch):
    for name in list(sys.modules):
        if name.split(".")[0] == "timm" or name == "catkernels.timm_models":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        ImportError, match=r"needs timm \(.*timm.*\): pip install 'catkernels\[timm\]'"
    ):
        importlib.import_module("catkernels.timm_models")
