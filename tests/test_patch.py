"""Patching other people's models: what changes, what must not, and what is left alone."""

from __future__ import annotations

import io
import pickle
from copy import deepcopy

import pytest
import torch
from torch import nn

import catkernels
from catkernels import official
from catkernels.block import CATBlock
from catkernels.patch import patch, unpatch

TINY = {"embed_dim": 12, "depths": (1, 1), "num_heads": (3, 3), "num_classes": 4, "ape": True}
KINDS = {
    "classifier": {"img_size": 56},
    "backbone": {"img_size": 56, "out_indices": (0, 1)},
    "checkpointed": {"img_size": 56, "checkpoint_always": True},
    "dropping": {
        "img_size": 56,
        "drop_rate": 0.1,
        "ipsa_attn_drop": 0.2,
        "cpsa_attn_drop": 0.2,
        "drop_path_rate": 0.3,
    },
}
SIZES = {"backbone": (50, 61)}


def build(kind: str = "classifier") -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(3)
    return official.CAT(**TINY, **KINDS[kind]), torch.randn(2, 3, *SIZES.get(kind, (56, 56)))


def run(model, images):
    outputs = model(images)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def step(model, images):
    """The weights after one step of training from a fixed state of the random generator."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(7)
    sum(output.square().mean() for output in run(model, images)).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    return gradients, model.state_dict()


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


def test_unpatch_keeps_children_that_were_replaced_meanwhile():
    model, _ = build()
    patch(model)
    block = model.layers[0].cpsa_blocks[0]
    block.mlp = mlp = nn.Identity()
    unpatch(model)
    assert model.layers[0].cpsa_blocks[0].mlp is mlp


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


def test_methods_and_attributes_of_the_original_block_stay_reachable():
    model, _ = build()
    official_block = model.layers[0].cpsa_blocks[0]
    official_block.flops = lambda: 42
    patch(model)
    block = model.layers[0].cpsa_blocks[0]
    assert block.flops() == 42
    assert block.num_heads == official_block.num_heads
    with pytest.raises(AttributeError, match="no_such_thing"):
        block.no_such_thing  # noqa: B018


PLACES = ["block", "norm1", "mlp.fc1"] + [
    f"attn{part}" for part in ("", ".qkv", ".proj", ".softmax", ".attn_drop", ".proj_drop")
]


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("blocks", ["pre_ipsa_blocks", "cpsa_blocks"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_fire(where, blocks, when):
    model, images = build()
    model.eval()
    calls = []

    def hook():
        block = getattr(model.layers[0], blocks)[0]
        module = block if where == "block" else block.get_submodule(where)
        return module.register_forward_hook(lambda module, args, output: calls.append(output.shape))

    if when == "before":
        handle = hook()
        expected = run(model, images)
        report = patch(model)
    else:
        expected = run(model, images)
        report = patch(model)
        handle = hook()
    calls.clear()
    torch.testing.assert_close(run(model, images), expected)
    assert len(calls) == 1
    if when == "before" and where in ("attn.qkv", "attn.proj"):
        assert where.removeprefix("attn.") in str(report)
    if when == "before" and where in ("attn", "attn.softmax", "attn.attn_drop"):
        assert "its attention carries hooks" in str(report)
    handle.remove()
    run(model, images)
    assert len(calls) == 1


def test_backward_hooks_on_a_block_fire():
    model, images = build()
    calls = []
    model.layers[0].cpsa_blocks[0].register_full_backward_hook(lambda *_: calls.append(1))
    patch(model)
    run(model, images)[0].sum().backward()
    assert calls == [1]


def test_backward_hooks_set_while_patched_outlive_it():
    model, images = build()
    calls = []
    patch(model)
    model.layers[0].cpsa_blocks[0].register_full_backward_hook(lambda *_: calls.append(1))
    unpatch(model)
    run(model, images)[0].sum().backward()
    assert calls == [1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantised_and_scripted_parts_do_not_stop_the_rest():
    model, images = build()
    model.eval()
    for blocks in ("pre_ipsa_blocks", "cpsa_blocks"):
        attn = getattr(model.layers[0], blocks)[0].attn
        weight, bias = attn.qkv.weight.detach(), attn.qkv.bias.detach()
        attn.qkv = Buffered(weight, bias)
    model.head = torch.jit.script(model.head)
    expected = run(model, images)
    assert len(patch(model).swapped) == 6
    torch.testing.assert_close(run(model, images), expected)


class Buffered(nn.Module):
    """A linear layer without parameters, as quantisation leaves them."""

    def __init__(self, weight, bias):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


def test_the_backend_reaches_an_attention_of_ours_in_their_block():
    model, _ = build()
    block = model.layers[0].pre_ipsa_blocks[0]
    block.attn = catkernels.IPSA(12, 7, 3)
    patch(model, backend="reference")
    assert block.attn.backend == "reference"
    model.layers[0].pre_ipsa_blocks[0].backend = "auto"
    assert block.attn.backend == "auto"


def test_parametrised_and_adapted_layers_are_honoured():
    model, images = build()
    model.eval()
    for blocks in ("pre_ipsa_blocks", "cpsa_blocks"):
        torch.nn.utils.parametrizations.weight_norm(getattr(model.layers[0], blocks)[0].attn.qkv)
    expected = run(model, images)
    report = patch(model)
    assert len(report.swapped) == 6
    torch.testing.assert_close(run(model, images), expected)
    served = {block.name: block for block in report.blocks}
    assert "qkv goes through its own forward" in served["layers.0.pre_ipsa_blocks.0"].reason
    assert "qkv is intercepted" in served["layers.0.cpsa_blocks.0"].reason


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
    model = catkernels.CAT(**TINY, img_size=56)
    report = patch(model, backend="reference")
    assert report.swapped == []
    assert len(report.already_served) == 6
    assert all(m.backend == "reference" for m in model.modules() if hasattr(m, "backend"))
    assert unpatch(model) == []


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


class WithContext(official.CATBlock):
    def forward(self, x, context=0.0):
        return super().forward(x) + context


class WithSize(official.CATBlock):
    def forward(self, x, *, size):
        return super().forward(x)


class AlwaysInEvaluation(official.CATBlock):
    def train(self, mode=True):
        return super().train(False)


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


def test_the_report_prints_as_a_table():
    model, _ = build()
    text = str(patch(model))
    header, *rows, counts = text.splitlines()
    assert header.split() == ["block", "action", "kind", "shape", "backend", "reason"]
    assert len(rows) == 6
    assert rows[1].startswith("layers.0.cpsa_blocks.0")
    assert "14x14x12 N=7 heads=1" in rows[1]
    assert counts == "6 swapped, 0 already served, 0 left alone"


def test_moving_and_casting_a_patched_model():
    model, images = build()
    model.eval()
    patch(model)
    model.double()
    expected = model(images.double())
    unpatch(model)
    torch.testing.assert_close(model(images.double()), expected)
    assert model.layers[0].pre_ipsa_blocks[0].attn.relative_position_index.dtype == torch.int64
