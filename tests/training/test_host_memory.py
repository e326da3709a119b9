"""Memory that a process frees and keeps, counted in page faults of a process of its own."""

import platform
import subprocess
import sys

import pytest

from groupdetr_fast.training import host_memory

BLOCK = 128 << 20
# The module is run by its path: the package would import torch.
PROGRAM = f"""
import resource, runpy
kept = runpy.run_path({host_memory.__file__!r})["keep_freed_memory"]() if {{keep}} else False
bytearray({BLOCK})
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
bytearray({BLOCK})
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")


def faults(keep, **environment):
    program = [sys.executable, "-c", PROGRAM.format(keep=keep)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=True, timeout=60)
    return tuple(map(int, done.stdout.split()))


def test_a_block_that_was_freed_is_not_mapped_again():
    pages = BLOCK // 4096
    _, without = faults(keep=False)
    kept, with_it = faults(keep=True)
    assert kept == 1
    assert with_it < pages / 100
    assert without > pages / 1024, "large pages hide what this test measures"  # of 2 MB, 512 times fewer


@pytest.mark.parametrize(
    "choice",
    [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"}],
    ids=lambda choice: next(iter(choice)),
)
def test_what_the_user_chose_stays(choice):
    kept, again = faults(keep=True, **choice)
    assert kept == 0
    assert again > BLOCK // 4096 / 1024


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: object())
    for name in (*host_memory.USERS_CHOICES, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    assert not host_memory.keep_freed_memory()
