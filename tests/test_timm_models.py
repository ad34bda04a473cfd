"""CAT among timm's models: timm's interface, and the very numbers of `catkernels.CAT`."""

from __future__ import annotations

import pytest
import torch
from fresh_process import run_python

import catkernels
from catkernels.cat import VARIANTS

try:
    import timm
except (ImportError, RuntimeError) as error:  # the latter from a torchvision of another torch
    pytest.skip(f"timm cannot be imported: {error}", allow_module_level=True)

from timm.data import resolve_model_data_config
from timm.models import create_feature_extractor, group_parameters
from timm.optim import create_optimizer_v2

from catkernels import timm_models

OPTIONS = {"embed_dim": 6, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2), "img_size": 56}
CHANNELS, STRIDES = [6, 12, 24, 48], [4, 8, 16, 32]


def build(**overrides) -> torch.nn.Module:
    return timm.create_model("cat_tiny", **(OPTIONS | {"num_classes": 5} | overrides)).eval()


def build_pair(**overrides) -> tuple[torch.nn.Module, catkernels.CAT]:
    """timm's model and ours with the same weights."""
    ours = catkernels.cat_tiny(**OPTIONS, num_classes=5).eval()
    theirs = build(**overrides)
    theirs.load_state_dict(ours.state_dict(), strict=not overrides)
    return theirs, ours


def images(batch: int = 2, size: tuple[int, int] = (56, 56)) -> torch.Tensor:
    return torch.randn(batch, 3, *size)


def test_one_import_registers_and_nothing_else_does():
    output = run_python(
        """
        import importlib, sys, warnings
        warnings.filterwarnings("error", "Overwriting")
        import timm, catkernels, catkernels.official, catkernels.__main__
        assert "catkernels.timm_models" not in sys.modules
        print(*timm.list_models("cat_*"), "before")
        for _ in range(2):
            from catkernels import timm_models
        print(*timm.list_models("cat_*"))
        warnings.filterwarnings("ignore", "Overwriting")
        again = importlib.reload(timm_models)
        print(*timm.list_models("cat_*"), *timm.list_models(module="timm_models"))
        small = dict(embed_dim=6, depths=(1,), num_heads=(1,), img_size=28)
        assert type(timm.create_model("cat_base", **small)) is again.CAT
        """
    )
    names = "cat_base cat_small cat_tiny"
    assert output.splitlines() == ["before", names, f"{names} {names}"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_models_of_the_paper_have_official_names(variant):
    with torch.device("meta"):
        theirs, ours = timm.create_model(variant), getattr(catkernels, variant)()
    shapes = {name: value.shape for name, value in ours.state_dict().items()}
    assert {name: value.shape for name, value in theirs.state_dict().items()} == shapes
    rates = [
        [module.drop_prob for module in model.modules() if hasattr(module, "drop_prob")]
        for model in (theirs, ours)
    ]
    assert rates[0] == rates[1]
    assert max(rates[0]) == pytest.approx(VARIANTS[variant]["drop_path_rate"])
    assert theirs.default_cfg["architecture"] == variant


@pytest.mark.parametrize("size", [(56, 56), (50, 61)])
def test_logits_are_those_of_our_own_model(size):
    theirs, ours = build_pair()
    assert isinstance(theirs, timm_models.CAT)
    x = images(size=size)
    assert torch.equal(theirs(x), ours(x))
    ours.load_state_dict(theirs.state_dict(), strict=True)


def test_the_models_arguments():
    model = build(
        num_classes=3,
        in_chans=1,
        img_size=28,
        drop_rate=0.1,
        proj_drop_rate=0.2,
        ipsa_attn_drop=0.3,
        drop_path_rate=0.4,
    )
    assert model(torch.randn(1, 1, 28, 28)).shape == (1, 3)
    assert (model.num_classes, model.in_chans, model.ape_grid) == (3, 1, (7, 7))
    block = model.layers[-1].post_ipsa_blocks[-1]
    assert (model.head_drop.p, model.pos_drop.p, block.attn.proj_drop.p) == (0.1, 0.2, 0.2)
    assert (block.attn.attn_drop.p, block.drop_path.drop_prob) == (0.3, pytest.approx(0.4))


def test_features_and_head():
    theirs, ours = build_pair()
    x = images()
    features = theirs.forward_features(x)
    assert features.shape == (2, 2, 2, theirs.num_features)
    pooled = theirs.forward_head(features, pre_logits=True)
    assert torch.equal(pooled, ours.forward_features(x))
    assert torch.equal(theirs.forward_head(features), theirs(x))
    assert theirs.get_classifier() is theirs.head


@pytest.mark.parametrize(
    ("global_pool", "pool"),
    [
        ("", lambda x: x),
        ("avg", lambda x: x.mean((1, 2))),
        ("max", lambda x: x.amax((1, 2))),
        ("catavgmax", lambda x: torch.cat([x.mean((1, 2)), x.amax((1, 2))], 1)),
    ],
)
def test_pooling(global_pool, pool):
    built, reset = build(global_pool=global_pool, num_classes=0), build()
    reset.reset_classifier(0, global_pool)
    x = images()
    for model in (built, reset):
        assert torch.equal(model(x), pool(model.forward_features(x)))
        assert model.head_hidden_size == model(x).shape[-1]
    # the pooling stays, and the classifier is as wide as what it pools
    built.double().reset_classifier(7)
    assert built(x.double()).shape[-1] == 7
    assert 0.015 < built.head.weight.std() < 0.025
    assert not built.head.bias.any()


def test_a_new_classifier_is_in_the_models_mode():
    model = build()
    model.reset_classifier(3, "max")
    assert not any(module.training for module in model.modules())


def test_device_and_dtype():
    model = build(device="meta", dtype=torch.float16)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert model.layers[0].pre_ipsa_blocks[0].attn.relative_position_index.dtype == torch.int64


def test_a_wrong_number_of_classes():
    model = build()
    with pytest.raises(ValueError, match="num_classes must be at least 0, got -1"):
        model.reset_classifier(-1, "max")
    assert model.num_classes == 5
    assert model.global_pool.pool_type == "avg"


@pytest.mark.parametrize(
    ("out_indices", "stages"),
    [(None, [0, 1, 2, 3]), ((0, 2), [0, 2]), ((-1,), [3]), (2, [2, 3]), ((3, 0), [3, 0])],
)
def test_features_only_gives_the_classifiers_unnormed_maps(out_indices, stages):
    ours = catkernels.cat_tiny(**OPTIONS).eval()
    backbone = build(features_only=True, out_indices=out_indices)
    missing, _ = backbone.model.load_state_dict(ours.state_dict(), strict=False)
    assert not missing
    assert backbone.feature_info.channels() == [CHANNELS[stage] for stage in stages]
    assert backbone.feature_info.reduction() == [STRIDES[stage] for stage in stages]
    x = images(size=(50, 61))
    maps = [x.permute(0, 3, 1, 2) for x in ours.stage_maps(x)]
    outputs = backbone(x)
    for output, stage in zip(outputs, stages, strict=True):
        assert torch.equal(output, maps[stage])
        assert output.is_contiguous()
    # nothing is left that a wrapper for data-parallel training would miss in the backward pass
    sum(output.square().sum() for output in outputs).backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_intermediates():
    model = build()
    x = images()
    *_, last = maps = list(model.stage_maps(x))
    final, everything = model.forward_intermediates(x, output_fmt="NHWC")
    assert torch.equal(final, model.norm(last))
    assert len(everything) == 4
    assert all(torch.equal(*pair) for pair in zip(everything, maps, strict=True))
    (normed,) = model.forward_intermediates(x, [-1], norm=True, intermediates_only=True)
    assert torch.equal(normed, final.permute(0, 3, 1, 2))

    calls = []
    for layer in model.layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    final, (second,) = model.forward_intermediates(x, [1], stop_early=True)
    assert len(calls) == 2
    assert torch.equal(final, maps[1])
    assert torch.equal(second, maps[1].permute(0, 3, 1, 2))


def test_pruning_keeps_the_head_where_it_fits():
    model = build()
    x = images()
    expected = model(x)
    assert model.prune_intermediate_layers([1, -1], prune_head=False) == [1, 3]
    assert torch.equal(model(x), expected)
    assert model.prune_intermediate_layers([1], prune_head=False) == [1]
    assert model(x).shape == (2, 7, 7, model.num_features) == (2, 7, 7, 12)


@pytest.mark.parametrize("indices", [0, 5, [], [4], [0, -5]])
def test_stages_that_there_are_not(indices):
    with pytest.raises(ValueError, match=r"indices must be stages -4 \.\. 3"):
        build().forward_intermediates(images(), indices)


def test_a_format_that_there_is_not():
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW' or 'NHWC', got 'NLC'"):
        build().forward_intermediates(images(), output_fmt="NLC")


def test_the_optimizer_decays_weight_matrices_only():
    model = build()
    optimizer = create_optimizer_v2(model, opt="adamw", weight_decay=0.05)
    decay = {
        parameter: group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for name, parameter in model.named_parameters():
        matrix = parameter.dim() > 1 and name != "ape" and "position_bias_table" not in name
        assert decay[parameter] == (0.05 if matrix else 0.0), name


def test_learning_rates_by_depth():
    """The groups from the image to the classes: the embedding, each CAB, the head."""
    model = build()
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    expected = {
        "ape": 0,
        "patch_embed.norm.bias": 0,
        "layers.0.pre_ipsa_blocks.0.attn.relative_position_bias_table": 1,
        "layers.0.downsample.reduction.weight": 1,
        "layers.1.cpsa_blocks.0.attn.qkv.weight": 2,
        "layers.2.cpsa_blocks.0.norm1.weight": 3,
        "layers.2.post_ipsa_blocks.1.mlp.fc1.weight": 4,
        "layers.2.downsample.norm.weight": 4,
        "layers.3.post_ipsa_blocks.0.mlp.fc2.bias": 5,
        "norm.weight": 5,
        "head.weight": 6,
    }
    assert {name: groups[name] for name in expected} == expected
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert coarse["layers.2.cpsa_blocks.0.norm1.weight"] == coarse["layers.2.downsample.norm.bias"]
    scales = {
        group["lr_scale"]
        for group in create_optimizer_v2(model, opt="adamw", layer_decay=0.5).param_groups
    }
    assert scales == {0.5**power for power in range(7)}


def test_gradient_checkpointing():
    model = build().train()
    x = images()

    def step() -> tuple[int, list[torch.Tensor]]:
        saved = 0

        def count(tensor):
            nonlocal saved
            saved += 1
            return tensor

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(x).square().sum()
        return saved, torch.autograd.grad(loss, list(model.parameters()))

    everything, expected = step()
    model.set_grad_checkpointing()
    recomputed, gradients = step()
    assert recomputed < everything / 2
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference)
    model.set_grad_checkpointing(False)
    assert step()[0] == everything


def test_preprocessing_is_that_of_the_official_evaluation():
    config = resolve_model_data_config(build())
    assert config["input_size"] == (3, 224, 224)
    assert (config["interpolation"], config["crop_mode"]) == ("bicubic", "center")
    assert int(224 / config["crop_pct"]) == 256
    assert config["mean"] == (0.485, 0.456, 0.406)
    assert config["std"] == (0.229, 0.224, 0.225)


def test_weights_from_files(tmp_path):
    ours = catkernels.cat_tiny(**OPTIONS, num_classes=5).eval()
    torch.save({"model": ours.state_dict()}, path := tmp_path / "cat.pth")
    x = images()
    assert torch.equal(build(checkpoint_path=str(path))(x), ours(x))
    # timm's way of naming a file as the pretrained weights, which it then fits to the model
    file = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path), "num_classes": 5}}
    assert torch.equal(build(**file)(x), ours(x))
    assert build(**file, num_classes=2)(x).shape == (2, 2)
    assert build(**file, in_chans=1)(x[:, :1]).shape == (2, 5)
    features = build(features_only=True)
    catkernels.load_checkpoint(features.model, path)
    for backbone in (features, build(**file, features_only=True)):
        assert torch.equal(backbone(x)[-1].permute(0, 2, 3, 1), list(ours.stage_maps(x))[-1])
    larger = build(img_size=64)
    assert "ape" in catkernels.load_checkpoint(larger, path).converted


@pytest.mark.parametrize("features_only", [False, True])
def test_no_weights_are_hosted(features_only):
    with pytest.raises(
        RuntimeError, match=r"no weights of cat_tiny are hosted.*checkpoint_path=.*load_checkpoint"
    ):
        build(pretrained=True, features_only=features_only)


@pytest.mark.parametrize("size", [(56, 56), (50, 61)])
def test_traced_by_fx(size):
    """As timm's own tests do, and at another size than the embedding's."""
    model = build(depths=(1, 1), num_heads=(1, 1))
    extractor = create_feature_extractor(model, {"layers.0.downsample": "next", "head": "logits"})
    x = images(size=size)
    outputs = extractor(x)
    torch.testing.assert_close(outputs["logits"], model(x))
    (first, _) = model.stage_maps(x)
    torch.testing.assert_close(outputs["next"], model.layers[0].downsample(first))
    outputs["logits"].sum().backward()
    assert all(parameter.grad is not None for parameter in extractor.parameters())


def test_the_index_is_right_after_a_load():
    """Whatever the buffer held before, as memory does that was only just allocated."""
    right = build()
    weights = {name: w for name, w in right.state_dict().items() if not name.endswith("_index")}
    with torch.device("meta"):
        model = build()
    model.to_empty(device="cpu")
    for value in model.state_dict().values():
        value.fill_(17)
    catkernels.load_checkpoint(model, weights)
    x = images()
    assert torch.equal(model(x), right(x))
    for name, value in model.state_dict().items():
        assert torch.equal(value, right.state_dict()[name]), name


def test_patching_leaves_it_as_it_is():
    model = build()
    blocks = [module for module in model.modules() if isinstance(module, catkernels.CATBlock)]
    report = catkernels.patch(model)
    assert len(report.already_served) == len(report.blocks) == len(blocks)
    assert blocks == [m for m in model.modules() if isinstance(m, catkernels.CATBlock)]


@pytest.mark.parametrize(
    "features_only",
    [
        pytest.param(True, id="features"),
        pytest.param(False, id="classifier", marks=pytest.mark.full),
    ],
)
def test_compile_and_export(features_only):
    model = build(depths=(1, 1), num_heads=(1, 1), features_only=features_only)
    x = images(size=(50, 61))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    x = images(3, (50, 61))
    torch.testing.assert_close(program.module()(x), model(x))
