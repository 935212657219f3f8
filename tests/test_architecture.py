"""What may import what, asserted from the source: the layers of the project and what is never used anywhere."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kernels
from gr_platform import settings

ROOT = settings.PROJECT_ROOT
PACKAGES = ("gr_platform", "assets", "kernels", "serving")
# What puts the layers together; the packages below them are the library.
COMPOSITION = {"cli", "definitions", "deploy"}
COMPOSED = {"commands", "lifecycle", "replay"}
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def _imports(path: Path) -> Iterator[str]:
    """Yield every module that a file imports, inside functions too, but not for type checking alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in _imports(path)}


def _library() -> list[Path]:
    return [
        p
        for p in (ROOT / "gr_platform").rglob("*.py")
        if p.parent.name not in COMPOSED and not (p.parent.name == "gr_platform" and p.stem in COMPOSITION)
    ]


def test_kernels_import_torch_triton_and_nothing_of_ours() -> None:
    allowed = {"torch", "triton", "kernels", "numpy", *sys.stdlib_module_names}
    assert {path.name: extra for path in (ROOT / "kernels").rglob("*.py") if (extra := _roots(path) - allowed)} == {}


def test_the_library_knows_neither_orchestration_nor_server() -> None:
    found = {path.name: _roots(path) & {"assets", "serving", "dagster", "tritonclient"} for path in _library()}
    assert {name: roots for name, roots in found.items() if roots} == {}


def test_mlflow_is_named_by_the_registry_alone() -> None:
    users = {path.parent.name for path in SOURCES if "mlflow" in _roots(path)}
    assert users == {"registry"}


def test_serving_imports_bundles_models_and_kernels_only() -> None:
    forbidden = {"assets", "dagster", "mlflow", "polars", "duckdb"}
    ours = ("gr_platform.bundle", "gr_platform.models", "gr_platform.sequences", "gr_platform.events.declaration")
    small = ("settings", "errors", "storage", "processes", "serving_state", "option_files")
    for path in (ROOT / "serving").rglob("*.py"):
        assert not _roots(path) & forbidden, path.name
        if path.name == "bench.py":
            continue
        for name in _imports(path):
            if name.startswith("gr_platform."):
                top = name.removeprefix("gr_platform.").split(".")[0]
                assert name.startswith(ours) or top in small, (path.name, name)


def test_assets_are_imported_by_the_definitions_and_the_pipeline_alone() -> None:
    users = {path.stem for path in SOURCES if "assets" in _roots(path) and path.parent.name != "assets"}
    assert users <= {"definitions", "pipeline"}


@pytest.mark.parametrize(
    "module", ["serving.engine.ranker", "serving.engine.retriever", "serving.backend", "gr_platform.bundle.load"]
)
def test_the_import_closure_of_serving_has_none_of_the_platforms_libraries(module: str) -> None:
    heavy = ("polars", "duckdb", "dagster", "mlflow", "pandas")
    code = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "[]"


def test_kernels_is_our_package_not_another_projects_of_that_name() -> None:
    assert Path(kernels.__file__ or "").parent == ROOT / "kernels"


def test_no_pickle_is_written_or_loaded_anywhere() -> None:
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for path in SOURCES:
        assert not _roots(path) & modules, path.name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in ("torch.load", "torch.save", "pd.read_pickle", "pandas.read_pickle"), path.name
            allowed = [
                k
                for k in node.keywords
                if k.arg == "allow_pickle" and not (isinstance(k.value, ast.Constant) and k.value.value is False)
            ]
            assert not allowed, path.name


def test_gr_variables_are_read_in_settings_alone() -> None:
    for path in SOURCES:
        if path == ROOT / "gr_platform" / "settings.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            read = isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.environ.get", "os.getenv")
            read |= (
                isinstance(node, ast.Subscript)
                and ast.unparse(node.value) == "os.environ"
                and isinstance(node.ctx, ast.Load)
            )
            if read:
                assert "GR_" not in ast.unparse(node), path.name


def test_modules_and_functions_stay_small() -> None:
    limits = {"kernels": 400, "assets": 160}
    for path in SOURCES:
        relative = path.relative_to(ROOT)
        limit = 120 if path.name == "model.py" else limits.get(relative.parts[0], 300)
        assert len(path.read_text(encoding="utf-8").splitlines()) <= limit, f"{relative} has more than {limit} lines"


def test_every_module_says_why_it_exists() -> None:
    silent = [
        p.name for p in SOURCES if p.stat().st_size and not ast.get_docstring(ast.parse(p.read_text(encoding="utf-8")))
    ]
    assert silent == []
