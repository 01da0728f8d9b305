import pytest
import tiny

from mlx_zimage.errors import CheckpointError
from mlx_zimage.request import TOKENS
from mlx_zimage.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(tiny.GOLDEN / "tokenizer" / "tokenizer.json")


@pytest.mark.parametrize("key", tiny.PROMPTS)
def test_ids_equal_the_reference(golden, golden_pipe, key):
    ids = golden_pipe.tokenizer.encode(tiny.PROMPTS[key])
    assert ids[:TOKENS] == golden[f"text/{key}.ids"].tolist()


def test_a_long_prompt_is_encoded_without_truncation(tokenizer):
    # the pipeline truncates it, with a warning
    assert len(tokenizer.encode(tiny.PROMPTS["long"])) > 2 * TOKENS


def test_the_template_surrounds_the_prompt(tokenizer):
    start, end, newline = (tokenizer._backend.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>", "Ċ"))
    ids = tokenizer.encode("fox")
    assert ids[0] == start
    assert ids.count(start) == 2
    assert ids[ids.index(end) : ids.index(end) + 3] == [end, newline, start]
    assert ids[-1] == newline


def test_braces_in_a_prompt_are_kept_as_text(tokenizer):
    # the template is filled with str.format, which must not read the prompt
    assert tokenizer.encode("{prompt} {0} {") != tokenizer.encode("prompt 0")
    text = tokenizer._backend.decode(tokenizer.encode("{prompt} {0} {"), skip_special_tokens=True)
    assert "{prompt} {0} {" in text


def test_spaces_around_a_prompt_are_kept(tokenizer):
    assert tokenizer.encode(" fox ") != tokenizer.encode("fox")


def test_padding_and_truncation_in_the_file_are_ignored(tokenizer, tmp_path):
    backend = type(tokenizer._backend).from_file(str(tiny.GOLDEN / "tokenizer" / "tokenizer.json"))
    backend.enable_padding(length=64)
    backend.enable_truncation(8)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path / "tokenizer.json").encode("a fox") == tokenizer.encode("a fox")


def test_a_damaged_file_is_named(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a valid tokenizer"):
        Tokenizer(file)
