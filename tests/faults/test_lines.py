"""Files of prompts and requests that are made to fill memory: refused, or read in little more than they contain."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from mlx_zimage.errors import RequestError
from mlx_zimage.jobs import lines_of, multiply, read_prompts, read_requests

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

class Endless:
    def __init__(self, line):
        self.line, self.n = line, 0
    def read(self, size):
        self.n += 1
        return self.line * (size // len(self.line)) if self.n < 48 else b""

read, before = {"prompts": read_prompts, "requests": read_requests}[sys.argv[1]], peak()
try:
    list(multiply({"prompt": "a"}, read(lines_of(Endless(LINE), "f"), "f").values(), [1], "x.png"))
except RequestError as error:
    print(error)
print((peak() - before) // 10**6)
"""
HOSTILE = {
    "25 million prompts": ("prompts", b"a\n"),
    "50 million blank lines": ("prompts", b"\n"),
    "no line's end": ("prompts", b"a" * 2**20),
    "wide characters": ("prompts", b"a" * 500_000 + "🦊\n".encode()),
    "comments": ("prompts", b"#\n"),
    "carriage returns": ("prompts", b"\r"),
    "400 prompts of 0.1 MB": ("prompts", b"a" * 120_000 + b"\n"),
    "objects": ("requests", b"{}\n"),
    "numbers": ("requests", b'{"sigmas":[' + b"1," * 900 + b"0]}\n"),
    "lists": ("requests", b'{"loras":[' + b"[]," * 10_000 + b"[]]}\n"),
    "one object": ("requests", b'{"a":1,' * 100_000),
}


@pytest.mark.parametrize(("kind", "line"), HOSTILE.values(), ids=list(HOSTILE))
def test_a_file_of_50_mb_takes_little_memory(kind, line):
    program = PROGRAM.replace("LINE", repr(line))
    done = subprocess.run([sys.executable, "-", kind], input=program, capture_output=True, text=True, check=True)
    *_, used = done.stdout.split("\n")[:-1]
    assert int(used) < 200, done.stdout
