"""The house: imports go one way, importing is cheap, the wheel holds what it should."""

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import probes
import workbench

ROOT = Path(workbench.__file__).parent.parent

FLOORS = [
    ["errors"],
    ["sites", "tokens", "home", "artifacts", "results"],
    ["selection", "softmax", "near_ties", "attention", "unit_statistics", "facts"],
    ["run_log", "manifest", "file_differences"],
    ["projection"],
    ["tiles", "reductions", "fused_reduction", "fused_projection"],
    ["projector"],
    ["vocabulary"],
    ["architectures"],
    ["model"],
    ["activations", "heap", "frozen_norm", "corpus"],
    ["edits", "moments"],
    ["tracer"],
    ["capturing"],
    ["streaming"],
    ["store", "collecting", "transports", "gradients"],
    ["lenses"],
    ["intervention", "generation", "weight_edits"],
    ["substitution", "direction_ablation"],
    ["checks", "catalogue"],
    ["verification", "embedded"],
    ["recognition", "model_files"],
    ["loading"],
    ["interop"],
    ["analyses"],
    ["plots"],
    ["cli"],
]
"""From the ground up. A module imports from lower floors, and from its own package or floor."""

REACHING_UP = {
    ("model", "verification"),  # model.verify()
    ("model", "generation"),  # model.generate()
    ("activations", "interop"),  # acts.to_transformer_lens()
    ("capturing", "interop"),  # wb.capture(backend="nnsight")
    ("loading", "interop"),  # wb.load(bridge)
    ("analyses", "plots"),  # neurons.plot()
    ("activations", "plots"),  # acts.plot_norms()
}
"""One-line imports inside a method, for convenience."""


PROBE_FLOORS = [
    ["shipped", "folds"],
    ["dataset", "estimators"],
    ["dataset_files", "fit", "states", "untrained_model", "evaluation", "erasers"],
    ["sweep_files", "sweep_text"],
    ["probe_sweep"],
    ["reading", "plots"],
    ["erasing"],
]
"""Of `probes`, which stands on the workbench."""

PROBES_REACHING_UP = {
    ("dataset", "dataset_files"),  # Dataset.load()
    ("probe_sweep", "plots"),  # sweep.plot()
}


def modules(package: str = "workbench"):
    for path in sorted((ROOT / package).rglob("*.py")):
        if path.parent == ROOT / package and path.name == "__init__.py":
            continue
        yield path, path.relative_to(ROOT / package).parts[0].removesuffix(".py")


def imports(tree):
    """Every import of the package, with whether it runs when the module is imported and whether it is for types only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in ast.walk(node):
                child.types_only = True  # pyright: ignore[reportAttributeAccessIssue]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module and not hasattr(node, "types_only"):
            yield node.module, node
            if node.module in ("workbench", "probes"):
                yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)
        elif isinstance(node, ast.Import) and not hasattr(node, "types_only"):
            yield from ((alias.name, node) for alias in node.names)


@pytest.mark.parametrize(
    ("package", "floors", "reaching_up"),
    [("workbench", FLOORS, REACHING_UP), ("probes", PROBE_FLOORS, PROBES_REACHING_UP)],
    ids=["workbench", "probes"],
)
def test_imports_go_one_way(package, floors, reaching_up):
    height = {name: i for i, floor in enumerate(floors) for name in floor}
    seen = set()
    for path, room in modules(package):
        tree = ast.parse(path.read_text())
        top = {id(node) for node in tree.body}
        assert room in height, f"{path} stands on no floor: add it to the floors of {package}"
        for name, node in imports(tree):
            if not name.startswith(f"{package}.") or name == f"{package}.__init__":
                continue
            target = name.split(".")[1]
            if target == room or height.get(target, -1) <= height[room]:
                continue
            assert id(node) not in top, f"{path} imports {name}, which stands above it"
            assert (room, target) in reaching_up, f"{path} reaches up to {name}"
            seen.add((room, target))
    assert seen == reaching_up


def test_the_workbench_does_not_know_probes_but_for_their_verb():
    for path, room in modules():
        tree = ast.parse(path.read_text())
        top = {id(node) for node in tree.body}
        for name, node in imports(tree):
            if name.split(".")[0] == "probes":
                assert room == "cli", f"{path} imports {name}"
                assert id(node) not in top, f"{path} imports {name} before it is asked to"


def test_one_file_registers_hooks_and_one_knows_hugging_faces_paths():
    for path, room in modules():
        source = path.read_text()
        if room != "tracer":
            assert "register_forward" not in source, path
        if room not in ("architectures", "embedded"):
            for name in ("self_attn", "down_proj", "lm_head", "c_proj", "embed_tokens"):
                assert name not in source, f"{path} names {name}"


@pytest.mark.parametrize("package", [workbench, probes], ids=["workbench", "probes"])
def test_public_names_agree_with_what_type_checkers_see(package):
    tree = ast.parse((ROOT / package.__name__ / "__init__.py").read_text())
    typed = {
        alias.asname for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names if alias.asname
    }
    assert typed == set(package.__all__)
    for name in package.__all__:
        assert getattr(package, name) is not None
    assert dir(package) == package.__all__


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout


def test_importing_is_cheap():
    names = ("torch", "transformers", "pandas", "plotly", "duckdb", "sklearn", "pyarrow", "numba")
    heavy = f"[m for m in {names} if m in sys.modules]"
    assert run(f"import sys, workbench; print({heavy})").strip() == "[]"
    assert run(f"import sys, workbench.cli; print({heavy})").strip() == "[]"
    assert run(f"import sys, probes; print({heavy})").strip() == "[]"
    assert "map_neurons" in run("import workbench; print(dir(workbench))")


def test_only_the_three_packages_can_be_imported():
    script = "import importlib.util as u; print([n for n in ('tests', 'data', 'notebooks') if u.find_spec(n)])"
    assert run(script).strip() == "[]"
    assert run("import workbench, probes, app; print(1)").strip() == "1"


def test_the_wheel_holds_the_three_packages(tmp_path):
    """Built from a copy in which every folder of the top level has Python in it."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("workbench", "probes", "app"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("tests", "data", "notebooks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path / "out",
        ".",
    ]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = (tmp_path / "out").glob("mi_workbench-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"workbench", "probes", "app"}
    beside = {f"app/{path.name}" for path in (ROOT / "app").iterdir() if path.is_file()}
    assert beside <= names, "the page's script, look and report are packed"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'workbench' has no attribute 'no_such_thing'"):
        _ = workbench.no_such_thing
