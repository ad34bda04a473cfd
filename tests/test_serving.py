"""Which kernels serve a block's norms, MLP and residuals, and that they compute what it is."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from dense_cases import (
    AUTOCAST,
    BFLOAT16,
    FLOAT32,
    Mode,
    assert_near,
    assert_right,
    by_pytorch,
    results,
    rows,
    sampled,
    seeded,
)
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import catkernels
from catkernels import official
from catkernels.block import DropPath

pytestmark = pytest.mark.usefixtures("round_to_nearest_bf16", "tf32_on_gpus")

KINDS = ["ipsa", "cpsa"]


def make_block(kind="ipsa", drop_path=0.0, **options) -> catkernels.CATBlock:
    """A block whose norms matter, which asks for kernels wherever they serve."""
    options = {"backend": "triton", "attn_type": kind, "drop_path": drop_path} | options
    block = catkernels.CATBlock(32, 2, **options)
    with torch.no_grad():
        for norm in (block.norm1, block.norm2):
            norm.weight.normal_(1, 0.2)
            norm.bias.normal_(0, 0.2)
    return block


def assert_block_is_right(block, x, mode: Mode) -> None:
    assert_right(seeded, by_pytorch, block, x, mode)


@pytest.mark.parametrize("mode", [FLOAT32, BFLOAT16, AUTOCAST], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_training(kind, mode, device, launches, poisoned_memory):
    """Padded maps, and DropPath, which drops the same branches for the same seed."""
    assert_block_is_right(make_block(kind, drop_path=0.5), rows(4, 6, 7, 32).to(device), mode)
    fused = mode is not FLOAT32
    assert launches["mlp_forward_kernel"] == launches["mlp_backward_kernel"] == fused
    assert launches["bias_gelu_backward_kernel"] == (not fused)
    # norm1, and norm2 where the MLP is not one kernel
    assert launches["norm_backward_kernel"] == 1 + (not fused)
    joined = fused and kind == "ipsa"
    assert launches["norm_linear_kernel"] == launches["linear_residual_kernel"] == joined


@pytest.mark.parametrize("mode", [FLOAT32, BFLOAT16, AUTOCAST], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_inference(kind, mode, device, launches):
    block, x = make_block(kind).eval(), rows(2, 7, 7, 32).to(device)
    block.to(device, mode.stream)
    with torch.no_grad(), torch.autocast(device.type, mode.autocast, enabled=mode is AUTOCAST):
        actual, expected = seeded(block, x.to(mode.stream)), by_pytorch(block, x.to(mode.stream))
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, atol=0.05, rtol=0.02)
    served = {name for name in launches if not name.startswith(("cpsa", "ipsa"))}
    expected = set() if mode is FLOAT32 else {"mlp_forward_kernel"}
    if mode is not FLOAT32 and kind == "ipsa":
        expected |= {"norm_linear_kernel", "linear_residual_kernel"}
    if mode is not FLOAT32 and kind == "cpsa":
        expected.add("row_statistics_kernel")
    assert served == expected


def test_tokens(device, launches):
    block, x = make_block().to(device), rows(2, 49, 32).to(device)
    block.H = block.W = 7
    assert_block_is_right(block, x, AUTOCAST)
    assert launches["mlp_forward_kernel"]


class Doubled(nn.Module):
    """Something put around a part."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return 2 * self.part(x)


class HalfDropPath(DropPath):
    """Of a class of its own."""

    def forward(self, x):
        return super().forward(x) / 2


def listen(part):
    part.register_forward_hook(lambda module, arguments, output: output * 1.5)


def wrap(block, name):
    setattr(block, name, Doubled(getattr(block, name)))


# What is done to a block -> how often a norm goes back by a kernel, and the MLP forward. The MLP's
# backward kernel goes back through norm2 as well.
OBSTACLES = {
    "nothing": (lambda block: None, 1, 1),
    "a hook on norm1": (lambda block: listen(block.norm1), 0, 1),
    "a hook on norm2": (lambda block: listen(block.norm2), 1, 0),
    "a wrapped norm1": (lambda block: wrap(block, "norm1"), 0, 1),
    "a wrapped norm2": (lambda block: wrap(block, "norm2"), 1, 0),
    "another norm": (lambda block: setattr(block, "norm2", nn.RMSNorm(32)), 1, 0),
    "a norm without weights": (
        lambda block: setattr(block, "norm2", nn.LayerNorm(32, elementwise_affine=False)),
        1,
        0,
    ),
    "a norm without bias": (
        lambda block: setattr(block, "norm2", nn.LayerNorm(32, bias=False)),
        1,
        1,
    ),
    "a hook on the MLP": (lambda block: listen(block.mlp), 2, 0),
    "a wrapped MLP": (lambda block: wrap(block, "mlp"), 2, 0),
    "a hook on fc1": (lambda block: listen(block.mlp.fc1), 2, 0),
    "a wrapped fc2": (lambda block: wrap(block.mlp, "fc2"), 2, 0),
    "a parametrised fc1": (lambda block: parametrizations.weight_norm(block.mlp.fc1), 2, 0),
    "a hook on the activation": (lambda block: listen(block.mlp.act), 2, 0),
    "another activation": (lambda block: setattr(block.mlp, "act", nn.SiLU()), 2, 0),
    "GELU by tanh": (lambda block: setattr(block.mlp, "act", nn.GELU("tanh")), 2, 0),
    "dropout": (lambda block: setattr(block.mlp, "drop", nn.Dropout(0.5)), 2, 0),
    "a hook on drop": (lambda block: listen(block.mlp.drop), 2, 0),
    "a hook on DropPath": (lambda block: listen(block.drop_path), 2, 0),
    "another DropPath": (lambda block: setattr(block, "drop_path", HalfDropPath(0.5)), 2, 0),
    "no DropPath": (lambda block: setattr(block, "drop_path", nn.Identity()), 1, 1),
    "no biases": (
        lambda block: [
            layer.register_parameter("bias", None) for layer in (block.mlp.fc1, block.mlp.fc2)
        ],
        1,
        1,
    ),
    "a compiled MLP": (lambda block: block.mlp.compile(backend="eager"), 2, 0),
    # products then give the MLP's gradient, and a kernel norm2's
    "a frozen block": (lambda block: block.requires_grad_(False), 2, 1),
    "the reference": (lambda block: setattr(block, "backend", "reference"), 0, 0),
}


# One of a kind is enough for a plain run.
MORE = {
    "a wrapped norm1",
    "a norm without weights",
    "a hook on fc1",
    "a wrapped fc2",
    "a hook on drop",
    "another activation",
    "no DropPath",
    "a compiled MLP",
}


@pytest.mark.parametrize(
    ("obstacle", "norms", "mlps"),
    [
        pytest.param(*case, id=name, marks=[pytest.mark.full] * (name in MORE))
        for name, case in OBSTACLES.items()
    ],
)
def test_what_is_not_official_goes_its_own_way(obstacle, norms, mlps, device, launches):
    block = make_block("cpsa", drop_path=0.5).to(device)
    obstacle(block)
    x = rows(2, 7, 7, 32).to(device)
    actual = results(seeded, block, x, AUTOCAST)
    assert (launches["norm_backward_kernel"], launches["mlp_forward_kernel"]) == (norms, mlps)
    expected = results(by_pytorch, block, x, AUTOCAST)
    assert_near(actual, expected)
    launches["the reference, which is none"] += 1


def drop_output(block):
    block.attn.proj_drop = nn.Dropout(0.5)


# What is done to an IPSA block -> how often a kernel computes norm1 and qkv, and proj and residual.
IPSA_OBSTACLES = {
    "nothing": (lambda block: None, 1, 1),
    "a hook on norm1": (lambda block: listen(block.norm1), 0, 1),
    "another norm": (lambda block: setattr(block, "norm1", nn.RMSNorm(32)), 0, 1),
    "a hook on qkv": (lambda block: listen(block.attn.qkv), 0, 0),
    "a wrapped proj": (lambda block: wrap(block.attn, "proj"), 0, 0),
    "a parametrised proj": (lambda block: parametrizations.weight_norm(block.attn.proj), 0, 0),
    "a hook on the attention": (lambda block: listen(block.attn), 0, 0),
    "a hook on proj_drop": (lambda block: listen(block.attn.proj_drop), 0, 0),
    "dropout of the output": (drop_output, 1, 0),
    "a hook on DropPath": (lambda block: listen(block.drop_path), 1, 0),
    "another DropPath": (lambda block: setattr(block, "drop_path", HalfDropPath(0.5)), 1, 0),
    "no biases": (
        lambda block: [
            layer.register_parameter("bias", None) for layer in (block.attn.qkv, block.attn.proj)
        ],
        1,
        1,
    ),
    "a frozen block": (lambda block: block.requires_grad_(False), 1, 1),
    "the reference": (lambda block: setattr(block, "backend", "reference"), 0, 0),
}
MORE_OF_IPSA = {"a wrapped proj", "a hook on proj_drop", "another DropPath", "the reference"}


@pytest.mark.parametrize(
    ("obstacle", "qkvs", "projs"),
    [
        pytest.param(*case, id=name, marks=[pytest.mark.full] * (name in MORE_OF_IPSA))
        for name, case in IPSA_OBSTACLES.items()
    ],
)
def test_projections_that_are_not_official_go_their_own_way(
    obstacle, qkvs, projs, device, launches
):
    block, x = make_block(drop_path=0.5).to(device), rows(2, 6, 7, 32).to(device)
    obstacle(block)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        actual, expected = ({"x": call(block, x)} for call in (seeded, by_pytorch))
    found = (launches["norm_linear_kernel"], launches["linear_residual_kernel"])
    assert found == (qkvs, projs)
    assert_near(actual, expected)
    launches["the reference, which is none"] += 1


def test_attention_dropout_draws_before_drop_path_does(device, launches):
    """As where they are drawn apart."""
    block = make_block(drop_path=0.5, attn_drop=0.5).to(device)
    x = rows(4, 7, 7, 32).to(device)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        joined = seeded(block, x)
        assert launches["linear_residual_kernel"] == 1
        block.drop_path.register_forward_hook(lambda module, arguments, output: None)
        apart = seeded(block, x)
    assert launches["linear_residual_kernel"] == 1
    assert_near({"x": joined}, {"x": apart})


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("attn.qkv", nn.Linear(64, 96)),
        ("attn.proj", nn.Linear(64, 32)),
        ("attn.proj", nn.Linear(32, 64)),
        ("mlp.fc1", nn.Linear(64, 128)),
        ("mlp.fc2", nn.Linear(128, 64)),
    ],
    ids=str,
)
def test_a_layer_of_other_channels_is_left_to_pytorch(name, layer, device):
    """Which says what is wrong with it; a kernel would read beyond its weight."""
    block = make_block()
    block.set_submodule(name, layer)
    block, x = block.to(device, torch.bfloat16), rows(1, 7, 7, 32).to(device, torch.bfloat16)
    part = "projections" if name.startswith("attn") else "MLP"
    assert "other channels" in block.unsupported_parts(x)[part][0]
    with pytest.raises(RuntimeError, match=r"shape|size"):
        block(x)


@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_on_all_modules_hears_every_part(kind, device):
    block, x = make_block(kind).to(device), rows(1, 7, 7, 32).to(device).requires_grad_()
    heard = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: heard.append(module))
    try:
        with torch.autocast(device.type, torch.bfloat16):
            if kind == "cpsa":
                # whose kernels read the weights of qkv and proj
                with pytest.raises(ValueError, match="carries hooks"):
                    block(x)
                block.backend = "auto"
            block(x)
    finally:
        handle.remove()
    parts = (block.norm1, block.attn.qkv, block.attn.proj, block.norm2, block.mlp)
    parts = (*parts, block.mlp.fc1, block.mlp.act, block.mlp.fc2)
    assert set(parts) <= set(heard)


def test_reasons(device):
    block, x = make_block(drop_path=0.5).to(device), rows(1, 7, 7, 32).to(device)
    x.requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        assert block.unsupported_parts(x) == {"norms": [], "MLP": [], "projections": []}
        listen(block.norm1)
        listen(block.mlp.act)
        reasons = block.unsupported_parts(x)
        assert reasons["norms"] == ["the norm carries hooks or a forward of its own"]
        assert reasons["MLP"] == ["act carries hooks or a forward of its own"]
        assert reasons["projections"] == reasons["norms"]
        listen(block.attn.proj)
        (reason,) = block.unsupported_parts(x)["projections"]
        assert "qkv or proj is no plain nn.Linear" in reason
        listen(block.attn)
        assert block.unsupported_parts(x)["projections"] == ["the attention is called itself"]
        assert make_block("cpsa").to(device).unsupported_parts(x).keys() == {"norms", "MLP"}
        block.backend = "reference"
        assert set(map(tuple, block.unsupported_parts(x).values())) == {
            ("asked for the reference",)
        }
    block = make_block().to(device).eval()
    with torch.no_grad():
        reasons = block.unsupported_parts(x)
    half = "the kernels multiply in half precision, not in torch.float32"
    assert reasons["norms"] == ["in inference PyTorch's norm takes one pass as well"]
    assert reasons["MLP"][0] == half
    # in training kernels join what stands between the products
    assert block.unsupported_parts(x) == {"norms": [], "MLP": [], "projections": [half]}
    assert any("another dtype" in reason for reason in block.double().unsupported_parts(x)["MLP"])


@pytest.mark.parametrize("kind", sampled(KINDS[:1], KINDS[1:]))
def test_a_block_compiles_to_one_graph(kind, device, launches):
    block, x = make_block(kind, drop_path=0.0).to(device), rows(2, 7, 7, 32).to(device)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    actual, expected = (
        results(lambda module, x, call=call: call(x), block, x, AUTOCAST)
        for call in (compiled, block)
    )
    assert launches["mlp_forward_kernel"] == launches["mlp_backward_kernel"] == 2
    joined = 2 * (kind == "ipsa")
    assert launches["norm_linear_kernel"] == launches["linear_residual_kernel"] == joined
    assert_near(actual, expected)


@pytest.mark.parametrize("mode", [FLOAT32, AUTOCAST], ids=str)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_the_same_branches(use_reentrant, mode, device, launches):
    block, x = make_block("cpsa", drop_path=0.5).to(device), rows(4, 7, 7, 32).to(device)

    def checkpointed(block, x):
        torch.manual_seed(3)
        return checkpoint(block, x, use_reentrant=use_reentrant)

    def backward(call):
        leaf = x.clone().requires_grad_()
        with torch.autocast(device.type, mode.autocast, enabled=mode is AUTOCAST):
            output = call(block, leaf)
        output.sum().backward()
        gradients = [leaf.grad, *(parameter.grad for parameter in block.parameters())]
        block.zero_grad()
        return output.detach(), *gradients

    torch.testing.assert_close(backward(checkpointed), backward(seeded), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_and_no_images(kind, device, launches):
    block, x = make_block(kind).to(device), rows(1, 7, 7, 32).to(device)
    torch.testing.assert_close(deepcopy(block)(x), block(x), rtol=0, atol=0)
    found = results(seeded, block, x[:0], AUTOCAST)
    assert found["output 0"].shape == (0, 7, 7, 32)


@pytest.mark.parametrize("kind", KINDS)
def test_an_official_block_is_served_once_patched(kind, device, launches):
    block = official.CATBlock(32, (7, 7), 2, 7, 4.0, True, None, 0.0, 0.0, 0.5, nn.LayerNorm, kind)
    model, x = nn.Sequential(block).to(device), rows(2, 49, 32).to(device)
    expected = results(seeded, model, x, AUTOCAST)
    report = catkernels.patch(model, backend="triton")
    # float32 outside of autocast: kernels join what stands between the MLP's products
    assert report.blocks[0].kernels == ("attention", "MLP", "norms")
    assert "kernels serve: attention, MLP, norms" in str(report)
    actual = results(seeded, model, x, AUTOCAST)
    assert launches["mlp_forward_kernel"] == launches["norm_backward_kernel"] == 1
    assert_near(actual, expected)


class WideHeads(official.Attention):
    """Heads that are wider than a share of the channels, as a downstream copy may have them."""

    def __init__(self, dim, num_heads, head_dim):
        super().__init__(num_heads * head_dim, (7, 7), num_heads)
        self.qkv = nn.Linear(dim, 3 * num_heads * head_dim)
        self.proj = nn.Linear(num_heads * head_dim, dim)


@pytest.mark.parametrize("mode", sampled([AUTOCAST], [FLOAT32, BFLOAT16]), ids=str)
@pytest.mark.parametrize("channels", [40, 64])
def test_heads_need_not_share_the_channels(channels, mode, device, launches):
    """Nor are queries, keys and values three times as many values as the map has."""
    block = official.CATBlock(
        channels, (7, 14), 2, 7, 4.0, True, None, 0.0, 0.0, 0.0, nn.LayerNorm, "ipsa"
    )
    block.attn = WideHeads(channels, num_heads=2, head_dim=48)

    def by_kernels(model, x):
        catkernels.patch(model, backend="triton")
        return model(x)

    def as_it_was(model, x):
        catkernels.unpatch(model)
        return model(x)

    x = rows(2, 98, channels).to(device)
    assert_right(by_kernels, as_it_was, nn.Sequential(block), x, mode)
    assert launches["ipsa_backward_kernel"] == 1


def test_a_report_says_why_parts_are_left_to_pytorch(device):
    model = nn.Sequential(make_block().to(device).eval())
    (block,) = catkernels.patch(model, backend="triton").blocks
    assert block.kernels == ("attention",)
    assert "MLP: the kernels multiply in half precision" in block.others
    assert "projections: the kernels multiply in half precision" in block.others
    assert "norms: in inference" in block.others
    (block,) = catkernels.patch(model.bfloat16(), backend="triton").blocks
    assert block.kernels == ("attention", "projections", "MLP", "norms")
    (block,) = catkernels.patch(model, backend="reference").blocks
    assert (block.kernels, block.others) == ((), "")
