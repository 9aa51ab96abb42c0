"""``python -m msacore``: what a bug report needs to know about this installation."""

import importlib.metadata
import platform
import sys
from pathlib import Path

import torch

import msacore
from msacore import _C

_DEVICES = {"CPU": "cpu", "CUDA": "cuda", "Meta": "meta", "Autograd": "autograd"}


def version_of(*packages: str) -> str:
    """Version of the first of these packages that is installed; looked up without importing it."""
    for package in packages:
        try:
            return f"{importlib.metadata.version(package)} ({package})"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


def operators() -> dict[str, list[str]]:
    """Every registered ``msacore::`` operator and what it is registered for."""
    names = sorted({name for name in torch._C._dispatch_get_all_op_names() if name.startswith("msacore::")})
    kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return {name: [label for key, label in _DEVICES.items() if kernel(name, key)] for name in names}


def main() -> None:
    build = _C.build_info()
    table = operators()
    rows = {
        "msacore": f"{msacore.__version__}, {Path(msacore.__file__).parent}",
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'}); built with {build['torch']}",
        "faiss": version_of("faiss-gpu", "faiss-cpu"),
        "numpy": version_of("numpy"),
        "python": f"{sys.version.split()[0]}, {platform.platform()}",
        "compiler": f"{build['compiler']}, C++ {build['cpp_standard']}",
        "CPU instruction sets": f"{build['simd_active']} in use; compiled for {build['simd_compiled']}",
        "CPU threads": build["threads"],
        "CUDA in this build": f"{build['cuda']}, {build['cuda_architectures']}"
        if build["cuda"]
        else "none (CPU build)",
        "CUDA devices": ", ".join(
            f"{torch.cuda.get_device_name(i)} sm_{''.join(map(str, torch.cuda.get_device_capability(i)))}"
            for i in range(torch.cuda.device_count())
        )
        or "none",
    }
    width = max(map(len, rows))
    lines = [f"{label:<{width}}  {value}" for label, value in rows.items()]
    lines += ["operators", *(f"  {name:<{width + 30}}  {', '.join(devices)}" for name, devices in table.items())]
    if build["cuda"] and not any("cuda" in devices for devices in table.values()):
        lines.append("warning: CUDA is in this build, but no operator is registered for it; build msacore again")
    sys.stdout.write("\n".join([*lines, ""]))  # one write: `| head` may close the pipe before a second


if __name__ == "__main__":
    main()
