"""A tokenizer.json that makes its library panic, abort or never end is refused before the library sees it."""

import json
from base64 import b64encode

import pytest
import tiny
from lanes import slow
from measure import measured

from mlx_zimage import ZImagePipeline, tokenizer
from mlx_zimage.convert import convert
from mlx_zimage.convert.verify import verify
from mlx_zimage.errors import CheckpointError
from mlx_zimage.tokenizer import Tokenizer

FILE = tiny.GOLDEN / "tokenizer" / "tokenizer.json"
DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
SPLIT = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
WORD = {"id": 5, "content": "x", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def charsmap(content: bytes) -> dict:
    return {"type": "Precompiled", "precompiled_charsmap": b64encode(content).decode()}


# What is put into a tokenizer.json that is otherwise as it should be. The library panics unless noted otherwise.
HOSTILE = {
    "replaced 2**60 times": {"normalizer": {"type": "Sequence", "normalizers": [DOUBLE] * 60}},  # aborts
    "nothing replaced": {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "a"}},
    "no charsmap": {"normalizer": charsmap(b"\0\0\0\0")},
    "a charsmap past its end": {"normalizer": charsmap(b"\x10\0\0\0" + b"\xff" * 16 + b"abc\0")},
    "a charsmap of 4 GB": {"normalizer": charsmap(b"\xff\xff\xff\xff")},  # when opened
    "words of no length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "an expression that never ends": {"pre_tokenizer": SPLIT},
    "an expression among others": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, SPLIT]}},
    "bytes of bytes of bytes": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES] * 16}},  # of text 2**16
    "the words of words": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [tokenizer.SPLIT] * 2}},
    "words of bytes": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES, tokenizer.SPLIT]}},
    "a template without its token": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
    "another decoder": {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}},
    "a list": {"normalizer": [{"type": "NFC"}]},
    "added tokens without end": {"added_tokens": [WORD | {"content": f"<{i}>", "id": 600 + i} for i in range(10_000)]},
    "an endless added token": {"added_tokens": [WORD | {"content": "x" * 10**6}]},
    "added tokens of 60,000 characters": {
        "added_tokens": [WORD | {"content": f"{i} " + "x" * 900, "id": 600 + i} for i in range(66)]
    },
    "an added token that is a number": {"added_tokens": [5]},
}
MODELS = {
    "a prefix longer than a token": {"continuing_subword_prefix": "abcdefgh"},
    "dropout": {"dropout": 0.5},  # different ids each time
    "another model": {"type": "WordLevel", "unk_token": "x"},
    "no vocabulary": {"vocab": {}, "merges": []},  # no ids
    "no vocabulary at all": {"vocab": None},
    "ids in words": {"vocab": {"a": "1"}},
    "an id past the embedding": {"vocab": {"a": 10**9}, "merges": []},
    "a negative id": {"vocab": {"a": -1}},
    "endless merges": {"merges": ["a b"] * 200_001},
    "an endless vocabulary": {"vocab": {f"{i:x}": i for i in range(200_001)}},
    "merges that are a number": {"merges": 5},
}


def write(path, change: dict, model: dict | None = None) -> None:
    values = json.loads(FILE.read_text()) | change
    path.write_text(json.dumps(values | {"model": values["model"] | (model or {})}))


ALL = {name: (change, {}) for name, change in HOSTILE.items()} | {name: ({}, model) for name, model in MODELS.items()}


LARGE = ("added tokens without end", "an endless vocabulary")


@pytest.mark.parametrize(
    ("change", "model"), [slow(*case) if name in LARGE else case for name, case in ALL.items()], ids=list(ALL)
)
def test_a_hostile_tokenizer_is_refused_by_name_wherever_it_is_opened(folder, tmp_path, change, model):
    file = folder / "tokenizer" / "tokenizer.json"
    write(file, change, model)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json") as caught:
        ZImagePipeline.from_pretrained(folder).tokenize("a fox")
    assert len(str(caught.value)) < 500
    if model != MODELS["no vocabulary"]:  # which only an actual prompt reveals
        assert "tokenizer.json" in verify(folder)[0]
        with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
            convert(folder, tmp_path / "out")


@pytest.mark.parametrize("name", ["words of no length", "a charsmap of 4 GB"])
def test_a_panic_of_the_library_is_a_damaged_file_too(tmp_path, monkeypatch, name):
    monkeypatch.setattr(tokenizer, "check", lambda values: 512)
    write(tmp_path / "tokenizer.json", HOSTILE[name])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a valid tokenizer"):
        Tokenizer(tmp_path / "tokenizer.json")


def test_ids_that_the_file_does_not_declare_are_refused():
    opened = Tokenizer(FILE)
    opened.size = 100
    with pytest.raises(CheckpointError, match=r"the id \d+ to a token of the prompt, but has only \d+ tokens"):
        opened.encode("a fox")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * (tokenizer.MAX_TOKENIZER_BYTES + 1), "larger than"),
        (b"[" + b"[]," * tokenizer.MAX_TOKENIZER_VALUES + b"[]]", "more than 700,000 values"),
        (b"[" * 10**5, "nested"),
        (b'{"model": {"type": "BPE", "vocab": {"a": ' + b"9" * 5000 + b"}}}", "a number of 5,000 digits"),
        (b"[]", "no model"),
    ],
    ids=["bytes", "values", "nested", "digits", "list"],
)
def test_an_endless_tokenizer_is_refused_before_the_library_sees_it(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer(tmp_path / "tokenizer.json")


def test_interrupting_is_not_taken_for_damage(monkeypatch):
    opened = Tokenizer(FILE)

    class Interrupted:
        def encode(self, *args, **options):
            raise KeyboardInterrupt

    opened._backend = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        opened.encode("a fox")


def test_prefixes_that_say_nothing_are_accepted(tmp_path):
    # as in Qwen3's own file
    write(tmp_path / "tokenizer.json", {}, {"continuing_subword_prefix": "", "end_of_word_suffix": ""})
    assert Tokenizer(tmp_path / "tokenizer.json").encode("a fox") == Tokenizer(FILE).encode("a fox")


FOX = "🦊"  # a wide character makes every character of a Python string take four bytes
LARGEST = {
    "a text": lambda size: {"x": FOX + "a" * (size - 20_000)},
    "a token": lambda size: {"model": {"type": "BPE", "vocab": {FOX + "a" * (size - 20_000): 0}, "merges": []}},
    "tokens": lambda size: {"model": {"type": "BPE", "vocab": {f"{i}{FOX}{'a' * 54}": i for i in range(199_000)}}},
    "merges": lambda size: {
        "model": {"type": "BPE", "vocab": {"a": 0, FOX: 1, f"a{FOX}": 2}, "merges": [["a", FOX]] * 199_000}
    },
    "objects and lists": lambda size: {"x": [*({"a": 1} for _ in range(199_000)), *([] for _ in range(100_000))]},
    "added tokens": lambda size: {
        "added_tokens": [WORD | {"content": f"{i:03}{FOX * 15}", "id": i, "special": True} for i in range(1000)]
    },
}


@pytest.mark.parametrize(
    "values", [values if name == "merges" else slow(values) for name, values in LARGEST.items()], ids=list(LARGEST)
)
def test_the_largest_tokenizers_take_little_memory(tmp_path, values):
    parsed = json.loads(FILE.read_text()) | values(tokenizer.MAX_TOKENIZER_BYTES)
    content = json.dumps(parsed, ensure_ascii=False).encode()
    assert len(content) <= tokenizer.MAX_TOKENIZER_BYTES
    (tmp_path / "tokenizer.json").write_bytes(content)
    imports = """
import tokenizers
from pathlib import Path
from mlx_zimage.errors import CheckpointError
from mlx_zimage.tokenizer import Tokenizer
"""
    work = """
try:
    Tokenizer(Path(sys.argv[1])).encode("a fox")
except CheckpointError:
    pass
"""
    _, grown = measured(imports, work, tmp_path / "tokenizer.json")
    assert grown < 200e6
