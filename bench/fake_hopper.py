"""A Hopper GPU that is not there, so that Inductor writes code for one.

It is enough of a GPU for PyTorch to trace fake CUDA tensors and for Inductor to write its kernels;
nothing can be executed on it. Import it before torch, which asks only once which devices there are.
A few lines of C++ answer autograd's questions: one device, one stream, and events that are over. It
needs a CPU build of PyTorch, and g++.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

STAND_IN = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
const Device device(DeviceType::CUDA, 0);
const Stream stream(Stream::DEFAULT, device);
struct CUDAHooks : at::CUDAHooksInterface {
  CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
struct Guard : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return device; }
  Device getDevice() const override { return device; }
  Stream getStream(Device) const noexcept override { return stream; }
  Stream getNewStream(Device, int) const override { return stream; }
  Stream getDefaultStream(Device) const override { return stream; }
  Stream getStreamFromGlobalPool(Device, bool) const override { return stream; }
  Stream exchangeStream(Stream) const noexcept override { return stream; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};
namespace at { REGISTER_CUDA_HOOKS(CUDAHooks) }
static Guard guard;
static impl::DeviceGuardImplRegistrar registrar(DeviceType::CUDA, &guard);
"""


def stand_in() -> None:
    """Registers the C++ above with PyTorch; raises ImportError if PyTorch is built with CUDA.

    PyTorch asks for its hooks only once, so this must come before `import torch`.
    """
    package = Path(importlib.util.find_spec("torch").origin).parent
    if (package / "lib" / "libtorch_cuda.so").exists():
        raise ImportError("PyTorch is built with CUDA; where a GPU is, bench/step.py measures")
    compiler = ["g++", "-std=c++20", "-fPIC", "-shared", f"-I{package}/include"]
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/stand_in.so"
        command = [*compiler, "-x", "c++", "-", "-o", library]
        subprocess.run(command, input=STAND_IN.encode(), check=True, capture_output=True)
        for path in (f"{package}/lib/libtorch_cpu.so", library):
            ctypes.CDLL(path, ctypes.RTLD_GLOBAL)


# Why there is no stand-in; empty if there is one.
MISSING = ""
try:
    if "torch" in sys.modules:
        raise ImportError("torch is imported already")
    stand_in()
except (ImportError, OSError, subprocess.CalledProcessError) as error:
    MISSING = str(error)

import torch  # noqa: E402
import triton  # noqa: E402
from torch._dynamo.device_interface import CudaInterface  # noqa: E402
from torch._inductor.graph import GraphLowering  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

DEVICE = torch.device("cuda", 0)
HOPPER = types.SimpleNamespace(
    name="H100",
    type="cuda",
    index=0,
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    total_memory=80 << 30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block_optin=232448,
    L2_cache_size=50 << 20,
    gcnArchName="",
)


def answer(value: object) -> Callable[..., object]:
    """A function that returns `value` whatever it is asked."""

    def constant(*args: object, **kwargs: object) -> object:
        return value

    return constant


class Driver:
    """What Triton and Inductor ask of a GPU's driver while they write source."""

    utils = types.SimpleNamespace(get_device_properties=answer({"max_shared_mem": 232448}))

    def get_current_target(self) -> GPUTarget:
        """sm_90, with 32 threads in a warp."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """The only device."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """The only device, for PyTorch."""
        return DEVICE


@contextlib.contextmanager
def autocasting() -> Iterator[None]:
    """Keeps torch.autocast("cuda") on, which would switch itself off without a GPU."""
    with (
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", answer(False)),
        mock.patch.object(torch.cuda, "is_bf16_supported", answer(True)),
    ):
        yield


@contextlib.contextmanager
def hopper(finish: Callable[[GraphLowering], None]) -> Iterator[None]:
    """Inductor believes in an H100, and calls `finish` where it would load what it has written."""

    # A function, because a bound method in a class would not be given the graph.
    def compile_to_module(graph: GraphLowering) -> None:
        finish(graph)

    patches: list[tuple[object, str, object]] = [
        (CudaInterface, "get_device_properties", staticmethod(answer(HOPPER))),
        (CudaInterface.Worker, "get_device_properties", staticmethod(answer(HOPPER))),
        (CudaInterface, "get_compute_capability", staticmethod(answer(90))),
        (GraphLowering, "compile_to_module", compile_to_module),
        (torch.cuda, "is_available", answer(True)),
        (torch.cuda, "device_count", answer(1)),
        (torch.cuda, "current_device", answer(0)),
        (torch.cuda, "get_device_properties", answer(HOPPER)),
        (torch.cuda, "get_device_capability", answer((9, 0))),
        (torch.cuda, "get_rng_state", answer(torch.empty(16, dtype=torch.uint8))),
        (torch.cuda, "set_rng_state", answer(None)),
        (torch.cuda, "_exchange_device", answer(0)),
        (torch.cuda, "_maybe_exchange_device", answer(0)),
        (torch.cuda, "set_device", answer(None)),
        (torch.cuda, "synchronize", answer(None)),
    ]
    # Modules of Inductor hold these two by name, wherever they are imported.
    replaced = {"has_triton": answer(True), "triton_hash_with_backend": answer("")}
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith(("torch._inductor", "torch.utils._triton")):
            names = replaced.keys() & vars(module).keys()
            patches += [(module, name, replaced[name]) for name in names]
    with contextlib.ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        triton.runtime.driver.set_active(Driver())
        yield
