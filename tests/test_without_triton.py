"""Where Triton is missing everything still works, on the reference."""

from __future__ import annotations

from fresh_process import run_python

BLOCK_TRITON = """
    import sys
    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "triton":
                raise ModuleNotFoundError("No module named 'triton'", name=name)
    sys.meta_path.insert(0, Blocked())
"""


def test_functions_models_patching_and_training_work():
    output = run_python(
        BLOCK_TRITON
        + """
    import torch, catkernels
    from catkernels import official

    options = dict(img_size=28, embed_dim=6, depths=(1, 1), num_heads=(1, 1), num_classes=2)
    images = torch.randn(2, 3, 28, 28)
    for model in (catkernels.CAT(**options), official.CAT(**options)):
        report = catkernels.patch(model)
        assert {block.backend for block in report.blocks} == {"reference"}
        assert all("Triton is not installed" in block.reason for block in report.blocks)
        optimizer = torch.optim.AdamW(model.parameters())
        model(images).square().mean().backward()
        optimizer.step()
        with torch.inference_mode():
            assert model.eval()(images).isfinite().all()
    try:
        catkernels.CPSA(backend="triton")(torch.randn(1, 7, 7, 2))
    except ValueError as error:
        print(error)
    """
    )
    assert "Triton is not installed" in output


def test_the_command_line_says_so():
    output = run_python(BLOCK_TRITON + "    from catkernels.__main__ import main; main(['info'])")
    assert "Triton is not installed" in output


def test_importing_is_light():
    """No kernel of ours, plotting or data package is imported before it is needed.

    Triton itself is, by PyTorch's FLOP counter.
    """
    loaded = run_python(
        """
        import sys
        import torch
        before = set(sys.modules)
        import catkernels
        print(*sorted(set(sys.modules) - before))
        """
    ).split()
    assert "catkernels.functional" in loaded
    heavy = {"catkernels.kernels", "matplotlib", "PIL", "sklearn", "safetensors", "timm"}
    assert heavy.isdisjoint(loaded)
