"""CPSA with its norm and residual in one kernel, which serves inference alone."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from dense_cases import (
    AUTOCAST,
    AUTOCAST_FLOAT16,
    BFLOAT16,
    FLOAT16,
    Mode,
    by_pytorch,
    rows,
    sampled,
    seeded,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import catkernels
from catkernels.accuracy import assert_within_error_budget
from catkernels.ops.cpsa_residual import cpsa_residual, joined_reasons
from catkernels.ops.linear import per_image
from catkernels.torch_state.precision import compute_dtype

pytestmark = pytest.mark.usefixtures("round_to_nearest_bf16", "poisoned_memory", "launches")

KERNELS = {
    "cpsa_fold_weights_kernel": 1,
    "row_statistics_kernel": 1,
    "cpsa_map_forward_kernel": 1,
}
# The second image's branch is dropped.
FACTORS = torch.tensor([1.25, 0.0, 1.25])
EXACT = Mode("float64", torch.float64)
# N, and sizes of maps: of P = 1, 3 and 4, and of 12 and 16, of which one is padded.
SIZES = [(7, (2, 7, 7, 96)), (3, (2, 5, 9, 32)), (7, (1, 27, 26, 32))]
MORE_SIZES = [(7, (1, 28, 28, 32)), (2, (3, 4, 4, 64)), (2, (2, 6, 7, 192)), (7, (3, 5, 6, 32))]
MODES = [BFLOAT16, AUTOCAST]
MORE_MODES = [FLOAT16, AUTOCAST_FLOAT16]


def layers(channels: int, patch_size: int) -> nn.ModuleDict:
    """A norm and CPSA's linear layers, whose parameters are all of a size that matters."""
    pixels, generator = patch_size**2, torch.Generator().manual_seed(0)
    modules = nn.ModuleDict(
        {
            "norm": nn.LayerNorm(channels),
            "qkv": nn.Linear(pixels, 3 * pixels),
            "proj": nn.Linear(pixels, pixels),
        }
    ).requires_grad_(False)
    for name, parameter in modules.named_parameters():
        scale = 1.5 * parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.3
        parameter.normal_(generator=generator).mul_(scale)
        if name == "norm.weight":
            parameter.add_(1)
    return modules


def ours(modules, x, factor, patch_size):
    options = {"patch_size": patch_size, "scale": 1 / patch_size}
    return cpsa_residual(x, modules["norm"], modules["qkv"], modules["proj"], factor, **options)


def official(modules, x, factor, patch_size):
    qkv, proj = modules["qkv"], modules["proj"]
    weights = (qkv.weight, qkv.bias, proj.weight, proj.bias)
    normed = modules["norm"](x)
    branch = catkernels.cpsa_attention(normed, *weights, patch_size=patch_size, backend="reference")
    return x + (branch if factor is None else branch * per_image(factor, branch))


def result(call, modules, x, mode, patch_size, factor=FACTORS) -> Tensor:
    modules, x = deepcopy(modules).to(x.device, mode.stream), x.to(mode.stream)
    with torch.autocast(x.device.type, mode.autocast, enabled=mode.autocast is not None):
        if factor is not None:
            factor = factor[: len(x)].to(x.device, compute_dtype(x))
        return call(modules, x, factor, patch_size)


def assert_right(modules, x, mode, patch_size, factor=FACTORS) -> None:
    actual, same = (result(call, modules, x, mode, patch_size, factor) for call in (ours, official))
    # of the numbers as they are in the mode
    modules, x = deepcopy(modules).to(x.device, mode.stream), x.to(mode.stream)
    truth = result(official, modules, x, EXACT, patch_size, factor)
    assert actual.dtype == mode.stream
    assert_within_error_budget(actual, same, truth, str(mode))


@pytest.mark.parametrize("mode", sampled(MODES, MORE_MODES), ids=str)
@pytest.mark.parametrize(("patch_size", "size"), SIZES, ids=str)
def test_one_kernel(patch_size, size, mode, device, launches):
    modules, x = layers(size[-1], patch_size).to(device), rows(*size).to(device)
    assert_right(modules, x, mode, patch_size)
    assert launches == KERNELS


@pytest.mark.full
@pytest.mark.parametrize("mode", MODES + MORE_MODES, ids=str)
@pytest.mark.parametrize(("patch_size", "size"), MORE_SIZES, ids=str)
def test_more_sizes(patch_size, size, mode, device):
    modules, x = layers(size[-1], patch_size).to(device), rows(*size).to(device)
    assert_right(modules, x, mode, patch_size)


ABSENT = ["norm.bias", "qkv.bias", "proj.bias"]


@pytest.mark.parametrize("absent", [*([name] for name in ABSENT), ABSENT], ids=str)
def test_what_is_absent(absent, device):
    """Biases, and DropPath's factor."""
    modules = layers(32, 3).to(device)
    for name in absent:
        layer, parameter = name.split(".")
        modules[layer].register_parameter(parameter, None)
    modules["norm"].eps = 0.1
    assert_right(modules, rows(2, 6, 5, 32).to(device), AUTOCAST, 3, factor=None)


def test_a_dropped_branch_leaves_its_image_as_it_is(device):
    modules, x = layers(32, 3).to(device), rows(3, 6, 5, 32).to(device)
    found = result(ours, modules, x, AUTOCAST, 3)
    assert torch.equal(found[1], x[1])
    assert all((found[image] != x[image]).double().mean() > 0.9 for image in (0, 2))


def test_results_are_the_same_bits_from_run_to_run_and_of_any_strides(device):
    modules, x = layers(32, 3).to(device), rows(2, 32, 6, 5).to(device).permute(0, 2, 3, 1)
    first, second, packed = (
        result(ours, modules, values, BFLOAT16, 3) for values in (x, x, x.contiguous())
    )
    assert torch.equal(first, second)
    assert torch.equal(first, packed)


@pytest.mark.launches_nothing
def test_an_empty_batch(device):
    found = result(ours, layers(32, 3).to(device), rows(0, 6, 5, 32).to(device), AUTOCAST, 3)
    assert (found.shape, found.dtype) == ((0, 6, 5, 32), torch.float32)


def test_an_image_that_is_not_finite_spoils_no_other(device):
    modules, x = layers(32, 3).to(device), rows(3, 6, 5, 32).to(device)
    clean = result(ours, modules, x, AUTOCAST, 3)
    x[0, 4, 2, 3] = float("nan")
    spoilt = result(ours, modules, x, AUTOCAST, 3)
    assert torch.equal(spoilt[1:], clean[1:])
    # the pixel's norm is nan in all channels, and so is what attends to its patch
    assert spoilt[0, 4, 2].isnan().all()


def test_operator(device):
    modules, x = layers(32, 2).to(device), rows(2, 4, 3, 32).to(device)
    factor, numbers = FACTORS[:2].to(device), (1e-5, 2, 0.5, torch.bfloat16)
    arguments = (x, *modules.parameters(), factor, *numbers)
    torch.library.opcheck(torch.ops.catkernels.cpsa_residual, arguments)


@pytest.mark.parametrize("side", [3, 6])
def test_flops_are_those_of_the_attention(side, device):
    modules, x = layers(32, 3).to(device), rows(2, side, side, 32).to(device)
    qkv, proj = modules["qkv"], modules["proj"]
    weights = (qkv.weight, qkv.bias, proj.weight, proj.bias)
    counted = []
    for call in (
        lambda: ours(modules, x, None, 3),
        lambda: catkernels.cpsa_attention(x, *weights, patch_size=3, backend="triton"),
    ):
        autocast = torch.autocast(device.type, torch.bfloat16)
        with FlopCounterMode(display=False) as counter, autocast:
            call()
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


@pytest.mark.launches_nothing
def test_reasons():
    usual = {"products": torch.bfloat16, "parameters": {torch.float32}, "channels": 96}
    usual |= {"patch_size": 7, "num_patches": 16}
    assert joined_reasons(**usual) == []
    for change, reason in (
        ({"products": torch.float32}, "in half precision, not in torch.float32"),
        ({"parameters": {torch.float64}}, "not torch.float64"),
        ({"channels": 40}, "768 or 1024 channels, not 40"),
        ({"patch_size": 8}, "less than 8 x 8, not of 8"),
        ({"num_patches": 17}, "for 1 to 16 patches, not 17"),
        ({"num_patches": 0}, "for 1 to 16 patches, not 0"),
    ):
        (found,) = joined_reasons(**usual | change)
        assert reason in found


def block_for_inference(**options) -> catkernels.CATBlock:
    options = {"attn_type": "cpsa", "backend": "triton"} | options
    block = catkernels.CATBlock(32, 2, patch_size=3, **options)
    block.norm1.load_state_dict(layers(32, 3)["norm"].state_dict())
    return block.eval().requires_grad_(False)


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("mode", [BFLOAT16, AUTOCAST], ids=str)
def test_a_block(mode, tokens, device, launches):
    """Padded; it says that its norm is served, and computes what its parts do apart."""
    block, x = block_for_inference().to(device, mode.stream), rows(2, 5, 6, 32)
    x = x.to(device, mode.stream)
    block.H, block.W = 5, 6
    x = x.flatten(1, 2) if tokens else x
    with torch.autocast(device.type, mode.autocast, enabled=mode.autocast is not None):
        actual, same = seeded(block, x), by_pytorch(block, x)
        assert block.unsupported_parts(x) == {"norms": [], "MLP": []}
    truth = by_pytorch(deepcopy(block).double(), x.double())
    assert actual.dtype == same.dtype
    assert_within_error_budget(actual, same, truth, str(mode))
    assert launches == KERNELS | {"mlp_forward_kernel": 1}


def test_a_block_that_drops_paths_in_inference(device, launches):
    """Where DropPath alone is in training, the factors are its draws."""
    block = block_for_inference(drop_path=0.5).to(device, torch.bfloat16)
    x = rows(6, 3, 3, 32).to(device, torch.bfloat16)
    block.drop_path.train()
    actual, expected = seeded(block, x), by_pytorch(block, x)
    torch.testing.assert_close(actual, expected, atol=0.05, rtol=0.02)
    assert launches["row_statistics_kernel"] == 1


# What is done to a block -> what it then says of its norms, which kernels serve in training.
OBSTACLES = {
    "training": (lambda block: block.train(), ""),
    "the attention in training": (lambda block: block.attn.train(), "in inference alone"),
    "gradients": (lambda block: block.attn.requires_grad_(), "in inference alone"),
    "a norm that learns": (lambda block: block.norm1.requires_grad_(), ""),
    "a hook on the norm": (
        lambda block: block.norm1.register_forward_hook(lambda *_: None),
        "the norm carries hooks",
    ),
    "a hook on the attention": (
        lambda block: block.attn.register_forward_hook(lambda *_: None),
        "the attention is called itself",
    ),
    "another norm": (
        lambda block: setattr(block, "norm1", nn.RMSNorm(32).to(block.norm1.weight)),
        "RMSNorm",
    ),
    "dropout": (
        lambda block: setattr(block.attn, "proj_drop", nn.Dropout(0.5)),
        "drops values",
    ),
    "another drop_path": (lambda block: setattr(block, "drop_path", nn.Dropout(0.5)), "Dropout"),
    "another N": (lambda block: setattr(block, "patch_size", 2), "of other patches"),
}


@pytest.mark.parametrize(("change", "reason"), OBSTACLES.values(), ids=OBSTACLES)
def test_what_it_falls_back_for(change, reason, device, launches):
    block = block_for_inference().to(device, torch.bfloat16)
    x = rows(1, 6, 5, 32).to(device, torch.bfloat16)
    change(block)
    reasons = block.unsupported_parts(x)["norms"]
    assert any(reason in why for why in reasons) if reason else reasons == []
    torch.testing.assert_close(seeded(block, x), by_pytorch(block, x), atol=0.1, rtol=0.02)
    assert "row_statistics_kernel" not in launches


@pytest.mark.launches_nothing
def test_layers_that_are_listened_to_are_called(device):
    block = block_for_inference().to(device, torch.bfloat16)
    x = rows(1, 6, 5, 32).to(device, torch.bfloat16)
    block.attn.proj.register_forward_hook(lambda *_: None)
    assert "qkv or proj is no plain" in block.unsupported_parts(x)["norms"][-1]
    # CPSA's own kernels only read weights as well
    with pytest.raises(ValueError, match="carries hooks"):
        block(x)


@pytest.mark.parametrize(
    ("size", "dtype", "reason"),
    [
        ((1, 6, 5, 32), torch.float32, "half precision"),
        ((1, 15, 13, 32), torch.bfloat16, "16 patches, not 25"),
    ],
    ids=str,
)
def test_maps_that_it_falls_back_for(size, dtype, reason, device, launches):
    block, x = block_for_inference().to(device, dtype), rows(*size).to(device, dtype)
    reasons = block.unsupported_parts(x)["norms"]
    assert reasons[0] == "in inference PyTorch's norm takes one pass as well"
    assert any(reason in why for why in reasons)
    torch.testing.assert_close(block(x), by_pytorch(block, x), atol=0.1, rtol=0.02)
    assert "row_statistics_kernel" not in launches
    assert launches["cpsa_map_forward_kernel"] == 1


def test_a_block_in_inference_compiles_to_one_graph(device, launches):
    block = block_for_inference().to(device, torch.bfloat16)
    x = rows(2, 6, 5, 32).to(device, torch.bfloat16)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), block(x))
    assert launches["row_statistics_kernel"] == 2
