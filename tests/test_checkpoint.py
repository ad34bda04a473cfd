"""Loading weights: official layouts, other kinds of model and sizes, and files that are wrong."""

from __future__ import annotations

import pickle
import sys
import types
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import TINY

import catkernels
from catkernels import load_checkpoint, official
from catkernels.cat import VARIANTS


def build(seed: int = 0, model=catkernels.CAT, **options):
    torch.manual_seed(seed)
    return model(**(TINY | options))


def untouched(model, before) -> bool:
    return all(torch.equal(before[name], value) for name, value in model.state_dict().items())


LAYOUTS = {
    "bare": lambda weights: weights,
    "official training": lambda weights: {"model": weights, "epoch": 299, "optimizer": {}},
    "mm libraries": lambda weights: {
        "meta": {"epoch": 12},
        "state_dict": {f"backbone.{name}": value for name, value in weights.items()}
        | {"neck.weight": torch.zeros(1)},
    },
    "data parallel": lambda weights: {f"module.{name}": value for name, value in weights.items()},
    "with an average": lambda weights: {
        **{f"ema.{name}": torch.zeros_like(value) for name, value in weights.items()},
        **weights,
    },
    "nested": lambda weights: {f"module.model.{name}": value for name, value in weights.items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, tmp_path):
    source, model = build(1), build(2)
    file = tmp_path / "weights.pth"
    torch.save(LAYOUTS[layout](source.state_dict()), file)
    report = load_checkpoint(model, file, strict=layout != "with an average")
    assert untouched(model, source.state_dict())
    assert report.missing == []
    assert report.mismatched == report.converted == {}
    indices = [name for name in model.state_dict() if name.endswith("relative_position_index")]
    assert len(report.loaded) + len(indices) == len(model.state_dict())
    foreign = {"mm libraries": ["neck.weight"]}
    if layout != "with an average":
        assert report.unexpected == foreign.get(layout, [])


def test_safetensors(tmp_path):
    source, model = build(1), build(2)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    load_checkpoint(model, str(tmp_path / "weights.safetensors"))
    assert untouched(model, source.state_dict())


def test_a_file_with_the_official_training_configuration(tmp_path, monkeypatch):
    """The official code saves a yacs configuration beside the weights."""
    module = types.ModuleType("yacs.config")
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    configuration = module.CfgNode(MODEL=module.CfgNode(NAME="cat_tiny"))
    configuration.__dict__["__immutable__"] = True
    source, model = build(1), build(2)
    torch.save({"model": source.state_dict(), "config": configuration}, tmp_path / "official.pth")
    monkeypatch.delitem(sys.modules, "yacs.config")
    load_checkpoint(model, tmp_path / "official.pth")
    assert untouched(model, source.state_dict())


@pytest.mark.parametrize("model", [catkernels.CAT, official.CAT], ids=["ours", "official"])
def test_a_classifier_into_a_backbone_and_back(model):
    classifier = build(1)
    backbone = build(2, model, out_indices=(0, 1))
    report = load_checkpoint(backbone, classifier.state_dict())
    assert report.unexpected == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert report.missing == [f"norm{i}.{part}" for i in (0, 1) for part in ("weight", "bias")]
    assert report.converted == {"ape": "(1, 196, 12) -> (1, 12, 14, 14)"}
    back = build(3, model)
    report = load_checkpoint(back, backbone.state_dict())
    assert report.missing == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    for name, value in back.state_dict().items():
        if name not in report.missing:
            assert torch.equal(value, classifier.state_dict()[name]), name
    images = torch.randn(1, 3, 56, 56)
    maps = [list(m.stage_maps(images))[-1] for m in (classifier.eval(), backbone.eval())]
    torch.testing.assert_close(*maps)


@pytest.mark.parametrize("backbone", [False, True])
def test_another_image_size(backbone):
    options = {"out_indices": (1,)} if backbone else {}
    source, model = build(1, **options), build(2, img_size=(84, 112), **options)
    with torch.no_grad():
        source.ape.fill_(0.25)
    report = load_checkpoint(model, source.state_dict())
    assert list(report.converted) == ["ape"]
    torch.testing.assert_close(model.ape, torch.full_like(model.ape, 0.25))


def test_another_patch_size():
    source, model = build(1), build(2, patch_size=5)
    before = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"shapes differ: .*cpsa_blocks.* strict=False"):
        load_checkpoint(model, source.state_dict())
    assert untouched(model, before)
    report = load_checkpoint(model, source.state_dict(), strict=False)
    assert len(report.converted) == 4
    assert all(name.endswith("relative_position_bias_table") for name in report.converted)
    assert len(report.mismatched) == 2 * 4
    assert all(".cpsa_blocks." in name for name in report.mismatched)
    name = "layers.0.pre_ipsa_blocks.0.attn.relative_position_bias_table"
    # the middle of the table, no displacement, stays the middle
    assert (model.state_dict()[name][40] - source.state_dict()[name][84]).abs().max() < 0.02
    assert model.state_dict()["layers.0.pre_ipsa_blocks.0.attn.relative_position_index"].max() == 80
    assert "mismatched" in str(report)


def test_another_number_of_classes():
    source, model = build(1), build(2, num_classes=3)
    shapes = r"head\.weight \(\(4, 24\) in the state_dict, \(3, 24\)"
    with pytest.raises(ValueError, match=shapes + ".*pass new_head=True"):
        load_checkpoint(model, source.state_dict())
    report = load_checkpoint(model, source.state_dict(), strict=False)
    assert set(report.mismatched) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("classes", [3, 4, 0])
@pytest.mark.parametrize("model", [catkernels.CAT, official.CAT], ids=["ours", "official"])
def test_a_new_head(model, classes):
    """Of as many classes as it may be, it stays; all else is loaded as ever."""
    source, model = build(1), build(2, model, num_classes=classes)
    before = deepcopy(model.state_dict())
    report = load_checkpoint(model, source.state_dict(), new_head=True)
    head = ["head.weight", "head.bias"]
    assert report.new == (head if classes else [])
    assert report.unexpected == ([] if classes else head)
    assert report.missing == []
    assert not report.mismatched
    for name, value in model.state_dict().items():
        expected = before if name in head else source.state_dict()
        assert torch.equal(value, expected[name]), name
    assert ("new: head.weight, head.bias" in str(report)) == bool(classes)


def test_a_patched_model_loads_as_well():
    source, model = build(1), build(2, official.CAT)
    catkernels.patch(model)
    load_checkpoint(model, source.state_dict())
    assert untouched(model, source.state_dict())


def test_another_variant():
    deep, model = build(1, depths=(1, 2)), build(2)
    before = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"what the model lacks: layers\.1\.pre_ipsa_blocks\.1"):
        load_checkpoint(model, deep.state_dict())
    assert untouched(model, before)
    deep_before = deepcopy(deep.state_dict())
    with pytest.raises(ValueError, match=r"model has what it lacks: layers\.1\.pre_ipsa_blocks\.1"):
        load_checkpoint(deep, model.state_dict())
    assert untouched(deep, deep_before)


class Malicious:
    def __reduce__(self):
        return (print, ("code of the checkpoint ran",))


def write(path, how: str) -> None:
    match how:
        case "text":
            path.write_text("not a checkpoint")
        case "empty":
            path.write_bytes(b"")
        case "cut":
            torch.save(build().state_dict(), path)
            path.write_bytes(path.read_bytes()[:5000])
        case "code":
            torch.save({"model": build().state_dict(), "extra": Malicious()}, path)
        case "cut, in torch's older format":
            torch.save(build().state_dict(), path, _use_new_zipfile_serialization=False)
            path.write_bytes(path.read_bytes()[:2000])
        case "plain pickle":
            path.write_bytes(pickle.dumps({"a": 1}, protocol=2))
        case "script":
            torch.jit.save(torch.jit.script(torch.nn.ReLU()), path)
        case "number":
            torch.save(3, path)
        case "other model":
            torch.save(torch.nn.Linear(2, 2).state_dict(), path)
        case "nothing":
            torch.save({}, path)
        case "numbered":
            torch.save({0: torch.ones(1)}, path)
        case "sparse" | "complex":
            weights = build().state_dict()
            odd = torch.ones(16)
            weights["norm.weight"] = odd.to_sparse() if how == "sparse" else odd.cfloat()
            torch.save(weights, path)
        case "lists":
            torch.save({"weight": [1, 2]}, path)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("text", "is no checkpoint that torch.save wrote$"),
        ("empty", "is no checkpoint that torch.save wrote$"),
        ("cut, in torch's older format", "is no checkpoint that torch.save wrote$"),
        ("cut", "is no checkpoint that torch.save wrote"),
        ("code", r"not loaded for safety: .*print"),
        ("plain pickle", "is no checkpoint that torch.save wrote"),
        # and no word of PyTorch's advice to run its code
        ("script", "wrote: .* TorchScript archives passed to ``torch.load``$"),
        ("number", "holds no weights but a int"),
        ("nothing", "holds no weights but nothing"),
        ("other model", "holds none of the model's weights: it has weight, bias"),
        ("lists", "holds no weights by name: 'weight' is a list"),
        ("numbered", "holds no weights by name: 0 is a Tensor"),
        ("sparse", "holds no plain real values for 'norm.weight'"),
        ("complex", "holds no plain real values for 'norm.weight'"),
    ],
)
def test_wrong_files(how, message, tmp_path, capsys):
    file = tmp_path / "weights.pth"
    write(file, how)
    model = build()
    before = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        load_checkpoint(model, file)
    assert untouched(model, before)
    assert capsys.readouterr().out == ""


def test_a_file_with_objects_of_other_packages_says_how_to_allow_them(tmp_path, monkeypatch):
    """As mmengine saves its message hub beside the weights."""
    module = types.ModuleType("mmengine.history_buffer")
    module.HistoryBuffer = type("HistoryBuffer", (), {"__module__": "mmengine.history_buffer"})
    monkeypatch.setitem(sys.modules, "mmengine", types.ModuleType("mmengine"))
    monkeypatch.setitem(sys.modules, "mmengine.history_buffer", module)
    history = module.HistoryBuffer()
    history.values = np.arange(3.0)
    source, model = build(1), build(2)
    before = deepcopy(model.state_dict())
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        content = {"state_dict": source.state_dict(), "message_hub": history}
        torch.save(content, tmp_path / "mm.pth", **options)
        refused = r"add_safe_globals\(\[mmengine\.history_buffer\.HistoryBuffer.*\]\)"
        with pytest.raises(ValueError, match=refused) as raised:
            load_checkpoint(model, tmp_path / "mm.pth")
        # all at once, where torch can tell them
        assert ("numpy.ndarray" in str(raised.value)) == (not options)
        assert untouched(model, before)

    reconstruct = np.zeros(1).__reduce__()[0]
    allowed = [module.HistoryBuffer, reconstruct, np.ndarray, np.dtype]
    with torch.serialization.safe_globals(allowed):
        # what a class makes while it is built shows only then
        with pytest.raises(
            ValueError, match=r"add_safe_globals\(\[numpy\.dtypes\.Float64DType\]\)"
        ):
            load_checkpoint(model, tmp_path / "mm.pth")
        torch.serialization.add_safe_globals([np.dtypes.Float64DType])
        load_checkpoint(model, tmp_path / "mm.pth")
    assert untouched(model, source.state_dict())


def test_wrong_safetensors_and_missing_files(tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(b"12345678")
    with pytest.raises(ValueError, match=r"weights\.safetensors is no safetensors file"):
        load_checkpoint(build(), tmp_path / "weights.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint file"):
        load_checkpoint(build(), tmp_path / "nothing.pth")
    with pytest.raises(FileNotFoundError, match="it is a folder: name a file in it"):
        load_checkpoint(build(), tmp_path)


def test_a_table_in_another_order_is_refused():
    source, model = build(1).state_dict(), build(2)
    before = deepcopy(model.state_dict())
    name = "layers.0.pre_ipsa_blocks.0.attn.relative_position_index"
    source[name] = source[name].T.contiguous()
    with pytest.raises(ValueError, match="another order of the bias table"):
        load_checkpoint(model, source)
    assert untouched(model, before)


def test_a_table_in_another_order_is_left_out_where_that_is_asked_for():
    """Also where its size differs, so that the index says nothing of the model's."""
    for options in ({}, {"patch_size": 5}):
        source, model = build(1).state_dict(), build(2, **options)
        index = "layers.0.pre_ipsa_blocks.0.attn.relative_position_index"
        table = index.replace("index", "bias_table")
        source[index] = source[index].T.contiguous()
        before = model.state_dict()[table].clone()
        report = load_checkpoint(model, source, strict=False)
        assert {index, table} <= report.mismatched.keys()
        assert torch.equal(model.state_dict()[table], before)
        assert table not in report.loaded


KINDS = {
    "ours": build,
    "official": partial(build, model=official.CAT),
    "backbone": partial(build, out_indices=(1,)),
    "other patches": partial(build, patch_size=5),
}


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_index_is_right_after_every_load(kind, with_index, patched):
    """Whatever the buffer held before, as memory does that was only just allocated."""
    source = build(1).state_dict()
    if not with_index:
        source = {name: value for name, value in source.items() if not name.endswith("_index")}
    right = KINDS[kind](2).state_dict()
    with torch.device("meta"):
        model = KINDS[kind](2)
    if patched:
        catkernels.patch(model)
    model.to_empty(device="cpu")
    for value in model.state_dict().values():
        value.fill_(17)
    load_checkpoint(model, source, strict=kind != "other patches")
    indices = [name for name in right if name.endswith("relative_position_index")]
    assert len(indices) == 4
    for name in indices:
        assert torch.equal(model.state_dict()[name], right[name]), name
    if kind in ("ours", "official"):
        images = torch.randn(1, 3, 56, 56)
        expected = build(1).eval()(images)
        torch.testing.assert_close(model.eval()(images), expected)


def test_numbers_that_are_no_weights_do_not_fit():
    """Quantised weights, say, which would be copied as if they were the values themselves."""
    source, model = build(1).state_dict(), build(2)
    source["head.weight"] = (100 * source["head.weight"]).char()
    before = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"head\.weight \(torch\.int8 in the state_dict"):
        load_checkpoint(model, source)
    assert untouched(model, before)


def test_models_that_cannot_be_loaded_into():
    with torch.device("meta"):
        model = build()
    with pytest.raises(ValueError, match=r"on the meta device.*model\.to_empty"):
        load_checkpoint(model, build(1).state_dict())
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        load_checkpoint("cat_small", {})


def test_the_load_that_the_readme_shows(tmp_path):
    weights = {"model": official.CAT(**VARIANTS["cat_tiny"]).state_dict(), "epoch": 299}
    torch.save(weights, tmp_path / "official_layout.pth")
    backbone = catkernels.cat_tiny(img_size=384, out_indices=(0, 1, 2, 3))
    report = load_checkpoint(backbone, tmp_path / "official_layout.pth")
    readme = (Path(catkernels.__file__).parent / "patching" / "README.md").read_text()
    assert f'"official_layout.pth"))\n{report}\n```' in readme
