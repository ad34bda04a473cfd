"""`torch.compile`, fake and meta tensors, and function transforms."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from itertools import product

import pytest
import torch
from tiny_models import ONE_STAGE, TINY
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import catkernels
from catkernels import official
from catkernels.accuracy import assert_within_error_budget
from catkernels.cases import Shape, make_cpsa_inputs, make_ipsa_inputs

SHAPE = Shape("padded", batch=2, height=9, width=16, channels=12, num_heads=3)


def ipsa(qkv, bias_table, qkv_bias):
    return catkernels.ipsa_attention(qkv, bias_table, num_heads=3, patch_size=7, qkv_bias=qkv_bias)


def cpsa(*tensors):
    return catkernels.cpsa_attention(*tensors, patch_size=7)


FUNCTIONS = {"ipsa": (ipsa, make_ipsa_inputs), "cpsa": (cpsa, make_cpsa_inputs)}


def compiled(module_or_function, **options):
    torch._dynamo.reset()
    options = {"backend": "aot_eager", **options}
    return torch.compile(module_or_function, fullgraph=True, **options)


def outputs_and_gradients(function, inputs, parameters):
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum(output.square().sum() for output in outputs)
    gradients = torch.autograd.grad(loss, parameters)
    # as one: gradients that cancel to nearly nothing are all rounding, and differ by any factor
    return *outputs, torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_compile_to_one_graph(name):
    function, make_inputs = FUNCTIONS[name]
    inputs = tuple(tensor.requires_grad_() for tensor in make_inputs(SHAPE).values())
    expected = outputs_and_gradients(function, inputs, inputs)
    actual = outputs_and_gradients(compiled(function), inputs, inputs)
    for result, eager in zip(actual, expected, strict=True):
        torch.testing.assert_close(result, eager)


MODELS = {
    "classifier": lambda: catkernels.CAT(**TINY),
    "classifier of one stage": lambda: catkernels.CAT(
        **(TINY | {"depths": (1,), "num_heads": (3,)})
    ),
    "backbone": lambda: catkernels.CAT(**TINY, out_indices=(0, 1)),
    "patched classifier": lambda: patched(official.CAT(**TINY)),
    "patched backbone": lambda: patched(official.CAT(**TINY, out_indices=(0, 1))),
    "official": lambda: official.CAT(**TINY),
}


def patched(model):
    catkernels.patch(model)
    return model


def images(model, batch: int = 2) -> torch.Tensor:
    size = (50, 61) if model.is_backbone else (56, 56)
    return torch.randn(batch, 3, *size)


# in plain runs a classifier of ours that trains, and a patched backbone that does not
SAMPLE = {("classifier", "train"), ("patched backbone", "eval")}


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        pytest.param(*case, marks=() if case in SAMPLE else pytest.mark.full)
        for case in product(MODELS, ("train", "eval"))
    ],
)
def test_models_compile_to_one_graph(name, mode):
    torch.manual_seed(0)
    model = MODELS[name]()
    for module in model.modules():
        # random streams are not the same compiled
        if isinstance(module, catkernels.block.DropPath):
            module.drop_prob = 0.0
    getattr(model, mode)()
    double = deepcopy(model).double()
    x = images(model)
    expected = outputs_and_gradients(model, (x,), tuple(model.parameters()))
    actual = outputs_and_gradients(compiled(model), (x,), tuple(model.parameters()))
    truth = outputs_and_gradients(double, (x.double(),), tuple(double.parameters()))
    for result, eager, exact in zip(actual, expected, truth, strict=True):
        assert_within_error_budget(result, eager, exact)


@pytest.mark.parametrize(
    ("name", "grad"),
    [
        ("classifier of one stage", True),
        pytest.param("classifier", True, marks=pytest.mark.full),
        pytest.param("classifier", False, marks=pytest.mark.full),
        pytest.param("backbone", True, marks=pytest.mark.full),
        pytest.param("backbone", False, marks=pytest.mark.full),
        pytest.param("patched classifier", True, marks=pytest.mark.full),
        pytest.param("patched classifier", False, marks=pytest.mark.full),
    ],
)
def test_one_recompilation_serves_every_batch_size(name, grad):
    model = MODELS[name]().eval()
    function = compiled(model)
    with torch.set_grad_enabled(grad):
        function(images(model, 2))
        function(images(model, 3))
        with torch.compiler.set_stance("fail_on_recompile"):
            for batch in (4, 7, 2):
                x = images(model, batch)
                torch.testing.assert_close(function(x), model(x))


LAYERS = {
    "ipsa_attention": partial(ipsa, bias_table=torch.ones(169, 3), qkv_bias=torch.ones(36)),
    "cpsa_attention": lambda x: cpsa(x, *(torch.eye(49).repeat(3, 1), None, torch.eye(49), None)),
    "IPSA": catkernels.IPSA(36, 7, 3),
    "CPSA": catkernels.CPSA(7),
    "CATBlock": catkernels.CATBlock(36, 3, attn_type="cpsa"),
}


# in plain runs functions and modules, whose batch varies from the start or is found to
LAYER_SAMPLE = {("ipsa_attention", False), ("cpsa_attention", True), ("CATBlock", True)}


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [
        pytest.param(*case, marks=() if case in LAYER_SAMPLE else pytest.mark.full)
        for case in product(LAYERS, (False, True))
    ],
)
def test_functions_and_modules_recompile_once_at_most(name, dynamic):
    layer = LAYERS[name]
    function = compiled(layer)
    for count, batch in enumerate((2, 3, 4, 7, 2)):
        x = torch.randn(batch, 9, 16, 36, requires_grad=True)
        if dynamic:
            torch._dynamo.mark_dynamic(x, 0)
        known = count >= (1 if dynamic else 2)
        with torch.compiler.set_stance("fail_on_recompile" if known else "default"):
            actual = outputs_and_gradients(function, (x,), (x,))
        torch.testing.assert_close(actual, outputs_and_gradients(layer, (x,), (x,)))


def test_a_patched_model_on_kernels_compiles_to_one_graph(device, launches):
    model = official.CAT(**ONE_STAGE, drop_path_rate=0.0).to(device)
    catkernels.patch(model, backend="triton")
    double = deepcopy(model).double()
    catkernels.patch(double, backend="reference")
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    function = compiled(model, backend=backend)
    for batch in (2, 3, 5):
        x = torch.randn(batch, 3, 14, 17, device=device)
        # the first other batch size recompiles for batch sizes that vary; no other may
        with torch.compiler.set_stance("default" if batch < 5 else "fail_on_recompile"):
            actual = outputs_and_gradients(function, (x,), tuple(model.parameters()))
        expected = outputs_and_gradients(model, (x,), tuple(model.parameters()))
        truth = outputs_and_gradients(double, (x.double(),), tuple(double.parameters()))
        for results in zip(actual, expected, truth, strict=True):
            assert_within_error_budget(*results)


@pytest.mark.full
def test_inductor_computes_the_same():
    model = MODELS["classifier of one stage"]().eval()
    x = images(model)
    torch._dynamo.reset()
    actual = torch.compile(deepcopy(model), fullgraph=True)(x)
    torch.testing.assert_close(actual, model(x))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_fake_and_meta_tensors(name):
    function, make_inputs = FUNCTIONS[name]
    inputs = make_inputs(SHAPE).values()
    assert function(*(tensor.to("meta") for tensor in inputs)).shape == (2, 9, 16, 12)
    with FakeTensorMode() as mode:
        fake = function(*(mode.from_tensor(tensor) for tensor in inputs))
    assert fake.shape == (2, 9, 16, 12)
    # nothing fake stays behind in a cache
    assert function(*inputs).isfinite().all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_transforms(name):
    function, make_inputs = FUNCTIONS[name]
    x, *others = make_inputs(SHAPE).values()

    def loss(x):
        return function(x, *others).square().sum()

    x.requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(x), torch.autograd.grad(loss(x), x)[0])
    stacked = torch.stack([x, 2 * x]).detach()
    one_by_one = torch.stack([function(part, *others) for part in stacked])
    torch.testing.assert_close(
        torch.func.vmap(lambda part: function(part, *others))(stacked), one_by_one
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_gradient_penalty_reaches_every_input(name):
    function, make_inputs = FUNCTIONS[name]
    inputs = tuple(tensor.double().requires_grad_() for tensor in make_inputs(SHAPE).values())
    loss = function(*inputs).square().sum()
    (gradient,) = torch.autograd.grad(loss, inputs[0], create_graph=True)
    penalty = torch.autograd.grad(gradient.square().sum(), inputs, allow_unused=True)
    assert all(second is not None and second.isfinite().all() for second in penalty)


@pytest.mark.parametrize("changed", [False, True])
def test_a_graph_has_what_serves_a_patched_block(changed):
    """Of what a module is made, a compiler of graphs knows less than Python does."""
    options = (16, None, 1, 2, 4.0, True, None, 0.0, 0.0, 0.0, nn.LayerNorm, "ipsa")
    model = nn.Sequential(official.CATBlock(*options))
    catkernels.patch(model, compare=False)
    model[0].H = model[0].W = 4
    if changed:
        # what only the official attention's own code could read
        model[0].attn.patch_size = (3, 3)
    called = []

    def backend(graph, inputs):
        called.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    compiled(model, backend=backend)(torch.randn(1, 16, 16))
    assert (nn.functional.softmax in called) == changed
