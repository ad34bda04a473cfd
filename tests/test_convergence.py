"""The official order of operations, the reference and the kernels learn the same."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from tiny_training import tiny_data, tiny_model, trained

import catkernels
from catkernels import official
from catkernels.accuracy import assert_within_error_budget, tf32_products
from catkernels.torch_state.device import device_reasons
from catkernels.training.processes import Processes
from catkernels.training.recipe import Recipe
from catkernels.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("tf32_on_gpus")

PROCESSES = Processes()
# 16 channels a head are the fewest that the kernels take
MODEL = {"embed_dim": 16, "num_heads": (1, 2), "drop_path_rate": 0.1}


def learn(model: catkernels.CAT, steps: int, **options) -> dict[str, torch.Tensor]:
    """The loss of each step, and all the weights after the last, one after the other."""
    recipe = Recipe(epochs=1, batch_size=2, **({"learning_rate": 2.0} | options))
    trainer = Trainer(model, tiny_data(train=2 * steps, test=1), recipe, PROCESSES)
    for group in trainer.optimizer.param_groups:
        # AdamW divides a gradient by its size: with its usual eps, weights that the output does not
        # depend on, such as the bias of a key, would go whole steps with the rounding errors
        group["eps"] = 1e-4
    trained(trainer)
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return {"losses": trainer.losses, "weights": weights}


@pytest.fixture(scope="module")
def steps(request) -> int:
    return 50 if request.config.getoption("--full") else 6


@pytest.fixture
def expected(steps, tf32_on_gpus) -> dict[torch.dtype, dict[str, torch.Tensor]]:
    """What the official order of operations learns."""
    with tf32_products():
        return {
            dtype: learn(tiny_model(official.CAT, **MODEL).to(dtype), steps)
            for dtype in (torch.float32, torch.float64)
        }


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_each_backend_learns_what_the_official_operations_learn(backend, steps, expected):
    if backend == "triton" and (reasons := device_reasons(PROCESSES.device)):
        pytest.skip("; ".join(reasons))
    actual = learn(tiny_model(backend=backend, **MODEL), steps)
    for name, truth in expected[torch.float64].items():
        assert_within_error_budget(actual[name], expected[torch.float32][name], truth, name)


@pytest.mark.full
@pytest.mark.usefixtures("device", "round_to_nearest_bf16")
def test_a_patched_model_learns_the_same_in_half_precision(launches):
    """Under autocast, where kernels serve all of a block, in stages of 32 and of 64 channels."""
    options = {"embed_dim": 32, "num_heads": (2, 4), "drop_path_rate": 0.1}
    model = tiny_model(official.CAT, **options)
    # so fast that they learn, and not so fast that a rounding error grows to chance
    rate = {"learning_rate": 0.5}
    same_dtype = learn(deepcopy(model), 30, precision="bf16", **rate)
    truth = learn(deepcopy(model).double(), 30, **rate)
    report = catkernels.patch(model, backend="triton")
    assert all({"attention", "MLP", "norms"} <= set(block.kernels) for block in report.blocks)
    actual = learn(model, 30, precision="bf16", **rate)
    for name, exact in truth.items():
        assert_within_error_budget(actual[name], same_dtype[name], exact, name)
    # of each of the six blocks
    assert launches["mlp_backward_kernel"] == launches["norm_backward_kernel"] == 30 * 6


@pytest.mark.full
def test_they_do_learn(steps, expected):
    losses = expected[torch.float64]["losses"]
    assert losses[-10:].mean() < 0.75 * losses[:10].mean()
