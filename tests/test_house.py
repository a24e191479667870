"""The house rules, read from the source: who imports whom, sizes, calls that never appear, docstrings.

Every checker yields sentences "place: what is wrong" and is itself shown a snippet that it must reject.
"""

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "eckart"
FILES = sorted(SOURCE.rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES = 450, 60

# cli -> report -> methods -> { fit, stats, budget, optim, files } -> hosts -> maps -> { linalg, kernels }
STEPS = (
    {"linalg", "kernels"}, {"maps"}, {"hosts"}, {"fit", "stats", "budget", "optim", "files"}, {"methods"}, {"report"},
    {"cli"}, {"__main__"},
)  # fmt: skip
LEVEL = {part: level for level, parts in enumerate(STEPS) for part in parts}
BELOW_ALL = {"errors": 0, "progress": 0, "atomic": 1}  # every part may import them
SIDEWAYS = {("linalg", "kernels")}  # fast paths are reached through the numerics
TESTING_BELOW = LEVEL["methods"]

# What a plain installation lacks; only these may be imported inside a function.
OPTIONAL = {
    "accelerate", "jinja2", "peft", "pydantic", "rich", "scipy", "sklearn", "tokenizers", "tqdm", "transformers",
    "triton", "typer",
}  # fmt: skip


def part_of(module: str) -> str:
    """The part of the package a module belongs to: "maps" for "eckart.maps.dense", "" for "eckart" itself."""
    pieces = module.split(".")
    return pieces[1] if len(pieces) > 1 else ""


def module_of(path: Path) -> str:
    pieces = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(pieces[:-1] if pieces[-1] == "__init__" else pieces)


def imports_of(node: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Yield line and module of everything a statement imports, relative imports resolved."""
    if isinstance(node, ast.Import):
        yield from ((node.lineno, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
        module = ".".join(filter(None, (base, node.module)))
        if module == "eckart":  # from eckart import maps
            yield from ((node.lineno, f"eckart.{alias.name}") for alias in node.names)
        else:
            yield node.lineno, module


def allowed(importer: str, imported: str) -> bool:
    """Tell whether one part of the package may import another."""
    if importer in ("", imported):
        return True  # the package's own table of names, or the part itself
    if importer in BELOW_ALL:
        return imported in BELOW_ALL and BELOW_ALL[imported] < BELOW_ALL[importer]
    if imported in BELOW_ALL or (importer, imported) in SIDEWAYS:
        return True
    if importer == "cli" and imported not in (*LEVEL, "testing"):
        return True  # public names of the package itself, whose table is lazy
    if importer == "testing":
        return LEVEL.get(imported, TESTING_BELOW) < TESTING_BELOW
    return importer in LEVEL and imported in LEVEL and LEVEL[imported] < LEVEL[importer]


def wrong_arrows(tree: ast.Module, module: str, is_package: bool) -> Iterator[str]:
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(tree):
        for line, imported in imports_of(node, package):
            if imported.split(".")[0] == "eckart" and not allowed(part_of(module), part_of(imported)):
                yield f"{line}: {module} must not import {imported}"


def inner_imports(tree: ast.Module, module: str, is_package: bool) -> Iterator[str]:
    package = module if is_package else module.rpartition(".")[0]
    lazy = part_of(module) == "cli"  # the command line starts without torch
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    for node in (inner for function in functions for inner in ast.walk(function)):
        for line, imported in imports_of(node, package):
            if imported.split(".")[0] not in OPTIONAL and not lazy:
                yield f"{line}: {imported} is imported inside a function"


def large_functions(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield f"{node.lineno}: {node.name} has {lines} lines"


def forbidden(tree: ast.Module, module: str) -> Iterator[str]:
    decompositions = {"torch.svd", "torch.linalg.svd", "torch.linalg.svdvals", "torch.svd_lowrank", "torch.pca_lowrank"}
    short = {name.removeprefix("torch.") for name in decompositions}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for line, imported in imports_of(node, module):
                if imported.split(".")[0] in (
                    "pickle",
                    "cPickle",
                    "dill",
                    "cloudpickle",
                    "joblib",
                    "shelve",
                    "marshal",
                ):
                    yield f"{line}: {imported} is imported"
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = {ast.unparse(c) if c is not None else "" for c in caught}
            names_the_error = isinstance(node.body[-1], ast.Raise) and node.body[-1].cause is not None
            if names & {"", "Exception", "BaseException"} and not names_the_error:
                yield f"{node.lineno}: a broad except"
        if isinstance(node, ast.Global):
            yield f"{node.lineno}: global {', '.join(node.names)}"
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("torch.load", "eval", "exec", "compile"):
                yield f"{node.lineno}: {name}(...) is called"
            if (name in decompositions or name in short) and part_of(module) != "linalg":
                yield f"{node.lineno}: {name}(...) is called outside linalg"
            if any(k.arg == "trust_remote_code" and ast.unparse(k.value) != "False" for k in node.keywords):
                yield f"{node.lineno}: trust_remote_code is not False"


class Docstrings:
    """Public definitions without a docstring; a method documented in a base class of this package inherits it."""

    def __init__(self, trees: list[ast.Module]) -> None:
        self.classes = {n.name: n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}

    def missing(self, tree: ast.Module) -> Iterator[str]:
        if not ast.get_docstring(tree):
            yield "1: the module has no docstring"
        yield from self._missing_in(tree, None)

    def _missing_in(self, scope: ast.Module | ast.ClassDef, owner: ast.ClassDef | None) -> Iterator[str]:
        for node in scope.body:
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name.startswith("_"):
                continue
            setter = any(ast.unparse(d).endswith(".setter") for d in node.decorator_list)
            inherited = owner is not None and self._documented(owner, node.name, set())
            if not ast.get_docstring(node) and not inherited and not setter:
                yield f"{node.lineno}: {node.name} has no docstring"
            if isinstance(node, ast.ClassDef):
                yield from self._missing_in(node, node)

    def _documented(self, owner: ast.ClassDef, name: str, seen: set[str]) -> bool:
        for base in (ast.unparse(b).split("[")[0].split(".")[-1] for b in owner.bases):
            known = self.classes.get(base)
            if known is None or base in seen:
                continue
            own = [n for n in known.body if isinstance(n, ast.FunctionDef) and n.name == name]
            if any(ast.get_docstring(n) for n in own) or self._documented(known, name, {*seen, base}):
                return True
        return False


TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def findings(check: Callable[[Path, ast.Module], Iterator[str]]) -> list[str]:
    return [f"{path.relative_to(SOURCE)}:{found}" for path, tree in TREES.items() for found in check(path, tree)]


def test_imports_follow_the_arrows():
    assert not findings(lambda p, t: wrong_arrows(t, module_of(p), p.name == "__init__.py"))


def test_no_imports_inside_functions():
    assert not findings(lambda p, t: inner_imports(t, module_of(p), p.name == "__init__.py"))


def test_sizes():
    large = [
        f"{p.relative_to(SOURCE)}: {n} lines" for p in FILES if (n := len(p.read_text().splitlines())) > MAX_FILE_LINES
    ]
    assert not large
    assert not findings(lambda _, t: large_functions(t))


def test_nothing_forbidden_is_called():
    assert not findings(lambda p, t: forbidden(t, module_of(p)))


def test_everything_public_is_documented():
    docstrings = Docstrings(list(TREES.values()))
    assert not findings(lambda _, t: docstrings.missing(t))


def test_every_part_is_known():
    """A new folder has to be given its place among the arrows."""
    parts = {p.name for p in SOURCE.iterdir() if p.is_dir() and any(p.rglob("*.py"))}
    assert parts <= {*LEVEL, "testing"}
    assert not list((SOURCE / "demo").rglob("*.py"))


# The checkers, on snippets.


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("eckart.linalg.svd", "from eckart.maps import Dense"),
        ("eckart.maps.base", "import eckart.hosts.host"),
        ("eckart.maps.base", "from eckart import hosts"),
        ("eckart.hosts.host", "from eckart.fit import regress"),
        ("eckart.fit.metric", "from eckart.stats import Moments"),
        ("eckart.stats.store", "from eckart.files.folder import open_model"),
        ("eckart.files.folder", "from eckart.budget import knapsack"),
        ("eckart.budget.uniform", "from ..fit import regress"),
        ("eckart.files.card", "from eckart.methods import compress"),
        ("eckart.methods.compress.svd", "from eckart.report import table"),
        ("eckart.report.html", "from eckart.cli.main import run"),
        ("eckart.cli.main", "from eckart.testing import check_map"),
        ("eckart.kernels.cpu", "from eckart.linalg import truncated_svd"),
        ("eckart.errors", "from eckart.atomic import replacing"),
        ("eckart.atomic", "from eckart.maps import Dense"),
        ("eckart.testing.laws", "from eckart.methods.compress import compress"),
        ("eckart.maps.base", "from eckart.testing import check_map"),
        ("eckart.maps.base", "import eckart"),
        ("eckart.maps.base", "from eckart import compress"),
        ("eckart._autoload", "from eckart.files import huggingface"),
        ("eckart.maps.base", "if TYPE_CHECKING:\n    from eckart.hosts import Host"),
        ("eckart.maps.base", "def f():\n    from eckart.hosts import Host"),
    ],
)
def test_wrong_arrows_are_found(module, line):
    assert list(wrong_arrows(ast.parse(line), module, is_package=False))


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("eckart.cli.main", "from eckart.maps import Dense\nfrom eckart import compress"),
        ("eckart.__main__", "from eckart.cli.main import run"),
        ("eckart.linalg.svd", "from eckart.linalg.eigen import top_eigen\nfrom eckart.errors import EckartError"),
        ("eckart.linalg.svd", "from eckart.kernels.cpu import fast"),
        ("eckart.methods.merge.ties", "from eckart.methods.compress import Plan"),
        ("eckart.stats.store", "from eckart.atomic import replacing\nfrom . import moments"),
        ("eckart.testing.laws", "from eckart.files.folder import open_model"),
        ("eckart", "from eckart.methods.compress import compress"),
        ("eckart.maps.base", "import torch\nimport eckart_tools"),
    ],
)
def test_right_arrows_pass(module, line):
    assert not list(wrong_arrows(ast.parse(line), module, is_package=False))


def test_relative_imports_are_resolved():
    tree = ast.parse("from ..hosts import host")
    assert list(wrong_arrows(tree, "eckart.maps.base", is_package=False))
    assert list(wrong_arrows(tree, "eckart.maps.inner", is_package=True)) == []  # eckart.maps.hosts
    assert list(wrong_arrows(tree, "eckart.maps", is_package=True))


@pytest.mark.parametrize(
    ("module", "body", "wrong"),
    [
        ("eckart.maps.base", "import torch", True),
        ("eckart.maps.base", "import json", True),
        ("eckart.methods.train", "from eckart.maps import Dense", True),
        ("eckart.methods.train", "import transformers.models", False),
        ("eckart.cli.main", "from eckart.maps import Dense", False),
        ("eckart.cli.main", "import torch", False),
    ],
)
def test_inner_imports_are_found(module, body, wrong):
    nested = f"class A:\n  def f(self):\n    if True:\n      {body}\n"
    assert bool(list(inner_imports(ast.parse(nested), module, is_package=False))) is wrong
    assert not list(inner_imports(ast.parse(body), module, is_package=False))


def test_large_functions_are_found():
    body = "\n".join(["  x = 1"] * (MAX_FUNCTION_LINES - 1))
    assert not list(large_functions(ast.parse(f"def f():\n{body}")))
    assert list(large_functions(ast.parse(f"def f():\n{body}\n  x = 1")))
    assert list(large_functions(ast.parse(f"class A:\n async def f():\n{body}\n  x = 1")))


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load('x')",
        "torch.load('x', weights_only=True)",
        "torch.linalg.svd(a)",
        "torch.svd(a)",
        "linalg.svd(a)",
        "eval('1')",
        "exec('1')",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
        "AutoModel.from_pretrained('x', trust_remote_code=flag)",
        "try:\n  pass\nexcept:\n  pass",
        "try:\n  pass\nexcept Exception:\n  pass",
        "try:\n  pass\nexcept (ValueError, BaseException) as e:\n  pass",
        "def f():\n  global x\n  x = 1",
    ],
)
def test_forbidden_things_are_found(line):
    assert list(forbidden(ast.parse(line), "eckart.maps.base"))


@pytest.mark.parametrize(
    "line",
    [
        "model.eval()",
        "torch.compile(model)",
        "truncated_svd(a)",
        "AutoModel.from_pretrained('x', trust_remote_code=False)",
        "try:\n  pass\nexcept (ValueError, OSError):\n  pass",
        "try:\n  pass\nexcept Exception as error:\n  raise LawError('which law') from error",
    ],
)
def test_ordinary_things_pass(line):
    assert not list(forbidden(ast.parse(line), "eckart.maps.base"))
    assert not list(forbidden(ast.parse("torch.linalg.svd(a)"), "eckart.linalg.svd"))


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ('"""M."""\ndef f():\n  pass', 1),
        ("x = 1", 1),
        ('"""M."""\nclass A:\n  """A."""\n  def f(self):\n    pass', 1),
        ('"""M."""\nclass A:\n  def f(self):\n    """F."""', 1),
        ('"""M."""\nclass A:\n  """A."""\n  @property\n  def f(self):\n    pass', 1),
        (
            '"""M."""\nclass A:\n  """A."""\n  def f(self):\n    """F."""\n'
            'class B(m.A[int]):\n  """B."""\n  def f(self):\n    pass',
            0,
        ),
        ('"""M."""\nclass B(nn.Module):\n  """B."""\n  def forward(self):\n    pass', 1),
        ('"""M."""\ndef _f():\n  pass\nclass _A:\n  def g(self):\n    pass', 0),
    ],
)
def test_missing_docstrings_are_found(code, count):
    tree = ast.parse(code)
    assert len(list(Docstrings([tree]).missing(tree))) == count


def test_optional_packages_are_not_of_the_standard_library():
    assert not OPTIONAL & set(sys.stdlib_module_names)
