"""What is changed on a patched model's parts after patching does what it does without a patch."""

from __future__ import annotations

import pickle
from copy import deepcopy
from types import MethodType

import pytest
import torch
from patch_cases import build
from torch import nn

from catkernels import official
from catkernels.block import CATBlock
from catkernels.layers import Mlp
from catkernels.patching.patch import patch, unpatch
from catkernels.trust import Trust


def double(module, name="forward"):
    """Replace a method on an instance by one that calls it."""
    former = getattr(module, name)
    setattr(module, name, lambda x: 2 * former(x))


def turn_index(block, in_place):
    if block.attn_type == "ipsa":
        index = block.attn.relative_position_index
        if in_place:
            index.copy_(index.flip(0))
        else:
            block.attn.relative_position_index = index.flip(0)


def bind(block):
    block.attn.attend = MethodType(lambda attn, qkv: 2 * type(attn).attend(attn, qkv), block.attn)


CHANGES = {
    "block.forward": double,
    "attn.forward": lambda block: double(block.attn),
    "an inner method": bind,
    "mlp.forward": lambda block: double(block.mlp),
    "norm1.forward": lambda block: double(block.norm1),
    "norm2.forward": lambda block: double(block.norm2),
    "drop_path.forward": lambda block: double(block.drop_path),
    "qkv.forward": lambda block: double(block.attn.qkv),
    "proj.forward": lambda block: double(block.attn.proj),
    "softmax.forward": lambda block: double(block.attn.softmax),
    "attn_drop.forward": lambda block: double(block.attn.attn_drop),
    "act.forward": lambda block: double(block.mlp.act),
    "the index, in place": lambda block: turn_index(block, in_place=True),
    "another index": lambda block: turn_index(block, in_place=False),
    "another activation": lambda block: setattr(block.mlp, "act", nn.ReLU()),
    "another scale": lambda block: setattr(block.attn, "scale", 3.0),
    "no table": lambda block: setattr(block.attn, "rpe", False),
    "another eps": lambda block: setattr(block.norm1, "eps", 0.5),
    "softmax over another axis": lambda block: setattr(block.attn.softmax, "dim", -2),
}


def first_blocks(model):
    """An IPSA block and a CPSA block."""
    return model.layers[0].pre_ipsa_blocks[0], model.layers[0].cpsa_blocks[0]


def in_double(kind="classifier"):
    model, images = build(kind)
    for block in first_blocks(model)[:1]:
        # so that its order matters
        nn.init.normal_(block.attn.relative_position_bias_table)
    return model.double().eval(), images.double()


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_after_patching_is_honoured(change):
    model, images = in_double()
    patched = deepcopy(model)
    unchanged = model(images)
    # the very blocks, which somebody may hold, and those in their places
    originals = first_blocks(patched)
    patch(patched, compare=False)
    for block in first_blocks(model):
        CHANGES[change](block)
    for block in first_blocks(patched) if change != "block.forward" else originals:
        CHANGES[change](block)
    expected = model(images)
    assert not torch.allclose(expected, unchanged)
    torch.testing.assert_close(patched(images), expected)
    torch.testing.assert_close(deepcopy(patched)(images), expected)
    unpatch(patched)
    torch.testing.assert_close(patched(images), expected)


CLASSES = {
    "attn.forward": (official.Attention, "forward"),
    "attn.attend": (official.Attention, "attend"),
    "attn.__call__": (official.Attention, "__call__"),
    "mlp": (Mlp, "forward"),
    "block": (official.CATBlock, "forward"),
    "linear": (nn.Linear, "forward"),
    "norm": (nn.LayerNorm, "forward"),
    "softmax": (nn.Softmax, "forward"),
    "gelu": (nn.GELU, "forward"),
}


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_changed_of_a_class_after_patching_is_honoured(name, monkeypatch):
    model, images = in_double()
    patched = deepcopy(model)
    patch(patched, compare=False)
    kind, method = CLASSES[name]
    former = getattr(kind, method)
    monkeypatch.setattr(kind, method, lambda module, x: 1.5 * former(module, x))
    expected = model(images)
    torch.testing.assert_close(patched(images), expected)


@pytest.mark.parametrize("kind", [official.Attention, nn.Softmax, nn.Linear, nn.Dropout])
def test_a_hook_of_all_modules_sees_those_of_the_official_model(kind):
    model, images = in_double()
    patched = deepcopy(model)
    patch(patched, compare=False)
    unheard = model(images)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, arguments, output: 1.5 * output if isinstance(module, kind) else None
    )
    try:
        expected, actual = model(images), patched(images)
    finally:
        handle.remove()
    assert not torch.allclose(expected, unheard)
    torch.testing.assert_close(actual, expected)


def test_parts_that_changed_are_reported():
    model, _ = in_double()
    patch(model, compare=False)
    ipsa, cpsa = first_blocks(model)
    turn_index(ipsa, in_place=True)
    bind(cpsa)
    changed = model.layers[1].pre_ipsa_blocks[0]
    changed.dim = 7
    rows = {row.name: row for row in patch(model).blocks}
    assert rows["layers.0.pre_ipsa_blocks.0"].backend == "own"
    assert "was changed after patching" in rows["layers.0.pre_ipsa_blocks.0"].reason
    assert "was changed after patching" in rows["layers.0.cpsa_blocks.0"].reason
    assert (
        "the block, or its class, was changed after patching"
        in rows["layers.1.pre_ipsa_blocks.0"].reason
    )
    assert rows["layers.1.cpsa_blocks.0"].backend == "reference"


def test_an_mlp_of_another_class_that_changed_is_no_longer_read():
    class Another(Mlp):
        gain = 1.0

        def forward(self, x):
            return self.gain * super().forward(x)

    model, _ = in_double()
    block = first_blocks(model)[0]
    block.mlp.__class__ = Another
    patch(model)
    block = first_blocks(model)[0]
    assert block.read_mlp() is not None
    block.mlp.gain = 1.0
    assert block.read_mlp() is None, "an attribute hides its class's"
    del block.mlp.gain
    assert block.read_mlp() is not None
    former = Another.forward
    Another.forward = Mlp.forward
    assert block.read_mlp() is None
    Another.forward = former
    assert block.read_mlp() is not None


@pytest.mark.parametrize("copy", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_served_as_their_models_are(copy):
    model, _ = in_double()
    patch(model, compare=False)
    changed, unchanged = first_blocks(model)
    changed.attn.dim = 7
    twins = first_blocks(copy(model))
    assert [block.read_attention() is None for block in twins] == [True, False]
    assert unchanged.read_attention() is not None


@pytest.mark.parametrize("value", [3, 0.5, "mean", (1, (2, 3)), [1], {"a": 1}, None, nn.Identity])
def test_trust_lasts_as_long_as_the_attributes(value):
    module = nn.Identity()
    module.option = value
    trust = Trust.of(module)
    assert trust.holds_for(module)
    module.option = deepcopy(value)
    assert trust.holds_for(module)
    loaded, twin = pickle.loads(pickle.dumps((trust, module)))
    assert loaded.holds_for(twin)
    module.option = "other"
    assert not trust.holds_for(module)
    del module.option
    assert not trust.holds_for(module)
    assert Trust(nn.Identity).holds_for(module)
    assert not trust.holds_for(nn.Linear(1, 1))


class Forked(official.CATBlock):
    """A block of a fork, that looks at more of itself."""

    gain = 1.0

    @property
    def area(self):
        return self.map_size[0] * self.map_size[1]

    def parts(self):
        return [type(part).__name__ for part in (self.norm1, self.mlp)], self.training

    def forward(self, x):
        return self.gain * super().forward(x)


def test_what_is_set_on_a_patched_block_reaches_the_code_of_the_other_one():
    model, images = in_double("backbone")
    for block in first_blocks(model):
        block.__class__ = Forked
    patched = deepcopy(model)
    patch(patched)
    for whole in (model, patched):
        whole.train()
        block = first_blocks(whole)[0]
        block.mlp = nn.Identity()
        block.H, block.W = 3, 5
        assert block.parts() == (["LayerNorm", "Identity"], True)
        assert block.area == 15
        block.note = {"seen": 1}
        block.gain = 2.0
        whole.eval()
    assert isinstance(first_blocks(patched)[0], CATBlock)
    expected = model(images)
    for output, other in zip(patched(images), expected, strict=True):
        torch.testing.assert_close(output, other)
    unpatch(patched)
    block = first_blocks(patched)[0]
    assert (type(block), block.note, block.gain) == (Forked, {"seen": 1}, 2.0)
    assert not block.training
    for output, other in zip(patched(images), expected, strict=True):
        torch.testing.assert_close(output, other)


def test_a_block_that_was_held_before_patching_is_the_one_in_its_place():
    model, images = in_double()
    patched = deepcopy(model)
    held = first_blocks(patched)[1]
    patch(patched, compare=False)
    for block in (first_blocks(model)[1], held):
        torch.manual_seed(0)
        block.attn.qkv = nn.Linear(49, 147).double()
        block.mlp = nn.Identity()
    torch.testing.assert_close(patched(images), model(images))
