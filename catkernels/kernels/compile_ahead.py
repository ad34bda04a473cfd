"""Compile kernels for a GPU without running them: ahead of need, or where there is no GPU."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from catkernels.kernels.launch import architecture


def current_target() -> GPUTarget:
    """What Triton compiles for here: the current GPU's backend, architecture and warp size."""
    return triton.runtime.driver.active.get_current_target()


def ptxas_version() -> str:
    """The version of the assembler for the current NVIDIA GPU."""
    from triton.backends.nvidia.compiler import get_ptxas

    return get_ptxas(current_target().arch).version


def compiling_for(
    target: GPUTarget, keep: Callable[[str, CompiledKernel, tuple[int, ...]], None]
) -> contextlib.AbstractContextManager[None]:
    """A context in which launches compile for ``target`` instead of running.

    They compile under the very keys of a real launch, so Triton's cache then serves that. Tensors
    may be on the CPU or on the "meta" device: a launch asks them for dtype and alignment only.

    Args:
        keep: gets the name, the kernel and the grid of each launch.

    Raises:
        RuntimeError: the interpreter is on, which compiles nothing.
    """
    run = JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **kwargs):
        compiled = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        keep(kernel.__name__, compiled, grid)
        return compiled

    return _launching_as(compile_only, target)


def launching_nothing_on(target: GPUTarget) -> contextlib.AbstractContextManager[None]:
    """A context in which launchers look up their launches for ``target``, and that is all."""
    return _launching_as(lambda kernel, *args, **kwargs: None, target)


@contextlib.contextmanager
def _launching_as(run: Callable, target: GPUTarget) -> Iterator[None]:
    if triton.knobs.runtime.interpret:
        raise RuntimeError("Triton's interpreter compiles nothing: unset TRITON_INTERPRET")

    class Driver:
        """As much of a driver as compiling needs."""

        get_current_target = staticmethod(lambda: target)
        get_current_device = staticmethod(lambda: str(target))
        get_current_stream = staticmethod(lambda device: 0)

    shipped_run, shipped_driver = JITFunction.run, triton.runtime.driver._active
    triton.runtime.driver.set_active(Driver())
    JITFunction.run = run
    architecture.cache_clear()
    try:
        yield
    finally:
        JITFunction.run = shipped_run
        architecture.cache_clear()
        triton.runtime.driver._active = shipped_driver


def build_launcher(kernel: CompiledKernel) -> None:
    """Build the C function that launches a kernel, where this version of Triton has one for each.

    It takes a third of a second, is kept in Triton's cache as the kernel is, and needs the GPU's
    driver: where there is none, nothing is built.
    """
    if not torch.cuda.is_available():
        return
    backend = {"cuda": "nvidia", "hip": "amd"}.get(kernel.metadata.target.backend)
    driver = importlib.import_module(f"triton.backends.{backend}.driver") if backend else None
    if hasattr(driver, "make_launcher"):
        launcher = {"nvidia": "CudaLauncher", "amd": "HIPLauncher"}[backend]
        getattr(driver, launcher)(kernel.src, kernel.metadata)
