"""What Triton needs besides its wheel is named, each with what to do; on machines that lack it and on this one."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

import pytest
import torch

from swinv2_train.models.kernels import requirements, trial

PATHS = sysconfig.get_paths()


def missing(name: str) -> str:
    return requirements.missing_for_triton().get(name, "")


def program(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_without_a_compiler_it_is_named(monkeypatch, tmp_path):
    """Where none is, where CC names none, and where there is one that cannot link."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert missing("a C compiler") == "neither gcc nor clang is on the PATH; install gcc, or name a compiler in CC"
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "no-such-compiler does not work" in missing("a C compiler")
    monkeypatch.setenv("CC", str(program(tmp_path, "broken", "echo cannot find crti.o >&2; exit 1")))
    assert "does not work: cannot find crti.o; install gcc" in missing("a C compiler")


def test_headers_of_python_that_are_not_installed_are_named(monkeypatch, tmp_path):
    """Triton itself only says that gcc returned 1."""
    monkeypatch.setattr(sysconfig, "get_paths", lambda *scheme: PATHS | {"include": str(tmp_path)})
    assert missing("Python.h").startswith(f"{tmp_path} has no Python.h; install Python's headers (Debian: python3-dev")


def test_the_drivers_library_is_looked_for_where_triton_does(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(tmp_path))
    assert missing("libcuda") == f"TRITON_LIBCUDA_PATH ({tmp_path}) has no libcuda.so.1; correct it"
    (tmp_path / "libcuda.so.1").touch()
    assert missing("libcuda") == ""
    monkeypatch.delenv("TRITON_LIBCUDA_PATH")
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/nowhere:{tmp_path}")
    assert missing("libcuda") == ""


@pytest.mark.parametrize("variable", ["TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"])
def test_a_cache_that_cannot_hold_what_is_loaded_is_named(variable, monkeypatch, tmp_path):
    """A file in the place of a folder, a file system without programs, and one to be made."""
    (tmp_path / "file").touch()
    monkeypatch.setenv(variable, str(tmp_path / "file"))
    assert f"set {variable} to a folder on a disk of this machine" in missing(variable)
    monkeypatch.setenv(variable, str(tmp_path / "new" / "folder"))
    assert missing(variable) == "" and not (tmp_path / "new").exists(), "a check leaves nothing behind"
    plain = os.statvfs(tmp_path)
    flags = type("Mounted", (), {"f_flag": plain.f_flag | os.ST_NOEXEC})
    monkeypatch.setattr(os, "statvfs", lambda path: flags)
    assert "is on a file system mounted noexec" in missing(variable)


def test_a_user_without_a_home_is_told_to_name_a_cache(monkeypatch):
    """A container's user who is in no list: Triton would end with a traceback."""

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.delenv("TRITON_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert "home directory.); set TRITON_CACHE_DIR to a folder" in missing("TRITON_CACHE_DIR")


def test_the_names_are_those_of_triton_itself(monkeypatch, tmp_path):
    """Where it looks for its cache, in the version that is installed."""
    knobs = pytest.importorskip("triton.knobs", reason="the package triton is not installed")
    for name, value in {"TRITON_HOME": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
        assert Path(knobs.cache_knobs().dir) == requirements.triton_cache()


def test_a_kernel_that_fails_on_a_gpu_is_told_with_what_the_machine_lacks(monkeypatch):
    """On a CPU the same failure has nothing to do with Triton's needs."""
    checks = {"a C compiler": lambda: None, "Python.h": lambda: "install python3-dev"}
    monkeypatch.setattr(requirements, "REQUIREMENTS", checks)
    gcc = "CalledProcessError: gcc returned 1"
    assert trial._with_missing(gcc, torch.device("cuda", 0)) == f"{gcc}; Python.h: install python3-dev"
    assert trial._with_missing(gcc, torch.device("cpu")) == gcc
