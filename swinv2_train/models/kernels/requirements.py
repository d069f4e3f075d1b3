"""What Triton needs on a machine besides its wheel, before a kernel can be compiled and loaded: each by its name.

A wheel brings ptxas and no host compiler; Triton builds a small C module against libcuda for every version of Python.
Source: triton 3.8.0, runtime/build.py, backends/nvidia/driver.py and knobs.py.
"""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path


def missing_for_triton() -> dict[str, str]:
    """What is missing on this machine, by the requirement's name, each with the remedy; empty where nothing is."""
    found = {name: check() for name, check in REQUIREMENTS.items()}
    return {name: problem for name, problem in found.items() if problem is not None}


def _compiler() -> str | None:
    """Triton's choice."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def _c_compiler() -> str | None:
    compiler = _compiler()
    if compiler is None:
        return "neither gcc nor clang is on the PATH; install gcc, or name a compiler in CC"
    return _compiled(compiler, "int answer(void) { return 42; }\n", [])


def _python_headers() -> str | None:
    scheme = sysconfig.get_default_scheme()
    folder = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    if not Path(folder, "Python.h").is_file():
        return f"{folder} has no Python.h; install Python's headers (Debian: python3-dev, Fedora: python3-devel)"
    compiler = _compiler()
    return None if compiler is None else _compiled(compiler, "#include <Python.h>\n", [f"-I{folder}"])


def _compiled(compiler: str, source: str, flags: list[str]) -> str | None:
    """What is wrong with a compiler, seen by a file of two lines."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "probe.c")
            file.write_text(source)
            command: list[str | Path] = [compiler, "-shared", "-fPIC", *flags, "-o", f"{folder}/probe.so", file]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        return None
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip().splitlines() or [str(error)]
        return f"{compiler} does not work: {said[-1]}; install gcc, or name a compiler in CC"


def _libcuda() -> str | None:
    """The driver's library where Triton looks for it: TRITON_LIBCUDA_PATH, the linker's cache, LD_LIBRARY_PATH."""
    library = "libcuda.so.1"
    if named := os.environ.get("TRITON_LIBCUDA_PATH"):
        return None if Path(named, library).exists() else f"TRITON_LIBCUDA_PATH ({named}) has no {library}; correct it"
    try:
        cached = subprocess.run(["/sbin/ldconfig", "-p"], check=True, capture_output=True, timeout=60).stdout.decode()
    except (OSError, subprocess.SubprocessError) as error:
        return f"/sbin/ldconfig, which Triton asks, does not run ({error}); set TRITON_LIBCUDA_PATH to its folder"
    known = [Path(line.split()[-1]) for line in cached.splitlines() if library in line]
    on_path = [Path(folder, library) for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
    if any(path.exists() for path in known or on_path):
        return None
    return (
        f"{library} is not in the linker's cache; install NVIDIA's driver, start the container with its GPUs "
        "(--gpus all, --nv), or set TRITON_LIBCUDA_PATH to its folder"
    )


def triton_cache() -> Path:
    """Where Triton keeps what it compiled."""
    named = os.environ.get("TRITON_CACHE_DIR")
    return Path(named) if named else Path(os.environ.get("TRITON_HOME") or Path.home(), ".triton", "cache")


def inductor_cache() -> Path:
    """Where torch.compile keeps what it compiled."""
    named = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    return Path(named) if named else Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")


def _folder(variable: str, where: Callable[[], Path]) -> str | None:
    """What keeps a folder from holding compiled modules that are loaded from it."""
    remedy = f"set {variable} to a folder on a disk of this machine"
    try:
        path = where()
        existing = next(folder for folder in (path, *path.parents) if folder.exists())
        with tempfile.NamedTemporaryFile(dir=existing):
            pass
        loads = not os.statvfs(existing).f_flag & os.ST_NOEXEC
    except (OSError, KeyError, RuntimeError) as error:  # the last two from a user without a name or a home
        return f"nothing can be written there ({error}); {remedy}"
    return None if loads else f"{path} is on a file system mounted noexec, from which nothing can be loaded; {remedy}"


REQUIREMENTS: dict[str, Callable[[], str | None]] = {
    "a C compiler": _c_compiler,
    "Python.h": _python_headers,
    "libcuda": _libcuda,
    "TRITON_CACHE_DIR": lambda: _folder("TRITON_CACHE_DIR", triton_cache),
    "TORCHINDUCTOR_CACHE_DIR": lambda: _folder("TORCHINDUCTOR_CACHE_DIR", inductor_cache),
}
"""What is checked, by name: a function that says what is wrong and how to mend it, or nothing."""
