"""Training in two processes on the CPU; their program is training_processes.py.

One start of them by torchrun serves all tests.
"""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
from fresh_process import ROOT, torchrun
from tiny_training import RECIPE, tiny_data, tiny_model, trained, write_photos
from training_processes import command

from catkernels.__main__ import main
from catkernels.cat import CAT
from catkernels.commands.models import MODELS
from catkernels.training.processes import Processes
from catkernels.training.trainer import Trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the processes leave."""
    folder = tmp_path_factory.mktemp("processes")
    write_photos(folder / "photos")
    start = CAT(**(MODELS["digits"] | {"img_size": 8, "in_chans": 3, "num_classes": 2}))
    torch.save(start.state_dict(), folder / "start0.pth")
    torchrun(2, str(ROOT / "tests" / "training_processes.py"), str(folder), *free_ports(2))
    return folder


def free_ports(count: int) -> list[str]:
    sockets = [socket.create_server(("", 0)) for _ in range(count)]
    ports = [str(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def test_the_command_is_divided_without_further_flags(folder):
    output = (folder / "first0.txt").read_text()
    assert "fp32 on cpu and 1 more" in output
    assert f"starts from {folder / 'start0.pth'}: " in output
    assert output.count("test accuracy") == 3
    assert (folder / "first1.txt").read_text() == ""
    assert (folder / "run0" / "model.safetensors").exists()
    assert not (folder / "run1").exists()


def test_it_is_resumed_by_as_many_processes(folder, capsys):
    output = (folder / "resumed0.txt").read_text()
    assert "resumed after step 4 of 4" in output
    assert "starts from" not in output
    assert main([*command(folder, 0), "--resume"]) == 2
    assert "processes was 2 and is now 1: start it as it was started" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's list of threads")
def test_the_processes_end_after_their_threads(folder):
    """One that outlives the interpreter aborts the process, now and then."""
    for rank in range(2):
        during, after = torch.load(folder / f"first_threads{rank}.pt")
        assert min(during) > 0
        assert after == 0


def test_two_processes_give_the_weights_of_one_with_the_joined_batch(folder):
    cpu = Processes(device=torch.device("cpu"))
    alone = Trainer(tiny_model(drop_path_rate=0).double(), tiny_data(), RECIPE, cpu)
    expected = trained(alone)
    for rank in range(2):
        weights, losses, evaluation = torch.load(folder / f"divided{rank}.pt", weights_only=True)
        torch.testing.assert_close(weights, expected)
        torch.testing.assert_close(losses, alone.losses)
        assert evaluation == pytest.approx(alone.evaluate())
