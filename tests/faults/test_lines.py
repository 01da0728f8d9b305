"""Files of prompts and requests that are made to fill memory: refused, or read in little more than they contain."""

import io

import pytest
from lanes import slow
from measure import measured

from mlx_zimage.drafts import read_text
from mlx_zimage.request import MAX_PROMPT

IMPORTS = """
from mlx_zimage.errors import RequestError
from mlx_zimage.drafts import lines_of, multiply, read_prompts, read_requests
"""
PROGRAM = """
class Endless:
    def __init__(self, line):
        self.line, self.n = line, 0
    def read(self, size):
        self.n += 1
        return self.line * (size // len(self.line)) if self.n < 48 else b""

read = {"prompts": read_prompts, "requests": read_requests}[sys.argv[1]]
try:
    list(multiply({"prompt": "a"}, read(lines_of(Endless(LINE), "f"), "f").values(), [1], "x.png"))
except RequestError as error:
    print(error)
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


QUICK = ("25 million prompts", "one object")


@pytest.mark.parametrize(
    ("kind", "line"), [case if name in QUICK else slow(*case) for name, case in HOSTILE.items()], ids=list(HOSTILE)
)
def test_a_file_of_50_mb_takes_little_memory(kind, line):
    printed, grown = measured(IMPORTS, PROGRAM.replace("LINE", repr(line)), kind)
    assert grown < 200e6, printed


def test_a_prompt_from_stdin_is_read_no_further_than_a_prompt_goes():
    work = """
class Endless:
    def read(self, size=-1):
        assert 0 < size < 10**6
        return b"a" * size

try:
    read_text(Endless(), "stdin")
except RequestError as error:
    print(error)
"""
    printed, grown = measured(
        "from mlx_zimage.errors import RequestError; from mlx_zimage.drafts import read_text", work
    )
    assert printed == "stdin has more than 256,000 bytes; expected a prompt of at most 32,000 characters"
    assert grown < 10e6


def test_the_longest_prompt_in_the_widest_characters_is_read_from_stdin():
    prompt = "🦊" * MAX_PROMPT
    assert read_text(io.BytesIO(f"\ufeff\n\n{prompt}\n\n".encode()), "stdin").strip() == prompt
