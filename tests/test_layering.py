"""Who may use whom: the arrows between modules, read from the sources, and what the compiled core may include."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "dit_fast"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted([*PACKAGE.glob("*.py"), *PACKAGE.glob("integrations/*.py")])
}
CXX_SOURCES = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cu"})

# module: what it may import of dit_fast, lower layers first. A new module gets a line of its own here.
ALLOWED = {
    "errors": "",
    "byte_sizes": "",
    "progress": "",
    "numerics": "",
    "data": "",
    "mlp": "",
    "factored": "",
    "lowrank": "",
    "ops": "_C lowrank mlp",
    "pooling": "ops",
    "dual_rows": "mlp ops",
    "ops_torch": "lowrank mlp pooling",
    "mlp_team": "mlp ops",
    "mlp_gemm": "mlp ops",
    "modules": "errors",
    # the log
    "ranks": "errors",
    "optimizers": "errors",
    "factor_options": "",
    "projections": "factored",
    "factor_log": "errors factored projections",
    "log": "factor_log optimizers",
    "log_reader": "errors factor_log factored log optimizers",
    "layer_factors": "errors factor_log factored",
    "factor_store": "factor_log factor_options factored layer_factors projections",
    "factor_size": "data errors factor_log factor_options factor_store layer_factors",
    "log_size": "byte_sizes errors factor_options factor_size log modules optimizers",
    "background": "errors log log_size",
    "directory": "errors log",
    "resumption": "directory errors log log_reader modules",
    "recording": "background errors factor_log log log_size modules optimizers resumption",
    "named_batches": "data errors log modules",
    "factor_check": "errors layer_factors optimizers",
    "output_slopes": "errors",
    "capture": (
        "data errors factor_check factor_log factor_options factor_store layer_factors named_batches numerics optimizers "
        "output_slopes"
    ),
    "arrays": "data errors factored log optimizers",
    "trajectory": "arrays errors factored log log_reader optimizers",
    # what is asked of it
    "problem": "data errors log modules numerics trajectory",
    "queries": "data errors problem",
    "marked_queries": "factor_options log problem queries trajectory",
    "recorder": (
        "byte_sizes capture directory errors factor_options log log_reader log_size marked_queries modules named_batches "
        "optimizers queries ranks recording resumption"
    ),
    "replay": "errors optimizers problem trajectory",
    "guard": "errors problem replay",
    "result": "trajectory",
    "curves": "result trajectory",
    "patterns": "curves",
    "correlation": "curves patterns result",
    "detection": "result",
    # how it is answered
    "linearize": "data errors problem",
    "plan": "byte_sizes linearize problem trajectory",
    "sweep": "errors plan problem replay",
    "fisher": "problem replay sweep",
    # factors
    "factor_products": "factored ops",
    "factor_run": "errors factor_products factored linearize problem replay trajectory",
    "fused": "errors factor_products factor_run plan sweep",
    "gram": "byte_sizes errors factor_products factor_run factored fused plan sweep trajectory",
    "recognize": "mlp problem",
    "native": "data linearize log mlp mlp_gemm mlp_team ops optimizers problem recognize",
    "native_queries": "native ops plan problem queries sweep",
    "native_sweep": "errors linearize mlp mlp_gemm native native_queries ops plan problem",
    "native_team": "errors linearize mlp_team native native_queries plan problem",
    "factors": "data errors factor_products factored layer_factors linearize ops output_slopes problem sweep",
    "logged": (
        "errors factor_products factor_run factored factors fisher fused gram linearize numerics plan problem progress queries "
        "replay result sweep trajectory"
    ),
    "native_retrain": "mlp mlp_team native ops problem queries recognize",
    "known_loss": "dual_rows ops_torch",
    "duals": "dual_rows ops_torch pooling",
    "layers": "dual_rows duals pooling problem recognize",
    "layerwise": "data duals known_loss layers linearize problem recognize sweep",
    "retrain": "byte_sizes data guard native native_retrain plan problem progress queries recognize replay result trajectory",
    "score": (
        "factors fisher guard layerwise linearize logged native native_queries native_sweep native_team plan problem "
        "progress queries recognize replay result retrain sweep trajectory"
    ),
    "logged_cost": "factor_products factor_run gram plan trajectory",
    "estimate": "byte_sizes linearize logged logged_cost plan problem queries replay retrain score trajectory",
    "reference": "data problem progress queries result trajectory",
    "suspects": "data plan problem progress queries replay result score trajectory",
    "datamodeling": "correlation curves problem queries result retrain score trajectory",
    "cleaning": "data detection guard numerics plan problem progress replay suspects trajectory",
    "index": (
        "byte_sizes errors factor_products factor_run fisher linearize logged numerics plan problem progress queries replay "
        "result trajectory"
    ),
    # what users meet
    "analysis": "cleaning correlation curves datamodeling detection patterns suspects",
    "__init__": (
        "analysis data errors estimate factor_options index log_size ops optimizers problem queries recorder reference result "
        "retrain score trajectory"
    ),
    "sample_views": "problem",
    "report_data": "analysis byte_sizes result trajectory",
    "report": "problem queries report_data result sample_views trajectory",
    "explain": "linearize modules optimizers plan problem replay retrain score trajectory",
    "integrations.__init__": "",
    "integrations.transformers": "errors recorder",
    "integrations.lightning": "errors recorder",
    "plots": "correlation curves detection patterns result",
    "demo": "__init__ analysis report",
    "cli_arguments": "data problem queries result trajectory",
    "cli_log": "byte_sizes cli_arguments",
    "cli_score": "cli_arguments cli_log",
    "cli_bench": "cli_arguments cli_log data problem queries recorder retrain score trajectory",
    "cli": "cli_arguments cli_bench cli_log cli_score errors",
    "__main__": "cli",
}
# imports inside functions or for type checkers alone, which keep matplotlib, torch or a cycle out of `import dit_fast`
LAZY = {
    "trajectory": "index",
    "result": "plots",
    "score": "estimate",
    "demo": "plots",
    "cli": "__init__ demo log",
    "cli_log": "estimate explain log_size",
    "cli_score": "analysis report result retrain score",
}
# the slow truth shares no code with what it judges
NOT_IN_REFERENCE = (
    "ops optimizers score estimate sweep linearize layerwise native native_queries native_sweep native_retrain recognize plan "
    "factors replay retrain dual_rows duals known_loss layers pooling native_team mlp_team mlp_gemm"
)


def imports(source: str, modules: set[str]) -> Iterator[tuple[str, bool]]:
    """(module of dit_fast, whether lazily) for each import in `source`; "__init__" for a name of the package itself."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                top, _, rest = alias.name.partition(".")
                if top == "dit_fast":
                    yield rest or "__init__", lazy
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: a relative import"
            top, _, rest = (node.module or "").partition(".")
            if top == "dit_fast":
                names = [rest] if rest else [alias.name for alias in node.names]
                for name in names:
                    yield (name if name in modules else "__init__"), lazy
        guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        lazy = lazy or guarded or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy)

    yield from visit(ast.parse(source), False)


def cycle(arrows: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; empty where there are none."""
    done: set[str] = set()

    def follow(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in sorted(arrows.get(module, ())):
            if found := follow(other, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in arrows if (found := follow(module, []))), [])


FOUND = {name: set(imports(path.read_text("utf-8"), {*MODULES, "_C"})) for name, path in MODULES.items()}


def test_every_module_has_a_line_in_the_table_and_every_line_a_module():
    assert set(ALLOWED) == set(MODULES)
    assert list(ALLOWED) == list(dict.fromkeys(ALLOWED))
    assert set(LAZY) <= set(ALLOWED)
    assert {name for line in (*ALLOWED.values(), *LAZY.values()) for name in line.split()} <= {*MODULES, "_C"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_are_in_the_table(module):
    allowed, lazy = set(ALLOWED.get(module, "").split()), set(LAZY.get(module, "").split())
    for other, is_lazy in sorted(FOUND[module]):
        assert other in (allowed | lazy if is_lazy else allowed), f"{module} may not import {other}; see ALLOWED and LAZY"


def test_the_table_has_no_arrow_that_is_gone():
    for table, names in ((ALLOWED, "ALLOWED"), (LAZY, "LAZY")):
        for module, line in table.items():
            used = {other for other, is_lazy in FOUND[module] if is_lazy or table is ALLOWED}
            assert set(line.split()) <= used, f"{names}[{module!r}] allows what it does not use: {set(line.split()) - used}"


def test_there_is_no_cycle_and_the_table_reads_from_low_to_high():
    assert cycle({module: set(line.split()) for module, line in ALLOWED.items()}) == []
    lazy = {(module, other) for module, line in LAZY.items() for other in line.split()}
    assert cycle({m: {other for other, _ in found if (m, other) not in lazy} for m, found in FOUND.items()}) == []
    order = ["_C", *ALLOWED]
    for module, line in ALLOWED.items():
        assert all(order.index(other) < order.index(module) for other in line.split()), module


def test_ops_alone_imports_the_core():
    assert [module for module, found in FOUND.items() if "_C" in {other for other, _ in found}] == ["ops"]


def test_reference_shares_no_code_with_what_it_judges():
    assert not {other for other, _ in FOUND["reference"]} & set(NOT_IN_REFERENCE.split())


def test_no_module_is_named_after_nothing():
    assert not [name for name in MODULES if re.search(r"util|helper|manager|(^|_)base($|_)|common|misc", name)]


def test_the_reader_sees_every_kind_of_import():
    source = """
import os, dit_fast
import dit_fast.ops as ops
from dit_fast import log, LogError
from dit_fast.sweep import sweep
if TYPE_CHECKING:
    from dit_fast import plots
def f():
    from dit_fast import _C
from torch import nn
"""
    modules = {"ops", "log", "sweep", "plots", "_C"}
    assert set(imports(source, modules)) == {
        *(("__init__", False), ("ops", False), ("log", False), ("sweep", False)),
        *(("plots", True), ("_C", True)),
    }
    with pytest.raises(AssertionError, match="relative"):
        set(imports("from .log import Step", modules))
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_the_core_has_sources():
    assert {path.name for path in CXX_SOURCES} >= {"bindings.cpp", "grad_dot.h", "lowrank_update.h", "gemm.cpp"}


@pytest.mark.parametrize("path", CXX_SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_core_knows_neither_torch_nor_python(path):
    included = re.findall(r"#\s*include\s*[<\"]([^>\"]+)", path.read_text("utf-8"))
    assert not [name for name in included if re.match(r"torch|ATen|c10", name)]
    assert path.name == "bindings.cpp" or not [name for name in included if re.match(r"pybind11|Python", name)]
