"""CAT against stored results of the official implementation, its baseline and the paper."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import catkernels
from catkernels import official
from catkernels.cat import VARIANTS
from catkernels.layers import add_position_embedding

DATA = Path(__file__).parent / "data"
GOLDEN = ["classification_112", "classification_shrunk_patch", "backbone_padded"]


class Golden:
    """A stored case: configuration, weights, input, outputs and gradients."""

    def __init__(self, name: str) -> None:
        self.arrays = np.load(DATA / f"{name}.npz")
        self.config = ast.literal_eval(str(self.arrays["config"]))
        self.config.pop("kind")
        if "pre_trained_img_size" in self.config:
            self.config["img_size"] = self.config.pop("pre_trained_img_size")

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        return {
            name.removeprefix(prefix): torch.from_numpy(self.arrays[name])
            for name in self.arrays
            if name.startswith(prefix)
        }


@pytest.mark.parametrize("model", [catkernels.CAT, official.CAT], ids=["ours", "official"])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-6)], ids=["fp32", "fp64"]
)
@pytest.mark.parametrize("name", GOLDEN)
def test_outputs_and_gradients_of_the_official_implementation(name, dtype, bound, model):
    golden = Golden(name)
    cat = model(**golden.config, drop_path_rate=0.0)
    cat.load_state_dict(golden.tensors("state/"), strict=True)
    cat.to(dtype)
    images = golden.tensors("input")[""].to(dtype).requires_grad_()
    outputs = cat(images)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    cotangents = golden.tensors("grad_output/").values()
    torch.autograd.backward(outputs, [cotangent.to(dtype) for cotangent in cotangents])

    for output, expected in zip(outputs, golden.tensors("output/").values(), strict=True):
        assert relative_error(output, expected) < bound
    gradients = {name: parameter.grad for name, parameter in cat.named_parameters()}
    gradients["input"] = images.grad
    expected = golden.tensors("grad/")
    assert gradients.keys() == expected.keys()
    # some gradients are zero but for the rounding of the sums that cancel in them
    noise = torch.finfo(torch.float32).eps * max(g.norm().item() for g in expected.values())
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[name], noise) < bound, name


def relative_error(actual, expected, noise: float = 0.0) -> float:
    difference = (actual.detach().double() - expected.double()).norm().item()
    return max(0.0, difference - noise) / expected.double().norm().item()


@pytest.mark.parametrize(
    ("name", "millions"), [("cat_tiny", 16.87), ("cat_small", 37.29), ("cat_base", 51.53)]
)
def test_parameters_of_the_paper(name, millions):
    with torch.device("meta"):
        ours = getattr(catkernels, name)()
        theirs = official.CAT(**VARIANTS[name])
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    assert round(sum(p.numel() for p in ours.parameters()) / 1e6, 2) == millions


THREE_STAGES = {"embed_dim": 8, "depths": (1, 2, 1), "num_heads": (1, 2, 2), "num_classes": 5}


@pytest.mark.parametrize("slice_emb", [False, True], ids=["conv", "slices"])
@pytest.mark.parametrize("ape", [False, True], ids=["", "ape"])
@pytest.mark.parametrize("size", [(64, 64), (50, 61), (1, 1), (7, 130)], ids=str)
def test_any_size_runs(size, ape, slice_emb):
    images = torch.randn(2, 3, *size)
    options = {**THREE_STAGES, "img_size": (48, 64), "ape": ape, "slice_emb": slice_emb}
    logits = catkernels.CAT(**options)(images)
    assert logits.shape == (2, 5)
    assert logits.isfinite().all()
    maps = catkernels.CAT(**options, out_indices=(0, 2))(images)
    for stage, stage_map in zip((0, 2), maps, strict=True):
        expected = [-(-side // (4 << stage)) for side in size]
        assert stage_map.shape == (2, 8 << stage, *expected)
        assert stage_map.isfinite().all()


def test_slice_embedding_is_the_convolution_of_its_pixels():
    """Slicing twice is a permutation of the 4 x 4 pixels, so some convolution does the same."""
    cat = catkernels.CAT(**THREE_STAGES, slice_emb=True, patch_norm=False)
    embedding = cat.patch_embed
    weight = embedding.proj.weight[:, :, 0, 0].unflatten(1, (2, 2, 2, 2, 3))
    # channels: second slice (column, row), first slice (column, row), colour
    kernel = weight.permute(0, 5, 2, 4, 1, 3).reshape(8, 3, 4, 4)
    images = torch.randn(1, 3, 16, 12)
    expected = torch.nn.functional.conv2d(images, kernel, embedding.proj.bias, stride=4)
    torch.testing.assert_close(embedding(images), expected.permute(0, 2, 3, 1))


def test_position_embedding_is_resized_with_the_image():
    cat = catkernels.CAT(**THREE_STAGES, img_size=(32, 48), ape=True)
    assert cat.ape.shape == (1, 8 * 12, 8)
    same = add_position_embedding(torch.zeros(1, 8, 12, 8), cat._ape_as_map(cat.ape))
    assert torch.equal(same.flatten(1, 2), cat.ape)
    resized = add_position_embedding(torch.zeros(1, 5, 9, 8), cat._ape_as_map(cat.ape))
    assert resized.shape == (1, 5, 9, 8)
    assert resized.std() > 0.5 * cat.ape.std()
    dense = catkernels.CAT(**THREE_STAGES, img_size=(32, 48), ape=True, out_indices=(2,))
    assert dense.ape.shape == (1, 8, 8, 12)


def test_position_embedding_and_biases_are_spared_weight_decay():
    """By whole names, which timm's optimizers and the official training code ask for."""
    cat = catkernels.CAT(**THREE_STAGES, ape=True)
    spared = cat.no_weight_decay()
    tables = {name for name in cat.state_dict() if name.endswith("relative_position_bias_table")}
    assert spared == {"ape"} | tables
    assert len(spared) == 1 + 2 * sum(THREE_STAGES["depths"])


def test_n_shrinks_to_the_stage_in_the_classifier_only():
    options = {**THREE_STAGES, "img_size": 32}
    sides = [layer.pre_ipsa_blocks[0].patch_size for layer in catkernels.CAT(**options).layers]
    assert sides == [7, 4, 2]
    dense = catkernels.CAT(**options, out_indices=(0,))
    assert [layer.cpsa_blocks[0].patch_size for layer in dense.layers] == [7, 7, 7]


def test_checkpointing_changes_nothing_but_memory():
    images = torch.randn(2, 3, 32, 32)
    gradients = []
    for use_checkpoint in (False, True):
        torch.manual_seed(0)
        options = {**THREE_STAGES, "drop_rate": 0.1, "ipsa_attn_drop": 0.1, "cpsa_attn_drop": 0.1}
        cat = catkernels.CAT(**options, use_checkpoint=use_checkpoint)
        torch.manual_seed(5)
        cat(images).sum().backward()
        gradients.append([parameter.grad for parameter in cat.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": (1, 2)}, "depths names 3 stages and num_heads 2"),
        ({"out_indices": (0, 3)}, r"stages 0 \.\. 2, got \(0, 3\)"),
        ({"img_size": (1, 2, 3)}, "a size must be"),
        ({"img_size": 56.0}, "a size must be .* got 56.0"),
        ({"depths": (), "num_heads": ()}, "at least one stage"),
        ({"num_classes": -1}, "num_classes must be at least 0"),
        ({"out_indices": 1}, r"stages 0 \.\. 2, got 1"),
        ({"slice_emb": True, "patch_emb_size": 8}, "slice_emb needs patch_emb_size=4"),
        ({"num_heads": (3, 2, 2)}, "dim=8 is not divisible by num_heads=3"),
        ({"backend": "gpu"}, "backend must be"),
        ({"drop_rate": 1.0}, r"drop_rate must be in \[0, 1\), got 1.0"),
        ({"drop_path_rate": -3.0}, r"drop_path_rate must be in \[0, 1\), got -3.0"),
    ],
)
def test_contradicting_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        catkernels.CAT(**(THREE_STAGES | options))


def test_wrong_images():
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), got \(1, 1, 32, 32\)"):
        catkernels.CAT(**THREE_STAGES)(torch.randn(1, 1, 32, 32))


@pytest.mark.parametrize("structure", [catkernels.CAT, official.CAT])
@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (np.zeros((1, 3, 32, 32)), TypeError, r"must be a tensor \(B, 3, H, W\), got ndarray"),
        (torch.zeros(1, 3, 32, 32).half(), TypeError, "images is torch.float16 but the layer's"),
        (torch.zeros(1, 3, 32, 32, device="meta"), ValueError, "images is on meta but the layer's"),
    ],
    ids=["an array", "half", "elsewhere"],
)
def test_images_that_do_not_fit_the_weights(structure, images, error, message):
    with pytest.raises(error, match=message):
        structure(**THREE_STAGES)(images)


def test_images_that_a_hook_makes_fit():
    model = catkernels.CAT(**THREE_STAGES).eval()
    images = torch.randn(1, 3, 28, 28)
    expected = model(images.half().float())
    model.patch_embed.proj.register_forward_pre_hook(lambda _, inputs: inputs[0].float())
    assert torch.equal(model(images.half()), expected)


def test_images_of_bytes():
    with pytest.raises(TypeError, match=r"floating-point, got torch\.uint8: divide by 255"):
        catkernels.CAT(**THREE_STAGES)(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


@st.composite
def configurations(draw):
    stages = draw(st.integers(1, 3))
    heads = draw(st.integers(1, 3))
    patch_size = draw(st.integers(1, 8))
    config = {
        "embed_dim": heads * draw(st.integers(1, 5)),
        "depths": tuple(draw(st.integers(1, 2)) for _ in range(stages)),
        "num_heads": tuple(heads << stage for stage in range(stages)),
        "patch_size": patch_size,
        "patch_emb_size": draw(st.integers(1, 4)),
        "in_chans": draw(st.integers(1, 4)),
        "qkv_bias": draw(st.booleans()),
        "qk_scale": draw(st.sampled_from([None, 0.3])),
        "ape": draw(st.booleans()),
        "patch_norm": draw(st.booleans()),
        "mlp_ratio": draw(st.sampled_from([1.0, 2.5])),
        "num_classes": draw(st.integers(0, 3)),
        "img_size": draw(st.integers(8, 40)),
    }
    return config, tuple(draw(st.integers(1, 40)) for _ in range(2))


@given(configurations())
def test_random_configurations_agree_with_the_official_order_of_operations(drawn):
    config, size = drawn
    torch.manual_seed(0)
    options = {**config, "out_indices": tuple(range(len(config["depths"])))}
    theirs = official.CAT(**options, drop_path_rate=0.0).double()
    ours = catkernels.CAT(**options, drop_path_rate=0.0).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, config["in_chans"], *size, dtype=torch.float64)
    expected, trained = theirs(images), ours(images)
    with torch.inference_mode():
        inferred = ours(images)
    for reference, *results in zip(expected, trained, inferred, strict=True):
        for result in results:
            torch.testing.assert_close(result, reference)
