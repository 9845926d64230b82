"""`import cleandift_backbones` loads nothing heavy, and yet registers the models with timm, whatever comes first."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REGISTERED = "import timm; assert timm.is_model('cleandift_tiny') and timm.is_model('dift_sd21')"


def run(code, folder=None):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, filter(None, [folder, ROOT])))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_import_loads_nothing_heavy():
    modules = ["cleandift_backbones", *(f"cleandift_backbones.{m}" for m in ("cli.main", "utils.guard", "configs"))]
    modules += [f"cleandift_backbones.cli.{name}" for name in ("app", "convert", "demo", "finetune", "models", "push")]
    code = f"import sys, {', '.join(modules)}; found = {{'torch', 'timm', 'numpy', 'PIL'}} & {{*sys.modules}}"
    run(f"{code}; assert not found, found")


@pytest.mark.parametrize(
    "order",
    [
        "import timm, cleandift_backbones",
        "import cleandift_backbones; from importlib.util import find_spec; find_spec('timm'); find_spec('timm')",
        "import cleandift_backbones; from timm.models import create_model",
        "import cleandift_backbones; cleandift_backbones.models.dift_tiny",
    ],
)
def test_models_are_registered_in_any_order(order):
    run(f"{order}; {REGISTERED}")


CALLS = """
import sys
from importlib import reload
from cleandift_backbones.utils.imports import when_imported

calls, finders = [], len(sys.meta_path)
when_imported("other", lambda: calls.append(sys.modules["other"].value))
assert not calls
import other
assert calls == [1]
reload(other)
assert calls == [1] and len(sys.meta_path) == finders
when_imported("other", lambda: calls.append(2))
assert calls == [1, 2]
when_imported("no_such_module", lambda: calls.append(3))
try:
    import no_such_module
except ModuleNotFoundError:
    assert calls == [1, 2]
"""


def test_a_function_is_called_once_after_the_first_import(tmp_path):
    (tmp_path / "other.py").write_text("value = 1")
    run(CALLS, tmp_path)


def test_two_watches_of_one_module():
    """As after a reload of the package."""
    code = """if True:
        import importlib, sys
        import cleandift_backbones
        importlib.reload(cleandift_backbones)
        import timm
        assert timm.is_model("cleandift_tiny")
    """
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
