"""Which blocks are recognised as CAT's, which are left alone, and what a report notes."""

from __future__ import annotations

import pytest
import torch
from patch_cases import build, run
from torch import nn

from catkernels import official
from catkernels.patching.patch import patch


class Renamed(official.CATBlock):
    """A downstream copy, with another name for everything that may have one."""

    def forward(self, tokens):
        return super().forward(tokens)


def test_a_downstream_copy_is_recognised_by_its_structure():
    model, images = build()
    model.eval()
    for module in model.modules():
        if type(module) is official.CATBlock:
            module.__class__ = Renamed
    expected = run(model, images)
    assert len(patch(model).swapped) == 6
    torch.testing.assert_close(run(model, images), expected)


VARIANTS = {
    "classification": {"checkpoint_always": True},
    "detection": {"out_indices": (0, 1)},
    "segmentation": {"out_indices": (0, 1), "checkpoint_always": True},
}


@pytest.mark.parametrize(
    ("variant", "patch_size", "head_dim"),
    [
        ("classification", 7, 16),
        ("classification", 2, 24),
        ("detection", 4, 9),
        ("segmentation", 12, 5),
    ],
)
def test_the_official_variants_and_their_copies(variant, patch_size, head_dim):
    """Of other windows and head dimensions, with classes that share no name with the originals."""
    model = official.CAT(
        img_size=8 * patch_size,
        patch_size=patch_size,
        embed_dim=head_dim,
        depths=(1, 1),
        num_heads=(1, 2),
        num_classes=4,
        drop_path_rate=0.0,
        **VARIANTS[variant],
    ).double()
    for module in model.modules():
        if isinstance(module, official.CATBlock | official.Attention):
            module.__class__ = type("Copy", (type(module),), {})
    side = 8 * patch_size
    size = (side, side) if variant == "classification" else (side - 5, side + 3)
    images = torch.randn(1, 3, *size, dtype=torch.float64)

    def results():
        outputs = run(model, images)
        loss = sum(output.square().sum() for output in outputs)
        return *outputs, *torch.autograd.grad(loss, tuple(model.parameters()))

    expected = results()
    report = patch(model)
    assert len(report.swapped) == 6
    assert bool(report.notes) == ("checkpoint_always" in VARIANTS[variant])
    torch.testing.assert_close(results(), expected)


class WithContext(official.CATBlock):
    def forward(self, x, context=0.0):
        return super().forward(x) + context


class WithSize(official.CATBlock):
    def forward(self, x, *, size):
        return super().forward(x)


class AlwaysInEvaluation(official.CATBlock):
    def train(self, mode=True):
        return super().train(False)


class StaysInSinglePrecision(official.CATBlock):
    def _apply(self, fn, recurse=True):
        return super()._apply(lambda tensor: fn(tensor).float(), recurse)


def spoil(block: nn.Module, how: str) -> None:
    """Make a block one that ours must not replace."""
    attn = block.attn
    match how:
        case "layer scale":
            block.gamma = nn.Parameter(torch.ones(1))
        case "extra child":
            block.conv = nn.Identity()
        case "logit scale":
            attn.logit_scale = nn.Parameter(torch.ones(1))
        case "shifted":
            block.shift_size = 3
        case "other attention":
            block.attn_type = "global"
        case "context":
            block.__class__ = WithContext
        case "keyword":
            block.__class__ = WithSize
        case "own train":
            block.__class__ = AlwaysInEvaluation
        case "own casts":
            block.__class__ = StaysInSinglePrecision
        case "instance train":
            block.train = block.train
        case "drop path is a number":
            del block.drop_path
            block.drop_path = 0.0
        case "no norm":
            block.norm1 = None
        case "proj drop is a number":
            del attn.proj_drop
            attn.proj_drop = 0.0
        case "instance forward":
            block.forward = block.forward
        case "learned scale":
            del attn.scale
            attn.scale = torch.ones(())
        case "no drop path":
            del block.drop_path
        case "softmax":
            attn.softmax = nn.Softmax(dim=-2)
        case "own dropout":
            attn.attn_drop = nn.AlphaDropout()
        case "bias order":
            attn.relative_position_index.copy_(attn.relative_position_index.T.clone())
        case "oblong":
            block.patch_size = (7, 8)
        case "compiled":
            block.compile(backend="eager")


SPOILT = {
    "layer scale": "unknown here: gamma",
    "extra child": "unknown here: conv",
    "logit scale": "unknown here: logit_scale",
    "shifted": "shifts its windows by 3",
    "other attention": "attn_type is 'global'",
    "context": r"takes \(self, x, context\)",
    "keyword": r"takes \(self, x, size\)",
    "own train": "its class has a train of its own",
    "own casts": "its class has a _apply of its own",
    "instance train": "its train was replaced on the instance",
    "drop path is a number": "has no drop_path",
    "no norm": "has no norm1",
    "proj drop is a number": "has no proj_drop",
    "instance forward": "replaced on the instance",
    "learned scale": "scale is a Tensor",
    "no drop path": "has no drop_path",
    "softmax": r"softmax is Softmax\(dim=-2\)",
    "own dropout": "attn_drop is a AlphaDropout",
    "bias order": "orders the bias table in another way",
    "oblong": r"patch_size is \(7, 8\)",
    "compiled": "compiled by itself",
}


@pytest.mark.parametrize("how", SPOILT)
def test_what_is_left_alone_and_why(how):
    model, _ = build()
    block = model.layers[0].pre_ipsa_blocks[0]
    spoil(block, how)
    report = patch(model)
    assert report.left_alone == ["layers.0.pre_ipsa_blocks.0"]
    assert len(report.swapped) == 5
    assert model.layers[0].pre_ipsa_blocks[0] is block
    (left,) = (b for b in report.blocks if b.action == "left alone")
    with pytest.raises(AssertionError, match=SPOILT[how]):
        raise AssertionError(left.reason)


class Negated(official.CATLayer):
    def run(self, block, tokens):
        if not self.use_checkpoint:
            return block(tokens)
        else:
            return torch.utils.checkpoint.checkpoint(block, tokens, use_reentrant=False)


class ReturnsEarly(official.CATLayer):
    def run(self, block, tokens):
        if not self.use_checkpoint:
            return block(tokens)
        return torch.utils.checkpoint.checkpoint(block, tokens, use_reentrant=False)


class SavesToo(official.CATLayer):
    def save(self, manager, path):
        manager.checkpoint(path)


@pytest.mark.parametrize(
    ("layer", "noted"),
    [
        (official.CATLayer, False),
        (Negated, False),
        (ReturnsEarly, False),
        (SavesToo, False),
        (official.AlwaysCheckpointedLayer, True),
    ],
)
def test_the_report_notes_a_model_that_always_checkpoints(layer, noted):
    model, _ = build()
    for module in model.layers:
        module.__class__ = layer
    notes = "\n".join(patch(model).notes)
    assert ("recomputes every block in training" in notes) == noted


@pytest.mark.parametrize("place", ["attn.qkv", "mlp.fc1", "norm1"])
def test_weights_without_a_shape_wait_for_a_call(place):
    model, _ = build()
    block = model.layers[0].pre_ipsa_blocks[0]
    lazy = nn.LazyBatchNorm1d() if place == "norm1" else nn.LazyLinear(3 * block.dim)
    block.set_submodule(place, lazy)
    report = patch(model)
    assert len(report.swapped) == 5
    [row] = [row for row in report.blocks if row.action == "left alone"]
    assert row.reason.endswith("has no shape yet: call the model once, then patch it")
    assert place in row.reason
