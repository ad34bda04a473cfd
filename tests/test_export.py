"""The classifier and the backbone exported, traced and in ONNX, with a batch of any size."""

from __future__ import annotations

import io
from itertools import product

import pytest
import torch
from fresh_process import run_python
from tiny_models import ONE_STAGE, TINY

import catkernels
from catkernels import official

KINDS = ("classifier", "backbone", "patched classifier", "patched backbone")


def build(kind: str) -> tuple[torch.nn.Module, tuple[int, int]]:
    torch.manual_seed(0)
    options = {"out_indices": (0, 1)} if "backbone" in kind else {}
    if "patched" in kind:
        model = official.CAT(**TINY, **options)
        catkernels.patch(model)
        return model.eval(), (50, 61) if options else (56, 56)
    return catkernels.CAT(**TINY, **options).eval(), (50, 61)


def namespaces(program: torch.export.ExportedProgram) -> set[str]:
    """Whose operators a graph calls."""
    targets = (node.target for node in program.graph.nodes if node.op == "call_function")
    return {target.namespace for target in targets if isinstance(target, torch._ops.OpOverload)}


# in plain runs the classifier and the backbone, one strict and one with gradients
SAMPLE = [
    ("classifier", False, True),
    ("patched backbone", True, False),
]


@pytest.mark.parametrize(
    ("kind", "strict", "grad"),
    [
        pytest.param(*case, marks=() if case in SAMPLE else pytest.mark.full)
        for case in product(KINDS, (False, True), (False, True))
    ],
)
def test_round_trip(kind, strict, grad):
    model, size = build(kind)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(
            model, (torch.randn(2, 3, *size),), dynamic_shapes=({0: batch},), strict=strict
        )
        assert namespaces(program) == {"aten"}
        torch.export.save(program, file := io.BytesIO())
        file.seek(0)
        loaded = torch.export.load(file).module()
        for images in (torch.randn(1, 3, *size), torch.randn(5, 3, *size)):
            torch.testing.assert_close(loaded(images), model(images))


LOAD = """
import sys
import torch

reference, kernels, images, expected = torch.load(sys.argv[1])
torch.testing.assert_close(torch.export.load(reference).module()(images), expected)
assert "catkernels" not in sys.modules
try:
    torch.export.load(kernels)
except RuntimeError:
    pass
else:
    raise AssertionError("it was loaded without its operators")
import catkernels
torch.testing.assert_close(torch.export.load(kernels).module()(images), expected)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs interpreted kernels")
@pytest.mark.parametrize("grad", [False, pytest.param(True, marks=pytest.mark.full)])
def test_what_another_process_needs_to_load_a_program(grad, tmp_path):
    """Nothing of ours by the reference; where kernels serve, the import of their operators."""
    pytest.importorskip("triton")
    model = official.CAT(**ONE_STAGE).eval()
    images = torch.randn(3, 3, 14, 17)
    batch = torch.export.Dim("batch", min=1, max=64)
    files = []
    with torch.set_grad_enabled(grad):
        for backend, owners in (("reference", {"aten"}), ("triton", {"aten", "catkernels"})):
            catkernels.patch(model, backend=backend)
            program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: batch},))
            assert namespaces(program) == owners
            files.append(str(tmp_path / f"{backend}.pt2"))
            torch.export.save(program, files[-1])
    torch.save((*files, images, model(images)), tmp_path / "case.pt")
    run_python(LOAD, str(tmp_path / "case.pt"), interpret=True)


# in plain runs one of our own and a patched one, of maps that N divides and of padded ones
TRACED_SAMPLE = ("classifier", "patched backbone")
kinds = pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=() if k in TRACED_SAMPLE else pytest.mark.full) for k in KINDS],
)
traces = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore:.*legacy TorchScript"
)


def assert_outputs_close(actual, expected):
    expected = expected if isinstance(expected, tuple) else (expected,)
    for output, truth in zip(actual, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(output), truth)


@traces
@torch.no_grad()
@kinds
@pytest.mark.parametrize("size", [(56, 56), (50, 61)], ids=["whole", "padded"])
def test_a_trace_has_nothing_that_onnx_mistakes(kind, size):
    """It takes axes from the end for others, and the batch of an `unflatten` for a constant."""
    model, fixed = build(kind)
    size = size if kind != "patched classifier" else fixed
    traced = torch.jit.trace(model, torch.randn(2, 3, *size))
    mistaken = {"aten::movedim", "aten::moveaxis", "aten::unflatten"}
    assert not mistaken & {node.kind() for node in traced.inlined_graph.nodes()}
    images = torch.randn(5, 3, *size)
    torch.testing.assert_close(traced(images), model(images))


@traces
@kinds
@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.full)])
def test_onnxruntime_computes_the_same(kind, dynamo, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, size = build(kind)
    file = tmp_path / "model.onnx"
    options = {"dynamic_axes": {"images": {0: "batch"}}}
    if dynamo:
        options = {"dynamic_shapes": ({0: torch.export.Dim("batch", min=1, max=64)},)}
    images = torch.randn(2, 3, *size)
    torch.onnx.export(model, (images,), file, dynamo=dynamo, input_names=["images"], **options)
    session = runtime.InferenceSession(file)
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, *size)
        with torch.inference_mode():
            expected = model(images)
        assert_outputs_close(session.run(None, {"images": images.numpy()}), expected)
