"""Threads of a process that loads engines allocate from one heap."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

COUNT = """
import ctypes, os, sys, tempfile, threading
from qlip_export.backends.heap import share_one_heap
if sys.argv[1] == "shared":
    share_one_heap()
library = ctypes.CDLL(None)
library.malloc.restype = library.fopen.restype = ctypes.c_void_p
library.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
library.fclose.argtypes = [ctypes.c_void_p]
barrier = threading.Barrier(4)
def allocate():
    library.malloc(1000)
    barrier.wait()
threads = [threading.Thread(target=allocate) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "info").encode()
    file = library.fopen(path, b"w")
    library.malloc_info(0, file)
    library.fclose(file)
    print(open(path).read().count("<heap nr="))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="heaps of threads are glibc's")
@pytest.mark.parametrize(("asked", "expected"), [("shared", True), ("default", False)])
def test_threads_share_a_heap(asked: str, expected: bool) -> None:
    command = [sys.executable, "-c", COUNT, asked]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert (int(done.stdout) == 1) == expected
