"""CATBlock by itself, and the MLP and the drop path that it is made of."""

from __future__ import annotations

import pickle
from copy import deepcopy

import pytest
import torch

import catkernels
from catkernels import official
from catkernels.patching.patch import patch

both = pytest.mark.parametrize("attention", ["ipsa", "cpsa"])


@both
def test_block_takes_maps_and_tokens(attention):
    block = catkernels.CATBlock(12, 3, attn_type=attention)
    x = torch.randn(2, 9, 16, 12)
    block.H, block.W = 9, 16
    assert torch.equal(block(x).flatten(1, 2), block(x.flatten(1, 2)))
    with pytest.raises(ValueError, match=r"\(B, 9 \* 16, C\), got \(2, 143, 12\)"):
        block(x.flatten(1, 2)[:, 1:])


@both
def test_a_block_returns_a_tensor_of_its_own(attention):
    """No view: FSDP2 marks what a block returns, and loses the mark where a view is changed."""
    block = catkernels.CATBlock(12, 3, attn_type=attention)
    block.H, block.W = 9, 16
    x = torch.randn(2, 9, 16, 12)
    assert not block(x)._is_view()
    assert not block(x.flatten(1, 2))._is_view()


def test_block_survives_copying_and_pickling():
    block = catkernels.CATBlock(12, 3)
    x = torch.randn(1, 7, 7, 12)
    for copy in (deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(copy(x), block(x))


def test_drop_path_drops_whole_images():
    torch.manual_seed(0)
    drop = catkernels.block.DropPath(0.25)
    x = torch.ones(4000, 3, 2)
    y = drop(x)
    per_image = y.flatten(1)
    assert (per_image == per_image[:, :1]).all()
    assert y.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert y.mean().item() == pytest.approx(1, abs=0.05)
    assert drop.eval()(x) is x


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: catkernels.CATBlock(12, 3, attn_type="swin"), "attn_type must be"),
        (lambda: catkernels.CATBlock(12, 3)(torch.randn(1, 49, 12)), "set H and W"),
        (lambda: catkernels.CATBlock(12, 3, drop_path=1.0), r"drop_path must be in \[0, 1\)"),
        (lambda: catkernels.CATBlock(12, 3, drop_path=-0.5), r"drop_path must be .* got -0.5"),
        (lambda: catkernels.block.Mlp(4, 8, drop=1.0), r"drop must be in \[0, 1\), got 1.0"),
        (
            lambda: catkernels.CATBlock(12, 3, drop_path=float("nan")),
            r"drop_path must be .* got nan",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def patched_block(attention: str):
    """A block of ours in the place of an official one of the same structure."""
    model = official.CAT(embed_dim=12, depths=(1,), num_heads=(3,), out_indices=(0,))
    patch(model, compare=False)
    stage = model.layers[0]
    return stage.pre_ipsa_blocks[0] if attention == "ipsa" else stage.cpsa_blocks[0]


def our_block(attention: str):
    return catkernels.CATBlock(12, 3, attn_type=attention)


makes = pytest.mark.parametrize("make", [our_block, patched_block])


@both
@makes
def test_another_dtype_or_device_than_the_blocks_is_refused_in_our_words(make, attention):
    block = make(attention)
    x = torch.randn(2, 9, 16, 12)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        with pytest.raises(
            TypeError, match=rf"x is {dtype} but the layer's weights are torch\.float"
        ):
            block(x.to(dtype))
    with pytest.raises(
        ValueError, match="x is on meta but the layer's weights are on cpu: move both"
    ):
        block(x.to("meta"))
    with pytest.raises(TypeError, match=r"x must be a floating-point tensor, got torch\.int64"):
        block(x.to(torch.int64))
    with torch.autocast("cpu", torch.bfloat16):
        assert block(x).dtype == torch.float32
        assert block(x.bfloat16()).dtype == torch.bfloat16


@both
def test_what_can_be_computed_of_mixed_dtypes_is(attention):
    """Norms in float32 and products in half, as mixed precision by hand has it."""
    block = our_block(attention).bfloat16()
    block.norm1.float(), block.norm2.float()
    x = torch.randn(2, 9, 16, 12, dtype=torch.bfloat16)
    assert block(x).dtype == torch.bfloat16


@both
@makes
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_with_gradients_computes_what_the_block_does(make, attention):
    """Its check traces once more without gradients, and must find the same graph."""
    block = make(attention)
    traced = torch.jit.trace(block, torch.randn(2, 9, 16, 12))
    x = torch.randn(3, 9, 16, 12, requires_grad=True)
    inputs, results = (x, *block.parameters()), []
    for function in (block, traced):
        output = function(x)
        results.append((output, torch.autograd.grad(output.square().sum(), inputs)))
    torch.testing.assert_close(*results)


@both
@makes
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_kernels_leave_a_trace_to_the_reference(make, attention):
    block = make(attention)
    block.backend = "triton"
    with pytest.raises(
        ValueError, match=r"torch\.jit\.trace: it cannot record their backward pass"
    ):
        torch.jit.trace(block, torch.randn(2, 9, 16, 12))
