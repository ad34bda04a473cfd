"""Official weights in: from a file or a state_dict, between layouts, kinds of model and sizes."""

from __future__ import annotations

import argparse
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from catkernels.reference import relative_position_index
from catkernels.torch_state.tensors import is_wrapper

Source = str | os.PathLike[str] | Mapping[str, Tensor]

# Where training code keeps the weights within a checkpoint.
_CONTAINERS = ("model", "state_dict", "model_state_dict")
# What a classifier and a backbone do not share: the final norm and head, the norm of each output.
_KIND_SPECIFIC = re.compile(r"(norm\d*|head)\.(weight|bias)")
_HEAD = ("head.weight", "head.bias")
_TABLE, _INDEX = "relative_position_bias_table", "relative_position_index"


@dataclass(frozen=True)
class LoadReport:
    """What `load_checkpoint` did.

    Attributes:
        loaded: names of the parameters and buffers that were loaded.
        converted: those whose layout or size was changed, and how.
        missing: names of the model that the checkpoint lacks; they kept their values.
        unexpected: names of the checkpoint that the model lacks; they were dropped.
        mismatched: names whose shapes differ, and how; they kept their values.
        new: names of the head that was left as it is since ``new_head`` asked for that.
    """

    loaded: list[str] = field(default_factory=list)
    converted: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, str] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors loaded"]
        lines += [f"converted {name}: {how}" for name, how in self.converted.items()]
        lines += [f"mismatched {name}: {how}" for name, how in self.mismatched.items()]
        lists = {"new": self.new, "missing": self.missing, "unexpected": self.unexpected}
        lines += [f"{what}: {', '.join(names)}" for what, names in lists.items() if names]
        return "\n".join(lines)


class DoesNotFit(ValueError):
    """A checkpoint is of another model than the one it was to be loaded into.

    Attributes:
        fault: in what they differ, without the advice to somebody who writes Python.
    """

    def __init__(self, fault: str, advice: str) -> None:
        super().__init__(f"{fault}. {advice}")
        self.fault = fault


def load_checkpoint(
    model: nn.Module,
    path_or_state_dict: Source,
    strict: bool = True,
    *,
    new_head: bool = False,
) -> LoadReport:
    """Load the weights of a CAT into ``model``: `catkernels.CAT`, or any with the official names.

    Accepts ``.safetensors``, and what `torch.save` wrote, read without unpickling arbitrary
    objects; a state_dict, or one under "model" or "state_dict"; names with "module." or "backbone."
    before them. Converts the position embedding between the classifier's layout (1, H*W, C) and
    the backbone's (1, C, H, W) and, bicubically, between sizes, as it does IPSA's bias table for
    another patch size. The buffer ``relative_position_index`` follows from the patch size, and is
    set by it whatever the file holds and the model held; a file whose own orders the bias table in
    another way does not fit.

    To fine-tune to other classes, leave the head as the new model has it::

        model = catkernels.cat_small(num_classes=10)
        catkernels.load_checkpoint(model, "cat_small.pth", new_head=True)

    Args:
        model: is changed only when everything fits. One on the meta device needs
            ``model.to_empty(device=...)`` first; what is reported missing then is still to be set.
        path_or_state_dict: a file, or the weights themselves.
        strict: raise where names are missing or unexpected or shapes do not match. What a
            classifier and a backbone do not share, the norms of the outputs and the head, is
            reported only, and so is what stands beside a "backbone." in a detector's file. With
            False all of it is reported only.
        new_head: leave ``head`` as it is, of however many classes the model and the file are.

    Returns:
        What was loaded, converted, missing, unexpected, mismatched and left as new.

    Raises:
        TypeError: ``model`` is no module.
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, or not of this model; or the model's parameters are
            on the meta device, sharded or quantised.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    target = model.state_dict()
    _check_loadable(target)
    weights, foreign, where = _named_weights(path_or_state_dict)
    grid = getattr(model, "ape_grid", None)
    indices = _indices(target)
    head = [name for name in _HEAD if name in target] if new_head else []
    report = LoadReport(unexpected=list(foreign), new=head)
    fitting: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name not in target:
            report.unexpected.append(name)
            continue
        if name in head:
            continue
        wanted = target[name]
        if name in indices:
            if not _orders_as_ours(value):
                report.mismatched[name] = "another order of the bias table"
            continue
        index = weights.get(name.replace(_TABLE, _INDEX)) if name.endswith(_TABLE) else None
        if index is not None and not _orders_as_ours(index):
            report.mismatched[name] = "its rows are in another order"
            continue
        if value.is_floating_point() != wanted.is_floating_point():
            report.mismatched[name] = f"{value.dtype} in {where}, {wanted.dtype} here"
            continue
        converted = _convert(name, value, wanted.shape, grid)
        if converted.shape == wanted.shape:
            fitting[name] = converted
            report.loaded.append(name)
            if converted is not value:
                report.converted[name] = f"{tuple(value.shape)} -> {tuple(wanted.shape)}"
        else:
            report.mismatched[name] = f"{tuple(value.shape)} in {where}, {tuple(wanted.shape)} here"
    known = weights.keys() | indices.keys() | set(head)
    report.missing.extend(name for name in target if name not in known)
    if not fitting:
        raise DoesNotFit(
            f"{where} holds none of the model's weights: it has {some(weights)}, "
            f"the model {some(target)}",
            "Build the model that was saved.",
        )
    if strict:
        _raise_unless_it_fits(report, set(foreign), where)
    model.load_state_dict(fitting | indices, strict=False)
    return report


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The weights in a file by the names that a CAT has for them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint.
    """
    weights, _, _ = _named_weights(path)
    return weights


def _named_weights(
    path_or_state_dict: Source,
) -> tuple[dict[str, Tensor], list[str], str]:
    """The weights, the names that were not a CAT's, and what to call the whole in messages."""
    source, where = _read(path_or_state_dict)
    return *_strip_prefix(_unwrap(source, where)), where


def _check_loadable(target: Mapping[str, Tensor]) -> None:
    """Refuse a model that values cannot be written into, before any is."""
    if any(value.is_meta for value in target.values()):
        raise ValueError(
            "the model is on the meta device, which holds no values: "
            "give it some by model.to_empty(device=...) first"
        )
    # DTensor and its kin: `torch.nn.Module.load_state_dict` would stop at one of them, half done
    if any(map(is_wrapper, target.values())):
        raise ValueError(
            "the model's parameters are sharded or quantised: load them before that, or, where "
            "sharded, by torch.distributed.checkpoint.state_dict.set_model_state_dict"
        )


def _indices(target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The buffers (N*N, N*N) that follow from the patch size, by name."""
    return {
        name: relative_position_index(isqrt(len(value)))
        for name, value in target.items()
        if name.endswith(_INDEX) and value.shape == (isqrt(len(value)) ** 2,) * 2
    }


def _orders_as_ours(index: Tensor) -> bool:
    """Whether an index of any patch size orders the bias table as CAT does."""
    if index.dim() != 2:
        return False
    ours = relative_position_index(isqrt(len(index)), index.device)
    return torch.equal(index.long(), ours)


def _read(path_or_state_dict: Source) -> tuple[Any, str]:
    """The checkpoint's content and what to call it in messages."""
    if isinstance(path_or_state_dict, Mapping):
        return path_or_state_dict, "the state_dict"
    path = Path(path_or_state_dict)
    if not path.is_file():
        folder = ", it is a folder: name a file in it" if path.is_dir() else ""
        raise FileNotFoundError(f"there is no checkpoint file {path}{folder}")
    if path.suffix.lower() == ".safetensors":
        return _read_safetensors(path), path.name
    try:
        # official files also hold the training configuration, in containers that can do no harm
        with torch.serialization.safe_globals(
            [argparse.Namespace, (_Configuration, "yacs.config.CfgNode")]
        ):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        classes = _foreign_classes(path, str(error))
        if not classes:
            raise ValueError(f"{path.name} is no checkpoint that torch.save wrote") from error
        raise ValueError(
            f"{path.name} holds more than weights, which is not loaded for safety: "
            f"{', '.join(classes)}. Save its state_dict alone, best as .safetensors; or, where you "
            "trust the file, import and allow what it names before loading it: "
            f"torch.serialization.add_safe_globals([{', '.join(classes)}])"
        ) from error
    # of a damaged file torch raises anything, a KeyError of a number included
    except Exception as error:
        # the first sentence, since the next may advise to run what is in the file
        why = f": {error}".partition(". ")[0] if isinstance(error, OSError | RuntimeError) else ""
        raise ValueError(f"{path.name} is no checkpoint that torch.save wrote{why}") from error
    return content, path.name


def _foreign_classes(path: Path, error: str) -> list[str]:
    """The full names of what `torch.load` refused to build; none where that was not the fault."""
    refused = re.search(r"GLOBAL (\S+)|but got <class '(\S+)'>", error)
    if refused is None:
        return []
    names = {refused[1] or refused[2]}
    # that was the first one met; torch can tell them all, of its present format and whole files
    with suppress(Exception):
        names |= set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    return sorted(names)


def _read_safetensors(path: Path) -> Mapping[str, Tensor]:
    try:
        import safetensors
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError(
            f"reading {path.name} needs the package safetensors: pip install safetensors"
        ) from error
    try:
        return load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path.name} is no safetensors file: {error}") from error


class _Configuration:
    """Stands for the official code's configuration, a dictionary that nothing here uses."""

    def __new__(cls) -> Any:
        return OrderedDict()


def _unwrap(content: Any, where: str) -> dict[str, Tensor]:
    """The weights by name, out of whatever dictionary a training script saved them in."""
    if isinstance(content, Mapping) and content.keys() == {"options", "state"}:
        raise ValueError(
            f"{where} is what train --resume goes on with. The weights are beside it, in "
            "model.safetensors, once the run has ended: name that file"
        )
    for name in _CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not content:
        found = "nothing" if content == {} else f"a {type(content).__name__}"
        raise ValueError(f"{where} holds no weights but {found}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise ValueError(f"{where} holds no weights by name: {name!r} is a {kind}")
        if value.is_meta or value.is_complex() or value.layout != torch.strided:
            raise ValueError(f"{where} holds no plain real values for {name!r}")
    return dict(content)


def _strip_prefix(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Remove what a wrapper put before the names, and tell the names that were not in it.

    The prefix is that of the patch embedding, which every CAT has; the shortest, where an average
    of the weights stands beside them.
    """
    embedding = "patch_embed.proj.weight"
    prefixes = [name.removesuffix(embedding) for name in weights if name.endswith(embedding)]
    prefix = min(prefixes, key=len, default="")
    inside = {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if name.startswith(prefix)
    }
    return inside, [name for name in weights if not name.startswith(prefix)]


def _convert(
    name: str, value: Tensor, wanted: torch.Size, ape_grid: tuple[int, int] | None
) -> Tensor:
    """``value`` in the shape ``wanted`` where it is known how, else as it is."""
    if value.shape == wanted:
        return value
    if name == "ape":
        return _convert_position_embedding(value, wanted, ape_grid)
    if name.endswith("relative_position_bias_table") and value.shape[1:] == wanted[1:]:
        old, new = isqrt(value.shape[0]), isqrt(wanted[0])
        if old and (old**2, new**2) == (value.shape[0], wanted[0]):
            grid = value.T.unflatten(1, (old, old))[None]  # (1, heads, 2N-1, 2N-1)
            return _resize(grid, (new, new))[0].flatten(1).T.contiguous()
    return value


def _convert_position_embedding(
    value: Tensor, wanted: torch.Size, ape_grid: tuple[int, int] | None
) -> Tensor:
    """Between (1, H*W, C) and (1, C, H, W) and between sizes; an unknown grid is square."""
    as_map = len(wanted) == 4
    if value.dim() not in (3, 4) or len(wanted) not in (3, 4):
        return value
    if value.dim() == 3:
        known = (wanted[2], wanted[3]) if as_map else ape_grid
        old = _grid(value.shape[1], known)
        if old is None:
            return value
        value_grid = value.permute(0, 2, 1).unflatten(2, old)  # (1, C, H, W)
    else:
        value_grid = value
    if value_grid.shape[1] != wanted[1 if as_map else 2]:
        return value
    if as_map:
        return _resize(value_grid, (wanted[2], wanted[3]))
    height, width = value_grid.shape[2:]
    new = _grid(wanted[1], ape_grid or (height, width))
    return value if new is None else _resize(value_grid, new).flatten(2).permute(0, 2, 1)


def _grid(tokens: int, known: tuple[int, int] | None) -> tuple[int, int] | None:
    """The height and width of so many tokens: those known if they fit, else a square's."""
    if known is not None and known[0] * known[1] == tokens:
        return known
    side = isqrt(tokens)
    return (side, side) if side**2 == tokens else None


def _resize(grid: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(grid.shape[2:]) == size:
        return grid
    wide = grid if grid.dtype == torch.float64 else grid.float()
    return F.interpolate(wide, size, mode="bicubic").to(grid.dtype)


def _raise_unless_it_fits(report: LoadReport, foreign: set[str], where: str) -> None:
    missing = [name for name in report.missing if not _KIND_SPECIFIC.fullmatch(name)]
    unexpected = [
        name
        for name in report.unexpected
        if name not in foreign and not _KIND_SPECIFIC.fullmatch(name)
    ]
    if not (missing or unexpected or report.mismatched):
        return
    faults = []
    if report.mismatched:
        shapes = [f"{name} ({how})" for name, how in report.mismatched.items()]
        faults.append(f"shapes differ: {some(shapes)}")
    if missing:
        faults.append(f"the model has what it lacks: {some(missing)}")
    if unexpected:
        faults.append(f"it has what the model lacks: {some(unexpected)}")
    advice = "Build the model that was saved, or pass strict=False to load what fits."
    if not missing and not unexpected and report.mismatched.keys() <= set(_HEAD):
        advice = "To fine-tune to other classes, pass new_head=True."
    raise DoesNotFit(f"{where} is not of this model: {'; '.join(faults)}", advice)


def some(texts: Iterable[str]) -> str:
    """The first three of ``texts``, and how many more there are."""
    texts = list(texts)
    return ", ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")
