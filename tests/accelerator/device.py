"""The accelerator of `accelerator.cpp`, and the pytest plugin that lets tests run on it.

    ACCELERATOR=default python -m pytest -p tests.accelerator.device tests/training

makes tensors there unless told otherwise, also in float64. Not for tests that read files or start processes.
"""

import contextlib
import os
import shutil
import subprocess
import types
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("accelerator.cpp")
COMPILER = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
NAME = "pretend"


def build(library: Path) -> None:
    """Compile the library, against the installed torch."""
    root = Path(torch.__file__).parent
    include = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    links = [f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    options = ["-shared", "-fPIC", "-O0", "-w", "-std=c++20", abi]
    subprocess.run([COMPILER, *options, *include, str(SOURCE), "-o", str(library), *links], check=True)


def start(library: Path) -> None:
    """Make the device known to torch."""
    torch.ops.load_library(library)
    operations = torch.ops.accelerator
    torch.utils.rename_privateuse1_backend(NAME)
    module = types.ModuleType(f"torch.{NAME}")
    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork, module._initialized = (lambda: False), True
    module.device_count, module.current_device = lambda: 1, lambda: 0
    module.manual_seed = module.manual_seed_all = lambda seed: operations.seed(seed)
    module.get_rng_state = lambda device=0: operations.get_state()
    module.set_rng_state = lambda state, device=0: operations.set_state(state)
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    module.device = lambda *_: contextlib.nullcontext()
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend()


def pytest_configure(config):
    library = Path(os.environ.get("ACCELERATOR_LIBRARY", "build/accelerator.so"))
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        build(library)
    start(library)
    if os.environ.get("ACCELERATOR") == "default":
        torch.ops.accelerator.relax()
        torch.set_default_device(NAME)
