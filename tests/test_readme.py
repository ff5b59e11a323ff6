"""The README does what it says: its Python runs, and its commands, options and names exist."""

import inspect
import re
import tomllib
from pathlib import Path

import pytest
import torch
import typer.main

import dit_fast
from dit_fast import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def code(pattern: str) -> set[str]:
    """What `pattern` finds in code: fenced blocks and `inline` alike."""
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL))
    return {found for text in (*blocks("python"), *blocks("sh"), *inline) for found in re.findall(pattern, text)}


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The names that the README's Python blocks leave behind, run one after the other in an empty folder."""
    names: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("readme"))
        for number, block in enumerate(blocks("python")):
            exec(compile(block, f"README.md, Python block {number}", "exec"), names)
        yield names


def test_the_example_gives_scores_of_the_right_shape(example):
    result = example["result"]
    assert result.scores.shape == (3, 1, 200)
    assert result.scores.dtype == torch.float64
    assert torch.isfinite(result.scores).all()
    assert (result.scores[-1] != 0).all()
    assert [window.name for window in result.windows] == ["epoch 0", "epoch 1", "epoch 2"]
    assert torch.equal(dit_fast.Influence.load("runs/mine-scores.safetensors").scores, result.scores)


def test_the_example_agrees_with_retraining_and_with_the_slow_twin(example):
    truth, result = example["truth"], example["result"]
    scores = result.scores[..., truth.sample_ids]
    assert (scores - truth.scores).abs().max() < 0.1 * truth.scores.abs().max()
    arguments = (example["trajectory"], example["problem"], example["query"])
    slow = dit_fast.reference.score(*arguments, windows="epochs", sample_ids=truth.sample_ids)
    torch.testing.assert_close(scores, slow.scores, rtol=0, atol=1e-5 * float(slow.scores.abs().max()))


def test_the_log_holds_what_the_table_says(example):
    from safetensors import safe_open

    def rows(head):
        return set(re.findall(r"^\| `(\w+)` \|", README.split(head)[1].split("\n\n")[0], re.MULTILINE))

    always = rows("| in a chunk |")
    with safe_open("runs/mine/chunk-000000.safetensors", framework="pt") as file:
        assert always == set(file.keys())
    names = set()
    for run in ("adamw", "factors"):
        with safe_open(f"runs/{run}/chunk-000000.safetensors", framework="pt") as file:
            names |= {re.sub(r"^(batch|factor)_\d+", r"\1_i", name) for name in file.keys()}  # noqa: SIM118
    assert always | rows("| in a chunk where there is need |") == names
    files = {path.name for path in Path("runs/mine").iterdir()}
    assert files == {"manifest.json", "chunk-000000.safetensors", "constants.safetensors"}
    assert all(f"`{name}`" in README for name in files)


def test_the_second_example_is_scored_by_its_own_rule(example):
    by_adamw = example["by_adamw"]
    assert by_adamw.scores.shape == (1, 1, 200)
    assert by_adamw.meta["dtype"] == "float64" and by_adamw.meta["replayed"] == "parameters"
    arguments = (dit_fast.Trajectory.open("runs/adamw"), example["seen_problem"], example["query"])
    slow = dit_fast.reference.score(*arguments, sample_ids=[0, 1, 2])
    torch.testing.assert_close(by_adamw.scores[..., :3], slow.scores, rtol=0, atol=1e-5 * float(slow.scores.abs().max()))


def test_the_example_without_a_problem_is_scored_as_with_one(example):
    alone, trajectory = example["alone"], dit_fast.Trajectory.open("runs/factors")
    problem = dit_fast.Problem(example["wide"], torch.nn.CrossEntropyLoss(reduction="none"), (example["x"], example["y"]))
    whole = dit_fast.score(trajectory, problem, example["query"], windows="epochs", hessian="fisher", backend="generic")
    torch.testing.assert_close(alone.scores, whole.scores, rtol=0, atol=1e-4 * float(whole.scores.abs().max()))


def test_make_targets_exist():
    targets = code(r"\bmake ([a-z]+)")
    assert targets >= {"demo", "test"}
    for target in targets:
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target
    assert "DEMO_ARGS" in MAKEFILE


def test_commands_and_their_options_exist():
    group = typer.main.get_command(cli.app)
    commands = {name: {option for p in command.params for option in p.opts} for name, command in group.commands.items()}
    assert code(r"dit-fast ([a-z]+)") == set(commands)
    options = code(r"(?<![\w-])--[a-z][a-z-]*")
    assert options >= {"--json", "--data", "--windows", "--image-shape"}
    assert options <= set().union(*commands.values(), {"--help"})
    for line in filter(None, (line.split("#")[0] for text in blocks("sh") for line in text.splitlines())):
        if line.startswith("dit-fast "):
            assert set(re.findall(r"--[a-z-]+", line)) <= commands[line.split()[1]], line


def test_extras_and_build_options_exist():
    assert code(r"pip install '\.\[(\w+)\]'") <= set(PYPROJECT["project"]["optional-dependencies"])
    cmake = (ROOT / "CMakeLists.txt").read_text("utf-8")
    settings = code(r"-DDIT_FAST_CUDA=(\w+)")
    assert settings == {"AUTO", "ON", "OFF"}
    assert all(setting in cmake for setting in settings)


def test_names_of_the_package_exist():
    public = code(r"\bdit\.([A-Za-z_]+)")
    assert public >= {"Recorder", "Trajectory", "Problem", "score", "leave_one_out"}
    assert public <= set(dit_fast.__all__)
    for name in code(r"\bqueries\.([a-z_]+)"):
        assert callable(getattr(dit_fast.queries, name)), name
    made = {name for name, f in inspect.getmembers(dit_fast.queries, inspect.isfunction) if f.__module__ == "dit_fast.queries"}
    public_queries = {
        n for n in made if inspect.signature(getattr(dit_fast.queries, n)).return_annotation is dit_fast.queries.Query
    }
    assert {name for name in public_queries if not name.startswith("_")} == code(r"^queries\.([a-z_]+)")


def test_every_option_of_the_hessian_is_explained():
    from dit_fast.linearize import HESSIANS

    assert set(re.findall(r'^\| `"(\w+)"` \|', README, re.MULTILINE)) == set(HESSIANS)


def test_every_backend_is_explained_and_options_exist(example):
    from dit_fast.score import BACKENDS

    assert set(re.findall(r'^\| `backend="(\w+)"` \|', README, re.MULTILINE)) == set(BACKENDS) - {"auto"}
    assert example["result"].meta["backend"] == "native" and example["chosen"].meta["backend"] == "factors"
    assert example["chosen"].meta["why"] in README.replace("; …", "; a net of linear layers")
    named = {name for call in code(r"Recorder\(([^()]*)\)") for name in re.findall(r"(\w+)=", call)}
    assert named >= {"clip_norm", "every", "reduction", "resume", "store_batches"}
    assert named <= set(inspect.signature(dit_fast.Recorder).parameters)


def test_links_lead_somewhere():
    headings = {
        re.sub(r"[^\w\- ]", "", line).strip().lower().replace(" ", "-") for line in re.findall(r"^#+ (.*)$", README, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("https://"):
            assert (ROOT / target).is_file(), target


def test_modules_and_make_targets_named_for_contributors_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    modules = {path.name for path in (ROOT / "python" / "dit_fast").glob("*.py")}
    assert set(re.findall(r"`(\w+\.py)`", text)) <= modules
    assert all((ROOT / path).exists() for path in re.findall(r"`((?:tests|csrc)/[\w./]*)`", text))
    assert all(re.search(rf"^{target}:", MAKEFILE, re.MULTILINE) for target in re.findall(r"`make (\w+)`", text))
