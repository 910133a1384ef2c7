"""The code keeps the structure that docs/design.md describes; each rule is read off the sources."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

LAYERS = (
    {"errors", "shapes"},
    {"builtin", "hosts", "huge_pages", "memory", "tensor_file"},
    {"arithmetic", "charts", "checkpoint", "cli", "collector", "compile_cache", "costs"}
    | {"gallery", "lock", "log", "mesh", "params", "patterns", "schema", "signals"}
    | {"data", "models"},
    {"lycoris", "report", "spellings"},
    {"low_rank"},
    {"diffusion", "foreign", "formats", "tuning"},
    {"origins", "prediction"},
    {"compat", "config", "merging", "selection", "step"},
    {"averaging", "controls", "loss_options", "offloading", "profiling", "warm_start", "words"},
    {"pictures"},
    {"sampling"},
    {"datasets", "optimization", "sample"},
    {"previews"},
    {"compiled", "explain", "inspection", "pickled", "plan", "start", "verify"},
    {"caches", "records"},
    {"assembly"},
    {"forecast", "painter", "validation"},
    {"convert", "planning", "train"},
)
"""Modules and packages, from the bottom: imports point down, or stay within a package."""

OWNERS = {
    "fcntl": {"lock"},
    "grain": {"data.loader"},
    "huggingface_hub": {"formats.layout"},
    "importlib": {"cli"},
    "ml_collections": {"compat", "config"},
    "omegaconf": {"config"},
    "orbax": {"checkpoint"},
    "runpy": {"config"},
    "sklearn": {"data.buckets"},
    "tensorboardX": {"log"},
    "transformers": {"data.tokens"},
    "wandb": {"log"},
    "yaml": {"config", "data.caption_tables", "origins"},
}
"""Library -> the modules that may import it."""

PYTORCH = {"torch", "diffusers", "transformers"}
"""What functions of `pickled` and `verify` import when called: jaxft runs without PyTorch."""

FORBIDDEN_IMPORTS = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "__import__", "system", "popen"}

MODULES = {
    ".".join(path.relative_to(ROOT / "jaxft").with_suffix("").parts): path
    for path in sorted((ROOT / "jaxft").rglob("*.py"))
    if path.name != "__init__.py"
}
SOURCES = sorted(
    path for name in ("jaxft", "scripts", "tests") for path in (ROOT / name).rglob("*.py")
)


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def imports(module: str) -> Iterator[tuple[str, bool]]:
    """Names that a module imports, and whether a function does it when it is called."""
    parsed = tree(MODULES[module])
    top = {id(node) for node in parsed.body}
    for node in ast.walk(parsed):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) not in top
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: a relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", id(node) not in top


def layer(module: str) -> int:
    (found,) = (i for i, names in enumerate(LAYERS) if module.partition(".")[0] in names)
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    for name, _ in imports(module):
        package, _, inner = name.partition(".")
        if package != "jaxft" or inner.startswith("__"):
            continue
        own, other = module.partition(".")[0], inner.partition(".")[0]
        same_package = own == other and "." in module
        assert same_package or layer(inner) < layer(module), f"{module} imports {name}"


def test_every_module_has_its_place():
    names = {module.partition(".")[0] for module in MODULES}
    assert names == set().union(*LAYERS)
    assert sum(len(names) for names in LAYERS) == len(set().union(*LAYERS))


@pytest.mark.parametrize("module", MODULES)
def test_libraries_are_used_in_one_place(module):
    for name, when_called in imports(module):
        library = name.partition(".")[0]
        assert library not in FORBIDDEN_IMPORTS, f"{module} imports {library}"
        if library in PYTORCH and module not in OWNERS.get(library, ()):
            assert (module in ("pickled", "verify"), when_called) == (True, True), (
                f"{module} imports {library}"
            )
        elif library in OWNERS:
            assert module in OWNERS[library], f"{module} imports {library}"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_that_is_read_can_run(module):
    """No eval, no shell, no pickle: neither a configuration nor a checkpoint brings code."""
    for node in ast.walk(tree(MODULES[module])):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called != "yaml.load"
        if called == "torch.load":  # in a process of its own
            assert module == "pickled"
            assert "weights_only=True" in ast.unparse(node)
        if isinstance(node.func, ast.Name) or called.startswith("os."):
            assert called.rpartition(".")[2] not in FORBIDDEN_CALLS, f"{module}: {called}"
        for keyword in node.keywords:
            text = f"{keyword.arg}={ast.unparse(keyword.value)}"
            assert text not in ("shell=True", "allow_pickle=True"), f"{module}: {called}({text})"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    assert len(path.read_text("utf-8").splitlines()) <= 400
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= (120 if node.name == "main" else 60), f"{node.name}: {length} lines"


def test_no_module_is_a_drawer():
    assert not {path.stem for path in SOURCES} & {"utils", "helpers", "common", "misc", "base"}
