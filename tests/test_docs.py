"""The tutorials run as they are written, each in an empty folder, and their links lead somewhere."""

import importlib.util
import re
import warnings
from pathlib import Path

import pytest
import typer.main

from dit_fast import cli

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
NEEDS = {"trainers": ("transformers", "lightning"), "mislabelled": ("sklearn",), "when": ("sklearn",)}


def run(page: Path) -> dict:
    """The names that the page's Python blocks leave behind."""
    names: dict = {}
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)):
        exec(compile(block, f"{page.name}, Python block {number}", "exec"), names)
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_tutorial_runs(page, tmp_path, monkeypatch, capsys):
    missing = [name for name in NEEDS.get(page.stem, ()) if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed")
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        if page.stem == "trainers":  # those libraries warn of their own affairs
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", module="dit_fast")
        names = run(page)
    assert "Influence of" in capsys.readouterr().out
    assert (names["result"].scores != 0).any()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8")):
        assert target.startswith("https://") or (DOCS / target).is_file(), target


def test_commands_and_their_options_exist():
    commands = {
        name: {option for parameter in command.params for option in parameter.opts}
        for name, command in typer.main.get_command(cli.app).commands.items()
    }
    seen = set()
    for page in PAGES:
        for block in re.findall(r"^```sh\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("dit-fast "):
                    name = line.split()[1]
                    assert set(re.findall(r"(?<=\s)--[a-z-]+", line)) <= commands[name], line
                    seen.add(name)
    assert seen == {"score", "compare", "report"}
