"""Modules put around an attention or another part of a block: they are called, in any model."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from patch_cases import build, run
from tiny_models import TINY
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

import catkernels
from catkernels import official
from catkernels.patching.patch import patch, unpatch


class HandsOn(nn.Module):
    """A wrapper that has every attribute of what it wraps, as those of FSDP and PEFT do."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("wrapped"), name)

    def forward(self, x):
        return self.wrapped(x)


class Arithmetic(HandsOn):
    """One that computes with what it gets, place by place, and with what it gives."""

    def forward(self, x):
        place = torch.arange(x.shape[1], dtype=x.dtype).view(-1, *(1,) * (x.dim() - 2))
        y = self.wrapped(x + (0.5 + place).cos())
        return 2 * y + 0.1 * place.sin()


class Saved(HandsOn):
    """One that has trained a copy of what it wraps, and calls that."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__(wrapped)
        self.saved = nn.ModuleDict({"default": deepcopy(wrapped)})
        with torch.no_grad():
            for parameter in self.saved.parameters():
                parameter.mul_(1.5)

    def forward(self, x):
        return self.saved["default"](x)


class AdaptedTable(HandsOn):
    """One that adds to a parameter of what it wraps for the time of a call, as PEFT's LoRA does."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__(wrapped)
        table = getattr(wrapped, "relative_position_bias_table", None)
        self.delta = None if table is None else nn.Parameter(torch.randn_like(table))

    def forward(self, x):
        if self.delta is None:
            return self.wrapped(x)
        name = "relative_position_bias_table"
        parametrize.register_parametrization(self.wrapped, name, Plus(self.delta))
        try:
            return self.wrapped(x)
        finally:
            parametrize.remove_parametrizations(self.wrapped, name, leave_parametrized=False)


class Plus(nn.Module):
    def __init__(self, delta: nn.Parameter) -> None:
        super().__init__()
        self.delta = (delta,)

    def forward(self, table):
        return table + self.delta[0]


WRAPPERS = {
    "checkpoint": checkpoint_wrapper,
    "sequential": nn.Sequential,
    "compile": lambda module: torch.compile(module, backend="eager"),
    "DDP": DistributedDataParallel,
    "hands on": HandsOn,
    "arithmetic": Arithmetic,
    "saved": Saved,
    "adapted table": AdaptedTable,
}
PLACES = ["attn", "norm1", "norm2", "mlp", "drop_path", "attn.qkv", "attn.proj"]
CASES = [(how, "attn") for how in WRAPPERS] + [("arithmetic", place) for place in PLACES[1:]]
cases = pytest.mark.parametrize(("how", "place"), CASES)


@pytest.fixture(scope="module", autouse=True)
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def wrap(model: nn.Module, how: str, place: str) -> None:
    """Put a wrapper around a part of every block, or of one of each kind where that takes long."""
    torch._dynamo.reset()
    torch.manual_seed(5)
    blocks = [module for module in model.modules() if hasattr(module, "attn_type")]
    for block in blocks[:2] if how == "compile" else blocks:
        holder, _, name = f"block.{place}".rpartition(".")
        holder = nn.ModuleDict({"block": block}).get_submodule(holder)
        setattr(holder, name, WRAPPERS[how](getattr(holder, name)))


def outputs_and_gradients(model, images):
    outputs = run(model, images)
    loss = sum(output.square().sum() for output in outputs)
    gradients = torch.autograd.grad(loss, tuple(model.parameters()), allow_unused=True)
    return outputs, [g for g in gradients if g is not None]


@cases
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", [pytest.param("classifier", marks=pytest.mark.full), "backbone"])
def test_a_patched_model_calls_what_is_put_around_its_parts(how, place, when, kind):
    model, images = build(kind)
    model, images = model.double().eval(), images.double()
    patched = deepcopy(model)
    wrap(model, how, place)
    expected = outputs_and_gradients(model, images)
    if when == "before":
        wrap(patched, how, place)
        report = patch(patched)
    else:
        patch(patched)
        wrap(patched, how, place)
        report = patch(patched)
    torch.testing.assert_close(outputs_and_gradients(patched, images), expected)
    if place == "attn":
        assert "which is called itself" in report.blocks[0].reason
        assert report.blocks[0].backend == report.blocks[1].backend == "own"
    if place.startswith("attn."):
        assert f"{place.removeprefix('attn.')} goes through its own forward" in str(report)
    assert len(unpatch(patched)) == 6
    torch.testing.assert_close(outputs_and_gradients(patched, images), expected)


@pytest.mark.parametrize("place", ["attn.attn_drop", "attn.softmax", "attn.proj_drop"])
def test_a_patched_attention_calls_what_is_later_put_around_its_parts(place):
    model, images = build("backbone")
    model, images = model.double().eval(), images.double()
    patched = deepcopy(model)
    patch(patched)
    for whole in (model, patched):
        wrap(whole, "arithmetic", place)
    expected = outputs_and_gradients(model, images)
    torch.testing.assert_close(outputs_and_gradients(patched, images), expected)
    assert {row.backend for row in patch(patched).blocks} == {"own"}


def our_block(attention: str) -> tuple[catkernels.CATBlock, torch.Tensor]:
    torch.manual_seed(2)
    block = catkernels.CATBlock(12, 3, attn_type=attention, backend="reference")
    block.H, block.W = 9, 16
    return block.double(), torch.randn(2, 9 * 16, 12, dtype=torch.float64)


def restated(block: catkernels.CATBlock, tokens: torch.Tensor, attend=None) -> torch.Tensor:
    """A block in its own words, which calls each of its parts."""
    x = block.norm1(tokens).unflatten(1, (block.H, block.W))
    x = tokens + block.drop_path((attend or block.attn)(x).flatten(1, 2))
    return x + block.drop_path(block.mlp(block.norm2(x)))


both = pytest.mark.parametrize("attention", ["ipsa", "cpsa"])


@both
@pytest.mark.parametrize(("how", "place"), [case for case in CASES if "attn." not in case[1]])
def test_a_block_of_ours_calls_what_is_put_around_its_parts(how, place, attention):
    block, tokens = our_block(attention)
    wrap(block, how, place)
    torch.testing.assert_close(block(tokens), restated(block, tokens))


@both
@pytest.mark.parametrize("how", WRAPPERS)
def test_the_backend_reaches_an_attention_of_ours_in_a_wrapper(how, attention):
    block, _ = our_block(attention)
    attn = block.attn
    wrap(block, how, "attn")
    assert block.backend == "reference"
    (row,) = patch(nn.Sequential(block), backend="triton").blocks
    assert attn.backend == block.backend == "triton"
    assert row.action == "already served"
    assert "which is called itself" in row.reason


@both
@pytest.mark.parametrize("wrapped", [False, True])
def test_an_official_attention_in_a_block_of_ours_gets_its_tokens(wrapped, attention):
    block, tokens = our_block(attention)
    bare = official.CATBlock(
        12, None, 3, 7, 4.0, True, None, 0.0, 0.0, 0.0, nn.LayerNorm, attention
    ).double()
    if wrapped:
        bare.attn = Arithmetic(bare.attn)
    block.attn = bare.attn
    attend = official.attend_within if attention == "ipsa" else official.attend_across

    def padded(x):
        return attend(bare.attn, nn.functional.pad(x, (0, 0, 0, 5, 0, 5)), 7)[:, :9, :16]

    torch.testing.assert_close(block(tokens), restated(block, tokens, padded))
    (row,) = patch(nn.Sequential(block)).blocks
    assert row.backend == "own"


@pytest.mark.parametrize("ours", [False, True])
def test_any_other_attention_gets_what_the_block_deals_in(ours):
    block, tokens = our_block("ipsa")
    if not ours:
        theirs, _ = build()
        patch(theirs)
        block = theirs.layers[0].pre_ipsa_blocks[0].double()
        tokens = tokens.repeat(1, 2, 1)[:, : 14 * 14]
    shapes = []
    block.attn = nn.Identity()
    block.attn.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    block(tokens)
    assert shapes == [(2, 9, 16, 12) if ours else (2 * 4, 49, 12)]
    assert block.backend == "auto"


def numbers_kept(model: nn.Module, images: torch.Tensor) -> int:
    """How many numbers a forward pass keeps for the backward pass, parameters aside."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(model, images)
    return sum(storage.nbytes() for storage in kept.values()) // images.element_size()


@pytest.mark.parametrize("kind", ["official", "ours"])
def test_checkpointing_the_attentions_saves_what_it_saves_in_the_official_model(kind):
    theirs, images = build()
    model = patched = deepcopy(theirs)
    if kind == "ours":
        model = patched = catkernels.CAT(**TINY)
    patch(patched)
    everything = numbers_kept(model, images)
    for whole in (model, theirs):
        wrap(whole, "checkpoint", "attn")
    kept = numbers_kept(model, images)
    assert kept <= numbers_kept(theirs, images)
    assert kept < everything
