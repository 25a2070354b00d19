"""The architecture, held by a test: imports only go down. The table is the diagram; a new edge is decided here."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BASE = {f"pretrain.{name}" for name in ("configlib", "distributed", "heartbeat", "ranks", "record", "schedule")}
FLOOR_1 = {"pretrain.models", "pretrain.data", "pretrain.engine"}
BELOW_4 = BASE | FLOOR_1 | {"pretrain.objectives", "pretrain.probes", "pretrain.config"}
PARTS_OF_A_RUN = ("run", "start", "feed", "online_probe", "online_doctor", "release", "doctor", "memory")
PARTS_OF_A_REWIND = ("capture", "culprits", "passed_over", "recompute", "recovery", "replay")
FLOOR_4 = {f"pretrain.{name}" for name in PARTS_OF_A_RUN + PARTS_OF_A_REWIND}
EVERYTHING = {"pretrain", "launch", "finetune"}
ABOUT_IMAGES = {"finetune.predictions", "finetune.data"}
PARTS_OF_A_TASK = {f"finetune.{name}" for name in ("heads", "backbones", "metrics", "report", "tasks")} | ABOUT_IMAGES
ALLOWED = {
    "pretrain.configlib": set(),
    "pretrain.record": set(),
    "pretrain.schedule": set(),
    "pretrain.ranks": set(),
    "pretrain.heartbeat": set(),
    "pretrain.distributed": {"pretrain.ranks", "pretrain.heartbeat"},
    "pretrain.models": BASE,
    "pretrain.data": BASE,
    "pretrain.engine": BASE,
    # Of data, objectives see the specification of views and masks only; probes also read labelled images.
    "pretrain.objectives": BASE | {"pretrain.models", "pretrain.data.view", "pretrain.data.masks"},
    "pretrain.probes": BASE | {"pretrain.models", "pretrain.data"},
    "pretrain.backbones": BASE | {"pretrain.objectives", "pretrain.models.families", "pretrain.data.view"},
    "pretrain.config": BASE
    | {"pretrain.objectives.configs", "pretrain.models.config", "pretrain.models.families", "pretrain.engine.config"}
    | {"pretrain.engine.plan"}
    | {"pretrain.data.view", "pretrain.probes.config"},
    **{module: BELOW_4 | FLOOR_4 for module in FLOOR_4},
    "pretrain.__main__": {"pretrain"},
    "pretrain.scale": {"pretrain"},
    "finetune.predictions": set(),
    "finetune.data": BASE | {"pretrain.data", "finetune.predictions"},
    "finetune.metrics": BASE | ABOUT_IMAGES,
    "finetune.backbones": BASE | {"pretrain.models"},
    "finetune.heads": BASE | ABOUT_IMAGES | {"pretrain.models", "finetune.backbones"},
    # Tasks draw their pictures with it; it knows of them what a type checker sees.
    "finetune.report": BASE | ABOUT_IMAGES | {"finetune.metrics", "finetune.tasks.base"},
    "finetune.tasks": BASE | PARTS_OF_A_TASK | {"pretrain.models"},
    "finetune.tasks.configs": {"pretrain.configlib"},
    "finetune.config": BASE | {"finetune.tasks.configs", "pretrain.engine.config"},
    "finetune": BASE | FLOOR_1 | PARTS_OF_A_TASK | {"pretrain.probes"},
    "launch": EVERYTHING,
}
LOADED_IN_ONE_FILE = {"deepspeed": "pretrain/engine/deepspeed.py", "accelerate": "pretrain/engine/accelerate.py"}
NO_TORCH = (
    *(
        "pretrain.config",
        "pretrain.__main__",
        "launch.cli",
        "launch.__main__",
        "launch.slurm",
        "launch.attempt",
        "launch.check",
        "pretrain.objectives",
        "pretrain.engine.watchdog",
    ),
    *("finetune.config", "finetune.__main__", "finetune.tasks", "finetune.data.files", "finetune.data.subset"),
    *("finetune.data.classification", "finetune.data.coco", "finetune.data.masks", "finetune.data.depth"),
)


def modules() -> list[Path]:
    return sorted(path for package in ("pretrain", "finetune", "launch") for path in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Every module that `path` imports, at any depth of its code; `from a import b` is a.b where that is a module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
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
    shared = {"base", "self_distillation", "__init__"}
    methods = {f"pretrain.objectives.{path.stem}" for path in folder.glob("*.py") if path.stem not in shared}
    for path in folder.glob("*.py"):
        others = methods - {module_name(path)}
        assert not imports(path) & others, f"{path.name} imports another objective"


@pytest.mark.parametrize(("package", "home"), LOADED_IN_ONE_FILE.items())
def test_an_engine_library_is_imported_in_one_file_only(package: str, home: str):
    users = [str(path.relative_to(ROOT)) for path in modules() if any(within(i, {package}) for i in imports(path))]
    assert set(users) <= {home}


def test_checking_a_configuration_never_imports_torch():
    code = f"import sys\nfor name in {NO_TORCH!r}: __import__(name)\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_file_outgrows_its_subject():
    long = {str(p.relative_to(ROOT)): n for p in modules() if (n := len(p.read_text().splitlines())) > 400}
    assert not long, f"over 400 lines, look for two subjects: {long}"
