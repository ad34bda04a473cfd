"""What time is taken with: the device's own events on a GPU, the host's clock on a CPU."""

from __future__ import annotations

import time

import torch

from catkernels.torch_state.device import best_device

DEVICE = best_device()


class DeviceInstant:
    """A point in the queue of the device; the difference of two is in seconds.

    Nothing waits when one is taken, so work queued before it (a flush of the cache, say) hides the
    time that the host needs to queue what is timed.
    """

    def __init__(self) -> None:
        self.event = torch.get_device_module(DEVICE).Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: DeviceInstant) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


# pytest-benchmark takes it as a timer: it calls it before and after, and subtracts
CLOCK = time.perf_counter if DEVICE.type == "cpu" else DeviceInstant
