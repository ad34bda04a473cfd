"""Training in two processes: the program of test_training_processes.py.

    torchrun --nproc-per-node 2 tests/training_processes.py FOLDER PORT PORT

Each process has a folder of its own beneath FOLDER, as on machines that share none. In it the
command is run, and resumed when it is done; then a model is trained as the command does it. What
each of them printed or came to is left there.
"""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from tiny_training import RECIPE, SMALL, tiny_data, tiny_model, trained

from catkernels.__main__ import main
from catkernels.training.processes import joined_processes
from catkernels.training.trainer import Trainer


def command(folder: Path, rank: int) -> list[str]:
    """What both processes type; only the first has the weights that it starts from."""
    files = ["--data", folder / "photos", "--output", folder / f"run{rank}"]
    files += ["--checkpoint", folder / f"start{rank}.pth"]
    return ["train", *map(str, files), *SMALL, "--epochs", "2"]


def run_command(folder: Path, rank: int, name: str, *options: str) -> None:
    """Run it, and leave what it printed, and the group's threads while it ran and after."""
    during = []
    evaluate = Trainer.evaluate
    Trainer.evaluate = lambda self: (during.append(gloo_threads()), evaluate(self))[1]
    with (folder / f"{name}{rank}.txt").open("w") as file, redirect_stdout(file):
        assert main([*command(folder, rank), *options]) == 0
    Trainer.evaluate = evaluate
    torch.save([during, gloo_threads()], folder / f"{name}_threads{rank}.pt")


def gloo_threads() -> int:
    """How many threads of a process group this process has, by Linux's list of them."""
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return sum("gloo" in name for name in names)


def meet_anew(port: str) -> None:
    """Let the processes form another group: torchrun has them meet only once where it says."""
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": port}


def train_divided(folder: Path, rank: int) -> None:
    """Train in float64 without what each process draws for itself."""
    with joined_processes() as processes:
        # what one raises all raise, so that none waits for it
        with pytest.raises(FileNotFoundError, match="nowhere"):
            processes.from_first(Path("nowhere").stat)
        trainer = Trainer(tiny_model(drop_path_rate=0).double(), tiny_data(), RECIPE, processes)
        weights = trained(trainer)
        torch.save([weights, trainer.losses, trainer.evaluate()], folder / f"divided{rank}.pt")
        # no name for the trainer, which must be gone when the processes part
        del trainer


if __name__ == "__main__":
    folder, *ports = Path(sys.argv[1]), *sys.argv[2:]
    rank = int(os.environ["RANK"])
    run_command(folder, rank, "first")
    meet_anew(ports[0])
    run_command(folder, rank, "resumed", "--resume")
    meet_anew(ports[1])
    train_divided(folder, rank)
