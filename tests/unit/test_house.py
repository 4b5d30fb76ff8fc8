"""Rules of the house that no other tool checks: who may import what, and how small a component stays."""

import ast
import io
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = sorted((ROOT / "spin").rglob("*.py"))
COMPONENTS = sorted((ROOT / "components").rglob("*.py"))
SERVED = ROOT / "spin" / "served_player.py"
PICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
MOST_COMPONENT_LINES = 60


def imports(tree: ast.AST) -> set[str]:
    """Return the top-level packages imported anywhere below ``tree``."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # A relative import stays in its own package; spin and components have none.
            found.add("." if node.level else (node.module or "").split(".")[0])
    return found


def top_imports(tree: ast.Module) -> set[str]:
    """Return the packages imported when the module is imported: everything outside functions."""
    found: set[str] = set()
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= imports(node)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return found


def unsafe_loads(tree: ast.AST) -> list[str]:
    """Return what reads or writes pickles: the modules, torch.load and torch.save, pandas' read_pickle."""
    found = sorted(imports(tree) & PICKLERS)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (
            (isinstance(node.value, ast.Name) and node.value.id == "torch" and node.attr in ("load", "save"))
            or node.attr in ("read_pickle", "to_pickle", "load_state_dict_from_url")
        ):
            found.append(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            found += [f"torch.{alias.name}" for alias in node.names if alias.name in ("load", "save")]
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.append("allow_pickle")
    return found


def code_lines(source: str) -> int:
    """Count the lines that hold code: no blank lines, comments or docstrings."""
    documentation: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                documentation |= set(range(statement.lineno, (statement.end_lineno or statement.lineno) + 1))
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - documentation)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_files_are_found() -> None:
    assert {"spin/store.py", "spin/stages/train.py"} <= {name(path) for path in LIBRARY}
    assert "components/spin_train/component.py" in {name(path) for path in COMPONENTS}


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_the_library_knows_no_orchestrator(path: Path) -> None:
    assert not imports(parsed(path)) & {"kfp", "kfp_kubernetes", "components", "pipelines", "tests"}


@pytest.mark.parametrize(
    ("package", "owner"),
    [("minio", "spin/store.py"), ("mlflow", "spin/tracking.py"), ("kubernetes", "spin/cluster.py")],
)
def test_each_server_has_one_client(package: str, owner: str) -> None:
    assert [name(path) for path in LIBRARY if path != SERVED and package in imports(parsed(path))] == [owner]


def test_what_is_served_needs_nothing_of_spin() -> None:
    # MLflow copies the file into the model and runs it elsewhere.
    assert "spin" not in imports(parsed(SERVED))
    assert top_imports(parsed(SERVED)) <= {*sys.stdlib_module_names, "mlflow", "pandas"}


@pytest.mark.parametrize("package", ["boto3", "botocore", "s3fs"])
def test_there_is_no_second_way_to_s3(package: str) -> None:
    assert [name(path) for path in LIBRARY if package in imports(parsed(path))] == []


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_nothing_is_pickled(path: Path) -> None:
    # The scorers' authors publish torch.save files; one place reads them, without running what is in them.
    allowed = ["torch.load"] if name(path) == "spin/scorers/convert.py" else []
    assert unsafe_loads(parsed(path)) == allowed


def test_the_one_load_runs_no_code() -> None:
    source = (ROOT / "spin" / "scorers" / "convert.py").read_text()
    (call,) = [
        node for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]  # fmt: skip
    assert {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}["weights_only"] == "True"


@pytest.mark.parametrize("path", COMPONENTS, ids=name)
def test_components_compile_without_the_library(path: Path) -> None:
    # `kfp dsl compile` on a bare machine imports these files; what they run is imported inside the functions.
    assert top_imports(parsed(path)) <= {*sys.stdlib_module_names, "kfp", "components"}


@pytest.mark.parametrize("path", COMPONENTS, ids=name)
def test_components_are_thin(path: Path) -> None:
    assert code_lines(path.read_text()) <= MOST_COMPONENT_LINES


def test_the_import_rules_see_what_they_forbid() -> None:
    source = "import a.b\nif True:\n    from c import d\ndef f():\n    import e\nclass G:\n    import h\n"
    assert imports(ast.parse(source)) == {"a", "c", "e", "h"}
    assert top_imports(ast.parse(source)) == {"a", "c", "h"}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import save",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "frame.read_pickle('x')",
    ],
)
def test_the_pickle_rule_sees_what_it_forbids(source: str) -> None:
    assert unsafe_loads(ast.parse(source))


EXAMPLE = """\"\"\"Module.

More.
\"\"\"

import a  # why


# alone
def f(
    x,
):
    \"\"\"Doc.\"\"\"
    y = \"\"\"two
lines\"\"\"
    return x
"""


def test_lines_are_counted_by_hand() -> None:
    # import a; def f(; x,; ):; y = two; lines; return x
    assert code_lines(EXAMPLE) == 7


def test_the_tests_of_a_file_share_a_process(request: pytest.FixtureRequest) -> None:
    """xdist says so behind a test's name; where it does not, each process makes what a file's tests share."""
    grouped = getattr(request.config.option, "loadgroup", False)
    assert not grouped or request.node.nodeid.endswith("@test_house.py")
