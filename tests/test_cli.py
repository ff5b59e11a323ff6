"""The command line: what it prints, and its exit status for what a user can get wrong."""

import importlib.util
import json
import tomllib
from pathlib import Path

import pytest

from dit_fast import LogError, UnsupportedError, build_info, cli

ROOT = Path(__file__).parents[1]


def one_line(status_and_output: tuple[int, str, str]) -> str:
    """The single line on stderr of a call refused with status 2, which printed nothing else."""
    status, out, err = status_and_output
    assert (status, out, err.count("\n")) == (2, "", 1), (status, out, err)
    assert err.startswith("dit-fast: ")
    return err


def test_the_command_is_installed_as_dit_fast():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    assert scripts == {"dit-fast": "dit_fast.cli:main"}


def test_help_names_the_commands(command):
    status, out, err = command("--help")
    assert (status, err) == (0, "")
    assert "info" in out
    assert "demo" in out


def test_help_of_the_demo_names_its_options(command):
    status, out, _ = command("demo", "--help")
    assert status == 0
    assert all(option in out for option in ("--data", "--out", "--seed", "DIT_FAST_DATA"))


def test_info_as_json_is_the_build_info(command):
    status, out, _ = command("info", "--json")
    assert status == 0
    assert json.loads(out) == build_info()


def test_info_has_a_line_for_each_fact(command):
    status, out, _ = command("info")
    facts = build_info()
    assert status == 0
    lines = {line.strip()[:20].strip(): line for line in out.splitlines()}
    assert list(lines) == [name.replace("_", " ") for name in facts]
    assert str(facts["torch"]) in lines["torch"]
    assert max(map(len, out.splitlines())) <= 80


def test_without_a_command_the_help_is_shown(command):
    status, out, err = command()
    assert status == 2
    assert "demo" in out + err


@pytest.mark.parametrize("arguments", [("nonsense",), ("demo", "--nonsense"), ("demo", "--seed", "x")])
def test_unknown_words_end_with_status_2(command, arguments):
    status, _, err = command(*arguments)
    assert status == 2
    assert "Traceback" not in err


def test_unknown_data(command, tmp_path):
    err = one_line(command("demo", "--data", "iris", "--out", str(tmp_path / "new")))
    assert "'iris' is not one of 'digits', 'adult', 'mnist'" in err


@pytest.mark.parametrize("data", ["adult", "mnist"])
def test_missing_data_folder_is_named(command, monkeypatch, tmp_path, data):
    monkeypatch.delenv("DIT_FAST_DATA", raising=False)
    assert "DIT_FAST_DATA; it is not set" in one_line(command("demo", "--data", data, "--out", str(tmp_path / "new")))
    monkeypatch.setenv("DIT_FAST_DATA", str(tmp_path))
    assert str(tmp_path) in one_line(command("demo", "--data", data, "--out", str(tmp_path / "new")))


def test_a_folder_that_is_not_empty_is_left_alone(command, tmp_path):
    (tmp_path / "mine").write_text("precious")
    assert f"--out {tmp_path} is not empty" in one_line(command("demo", "--out", str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_out_that_is_a_file(command, tmp_path):
    file = tmp_path / "file"
    file.write_text("precious")
    one_line(command("demo", "--out", str(file)))
    assert file.read_text() == "precious"


def test_missing_packages_are_named_with_what_installs_them(command, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name))
    err = one_line(command("demo", "--out", str(tmp_path / "new")))
    assert "needs sklearn: pip install 'dit_fast[demo]'" in err


@pytest.mark.parametrize("error", [ValueError, TypeError, OSError, LogError, UnsupportedError])
def test_errors_for_users_are_one_line(command, monkeypatch, error):
    def fail(**options: object) -> None:
        raise error("the reason")

    monkeypatch.setattr(cli, "app", fail)
    assert one_line(command("info")) == "dit-fast: the reason\n"


def test_our_own_errors_keep_their_traceback(monkeypatch):
    def fail(**options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_version(command):
    status, out, _ = command("--version")
    assert (status, out) == (0, f"dit-fast {build_info()['version']}\n")


def test_an_out_that_is_no_folder(command, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file: name a new folder" in one_line(command("demo", "--out", str(tmp_path / "file")))
    assert "cannot be made: Not a directory" in one_line(command("demo", "--out", str(tmp_path / "file" / "below")))
