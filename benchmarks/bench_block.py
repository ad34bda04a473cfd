"""Blocks of CAT, and what a block has beside its attention, part by part, by every provider.

A part is computed as a block of this package computes it, on the device and in the precision at
hand. Stochastic depth is off, so that all providers compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import catkernels
from benchmarks import harness, operation, roofline
from benchmarks.clock import DEVICE
from benchmarks.operation import Case, Operation, Outputs, WorkModel
from catkernels import official
from catkernels.arguments import Backend
from catkernels.cases import Shape, cat_stages, normal_numbers
from catkernels.ops.linear import linear_residual, norm_linear_residual
from catkernels.ops.norm import norm_residual
from catkernels.parts import AttentionParts
from catkernels.serving import call_reasons, norm_reasons, proj_reasons, qkv_joins
from catkernels.torch_state.precision import compute_dtype

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Part:
    """A block, or a part of one.

    Attributes:
        kind: of the block, "ipsa" or "cpsa".
        parameters: what the names of its parameters begin with.
        official: the block and the maps -> the outputs, in the official order of operations.
        ours: the same by a block of this package.
        reasons: what `CATBlock.unsupported_parts` calls it, or "" for all of a block.
        maps: names of its maps.
    """

    kind: str
    parameters: tuple[str, ...]
    official: Callable[..., Outputs]
    ours: Callable[..., Outputs]
    reasons: str
    maps: tuple[str, ...] = ("x",)

    def make_inputs(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        """Maps, and parameters of sizes that matter."""
        normal = normal_numbers(device, seed=0)
        inputs = {name: normal(shape.size) + 0.3 for name in self.maps}
        with torch.device("meta"):
            block = official_block(self.kind, shape)
        for name, parameter in block.named_parameters():
            if name.startswith(self.parameters):
                values = normal(tuple(parameter.shape))
                scale = 0.3 if parameter.dim() == 1 else 1.5 * parameter.shape[1] ** -0.5
                is_gain = name in ("norm1.weight", "norm2.weight")
                inputs[name] = values * scale + 1 if is_gain else values * scale
        return {name: tensor.to(device, dtype) for name, tensor in inputs.items()}

    def bind(
        self, make: Callable[[str, Shape], nn.Module], shape: Shape, inputs: Inputs
    ) -> tuple[nn.Module, list[Tensor]]:
        """A block with the very parameters of the inputs, and the maps."""
        # what trains is known by its gradients, which the forward pass alone is timed without
        block = make(self.kind, shape).to(inputs["x"]).eval()
        parameters = {name: tensor for name, tensor in inputs.items() if name not in self.maps}
        block.load_state_dict(parameters, strict=False, assign=True)
        return block, [inputs[name] for name in self.maps]

    def official_provider(self, shape: Shape, inputs: Inputs) -> Callable[[], Outputs]:
        """The official order of operations."""
        block, maps = self.bind(official_block, shape, inputs)
        return lambda: self.official(block, *maps)

    def compiled_provider(self, shape: Shape, inputs: Inputs) -> Callable[[], Outputs]:
        """The official order of operations through `torch.compile`."""
        return harness.compiled(self.official_provider(shape, inputs))

    def catkernels_provider(self, shape: Shape, inputs: Inputs) -> Callable[[], Outputs]:
        """This package, by whatever serves on the device."""
        block, maps = self.bind(our_block, shape, inputs)
        return lambda: self.ours(block, *maps)

    def served_by(self, shape: Shape, inputs: Inputs) -> str:
        """The parts of a block that kernels serve, or why none serves a part."""
        block, (x, *_) = self.bind(our_block, shape, inputs)
        unserved = block.unsupported_parts(x)
        if self.reasons:
            return operation.serving(unserved[self.reasons])
        served = [part for part, reasons in unserved.items() if not reasons]
        if call_reasons(x, block.backend):
            return operation.serving(next(iter(unserved.values())))
        return f"triton: {', '.join(['attention', *served])}"


def official_block(kind: str, shape: Shape) -> official.CATBlock:
    """The block for dense tasks, which pads."""
    sizes = (None, shape.num_heads, shape.patch_size)
    options = (4.0, True, None, 0.0, 0.0, 0.0, nn.LayerNorm, kind)
    block = official.CATBlock(shape.channels, *sizes, *options)
    block.H, block.W = shape.height, shape.width
    return block


def our_block(kind: str, shape: Shape, backend: Backend = "auto") -> catkernels.CATBlock:
    sizes = (shape.channels, shape.num_heads, shape.patch_size)
    return catkernels.CATBlock(*sizes, attn_type=kind, backend=backend)


def official_whole(block: official.CATBlock, x: Tensor) -> Tensor:
    return block(x.flatten(1, 2)).reshape(x.shape)


def official_mlp(block: official.CATBlock, x: Tensor) -> Tensor:
    return x + block.mlp(block.norm2(x))


def our_mlp(block: catkernels.CATBlock, x: Tensor) -> Tensor:
    return block._add_mlp(x, not call_reasons(x, block.backend))


def official_norm(block: nn.Module, x: Tensor) -> Outputs:
    """The norm and what goes around it, whose gradients come together."""
    return block.norm1(x), x


def our_norm(block: catkernels.CATBlock, x: Tensor) -> Outputs:
    if call_reasons(x, block.backend) or norm_reasons(block.norm1, x):
        return official_norm(block, x)
    return norm_residual(x, block.norm1)


def official_norm_qkv(block: nn.Module, x: Tensor) -> Outputs:
    return block.attn.qkv(block.norm1(x)), x


def our_norm_qkv(block: catkernels.CATBlock, x: Tensor) -> Outputs:
    qkv = block.attn.qkv
    if call_reasons(x, block.backend) or not qkv_joins(block.norm1, qkv, x):
        return official_norm_qkv(block, x)
    return norm_linear_residual(x, block.norm1, qkv.weight, qkv.bias)


def official_proj_residual(block: nn.Module, x: Tensor, attended: Tensor) -> Tensor:
    return x + block.attn.proj(attended)


def our_proj_residual(block: catkernels.CATBlock, x: Tensor, attended: Tensor) -> Tensor:
    attn, proj = AttentionParts.of(block.attn), block.attn.proj
    if call_reasons(x, block.backend) or proj_reasons(proj, attn, block.drop_path, x):
        return official_proj_residual(block, x, attended)
    return linear_residual(x, attended.to(compute_dtype(x)), proj.weight, proj.bias, None)


def _operation(name: str, part: Part, forward_work: WorkModel, backward_work: WorkModel):
    providers = {
        "official": part.official_provider,
        "compiled": part.compiled_provider,
        "catkernels": part.catkernels_provider,
    }
    return Operation(name, part.make_inputs, providers, part.served_by, forward_work, backward_work)


BLOCKS = [
    _operation(
        "ipsa block",
        Part("ipsa", ("",), official_whole, lambda block, x: block(x), reasons=""),
        roofline.ipsa_block_forward_work,
        roofline.ipsa_block_backward_work,
    ),
    _operation(
        "cpsa block",
        Part("cpsa", ("",), official_whole, lambda block, x: block(x), reasons=""),
        roofline.cpsa_block_forward_work,
        roofline.cpsa_block_backward_work,
    ),
]
MLP = _operation(
    "mlp",
    Part("ipsa", ("norm2.", "mlp."), official_mlp, our_mlp, "MLP"),
    roofline.mlp_forward_work,
    roofline.mlp_backward_work,
)
NORM = _operation(
    "norm",
    Part("ipsa", ("norm1.",), official_norm, our_norm, "norms"),
    roofline.norm_forward_work,
    roofline.norm_backward_work,
)
NORM_QKV = _operation(
    "norm and qkv",
    Part("ipsa", ("norm1.", "attn.qkv."), official_norm_qkv, our_norm_qkv, "projections"),
    roofline.norm_qkv_forward_work,
    roofline.norm_qkv_backward_work,
)
PROJ_RESIDUAL = _operation(
    "proj and residual",
    Part(
        "ipsa",
        ("attn.proj.",),
        official_proj_residual,
        our_proj_residual,
        "projections",
        ("x", "attended"),
    ),
    roofline.proj_residual_forward_work,
    roofline.proj_residual_backward_work,
)
PARTS = [MLP, NORM, NORM_QKV, PROJ_RESIDUAL]


def sweep(*, trial: bool) -> Iterator[tuple[Operation, Case, str]]:
    """The rows of this device, what matters most first."""
    everything, ours = [*BLOCKS, *PARTS], "catkernels"
    both, training = "forward backward", "forward backward step"
    if trial:
        shapes = [operation.TRIAL_SHAPE]
        chosen = [("trial", everything, shapes, "float32", training, ours)]
        chosen += [("trial", BLOCKS, shapes, "autocast", "step", ours)]
        chosen += [("trial", [MLP], shapes, "float32", "forward", "compiled")]
    elif DEVICE.type == "cpu":
        # of the parts kernels alone make another thing
        shapes = cat_stages("small", batch=8)
        chosen = [("stages", BLOCKS, shapes, "float32", "forward", ours)]
        chosen += [("stages", BLOCKS, shapes[:1], "float32", "step", ours)]
    else:
        shapes = cat_stages("small", batch=256)
        chosen = [
            ("stages", everything, shapes, "bfloat16", both, ours),
            ("stages", BLOCKS, shapes, "autocast", training, ours),
            ("stages", [*BLOCKS, MLP], cat_stages("tiny", batch=256), "bfloat16", both, ours),
            ("stages", [MLP, NORM], shapes, "autocast", both, ours),
            ("peers", [*BLOCKS, MLP], shapes, "bfloat16", both, "compiled"),
            ("peers", BLOCKS, shapes, "autocast", "step", "compiled"),
        ]
    for name, operations, shapes, precision, directions, provider in chosen:
        for subject in operations:
            for case, _ in operation.rows(name, shapes, precision, directions, provider):
                yield subject, case, provider


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    every = sweep(trial=metafunc.config.getoption("--trial"))
    metafunc.parametrize(("subject", "case", "provider"), every, ids=str)


def test_block(benchmark, subject: Operation, case: Case, provider: str):
    operation.run(benchmark, subject, case, provider)
