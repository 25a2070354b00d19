"""The architecture, held by a test: imports only go down. The table is the diagram; a new edge is decided here."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = {"pretrain.core"}
FLOOR_1 = {"pretrain.models", "pretrain.data", "pretrain.engine"}
FLOOR_2 = {"pretrain.objectives", "pretrain.probes", "pretrain.doctor"}
BELOW_4 = CORE | FLOOR_1 | FLOOR_2 | {"pretrain.config"}
PARTS_OF_A_RUN = ("run", "start", "loader", "release", "online", "nonfinite", "datasets", "report")
FLOOR_4 = {f"pretrain.{name}" for name in PARTS_OF_A_RUN}
EVERYTHING = {"pretrain", "launch", "finetune", "fovea"}
ABOUT_IMAGES = {"finetune.predictions", "finetune.data"}
PARTS_OF_A_TASK = {f"finetune.{name}" for name in ("heads", "dense", "metrics", "report", "tasks")} | ABOUT_IMAGES
ALLOWED = {
    "pretrain.core": set(),
    "pretrain.models": CORE,
    "pretrain.data": CORE,
    "pretrain.engine": CORE,
    # Of data, objectives see the specification of views and masks only; probes also read labelled images.
    "pretrain.objectives": CORE | {"pretrain.models", "pretrain.data.views.specs", "pretrain.data.views.masks"},
    "pretrain.probes": CORE | {"pretrain.models", "pretrain.data"},
    "pretrain.doctor": CORE | {"pretrain.models"},
    "pretrain.config": CORE
    | {"pretrain.objectives.configs", "pretrain.models.config", "pretrain.models.backbones.families"}
    | {"pretrain.engine.config", "pretrain.engine.plan"}
    | {"pretrain.data.views.specs", "pretrain.probes.config", "pretrain.doctor.config"},
    **{module: BELOW_4 | FLOOR_4 for module in FLOOR_4},
    "pretrain.__main__": {"pretrain"},
    "finetune.predictions": set(),
    "finetune.data": CORE | {"pretrain.data", "finetune.predictions"},
    "finetune.metrics": CORE | ABOUT_IMAGES,
    "finetune.dense": CORE | {"pretrain.models"},
    "finetune.heads": CORE | ABOUT_IMAGES | {"pretrain.models", "finetune.dense"},
    # Tasks draw their pictures with it; it knows of them what a type checker sees.
    "finetune.report": CORE | ABOUT_IMAGES | {"finetune.metrics", "finetune.tasks.base"},
    "finetune.tasks": CORE | PARTS_OF_A_TASK | {"pretrain.models"},
    "finetune.tasks.configs": {"pretrain.core.configlib"},
    "finetune.config": CORE | {"finetune.tasks.configs", "pretrain.engine.config"},
    "finetune": CORE | FLOOR_1 | PARTS_OF_A_TASK | {"pretrain.probes"},
    "launch": EVERYTHING - {"fovea"},
    "fovea": EVERYTHING,
}
LOADED_IN_ONE_FILE = {"deepspeed": "pretrain/engine/deepspeed.py", "accelerate": "pretrain/engine/accelerate.py"}
MOST_FILES = 14
LISTS_OF_METHODS = {"pretrain/objectives", "pretrain/objectives/configs", "pretrain/models/mechanisms"}
NO_TORCH = (
    *("pretrain.config", "pretrain.__main__", "pretrain.objectives", "pretrain.engine.watchdog.__main__"),
    *("launch.cli", "launch.__main__", "launch.slurm.command", "launch.slurm.hooks", "launch.check.command"),
    *("launch.init.finetune", "launch.init.pretrain"),
    *("finetune.config", "finetune.__main__", "finetune.tasks", "finetune.data.files", "finetune.data.subset"),
    *("finetune.data.classification", "finetune.data.coco.examples", "finetune.data.maps.masks"),
    *("finetune.data.maps.depth", "finetune.locate", "fovea", "fovea.__main__"),
)


@cache
def modules() -> list[Path]:
    return sorted(path for package in sorted(EVERYTHING) for path in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def imports(path: Path) -> set[str]:
    """Every module that `path` imports, at any depth of its code; `from a import b` is a.b where that is a module."""
    return imported_by(ast.parse(path.read_text(encoding="utf-8")).body)


def imported_by(statements: list[ast.stmt]) -> set[str]:
    found = set()
    for node in (inner for statement in statements for inner in ast.walk(statement)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}"
            assert node.module is not None
            for alias in node.names:
                inner = ROOT / Path(*node.module.split("."), alias.name)
                is_module = inner.with_suffix(".py").exists() or inner.is_dir()
                found.add(f"{node.module}.{alias.name}" if is_module else node.module)
    return found


def within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_imports_only_go_down(path: Path):
    name = module_name(path)
    if name in EVERYTHING:
        return
    home = max((key for key in ALLOWED if within(name, {key})), key=len, default=None)
    assert home is not None, f"{name} has no floor: give it a row in ALLOWED"
    ours = {imported for imported in imports(path) if within(imported, EVERYTHING)}
    wrong = sorted(imported for imported in ours if not within(imported, ALLOWED[home] | {home}))
    assert not wrong, f"{name} ({home}) imports {', '.join(wrong)}"


def test_one_objective_never_imports_another():
    folder = ROOT / "pretrain" / "objectives"
    shared = {"base", "multi_crop", "self_distillation", "whole_step", "__init__"}
    methods = {f"pretrain.objectives.{path.stem}" for path in folder.glob("*.py") if path.stem not in shared}
    for path in folder.glob("*.py"):
        others = methods - {module_name(path)}
        assert not imports(path) & others, f"{path.name} imports another objective"


@pytest.mark.parametrize(("package", "home"), LOADED_IN_ONE_FILE.items())
def test_an_engine_library_is_imported_in_one_file_only(package: str, home: str):
    users = [str(path.relative_to(ROOT)) for path in modules() if any(within(i, {package}) for i in imports(path))]
    assert set(users) <= {home}


@pytest.mark.processes
def test_checking_a_configuration_never_imports_torch():
    code = f"import sys\nfor name in {NO_TORCH!r}: __import__(name)\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_file_outgrows_its_subject():
    long = {str(p.relative_to(ROOT)): n for p in modules() if (n := len(p.read_text().splitlines())) > 400}
    assert not long, f"over 400 lines, look for two subjects: {long}"


def test_no_folder_outgrows_a_glance():
    counts = Counter(str(path.parent.relative_to(ROOT)) for path in modules())
    wide = {folder: n for folder, n in counts.items() if n > MOST_FILES and folder not in LISTS_OF_METHODS}
    assert not wide, f"more than {MOST_FILES} files: {wide}"


def imports_at_start(path: Path) -> set[str]:
    """What importing `path` imports: not what a function imports later, nor what only a type checker sees."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    outer = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))]
    outer = [node for node in outer if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return imported_by(outer)


def test_no_module_imports_itself_through_others():
    names = {module_name(path) for path in modules()}
    graph = {module_name(path): (imports_at_start(path) & names) - {module_name(path)} for path in modules()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a cycle of imports: {' -> '.join(error.args[1])}")
