"""Compiles CUDA kernels for the CPU with g++ and calls them; see cuda_on_cpu.h."""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

EMULATOR = Path(__file__).parent
KERNELS = EMULATOR.parents[1] / "csrc"
WARNINGS = ["-Wall", "-Wno-unknown-pragmas", "-Wno-attributes"]
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", *WARNINGS]
CHECKS = {
    "plain": [],
    "races": ["-fsanitize=thread"],
    "addresses": ["-fsanitize=address", "-fsanitize-sections=cuda_shared"],
}


class KernelError(RuntimeError):
    """A launch failed; the message is the emulator's."""


class Library:
    """The C functions of a library that :func:`build` returned."""

    def __init__(self, path):
        self._path = path
        self._functions = ctypes.CDLL(str(path))
        self._functions.cuda_on_cpu_error.restype = ctypes.c_char_p

    def call(self, function, *arguments, schedule=0, ignore_races=False):
        """Call a function that returns a ``cudaError_t``; raise :class:`KernelError` if it is not 0."""
        self._functions.cuda_on_cpu_schedule(ctypes.c_uint64(schedule), ctypes.c_bool(ignore_races))
        if getattr(self._functions, function)(*arguments) != 0:
            raise KernelError(self._with_lines(self._functions.cuda_on_cpu_error().decode()))

    def size(self, function, *arguments):
        """Call a function that returns an ``int64_t`` and launches nothing."""
        called = getattr(self._functions, function)
        called.restype = ctypes.c_int64
        return called(*arguments)

    def _with_lines(self, message):
        def line(match):
            command = ["addr2line", "-e", str(self._path), hex(int(match[1], 16) - 1)]
            found = subprocess.run(command, capture_output=True, text=True).stdout.split()
            return Path(found[0]).name if found else match[0]

        return re.sub(r"<code\+(\w+)>", line, message) if shutil.which("addr2line") else message


def build(source, checks="races", defines=(), changes=None):
    """Compile a file that launches CUDA kernels; return the path of the library. Skips the test without a compiler.

    Args:
        source: a C++ file that includes kernels from ``csrc`` and defines ``extern "C"`` functions.
        checks: ``"races"`` has preemption and the check of races at every load and store; ``"addresses"`` is built with
            AddressSanitizer and is for :func:`run_with_address_sanitizer`; ``"plain"`` has neither and is fast.
        defines: macros.
        changes: ``{file: [(old, new), ...]}``, replacements of text in copies of files under ``csrc``.
    """
    source = Path(source)
    headers = [*KERNELS.glob("**/*.h"), *KERNELS.glob("**/*.cuh"), *EMULATOR.glob("**/*.h")]
    sanitize = CHECKS[checks] if checks == "addresses" else []
    with tempfile.TemporaryDirectory() as folder:
        kernels = _changed_copy(changes, Path(folder)) if changes else KERNELS
        kernel_flags = [*CHECKS[checks], *(f"-D{define}" for define in defines)]
        objects = [
            _compile(EMULATOR / "machine.cpp", ["-O2", *sanitize], headers),
            _compile(EMULATOR / "races.cpp", ["-O2"], headers),
            _compile(source, kernel_flags, headers, include=kernels, key=changes),
        ]
        return _cached(f"{source.stem}-{checks}.so", ["-shared", *objects, "-ldl", *sanitize], objects)


def run_with_address_sanitizer(script, *arguments):
    """Run a Python script that calls a library built with ``checks="addresses"``; return the finished process."""
    question = subprocess.run([_compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True)
    runtime = question.stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("g++ has no AddressSanitizer")
    environment = {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    environment["PYTHONPATH"] = str(EMULATOR.parent)
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def _compiler():
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("running CUDA kernels on the CPU needs g++")
    if os.uname().machine != "x86_64":
        pytest.skip("running CUDA kernels on the CPU needs an x86-64 machine")
    return compiler


def _compile(source, flags, headers, include=KERNELS, key=None):
    includes = [f"-I{folder}" for folder in (include, EMULATOR, EMULATOR / "include")]
    arguments = [*FLAGS, *flags, "-c", source, *includes]
    return _cached(f"{source.stem}.o", arguments, [source, *sorted(headers)], (flags, key))


def _cached(name, arguments, inputs, key=None):
    """The output of g++ for these arguments; reused as long as ``inputs`` and ``key`` stay the same."""
    cache = Path(tempfile.gettempdir()) / f"groupdetr_fast-cuda_on_cpu-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    digest = hashlib.sha256(repr((FLAGS, key)).encode())
    for file in inputs:
        digest.update(file.read_bytes())
    target = cache / f"{digest.hexdigest()[:16]}-{name}"
    if not target.exists():
        unfinished = target.with_suffix(f".{os.getpid()}")
        command = [_compiler(), *map(str, arguments), "-o", str(unfinished)]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode != 0:
            raise RuntimeError(f"g++ failed:\n{process.stderr[:4000]}")
        unfinished.replace(target)
    return target


def _changed_copy(changes, folder):
    copy = folder / "csrc"
    shutil.copytree(KERNELS, copy)
    for name, replacements in changes.items():
        text = (copy / name).read_text()
        for old, new in replacements:
            if text.count(old) != 1:
                raise ValueError(f"{name} has {text.count(old)} times: {old}")
            text = text.replace(old, new)
        (copy / name).write_text(text)
    return copy
