"""A Hopper GPU that is not there: enough of it for PyTorch to trace fake CUDA tensors and for Inductor to write code.

Import it before torch, which asks only once what devices there are: a few lines of C++ answer autograd's questions (one
device, one stream, events that are over). Needs a CPU build of PyTorch, and g++. Nothing can be executed on it."""

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
    """Registers the C++ above with PyTorch, which asks for it only once: so before `import torch`."""
    package = Path(importlib.util.find_spec("torch").origin).parent
    if (package / "lib" / "libtorch_cuda.so").exists():
        raise ImportError("PyTorch is built with CUDA; where a GPU is, bench/step.py measures")
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/stand_in.so"
        command = [
            "g++",
            "-std=c++20",
            "-fPIC",
            "-shared",
            "-x",
            "c++",
            "-",
            f"-I{package}/include",
            "-o",
            library,
        ]
        subprocess.run(command, input=STAND_IN.encode(), check=True, capture_output=True)
        for path in (f"{package}/lib/libtorch_cpu.so", library):
            ctypes.CDLL(path, ctypes.RTLD_GLOBAL)


MISSING = ""  # why there is no stand-in
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


class Driver:  # what Triton and Inductor ask of a GPU's driver while they write source
    utils = types.SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": 232448})

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return DEVICE


@contextlib.contextmanager
def autocasting() -> Iterator[None]:  # torch.autocast("cuda") would switch itself off
    with (
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        mock.patch.object(torch.cuda, "is_bf16_supported", lambda *_, **__: True),
    ):
        yield


@contextlib.contextmanager
def hopper(finish: Callable[[GraphLowering], None]) -> Iterator[None]:
    """Inductor believes in an H100 and calls `finish` where it would compile and load what it wrote."""
    everywhere = {"has_triton": lambda *_: True, "triton_hash_with_backend": lambda: ""}
    loaded = [
        m
        for name, m in sys.modules.items()
        if name.startswith(("torch._inductor", "torch.utils._triton"))
    ]
    cuda = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda *_, **__: HOPPER,
        "get_device_capability": lambda *_: (9, 0),
        "get_rng_state": lambda *_: torch.empty(16, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
        "_exchange_device": lambda _: 0,
        "_maybe_exchange_device": lambda _: 0,
        "set_device": lambda _: None,
        "synchronize": lambda *_: None,
    }
    properties = staticmethod(lambda *_: HOPPER)
    with contextlib.ExitStack() as stack:
        for module in loaded:
            for name in everywhere.keys() & vars(module).keys():
                stack.enter_context(mock.patch.object(module, name, everywhere[name]))
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(CudaInterface, "get_device_properties", properties))
        stack.enter_context(
            mock.patch.object(CudaInterface.Worker, "get_device_properties", properties)
        )
        stack.enter_context(
            mock.patch.object(CudaInterface, "get_compute_capability", staticmethod(lambda *_: 90))
        )
        stack.enter_context(
            mock.patch.object(GraphLowering, "compile_to_module", lambda graph: finish(graph))
        )
        triton.runtime.driver.set_active(Driver())
        yield
