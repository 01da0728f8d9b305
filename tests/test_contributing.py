"""CONTRIBUTING.md is true: the places that it names exist, its words are used, its tools are those of CI."""

import re
import tomllib
from pathlib import Path

import click
import pytest
import yaml
from test_pages import PAGES, SETTINGS, read, resolved

from mlx_zimage import cli

ROOT = Path(__file__).parents[1]


def table(heading: str) -> list[list[str]]:
    """The rows of the first table of a section, without its header."""
    section = read("CONTRIBUTING.md").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return rows[2:]


def test_the_files_and_names_of_its_tables_exist():
    """A name in capitals, or one that begins with open_, must be in a file that its cell names."""
    for row in table("Where a new thing goes"):
        for cell in row[1:]:
            spans = re.findall(r"`([^`]+)`", cell)
            files = [span for span in spans if "." in span and "/" in span]
            assert all((ROOT / file).exists() for file in files), files
            text = "".join((ROOT / file).read_text(encoding="utf-8") for file in files if (ROOT / file).is_file())
            for name in spans:
                if re.fullmatch(r"[A-Z_]{3,}|open_\w+", name) and text:
                    assert re.search(rf"\b{name}\b", text), (name, files)


def test_the_layout_lists_files_that_exist():
    (listing,) = re.findall(r"```text\n(mlx_zimage/\n.*?)```", read("CONTRIBUTING.md"), re.DOTALL)
    package, rest = listing.split("\nconvert/")
    for name in re.findall(r"\b\w+\.py\b", package) + re.findall(r"^  (\w+/)", package, re.MULTILINE):
        assert (ROOT / "mlx_zimage" / name).exists(), name
    for name in re.findall(r"^(\S+/) ", f"convert/{rest}", re.MULTILINE):
        assert (ROOT / name).is_dir(), name


def unwanted() -> list[str]:
    """The single words and phrases of the column "not" that are never right here."""
    words = [row[1].strip('"') for row in table("Vocabulary")]
    return [word for word in words if re.fullmatch(r"picture|draw|read as needed|what may be used", word)]


def helps() -> dict[str, str]:
    texts = {}
    for name in cli.COMMANDS:
        command = resolved(name)
        for each in [command, *(command.commands.values() if isinstance(command, click.Group) else ())]:
            with click.Context(each, info_name=each.name, **SETTINGS) as context:
                texts[f"{name} {each.name}"] = each.get_help(context)
    return texts


@pytest.mark.parametrize("page", [*(page for page in PAGES if page != "CONTRIBUTING.md"), "CHANGELOG.md"])
def test_pages_use_the_vocabulary(page):
    check_words(page, re.sub(r"^```.*?^```$|`[^`]*`|\]\(.*?\)", "", read(page), flags=re.MULTILINE | re.DOTALL))


def test_help_uses_the_vocabulary():
    for name, text in helps().items():
        check_words(name, text)


def check_words(place: str, text: str) -> None:
    assert len(unwanted()) == 4
    for word in unwanted():
        match = re.search(rf"\b{word}(s|ing|n)?\b", text, re.IGNORECASE)
        assert match is None, f"{place}: {text[max(0, match.start() - 40) : match.end() + 40]}"


def test_issue_forms_and_workflows_are_yaml_and_ask_for_what_doctor_prints():
    forms = {file.stem: yaml.safe_load(file.read_text()) for file in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")}
    assert forms.keys() == {"bug", "config", "feature", "measurement"}
    for name in ("bug", "measurement"):
        (asked,) = [part for part in forms[name]["body"] if "doctor --json" in part["attributes"].get("label", "")]
        assert asked["validations"]["required"]
    assert "--json" in {option for parameter in resolved("doctor").params for option in parameter.opts}
    for file in (ROOT / ".github/workflows").glob("*.yml"):
        assert yaml.safe_load(file.read_text())["jobs"], file


def test_publishing_waits_for_the_checks_and_needs_no_token():
    workflow = yaml.safe_load(read(".github/workflows/release.yml"))
    publish = workflow["jobs"]["publish"]
    assert set(publish["needs"]) == {"build", "check"} and publish["permissions"] == {"id-token": "write"}
    assert any("pypa/gh-action-pypi-publish" in step.get("uses", "") for step in publish["steps"])
    assert "secrets." not in read(".github/workflows/release.yml")


def test_hooks_run_the_tools_that_the_environment_pins():
    hooks = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"][0]["hooks"]
    dev = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]["dev"]
    pinned = {requirement.split("==")[0] for requirement in dev if "==" in requirement}
    assert {hook["id"].removesuffix("-check").removesuffix("-format") for hook in hooks} == pinned
    assert ".[dev]" in read(".ci/run"), "CI installs the same"
