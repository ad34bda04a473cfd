"""Modules and whole models on the kernels: everything between a user's call and a launch.

Without a GPU the kernels run in Triton's interpreter; on one the same tests run there, in TF32.
"""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from tiny_models import ONE_STAGE, SERVED
from torch.utils.checkpoint import checkpoint

import catkernels
from catkernels import official
from catkernels.accuracy import assert_within_error_budget, tf32_products

pytestmark = pytest.mark.usefixtures("tf32_on_gpus", "launches")


def build(kind: str, device: torch.device):
    """A model on the kernels, and images."""
    torch.manual_seed(0)
    if kind == "classifier":
        model, size = catkernels.CAT(**SERVED, drop_path_rate=0.0), (56, 56)
    else:
        dense = {"out_indices": (0, 1), "drop_path_rate": 0.0}
        model, size = official.CAT(**SERVED, **dense), (38, 45)
    catkernels.patch(model, backend="triton")
    return model.to(device), torch.randn(2, 3, *size, device=device)


def outputs_and_gradients(model, images):
    outputs = model(images)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum(output.float().square().sum() for output in outputs)
    gradients = torch.autograd.grad(loss, tuple(model.parameters()))
    assert all(g.dtype == p.dtype for g, p in zip(gradients, model.parameters(), strict=True))
    return [output.detach() for output in outputs], gradients


def with_backend(model, backend: str):
    copy = deepcopy(model)
    catkernels.patch(copy, backend=backend)
    return copy


def compare(actual, same_dtype, double) -> None:
    for result, eager, exact in zip(actual[0], same_dtype[0], double[0], strict=True):
        assert_within_error_budget(result, eager, exact)
    # gradients that cancel to nearly nothing are all rounding: they are judged together
    together = [
        torch.cat([g.flatten() for g in gradients[1]]) for gradients in (actual, same_dtype)
    ]
    assert_within_error_budget(*together, torch.cat([g.flatten() for g in double[1]]))


@pytest.mark.parametrize("kind", ["classifier", "backbone"])
def test_models_train_as_on_the_reference(kind, device, launches):
    model, images = build(kind, device)
    reference = with_backend(model, "reference")
    actual = outputs_and_gradients(model, images)
    with tf32_products():
        same_dtype = outputs_and_gradients(reference, images)
    double = outputs_and_gradients(deepcopy(reference).double(), images.double())
    compare(actual, same_dtype, double)
    assert launches["ipsa_forward_kernel"] == launches["ipsa_backward_kernel"] == 4
    assert any(name.startswith("cpsa") for name in launches)


@pytest.mark.usefixtures("round_to_nearest_bf16")
@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float16, marks=pytest.mark.full), torch.bfloat16], ids=str
)
def test_autocast(dtype, device):
    model, images = build("classifier", device)
    reference = with_backend(model, "reference")
    results = []
    for candidate in (model, reference):
        with torch.autocast(device.type, dtype):
            results.append(outputs_and_gradients(candidate, images))
    double = outputs_and_gradients(deepcopy(reference).double(), images.double())
    compare(*results, double)


@pytest.mark.usefixtures("round_to_nearest_bf16")
def test_half_parameters(device):
    model, images = build("backbone", device)
    model.bfloat16()
    with torch.inference_mode():
        outputs = model(images.bfloat16())
        same = with_backend(model, "reference")(images.bfloat16())
        exact = with_backend(model, "reference").double()(images.bfloat16().double())
    for output, eager, double in zip(outputs, same, exact, strict=True):
        assert output.dtype == torch.bfloat16
        assert_within_error_budget(output, eager, double)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("attention", ["ipsa", "cpsa"])
def test_checkpointing_repeats_the_dropout(attention, use_reentrant, device):
    block = catkernels.CATBlock(
        32, 2, attn_type=attention, attn_drop=0.3, drop=0.1, drop_path=0.2, backend="triton"
    ).to(device)
    x = torch.randn(2, 9, 7, 32, device=device, requires_grad=True)
    gradients = []
    for call in (block, lambda x: checkpoint(block, x, use_reentrant=use_reentrant)):
        torch.manual_seed(11)
        call(x).square().sum().backward()
        leaves = (x, *block.parameters())
        gradients.append([leaf.grad for leaf in leaves])
        for leaf in leaves:
            leaf.grad = None
    for plain, repeated in zip(*gradients, strict=True):
        assert torch.equal(plain, repeated)


@pytest.mark.parametrize("attention", ["ipsa", "cpsa"])
def test_deterministic_algorithms_are_no_obstacle(attention, device, monkeypatch):
    block = catkernels.CATBlock(32, 2, attn_type=attention, backend="triton").to(device)
    x = torch.randn(2, 9, 7, 32, device=device)
    # without it PyTorch refuses the products of linear layers on NVIDIA's devices
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        first = outputs_and_gradients(block, x)
        second = outputs_and_gradients(block, x)
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(one, other)


def maps_saved(block: torch.nn.Module, x: torch.Tensor) -> float:
    """What a call keeps for its backward pass beside parameters, in sizes of the map ``x``."""
    parameters = {p.untyped_storage().data_ptr() for p in block.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x)
    return sum(storage.nbytes() for storage in storages.values()) / x.nbytes


@pytest.mark.parametrize(("attention", "maps"), [("ipsa", 5), ("cpsa", 2)])
def test_what_a_block_saves_for_its_backward_pass(attention, maps, device):
    """IPSA: the norm's input, q, k, v and proj's input. CPSA: the norm's input and output."""
    block = catkernels.CATBlock(64, 2, attn_type=attention, backend="triton")
    theirs = official.CATBlock(
        64, (28, 28), 2, 7, 4.0, True, None, 0.0, 0.0, 0.0, torch.nn.LayerNorm, attention
    )
    for whole in (block, theirs):
        # what is left is the attention's half
        whole.norm2 = whole.mlp = torch.nn.Identity()
        whole.to(device)
    x = torch.randn(2, 28, 28, 64, device=device, requires_grad=True)
    # the folded weights, and two numbers for each pixel
    small = 0.2 if attention == "cpsa" else 0
    assert maps <= maps_saved(block, x) <= maps + small
    assert 7 < maps_saved(theirs, x.flatten(1, 2)) < 8


@pytest.mark.parametrize("attention", ["ipsa", "cpsa"])
def test_an_unpadded_child_with_a_hook_still_reaches_the_kernels_or_says_so(
    attention, device, launches
):
    block = catkernels.CATBlock(32, 2, attn_type=attention, backend="triton").to(device)
    x = torch.randn(1, 7, 7, 32, device=device)
    expected = block(x)
    block.attn.proj.register_forward_hook(lambda module, args, output: None)
    if attention == "ipsa":
        torch.testing.assert_close(block(x), expected)
        assert launches["ipsa_forward_kernel"] == 2
    else:
        with pytest.raises(ValueError, match="cannot use backend='triton'"):
            block(x)


def test_a_gradient_penalty_is_refused(device):
    """The incoming gradient is a constant here, which `once_differentiable` would let pass."""
    model = official.CAT(**ONE_STAGE).to(device)
    catkernels.patch(model, backend="triton")
    images = torch.randn(1, 3, 16, 16, device=device, requires_grad=True)
    (output,) = model(images)
    (gradient,) = torch.autograd.grad(output.sum(), images, create_graph=True)
    with pytest.raises(RuntimeError, match='cannot be differentiated twice: use backend="ref'):
        gradient.square().sum().backward()
