"""Patched models in DistributedDataParallel and FSDP2, on the CPU."""

from __future__ import annotations

from fresh_process import run_python

SETUP = """
    import sys
    from copy import deepcopy
    import torch
    import torch.distributed as dist
    import catkernels
    from catkernels import official

    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
    torch.manual_seed(0)
    options = dict(img_size=28, embed_dim=6, depths=(1, 1), num_heads=(1, 1), num_classes=2)
    model, images = official.CAT(**options).eval(), torch.randn(2, 3, 28, 28)
    expected = model(images)
    expected.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    def check(model):
        output = model(images)
        torch.testing.assert_close(output, expected)
        output.sum().backward()
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            actual = parameter.grad
            actual = actual.full_tensor() if hasattr(actual, "full_tensor") else actual
            torch.testing.assert_close(actual, gradient, rtol=1e-4, atol=1e-5)
        model.zero_grad()
"""
TEARDOWN = """
    dist.destroy_process_group()
    print("done")
"""


def run(code: str, store) -> None:
    assert run_python(SETUP + code + TEARDOWN, str(store / "store")).endswith("done\n")


def test_patching_before_and_after_ddp(tmp_path):
    run(
        """
    twin = deepcopy(model)
    catkernels.patch(twin)
    check(torch.nn.parallel.DistributedDataParallel(twin))

    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    report = catkernels.patch(wrapped)
    assert report.swapped[0] == "module.layers.0.pre_ipsa_blocks.0", report
    check(wrapped)
    assert len(catkernels.unpatch(wrapped)) == 6
    check(wrapped)
    """,
        tmp_path,
    )


def test_patching_before_fsdp2(tmp_path):
    run(
        """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh("cpu", (1,))

    catkernels.patch(model)
    blocks = [m for m in model.modules() if isinstance(m, catkernels.CATBlock)]
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    check(model)
    modules = list(model.modules())
    try:
        catkernels.unpatch(model)
    except ValueError as error:
        assert "cannot unpatch a block that fully_shard manages" in str(error)
    else:
        raise AssertionError("unpatch did not raise")
    assert list(model.modules()) == modules
    check(model)
    """,
        tmp_path,
    )


def test_a_block_sharded_by_itself_is_left_alone(tmp_path):
    run(
        """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    sharded = model.layers[0].cpsa_blocks[0]
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    report = catkernels.patch(model)
    assert report.left_alone == ["layers.0.cpsa_blocks.0"], report
    assert "sharded by itself: patch before sharding" in str(report)
    assert len(report.swapped) == 5
    assert model.layers[0].cpsa_blocks[0] is sharded
    check(model)
    """,
        tmp_path,
    )
