"""Fixtures for tests that run kernels: in Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "launches_nothing: `launches` is to stay empty")


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> Iterator[None]:
    """Any test may run kernels, by itself or within a model."""
    interpreting = importlib.util.find_spec("triton") and not torch.cuda.is_available()
    with quickly_interpreted() if interpreting else nullcontext():
        yield


@contextmanager
def quickly_interpreted() -> Iterator[None]:
    """Spare Triton's interpreter what it does in vain: most of its time."""
    import triton.language as tl
    from triton.runtime import interpreter

    # whether integers overflow is worked out, and asserted only in a mode for debugging
    options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    # the language is replaced anew for every function that a kernel calls: once a launch is enough
    languages = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    replace_language, launched = interpreter._patch_lang, []

    def replace_once(function: object) -> object:
        if launched:
            return interpreter._LangPatchScope()
        launched.append(scope := replace_language(languages))
        restore = scope.restore
        scope.restore = lambda: (launched.clear(), restore())
        return scope

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.interpreter_builder, "options", options)
        patch.setattr(interpreter, "_patch_lang", replace_once)
        # 262 programs that each sum a few numbers; in blocks of any size they give the same
        patch.setattr("catkernels.kernels.cpsa.weights.SUM_BLOCK", 1024)
        yield


@pytest.fixture
def device() -> torch.device:
    """Where kernels run here: the GPU, else the CPU through Triton's interpreter."""
    pytest.importorskip("triton")
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture
def launches(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Counter[str]]:
    """How often each kernel, by name, was launched; a test launches one, or is marked not to."""
    pytest.importorskip("triton")
    from catkernels.kernels.tiles import dot as any_jit_function

    counter: Counter[str] = Counter()
    kernel_class = type(any_jit_function)
    run = kernel_class.run

    def counted(kernel, *args, **kwargs):
        counter[kernel.__name__] += 1
        return run(kernel, *args, **kwargs)

    monkeypatch.setattr(kernel_class, "run", counted)
    yield counter
    if request.node.get_closest_marker("launches_nothing"):
        assert not counter, "a kernel ran"
    else:
        assert counter, "no kernel ran"


@pytest.fixture
def tf32_on_gpus() -> Iterator[None]:
    """Let float32 products be TF32 on a GPU, which has no backward pass of CPSA for exact ones."""
    from catkernels.ops import cpsa

    before = torch.get_float32_matmul_precision()
    if not cpsa.interpreting():
        torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def round_to_nearest_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter round float32 to bfloat16 as GPUs do; by itself it truncates."""
    tl = pytest.importorskip("triton.language")
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(values, source, target, rounding_mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, rounding_mode)
        bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", rounding)
