"""Inference in slices: the reference's results, wherever nobody else looks at the operations."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import catkernels
from catkernels import cpu, reference
from catkernels.accuracy import assert_within_error_budget
from catkernels.cases import (
    Shape,
    cat_stages,
    make_cpsa_inputs,
    make_ipsa_inputs,
)

SHAPE = Shape("padded", batch=2, height=9, width=16, channels=12, num_heads=3)
SHAPES = [
    *cat_stages("tiny", batch=2),
    SHAPE,
    Shape("many images", batch=40, height=14, width=7, channels=96, num_heads=3),
    Shape("one pixel", batch=3, height=1, width=1, channels=4, num_heads=2),
    Shape("large patch", batch=2, height=20, width=12, channels=6, num_heads=1, patch_size=12),
    Shape("no image", batch=0, height=14, width=14, channels=6, num_heads=1),
]
MAKE_INPUTS = {"ipsa": make_ipsa_inputs, "cpsa": make_cpsa_inputs}
both = pytest.mark.parametrize("attention", MAKE_INPUTS)


def attend(attention: str, inputs, shape=SHAPE, module=catkernels):
    """The attention of that name, of a module that has both."""
    heads = {"num_heads": shape.num_heads} if attention == "ipsa" else {}
    function = getattr(module, f"{attention}_attention")
    return function(**inputs, **heads, patch_size=shape.patch_size)


def split(attention: str):
    """The map of a call, and the call as a function of the map."""
    inputs = MAKE_INPUTS[attention](SHAPE)
    name = next(iter(inputs))
    x = inputs.pop(name)
    return x, lambda x: attend(attention, {name: x, **inputs})


@pytest.fixture
def sliced(monkeypatch):
    """The calls that `catkernels.cpu` served."""
    calls = []

    def counting(function):
        def counted(*arguments, **options):
            calls.append(function.__name__)
            return function(*arguments, **options)

        return counted

    for attention in MAKE_INPUTS:
        name = f"{attention}_attention"
        monkeypatch.setattr(cpu, name, counting(getattr(cpu, name)))
    return calls


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_the_reference(attention, shape, dtype, sliced):
    inputs = MAKE_INPUTS[attention](shape, dtype)
    result = attend(attention, inputs, shape)
    assert sliced or not shape.batch, "the sliced path was not taken"
    expected = attend(attention, inputs, shape, reference)
    if dtype == torch.float64:
        torch.testing.assert_close(result, expected)
    else:
        exact = {name: tensor.double() for name, tensor in inputs.items()}
        truth = attend(attention, exact, shape, reference)
        assert_within_error_budget(result, expected, truth)


@both
def test_results_do_not_depend_on_the_slices(attention, monkeypatch):
    shape = Shape("images", batch=7, height=14, width=9, channels=12, num_heads=3)
    inputs = MAKE_INPUTS[attention](shape)
    whole = attend(attention, inputs, shape)
    monkeypatch.setattr(cpu, "SLICE_BYTES", 1)
    assert torch.equal(attend(attention, inputs, shape), whole)


@both
def test_every_pixel_is_written(attention, poisoned_memory):
    for shape in SHAPES:
        inputs = MAKE_INPUTS[attention](shape)
        torch.testing.assert_close(
            attend(attention, inputs, shape), attend(attention, inputs, shape, reference)
        )


@torch.inference_mode()
def test_a_layer_of_a_large_map_is_sliced_with_its_linears(monkeypatch, poisoned_memory):
    layer = catkernels.IPSA(12, 7, 3)
    x = torch.randn(5, 9, 16, 12)
    whole = layer(x)
    calls = []
    monkeypatch.setattr(cpu, "LARGE_BYTES", 0)
    monkeypatch.setattr(cpu, "SLICE_BYTES", 1)
    monkeypatch.setattr(
        cpu, "layer_in_slices", lambda *a, f=cpu.layer_in_slices: calls.append(a) or f(*a)
    )
    torch.testing.assert_close(layer(x), whole)
    assert calls


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@both
def test_a_trace_serves_larger_batches(attention, monkeypatch):
    """A recorded loop over slices would leave the images beyond the recorded ones unwritten."""
    monkeypatch.setattr(cpu, "SLICE_BYTES", 1)
    x, call = split(attention)
    traced = torch.jit.trace(call, x)
    larger = torch.cat([x, x, x])
    torch.testing.assert_close(traced(larger), call(larger))


class Listener(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        return operator(*arguments, **(options or {}))


class FunctionListener(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), options=None):
        return function(*arguments, **(options or {}))


class Seen(torch.Tensor):
    """A tensor whose class sees what is done with it."""


@both
@pytest.mark.parametrize("mode", [Listener, FunctionListener])
def test_who_sees_the_operations_sees_the_references(attention, mode, sliced):
    x, call = split(attention)
    with mode():
        seen = call(x)
    assert not sliced
    torch.testing.assert_close(seen, call(x))
    assert sliced


@both
def test_tensors_of_other_classes_are_left_to_the_reference(attention, sliced):
    inputs = MAKE_INPUTS[attention](SHAPE)
    for name, tensor in inputs.items():
        attend(attention, {**inputs, name: tensor.as_subclass(Seen)})
    assert not sliced


@both
def test_what_make_fx_records_writes_nothing_in_place(attention):
    x, call = split(attention)
    graph = make_fx(call)(x)
    assert not [node.name for node in graph.graph.nodes if "copy_" in str(node.target)]
    torch.testing.assert_close(graph(x), call(x))


@both
def test_a_device_to_make_tensors_on_is_no_listener(attention, sliced):
    x, call = split(attention)
    with torch.device("cpu"):
        call(x)
    assert sliced


@both
def test_flops_do_not_depend_on_gradients(attention):
    x, call = split(attention)
    counts = []
    for needs_grad in (False, True):
        with FlopCounterMode(display=False) as counter:
            call(x.clone().requires_grad_(needs_grad))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_flops_of_a_model_are_the_papers():
    """Through modules as well, whose large maps are sliced with their linear layers."""
    with torch.device("meta"):
        model = catkernels.cat_tiny().eval()
    model.to_empty(device="cpu")  # whatever its weights may be
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 224, 224))
    assert round(counter.get_total_flops() / 2e9, 3) == 2.770
