"""Patching other people's models: what changes, what must not, and what is left alone."""

from __future__ import annotations

import io
import pickle
from copy import deepcopy

import pytest
import torch
from patch_cases import KINDS, build, run, step
from tiny_models import TINY
from torch import nn

import catkernels
from catkernels import official
from catkernels.block import CATBlock
from catkernels.patching.patch import patch, unpatch

kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
def test_outputs_stay_what_they_are(kind):
    model, images = build(kind)
    model.eval()
    expected = run(model, images)
    report = patch(model)
    assert len(report.swapped) == 6
    with torch.inference_mode():
        inferred = run(model, images)
    for output, *others in zip(expected, run(model, images), inferred, strict=True):
        for other in others:
            torch.testing.assert_close(other, output)
    unpatch(model)
    for output, other in zip(expected, run(model, images), strict=True):
        assert torch.equal(other, output)


@pytest.mark.parametrize("kind", ["classifier", "backbone", "checkpointed"])
def test_a_training_step_stays_what_it_is(kind):
    model, images = build(kind)
    patched = deepcopy(model)
    patch(patched)
    for expected, actual in zip(step(model, images), step(patched, images), strict=True):
        assert expected.keys() == actual.keys()
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name])


def test_a_gradient_penalty_stays_what_it_is():
    model, images = build()
    model.double().eval()
    images = images.double().requires_grad_()
    penalties = []
    for _ in range(2):
        (gradient,) = torch.autograd.grad(model(images).sum(), images, create_graph=True)
        penalty = gradient.square().sum()
        gradients = torch.autograd.grad(penalty, tuple(model.parameters()), allow_unused=True)
        penalties.append((penalty, [g for g in gradients if g is not None]))
        patch(model)
    torch.testing.assert_close(*penalties)


def test_training_with_dropout_is_reproducible():
    model, images = build("dropping")
    patch(model)
    copy = deepcopy(model)
    for expected, actual in zip(step(model, images), step(copy, images), strict=True):
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


@kinds
def test_parameters_and_names_are_shared(kind):
    model, _ = build(kind)
    other, _ = build(kind)
    before = dict(model.named_parameters())
    keys = list(model.state_dict())
    types = [type(module) for module in other.modules()]
    patch(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert list(model.state_dict()) == keys
    assert [type(module) for module in other.modules()] == types
    model.load_state_dict(other.state_dict(), strict=True)
    other.load_state_dict(model.state_dict(), strict=True)


def test_patching_twice_changes_nothing_more():
    model, _ = build()
    first = patch(model)
    blocks = list(model.modules())
    second = patch(model, backend="reference")
    assert second.swapped == []
    assert second.already_served == first.swapped
    assert list(model.modules()) == blocks
    assert {block.backend for block in blocks if isinstance(block, CATBlock)} == {"reference"}
    assert "asked for" in str(second)


@kinds
def test_unpatch_restores_the_very_objects(kind):
    model, images = build(kind)
    original = list(model.modules())
    patch(model)
    model.eval()
    run(model, images)
    names = unpatch(model)
    assert len(names) == 6
    assert list(model.modules()) == original
    assert not any(module.training for module in model.modules())
    run(model, images)
    assert unpatch(model) == []
    if kind == "backbone":
        assert (model.layers[0].cpsa_blocks[0].H, model.layers[0].cpsa_blocks[0].W) == (13, 16)


def test_mode_is_kept_and_follows():
    model, _ = build()
    model.eval()
    model.layers[0].pre_ipsa_blocks[0].train()
    patch(model)
    assert model.layers[0].pre_ipsa_blocks[0].training
    assert not model.layers[1].pre_ipsa_blocks[0].training
    model.train()
    assert model.layers[1].pre_ipsa_blocks[0].attn.attn_drop.training


@kinds
@pytest.mark.parametrize("copy", ["deepcopy", "pickle", "torch.save"])
def test_patched_models_can_be_copied_and_saved(kind, copy):
    model, images = build(kind)
    patch(model)
    model.eval()
    expected = run(model, images)
    if copy == "deepcopy":
        twin = deepcopy(model)
    elif copy == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    for output, other in zip(expected, run(twin, images), strict=True):
        assert torch.equal(other, output)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}
    assert len(unpatch(twin)) == 6
    assert {id(p) for p in twin.parameters()} == {
        id(p) for p in twin.state_dict(keep_vars=True).values() if p.requires_grad
    }
    for output, other in zip(expected, run(twin, images), strict=True):
        torch.testing.assert_close(other, output)


def test_a_block_held_twice_is_replaced_in_both_places():
    model, _ = build()
    model.shared = model.layers[0].cpsa_blocks[0]
    patch(model)
    assert model.shared is model.layers[0].cpsa_blocks[0]
    assert isinstance(model.shared, CATBlock)
    unpatch(model)
    assert model.shared is model.layers[0].cpsa_blocks[0]
    assert isinstance(model.shared, official.CATBlock)


def test_a_model_of_our_own_is_served_already():
    model = catkernels.CAT(**TINY)
    report = patch(model, backend="reference")
    assert report.swapped == []
    assert len(report.already_served) == 6
    assert all(m.backend == "reference" for m in model.modules() if hasattr(m, "backend"))
    assert unpatch(model) == []


def test_a_model_without_cat_blocks_raises_and_is_unchanged():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(4, 12), nn.Linear(4, 4)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = Attention()

    model = nn.Sequential(Block(), nn.Linear(4, 4))
    modules = list(model.modules())
    with pytest.raises(ValueError, match=r"no CAT block to patch.* 0: not a CAT block"):
        patch(model)
    with pytest.raises(ValueError, match="nothing resembled one"):
        patch(nn.Linear(2, 2))
    assert list(model.modules()) == modules


class Sealed(nn.ModuleList):
    """A holder that lets nobody put anything into it."""

    def __setattr__(self, name, value):
        if name == "0" and name in self._modules:
            raise AttributeError("sealed")
        super().__setattr__(name, value)


def test_patch_and_unpatch_change_nothing_where_they_fail():
    model, images = build()
    model.eval()
    model.layers[1].cpsa_blocks.__class__ = Sealed
    modules, expected = list(model.modules()), run(model, images)
    with pytest.raises(AttributeError, match="sealed"):
        patch(model)
    assert list(model.modules()) == modules
    assert torch.equal(run(model, images)[0], expected[0])

    model.layers[1].cpsa_blocks.__class__ = nn.ModuleList
    patch(model)
    modules, expected = list(model.modules()), run(model, images)
    model.layers[1].cpsa_blocks.__class__ = Sealed
    with pytest.raises(AttributeError, match="sealed"):
        unpatch(model)
    assert list(model.modules()) == modules
    assert torch.equal(run(model, images)[0], expected[0])
    model.layers[1].cpsa_blocks.__class__ = nn.ModuleList
    assert len(unpatch(model)) == 6


def test_a_block_alone_cannot_be_patched():
    with pytest.raises(ValueError, match="it is the model itself"):
        patch(build()[0].layers[0].cpsa_blocks[0])


def test_a_patched_block_alone_cannot_be_unpatched():
    model, _ = build()
    patch(model)
    with pytest.raises(ValueError, match="itself a patched block"):
        unpatch(model.layers[0].cpsa_blocks[0])


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        patch("model")
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got dict"):
        unpatch({})
    model, _ = build()
    modules = list(model.modules())
    with pytest.raises(ValueError, match="backend must be one of"):
        patch(model, backend="gpu")
    assert list(model.modules()) == modules


def test_the_report_says_what_would_raise():
    model, images = build()
    report = patch(model, backend="triton")
    # heads of 4 dimensions are below what the kernels take, on any device
    served = {block.backend for block in report.blocks if block.kind == "ipsa"}
    assert served == {"raises"}
    with pytest.raises(ValueError, match=r"cannot use backend='triton'.*head dimensions"):
        model(images)


def test_the_report_of_maps_of_any_size_promises_no_kernels_that_may_not_serve(monkeypatch):
    """In exact float32 they train CPSA at one patch only, and only the interpreter at more."""
    monkeypatch.setattr(catkernels.ops.cpsa, "interpreting", lambda: False)
    model, _ = build("backbone")
    report = patch(model, backend="triton")
    (served,) = {block.backend for block in report.blocks if block.kind == "cpsa"}
    assert served == "raises"
    assert "more than one patch in float32" in report.blocks[1].reason


def test_the_report_prints_equal_rows_once():
    model, _ = build()
    # a block that stands for itself
    model.layers[0].cpsa_blocks[0].gamma = nn.Parameter(torch.ones(1))
    report = patch(model, backend="reference")
    text = str(report)
    assert text.splitlines()[0] == "4 blocks: ipsa, swapped, served by reference"
    assert "\n1 block: cpsa, left alone\n  the block has parts unknown here: gamma\n" in text
    assert "\n  14x14x12 N=7 heads=3: layers.0.pre_ipsa_blocks.0, layers.0.post_ipsa" in text
    assert "\n5 swapped, 0 already served, 1 left alone\n" in text
    assert text.count("asked for") == 2
    assert all(text.count(row.name) == 1 for row in report.blocks)


def test_the_report_says_what_was_compared():
    model, _ = build()
    report = patch(model)
    assert 0 < report.difference == max(row.difference for row in report.blocks) < 1e-12
    assert f"compared, largest difference {report.difference:.0e}: " in str(report)
    assert "compared" not in str(patch(model))
    unpatch(model)
    report = patch(model, compare=False)
    assert report.difference is None
    assert "not compared: what has the structure of CAT was trusted" in str(report)


def test_the_report_fits_a_terminal():
    model = official.CAT(depths=(1, 1, 3, 1), checkpoint_always=True)
    text = str(patch(model, compare=False))
    assert max(map(len, text.splitlines())) <= 100
    assert text.startswith("12 blocks: ")


def test_moving_and_casting_a_patched_model():
    model, images = build()
    model.eval()
    patch(model)
    model.double()
    expected = model(images.double())
    unpatch(model)
    torch.testing.assert_close(model(images.double()), expected)
    assert model.layers[0].pre_ipsa_blocks[0].attn.relative_position_index.dtype == torch.int64
