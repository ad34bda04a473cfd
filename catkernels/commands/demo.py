"""``python -m catkernels demo``: on a photo, or on digits with a model that learned them."""

from __future__ import annotations

from pathlib import Path

from catkernels.commands.models import read_checkpoint


def run(
    *,
    model: str | None,
    image: Path | None,
    size: int | None,
    batch: int | None,
    checkpoint: Path | None,
    save: Path | None,
) -> None:
    """Run the demo that fits the model, and leave a picture.

    Args:
        model: a name of `catkernels.commands.models.MODELS`; None: the checkpoint's, or cat_small.
        image: a photo; None: the one that scikit-learn ships.
        size: side of the square that it becomes; None: what the model was trained with, or 224.
        batch: copies of it; None: 8.
        checkpoint: weights; None: those that ship of the digits' model, random ones of others.
        save: where the picture goes; None: a name that says which of the demos it is of.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: the options contradict each other or the checkpoint.
    """
    if save is not None:
        _check_picture(save)
    trained = None if checkpoint is None else read_checkpoint(checkpoint, model)
    model = model or (trained.model if trained else "cat_small")
    # the model for digits, but trained on photos, is one for photos
    if model == "digits" and (trained is None or trained.in_chans == 1):
        from catkernels.commands import digits_demo

        if image or size or batch:
            raise ValueError(
                "--image, --size and --batch are of photos: leave them out, or give another --model"
            )
        digits_demo.run(trained, save=save or Path("catkernels-digits.png"))
    else:
        from catkernels.commands import photo_demo

        save = save or Path("catkernels-photo.png")
        photo_demo.run(model, trained, image=image, size=size, batch=batch or 8, save=save)


def _check_picture(save: Path) -> None:
    if save.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"cannot save {save}: the picture is a .png, .svg or .pdf")
    if not save.parent.is_dir():
        raise ValueError(f"cannot save {save}: there is no folder {save.parent}")
