"""What `patch` finds by running blocks beside ours: forks that compute something else, or not."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from patch_cases import build, run
from right_forks import RIGHT, Remembers
from tiny_models import TINY
from torch import nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode
from wrong_forks import (
    DROPS,
    ONLY_IPSA,
    WRONG,
    HalfBranches,
    InTraining,
    OnAnAttribute,
    OnANestedAttribute,
    OneDropPath,
    Pair,
    StopsTheGradient,
)

from catkernels import official
from catkernels.patching.patch import patch, unpatch


class RMSNorm(nn.Module):
    """A norm that is not PyTorch's."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * x.square().mean(-1, keepdim=True).rsqrt() * self.weight


def build_fork(fork: type, kind: str = "backbone"):
    """A model all of whose blocks, or attentions, are of another class, and images."""
    model, images = build(kind)
    for block in blocks_of(model):
        module = block if issubclass(fork, official.CATBlock) else block.attn
        module.__class__ = fork
    return model, images


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "attn_type")]


def add_official_block(model: nn.Module) -> None:
    """One block that can be swapped, so that there is a report."""
    model.another = build("classifier")[0].layers[0].cpsa_blocks[0]


@pytest.mark.parametrize("fork", WRONG, ids=lambda fork: fork.__name__)
def test_what_computes_something_else_is_left_alone(fork):
    model, _ = build_fork(fork)
    add_official_block(model)
    before = list(model.modules())[:-1]
    report = patch(model)
    for row in report.blocks[:-1]:
        # the drop path of the first stage never drops
        elsewhere = fork is OneDropPath and row.name.startswith("layers.0")
        if elsewhere or (row.kind == "cpsa" and fork in ONLY_IPSA):
            assert row.action == "swapped"
            continue
        assert row.action == "left alone", row
        assert "compared with random weights, its" in row.reason or fork is Pair
        assert fork is Pair or row.difference > 1e-3
    if fork not in {OneDropPath, *ONLY_IPSA}:
        assert report.swapped == ["another"]
        unpatch(model)
        assert list(model.modules())[:-1] == before


@pytest.mark.parametrize("fork", DROPS, ids=lambda fork: fork.__name__)
def test_dropout_elsewhere_is_left_alone_where_there_is_any(fork):
    model, _ = build_fork(fork, "dropping")
    with pytest.raises(ValueError, match=DROPS[fork]):
        patch(model)
    model, _ = build_fork(fork)
    assert len(patch(model).swapped) == 6


@pytest.mark.parametrize("kind", ["classifier", "backbone"])
@pytest.mark.parametrize("fork", RIGHT, ids=lambda fork: fork.__name__)
def test_what_computes_the_same_in_its_own_way_is_swapped(fork, kind):
    model, images = build_fork(fork, kind)
    model.eval()
    expected = run(model, images)
    report = patch(model)
    assert len(report.swapped) == 6
    assert all(row.difference < 1e-5 for row in report.blocks)
    torch.testing.assert_close(run(model, images), expected)


def test_norms_of_any_class_are_called():
    model = official.CAT(**TINY, norm_layer=RMSNorm).eval()
    images = torch.randn(2, 3, 56, 56)
    expected = run(model, images)
    assert len(patch(model).swapped) == 6
    torch.testing.assert_close(run(model, images), expected)


def test_the_reason_says_by_how_much():
    model, _ = build_fork(HalfBranches)
    with pytest.raises(ValueError, match=r"its output in evaluation differs by 50 ?%"):
        patch(model)
    model, _ = build_fork(InTraining)
    with pytest.raises(ValueError, match=r"its output in training differs by \d+ ?%"):
        patch(model)
    model, _ = build_fork(StopsTheGradient)
    with pytest.raises(ValueError, match=r"its gradient of input in training differs by \d+ ?%"):
        patch(model)
    model, _ = build_fork(Pair)
    with pytest.raises(ValueError, match="TypeError: its forward makes tuple of a tensor"):
        patch(model)


@pytest.mark.parametrize("where", ["plain", "nested"])
def test_an_attribute_makes_a_kind_of_its_own(where):
    model, _ = build_fork(OnAnAttribute if where == "plain" else OnANestedAttribute)
    for block, gain in zip(blocks_of(model), (1.0, 0.1, 1.0, 1.0, 1.0, 0.5), strict=True):
        block.gain, block.config = gain, {"gain": gain}
    report = patch(model)
    assert report.left_alone == ["layers.0.cpsa_blocks.0", "layers.1.post_ipsa_blocks.0"]


def test_without_comparison_the_structure_is_trusted():
    model, _ = build_fork(HalfBranches)
    report = patch(model, compare=False)
    assert len(report.swapped) == 6
    assert {row.difference for row in report.blocks} == {None}


def state_of(model: nn.Module) -> dict:
    """What a comparison could disturb: attributes, hooks, modes, numbers, and where those are."""
    state = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            state[name, key] = dict(value) if isinstance(value, dict) else value
    return state


def assert_generators_unmoved(work) -> None:
    states = [torch.get_rng_state(), random.getstate(), np.random.get_state()]  # noqa: NPY002 user code's
    work()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert all(map(np.array_equal, np.random.get_state(), states[2]))  # noqa: NPY002 user code's


def patch_or_fail(model: nn.Module) -> bool:
    try:
        patch(model)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("fork", [Remembers, HalfBranches, Pair], ids=lambda fork: fork.__name__)
def test_comparing_touches_nothing(fork):
    model, _ = build_fork(fork)
    calls = []
    for block in blocks_of(model):
        block.seen, block.cache, block.ema = [], {"gain": []}, torch.ones(1)
        block.generator = torch.Generator().manual_seed(1)
        for part in ("", "norm1", "attn", "attn.qkv", "drop_path", "mlp.fc1"):
            block.get_submodule(part).register_forward_hook(lambda *_: calls.append(1))
    first = model.layers[0].pre_ipsa_blocks[0].eval()
    first.attn.train()
    first.H = first.W = 17
    before = state_of(model)
    states = [block.generator.get_state() for block in blocks_of(model)]
    handle = nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
    assert_generators_unmoved(lambda: patch_or_fail(model))
    handle.remove()
    assert len(unpatch(model)) == (6 if fork is Remembers else 0)
    after = state_of(model)
    assert before.keys() == after.keys()
    assert all(before[key] is after[key] or before[key] == after[key] for key in before)
    assert calls == []
    for block, generator_state in zip(blocks_of(model), states, strict=True):
        assert (block.seen, block.cache, block.ema) == ([], {"gain": []}, torch.ones(1))
        assert not hasattr(block, "calls")
        assert torch.equal(block.generator.get_state(), generator_state)
    assert all(parameter.grad is None for parameter in model.parameters())


def half(model):
    return model.half()


def bfloat16_and_frozen(model):
    return model.bfloat16().requires_grad_(False)


def on_meta(model):
    return model.to("meta")


def with_zero_projections(model):
    for block in blocks_of(model):
        for linear in (block.attn.proj, block.mlp.fc2):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
    return model


@pytest.mark.parametrize("change", [half, bfloat16_and_frozen, on_meta, with_zero_projections])
def test_whatever_the_weights_are_it_is_the_arithmetic_that_counts(change):
    model, _ = build()
    assert len(patch(change(model)).swapped) == 6
    model, _ = build_fork(HalfBranches)
    with pytest.raises(ValueError, match="differs by 50%"):
        patch(change(model))


CONTEXTS = {
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "meta device": lambda: torch.device("meta"),
    "a counter": lambda: FlopCounterMode(display=False),
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_whatever_patch_is_called_within(context):
    with CONTEXTS[context]():
        model = official.CAT(**TINY)
        report = patch(model)
    assert len(report.swapped) == 6
    assert all(row.difference < 1e-12 for row in report.blocks)


def test_a_large_map_takes_little_memory():
    """CPSA of this one has 2304 patches: 8 GB of weights and gradients at 16 channels."""
    model = official.CAT(
        img_size=384, patch_emb_size=4, patch_size=2, embed_dim=16, depths=(1,), num_heads=(1,)
    )
    model.layers[0].cpsa_blocks[0].input_resolution = (1344, 1344)
    assert len(patch(model).swapped) == 3
    assert model.layers[0].cpsa_blocks[0].input_resolution == (1344, 1344)


@pytest.mark.parametrize("patch_size", [1, 2, 3, 12])
@pytest.mark.parametrize("variant", [{}, {"out_indices": (0,)}], ids=["classifier", "backbone"])
def test_any_patches(patch_size, variant):
    stage = {"embed_dim": 8, "depths": (1,), "num_heads": (2,), "num_classes": 3}
    options = {"qkv_bias": False, "patch_size": patch_size, "img_size": 4 * patch_size}
    report = patch(official.CAT(**stage, **variant, **options))
    assert len(report.swapped) == 3
    assert all(row.difference < 1e-12 for row in report.blocks)


def test_nothing_of_a_comparison_is_counted():
    model, _ = build()
    with FlopCounterMode(display=False) as counter:
        patch(model)
    assert counter.get_total_flops() == 0


def test_a_weight_that_is_no_parameter_is_compared_as_well():
    """Pruning leaves one that it computes before each call."""
    model, images = build()
    for block in model.layers[0].cpsa_blocks:
        prune.l1_unstructured(block.norm1, "weight", 0.5)
    expected = model.eval()(images)
    assert len(patch(model).swapped) == 6
    torch.testing.assert_close(model(images), expected)
