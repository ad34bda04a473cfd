"""Patched models in DistributedDataParallel and FSDP2: the program of test_distributed.py.

    torchrun --nproc-per-node 2 tests/two_processes.py FOLDER

FOLDER has the state of an unpatched model after its first step of training. The processes load it
into a model that is patched and wrapped, take the second step each with its share of the batch, and
save the state that comes of it beside the first.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from kernel_fixtures import quickly_interpreted
from tiny_models import SERVED
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import catkernels
from catkernels import official
from catkernels.training.processes import Processes, joined_processes

KINDS = {
    "classifier": SERVED,
    "backbone": SERVED | {"depths": (1,), "num_heads": (1,), "out_indices": (0,)},
}
# the backbone's maps are 7 x 13, two patches of which one is padded
SIZES = {"classifier": (56, 56), "backbone": (28, 50)}
WHOLE = StateDictOptions(full_state_dict=True)
BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def build(kind: str, dtype: torch.dtype) -> tuple[nn.Module, SGD]:
    model = official.CAT(**KINDS[kind], drop_path_rate=0.0).to(dtype)
    return model, SGD(model.parameters(), lr=1e-3, momentum=0.9)


def train_step(model: nn.Module, optimizer: SGD, images: Tensor) -> None:
    """One step on a loss that is a mean over the images, as gradients are over processes."""
    optimizer.zero_grad()
    outputs = model(images)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(output.square().sum() / len(images) for output in outputs).backward()
    optimizer.step()


def load(model: nn.Module, optimizer: SGD, state: tuple[dict, dict]) -> None:
    """The whole weights and state of an optimizer, by name, into a model however it is wrapped."""
    weights, moments = state
    set_state_dict(
        model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=WHOLE
    )


def patched(model: nn.Module, backend: str = "reference") -> nn.Module:
    report = catkernels.patch(model, backend=backend)
    assert not report.left_alone, report
    return model


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (torch.distributed.get_world_size(),))


def sharded(model: nn.Module, **options) -> nn.Module:
    """FSDP2 as patching/README.md has it: every block, then the rest."""
    for module in model.modules():
        if hasattr(module, "attn_type"):
            fully_shard(module, mesh=mesh(), **options)
    return fully_shard(model, mesh=mesh(), **options)


def sharded_by_layers(model: nn.Module) -> nn.Module:
    """FSDP2 of every linear layer, whose weights are whole only within the layer's own call."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            fully_shard(module, mesh=mesh())
    return fully_shard(model, mesh=mesh())


def patched_in_ddp(model: nn.Module) -> nn.Module:
    return patched(DistributedDataParallel(model, gradient_as_bucket_view=True))


def unpatched_in_ddp(model: nn.Module) -> nn.Module:
    model = patched(DistributedDataParallel(model))
    assert len(catkernels.unpatch(model)) == 6
    return model


def refusing_in_fsdp(model: nn.Module) -> nn.Module:
    """Refusing to unpatch or load must change nothing, or the step that follows would show it."""
    weights = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    model = sharded(patched(model))
    modules = list(model.modules())
    with pytest.raises(ValueError, match="cannot unpatch a block that fully_shard manages"):
        catkernels.unpatch(model)
    assert list(model.modules()) == modules
    with pytest.raises(ValueError, match="sharded or quantised: load them before that"):
        catkernels.load_checkpoint(model, weights)
    return model


def partly_patched_in_fsdp(model: nn.Module) -> nn.Module:
    """A block that was sharded before it could be patched stays what it is."""
    block = fully_shard(model.layers[0].cpsa_blocks[0], mesh=mesh())
    report = catkernels.patch(model)
    assert report.left_alone == ["layers.0.cpsa_blocks.0"], report
    assert "sharded by itself: patch before sharding" in str(report)
    assert len(report.swapped) == 5
    assert model.layers[0].cpsa_blocks[0] is block
    return fully_shard(model, mesh=mesh())


@dataclass(frozen=True)
class Case:
    """A kind of model, how it is patched and wrapped, and the dtype of its parameters."""

    kind: str
    wrap: Callable[[nn.Module], nn.Module]
    dtype: torch.dtype = torch.float64


# By the reference, in float64.
REFERENCE = {
    "DDP": Case(
        "classifier", lambda m: DistributedDataParallel(patched(m), find_unused_parameters=True)
    ),
    "DDP, then patched": Case("classifier", patched_in_ddp),
    "DDP, patched and unpatched": Case("classifier", unpatched_in_ddp),
    "DDP of a static graph": Case(
        "backbone", lambda m: DistributedDataParallel(patched(m), static_graph=True)
    ),
    "FSDP2": Case("classifier", refusing_in_fsdp),
    "FSDP2 of a backbone": Case("backbone", lambda m: sharded(patched(m))),
    "FSDP2 by layers": Case("classifier", lambda m: sharded_by_layers(patched(m))),
    "FSDP2 of a block before patching": Case("classifier", partly_patched_in_fsdp),
}
KERNELS = {
    "DDP on kernels": Case(
        "backbone", lambda m: DistributedDataParallel(patched(m, "triton")), torch.float32
    ),
    "FSDP2 on kernels": Case("backbone", lambda m: sharded(patched(m, "triton")), torch.float32),
}
MIXED_PRECISION = {
    "FSDP2 in bfloat16": Case(
        "classifier", lambda m: sharded(patched(m), mp_policy=BFLOAT16), torch.float32
    ),
    "FSDP2 in bfloat16, unpatched": Case(
        "classifier", lambda m: sharded(m, mp_policy=BFLOAT16), torch.float32
    ),
}
CASES = REFERENCE | KERNELS | MIXED_PRECISION


def second_step(case: Case, start: dict, processes: Processes) -> dict:
    """The state after the second step, and what the model then makes of all images."""
    # parameters that nothing but the state which is loaded can make equal
    torch.manual_seed(1 + processes.rank)
    model, _ = build(case.kind, case.dtype)
    model = case.wrap(model)
    optimizer = SGD(model.parameters(), lr=1, momentum=0.5)
    load(model, optimizer, start["state"])

    images = start["images"].to(case.dtype)
    train_step(model, optimizer, images.chunk(processes.count)[processes.rank])
    state = get_state_dict(model, optimizer, options=WHOLE)
    with torch.no_grad():
        return {"state": state, "outputs": model(images)}


def main(folder: Path) -> None:
    with quickly_interpreted(), joined_processes() as processes:
        for name, case in CASES.items():
            start = torch.load(folder / f"{case.kind}.pt")
            result = second_step(case, start, processes)
            if processes.is_first:
                torch.save(result, folder / f"{name}.pt")
    # DTensor's caches hold the group for good, and its threads must not see the interpreter end
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
