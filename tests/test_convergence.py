"""The official order of operations, the reference and the kernels learn the same."""

from __future__ import annotations

import pytest
import torch
from tiny_training import tiny_data, tiny_model, trained

import catkernels
from catkernels import official
from catkernels.ops.device import device_reasons
from catkernels.testing import assert_within_error_budget
from catkernels.training.processes import Processes
from catkernels.training.recipe import Recipe
from catkernels.training.trainer import Trainer

PROCESSES = Processes()
# 16 channels a head are the fewest that the kernels take
MODEL = {"embed_dim": 16, "num_heads": (1, 2), "drop_path_rate": 0.1}


def learn(model: catkernels.CAT, steps: int) -> dict[str, torch.Tensor]:
    """The loss of each step, and the weights after the last."""
    recipe = Recipe(epochs=1, batch_size=2, learning_rate=0.5)
    trainer = Trainer(model, tiny_data(train=2 * steps, test=1), recipe, PROCESSES)
    for group in trainer.optimizer.param_groups:
        # AdamW divides a gradient by its size: with its usual eps, weights that the output does not
        # depend on, such as the bias of a key, would go whole steps with the rounding errors
        group["eps"] = 1e-4
    return {"losses": trainer.losses} | trained(trainer)


@pytest.fixture(scope="module")
def expected(request) -> dict[str, dict[str, torch.Tensor]]:
    """What the official order of operations learns in float64 and in float32, and the steps."""
    steps = 50 if request.config.getoption("--full") else 6
    float64 = learn(tiny_model(official.CAT, **MODEL).double(), steps)
    return {"float64": float64, "float32": learn(tiny_model(official.CAT, **MODEL), steps)}


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_each_backend_learns_what_the_official_operations_learn(backend, expected):
    if backend == "triton" and (reasons := device_reasons(PROCESSES.device)):
        pytest.skip("; ".join(reasons))
    actual = learn(tiny_model(backend=backend, **MODEL), len(expected["float64"]["losses"]))
    assert actual["losses"].std() > 0.1
    for name, value in expected["float64"].items():
        if value.is_floating_point():
            assert_within_error_budget(actual[name], expected["float32"][name], value, name)
