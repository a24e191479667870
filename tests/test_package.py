"""The package as it is installed and imported: public names, start-up, registration with transformers, shipped data."""

import ast
import json
import os
import subprocess
import sys
import zipfile
from importlib.resources import files
from pathlib import Path

import pytest
from safetensors import safe_open

import eckart

ROOT = Path(__file__).parents[1]


def python(code: str, **environment: str) -> str:
    """Run code in a fresh interpreter, warnings as errors, and return what it prints."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ("ECKART_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD")
    }
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=kept | environment, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


@pytest.mark.parametrize("name", sorted(eckart.PUBLIC))
def test_every_public_name_resolves(name):
    assert getattr(eckart, name) is getattr(sys.modules[eckart.PUBLIC[name]], name)


def test_the_table_is_what_type_checkers_see():
    tree = ast.parse(Path(eckart.__file__).read_text(encoding="utf-8"))
    guarded = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    seen = {a.name: n.module for n in guarded.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert seen == eckart.PUBLIC


def test_every_map_family_is_public():
    assert set(eckart.FAMILIES) <= set(eckart.PUBLIC)


def test_dir_and_unknown_names():
    assert {*eckart.PUBLIC, "EckartError", "__version__"} <= set(dir(eckart))
    with pytest.raises(AttributeError, match="module 'eckart' has no attribute 'compres'"):
        eckart.compres
    assert not hasattr(eckart, "nothing")


def test_version_is_that_of_the_project():
    line = next(x for x in (ROOT / "pyproject.toml").read_text().splitlines() if x.startswith("version = "))
    assert line == f'version = "{eckart.__version__}"'


def test_a_missing_package_is_named_with_the_extra_that_installs_it():
    code = """
import sys
sys.modules["transformers"] = None  # as if it were not installed
import eckart
from eckart import Dense, regress, host
try:
    eckart.compress
except eckart.EckartError as error:
    print(error)
"""
    assert python(code) == "eckart.compress needs transformers; pip install 'eckart[hf]'"


def test_a_broken_module_of_our_own_is_not_called_a_missing_package(monkeypatch):
    monkeypatch.setitem(eckart.PUBLIC, "gone", "eckart.gone")
    with pytest.raises(ModuleNotFoundError, match=r"eckart\.gone"):
        eckart.gone


def test_importing_eckart_imports_neither_torch_nor_transformers():
    code = "import sys, eckart; print(sorted({'torch', 'transformers', 'numpy', 'accelerate'} & set(sys.modules)))"
    assert python(code) == "[]"


def test_the_algebra_does_not_import_transformers():
    code = "import sys; from eckart import LowRank, host, regress, truncated_svd; print('transformers' in sys.modules)"
    assert python(code) == "False"


def test_everything_but_kernels_works_without_triton():
    code = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
from eckart.kernels import _rescaled
from eckart.linalg import factored_row_norms
import eckart.hosts.factored
weight, up, down = torch.eye(4), torch.ones(4, 1), torch.zeros(1, 4)
print(factored_row_norms(weight, up, down, 1.0).tolist(), _rescaled(), "eckart.kernels.rescaled" in sys.modules)
"""
    assert python(code) == "[1.0, 1.0, 1.0, 1.0] None False"


def test_kernels_are_loaded_when_a_tensor_needs_them():
    code = "import sys, eckart.linalg, eckart.hosts.factored; print('eckart.kernels.rescaled' in sys.modules)"
    assert python(code) == "False"


# Registration with transformers.

KNOWN = "import transformers.quantizers.auto as auto; print('eckart' in auto.AUTO_QUANTIZER_MAPPING)"
ARMED = """
import sys
print(any(type(f).__module__ == 'eckart._autoload' for f in sys.meta_path), 'transformers' in sys.modules)
"""


def test_importing_torch_arms_and_imports_nothing():
    assert python(f"import torch\n{ARMED}") == "True False"


def test_also_if_transformers_is_what_imports_torch():
    # The quantizers' module is then half imported when torch calls the entry point.
    assert python(f"import transformers.quantizers.auto\nfrom transformers import LlamaConfig\n{KNOWN}") == "True"


@pytest.mark.slow
@pytest.mark.parametrize(
    "first", ["import torch", "import eckart", "import transformers, torch", "import eckart, torch"]
)
def test_transformers_knows_eckart_without_being_told(first):
    assert python(f"{first}\n{KNOWN}") == "True"


@pytest.mark.slow
def test_also_if_transformers_was_there_first():
    code = "import transformers.quantizers.auto, eckart"
    assert python(f"{code}\n{KNOWN}", TORCH_DEVICE_BACKEND_AUTOLOAD="0") == "True"


@pytest.mark.parametrize("first", ["import torch", "import eckart"])
def test_the_switch_arms_nothing(first):
    assert python(f"{first}\n{ARMED}", ECKART_AUTOLOAD="0") == "False False"


@pytest.mark.slow
@pytest.mark.parametrize("first", ["import torch", "import eckart"])
def test_the_switch_leaves_registering_by_hand(first):
    assert python(f"{first}\n{KNOWN}", ECKART_AUTOLOAD="0") == "False"
    assert python(f"{first}\nimport eckart.files.huggingface\n{KNOWN}", ECKART_AUTOLOAD="0") == "True"


@pytest.mark.slow
@pytest.mark.parametrize("order", ["import torch, transformers.quantizers.auto", "import transformers.quantizers.auto"])
def test_a_broken_registration_breaks_neither_torch_nor_transformers(order):
    code = f"""
import sys
sys.modules["eckart.files.huggingface"] = None  # importing it fails
{order}
from transformers import LlamaConfig
import torch
print(torch.ones(2).sum().item())
"""
    assert python(code) == "2.0"


@pytest.mark.slow
def test_the_finder_goes_away_once_it_has_worked():
    assert python(f"import torch, transformers.quantizers.auto\n{ARMED}") == "False True"


# The data of `eckart demo`.

DEMO = {
    "stories260k/config.json", "stories260k/generation_config.json", "stories260k/model.safetensors",
    "stories260k/tokenizer.json", "stories260k/tokenizer_config.json", "train.txt", "valid.txt", "LICENSES.md",
}  # fmt: skip


def test_demo_files_are_installed():
    demo = files("eckart") / "demo"
    held = {str(p.relative_to(str(demo))) for p in Path(str(demo)).rglob("*") if p.is_file()}
    assert held == DEMO
    assert json.loads((demo / "stories260k" / "config.json").read_text())["model_type"] == "llama"
    with safe_open(str(demo / "stories260k" / "model.safetensors"), "pt") as handle:
        assert sum(handle.get_tensor(k).numel() for k in handle.keys()) == 260_032  # noqa: SIM118


def test_demo_texts_are_whole_stories_without_overlap():
    demo = files("eckart") / "demo"
    train, valid = (
        [s.strip() for s in (demo / f).read_text("utf-8").split("<|endoftext|>")] for f in ("train.txt", "valid.txt")
    )
    assert (len(train), len(valid)) == (351, 72)
    assert not set(train) & set(valid)
    assert all(len(s) > 50 and s[-1] in ".!?\"'”’" for s in valid)
    assert "CDLA-Sharing-1.0" in (demo / "LICENSES.md").read_text()


@pytest.mark.slow
def test_the_wheel_holds_code_licences_and_demo(tmp_path):
    built = subprocess.run(
        [sys.executable, "-c", f"import hatchling.build as b; print(b.build_wheel({str(tmp_path)!r}))"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    names = zipfile.ZipFile(tmp_path / built.stdout.split()[-1]).namelist()
    assert {f"eckart/demo/{name}" for name in DEMO} <= set(names)
    assert "eckart/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert any(name.endswith("demo/LICENSES.md") and "dist-info" in name for name in names)
    sources = {f"eckart/{p.relative_to(ROOT / 'src/eckart')}" for p in (ROOT / "src/eckart").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources
    assert not any("test" in name.split("/")[0] for name in names)
