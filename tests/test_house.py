"""The house keeps its plan: layers, short functions, comments that say why, few settings and lines,
and a README and docs whose names exist.

Each check takes {file: source} and returns its faults as `file:line: what`, so that the first tests
can show on made-up files that it finds some.
"""

import ast
import io
import re
import tokenize

import pytest
from pydantic import BaseModel

from config import Config, load_config
from files import ROOT

# A room imports from its own package and from the rooms of the lines above; those of one line do
# not know each other.
LAYERS = """
    files
    config
    icebreaker garm qualeqs data
    llm
    run
    roles
    world
    stages
    serving
    tools
    train
    tables
    eval serve
""".strip().splitlines()
LEVEL = {room: level for level, line in enumerate(LAYERS) for room in line.split()}
OUTSIDE = ("tests", "benchmarks", "examples")  # import from every room; no room imports from them
# Tools that need no run: they stay usable where there is none.
LIGHT = {"tools/tiny_model.py", "tools/importers.py"}
OF_LIGHT = {"files", "config", "data", "llm", "roles", "tools"}
# One paper each, to be read beside it.
BOOKS = {"icebreaker.py", "garm.py", "qualeqs.py"}
# Data, no settings of a run.
NO_CONFIG = {"paper.yaml"}


def house() -> dict[str, str]:
    packages = {path.parent for path in ROOT.glob("*/*.py")} - {ROOT / name for name in OUTSIDE}
    paths = [*ROOT.glob("*.py"), *(path for folder in packages for path in folder.rglob("*.py"))]
    return {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8") for p in sorted(paths)}


def modules(files) -> dict[str, str]:
    """Name of each module -> its file."""
    return {f[:-3].replace("/", ".").removesuffix(".__init__"): f for f in files}


def imports(files) -> list[tuple[str, int, str]]:
    """(file, line, module) of every import of a room, those inside functions too."""
    names, edges = modules(files), []
    rooms = {*OUTSIDE, *(name.split(".")[0] for name in names)}
    for file, source in files.items():
        package = file.split("/")[:-1]
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = package[: len(package) + 1 - node.level] if node.level else []
                base = ".".join([*above, *filter(None, [node.module])])
                whole = [f"{base}.{alias.name}" for alias in node.names]
                # `from roles import text` means a file, `from roles import Chat` the package.
                targets = [name if name in names else base for name in whole]
            else:
                continue
            edges += [(file, node.lineno, t) for t in targets if t.split(".")[0] in rooms]
    return edges


def against_layers(files) -> list[str]:
    faults = [
        f"{file}:1: room {name.split('.')[0]} stands in no layer"
        for name, file in modules(files).items()
        if name.split(".")[0] not in LEVEL
    ]
    for file, line, target in imports(files):
        room, other = file.removesuffix(".py").split("/")[0], target.split(".")[0]
        up = room != other and LEVEL.get(other, 99) >= LEVEL.get(room, 99)
        if up or (file in LIGHT and other not in OF_LIGHT):
            faults.append(f"{file}:{line}: {room} must not import {target}")
    return faults


def circles(files) -> list[str]:
    names = modules(files)
    edges: dict[str, dict[str, int]] = {file: {} for file in files}
    for file, line, target in imports(files):
        if names.get(target, file) != file:
            edges[file].setdefault(names[target], line)
    faults, done = [], set()

    def visit(file: str, path: list[str]) -> None:
        if file in path:
            ring = [*path[path.index(file) :], file]
            faults.append(f"{ring[-2]}:{edges[ring[-2]][file]}: circle {' -> '.join(ring)}")
        elif file not in done:
            for other in edges[file]:
                visit(other, [*path, file])
            done.add(file)

    for file in files:
        visit(file, [])
    return faults


def long_functions(files, most: int = 60) -> list[str]:
    return [
        f"{file}:{node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for file, source in files.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno >= most
    ]


def comments(source: str) -> int:
    """Lines with a `#` comment, alone or after code; not those that speak to a tool."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    pragmas = ("# fmt:", "# noqa", "# type:")
    return sum(t.type == tokenize.COMMENT and not t.string.startswith(pragmas) for t in tokens)


def lines(source: str) -> int:
    return source.count("\n")


def few_comments(files, least: float) -> list[str]:
    return [
        f"{file}:1: {comments(source)} comments in {lines(source)} lines, under {least:.0%}"
        for file, source in files.items()
        if comments(source) < least * lines(source)
    ]


def settings(section: BaseModel) -> int:
    values = (getattr(section, name) for name in type(section).model_fields)
    return sum(settings(v) if isinstance(v, BaseModel) else 1 for v in values)


def unknown_names(page: str, where: str, files, sections, folder=ROOT) -> list[str]:
    """Links, files, commands and settings that a page names and that do not exist."""
    file_names = {part for file in files for part in (file, file.split("/")[-1])}
    faults = []
    for number, line in enumerate(page.splitlines(), 1):
        links = re.findall(r"\]\(([^)#:]+)[)#]", line)
        unknown = [link for link in links if not (folder / link).exists()]
        unknown += set(re.findall(r"`([\w/]+\.py)`", line)) - file_names
        for module in re.findall(r"python -m ([\w.]+)", line):
            path = module.replace(".", "/")
            if module != "pytest" and not {f"{path}.py", f"{path}/__main__.py"} & file_names:
                unknown.append(module)
        unknown += set(re.findall(r"python (\w+\.py)", line)) - file_names
        for section, key in re.findall(r"[` ](\w+)\.(\w+)(?==|`)", line):
            if key not in ("py", "jsonl") and key not in sections.get(section, {key}):
                unknown.append(f"{section}.{key}")
        faults += [f"{where}:{number}: no {name}" for name in unknown]
    return faults


# ---------------------------------------------------------------------- the checks can find faults


@pytest.mark.parametrize(
    "file, source, fault",
    [
        ("llm/a.py", "import config\nfrom stages import dpo\n", "llm/a.py:2: llm must not import"),
        ("llm/a.py", "def f():\n    import train\n", "llm/a.py:2: llm must not import train"),
        ("data.py", "import icebreaker\n", "data.py:1: data must not import icebreaker"),
        ("tools/importers.py", "import run\n", "tools/importers.py:1: tools must not import run"),
        ("world/a.py", "import tests.conftest\n", "world/a.py:1: world must not import tests.conf"),
        ("new.py", "", "new.py:1: room new stands in no layer"),
    ],
)
def test_an_import_that_goes_up_is_found(file, source, fault):
    rooms = {f"{room}.py": "" for room in LEVEL if not file.startswith(room)}
    rooms["stages/dpo.py"] = ""
    assert not against_layers(rooms)
    [line] = against_layers(rooms | {file: source})
    assert line.startswith(fault)


@pytest.mark.parametrize(
    "tree, fault",
    [
        ({"a.py": "import b", "b.py": "import c", "c.py": "def f():\n    import a"}, "c.py:2"),
        (
            {"p/__init__.py": "from p.x import f", "p/x.py": "import os\nfrom p import f"},
            "p/x.py:2",
        ),
        (
            {"p/__init__.py": "", "p/x.py": "from . import y", "p/y.py": "from .x import f"},
            "p/y.py:1",
        ),
        ({"p/__init__.py": "from p import x, y", "p/x.py": "from p import y", "p/y.py": ""}, None),
    ],
)
def test_a_circle_is_found(tree, fault):
    assert [line.split(": circle ")[0] for line in circles(tree)] == ([fault] if fault else [])


def test_long_functions_and_missing_comments_are_found():
    body = "    pass\n" * 60
    assert long_functions({"a.py": f"x = 1\ndef f():\n{body}"}) == ["a.py:2: f has 61 lines"]
    assert not long_functions({"a.py": f"def f():\n{body[9:]}"})
    source = '"""No # comment."""\nx = "# nor this"\ny = 1  # m\n# alone\nz = 3  # noqa\n'
    assert comments(source) == 2
    assert few_comments({"a.py": source}, 0.5) and not few_comments({"a.py": source}, 0.4)


def test_names_that_do_not_exist_are_found(tmp_path):
    (tmp_path / "b.md").touch()
    page = """[a](a.md) [b](b.md#c) [d](https://e.org)
`run.py` `stages/dpo.py` `gone.py` `eval.py`
python -m tools.logs check
python -m gone check; python gone.py; python run.py
`dpo.beta` `dpo.alpha` python run.py dpo.gamma=1 torch.nn"""
    files = ["run.py", "eval.py", "stages/dpo.py", "tools/logs.py"]
    faults = unknown_names(page, "README.md", files, {"dpo": {"beta"}, "eval": set()}, tmp_path)
    assert faults == [
        f"README.md:{line}: no {name}"
        for line, name in [
            (1, "a.md"), (2, "gone.py"), (4, "gone"), (4, "gone.py"), (5, "dpo.alpha"),
            (5, "dpo.gamma"),
        ]
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------- the house


def test_imports_go_down():
    assert against_layers(house()) == []


def test_no_import_circle():
    assert circles(house()) == []


def test_no_function_is_longer_than_60_lines():
    assert long_functions(house()) == []


def test_comments_say_why():
    files = house()
    core = {f: s for f, s in files.items() if f in BOOKS or f.startswith("stages/")}
    core = {f: s for f, s in core.items() if not f.endswith("__init__.py")}
    assert len(core) > 5 and few_comments(core, 0.10) == []
    assert few_comments({"all files": "".join(files.values())}, 0.12) == []


def test_at_most_ten_files_stand_at_the_top():
    top = [file for file in house() if "/" not in file]
    assert len(top) <= 10, top


def test_the_code_stays_small():
    files = house()
    longest = [
        f"{file}:{lines(files[file])}" for file in sorted(files, key=lambda f: -lines(files[f]))
    ]
    assert sum(map(lines, files.values())) <= 22_731, longest[:8]  # to go down, never up


def test_settings_stay_few():
    assert settings(load_config()) <= 156


def test_the_readme_stays_short():
    assert (ROOT / "README.md").stat().st_size <= 11_000


@pytest.mark.parametrize(
    "path", [f for f in sorted((ROOT / "configs").glob("*.yaml")) if f.name not in NO_CONFIG],
    ids=lambda path: path.name,
)  # fmt: skip
def test_every_shipped_config_loads(path):
    assert load_config(path).run.name == path.stem


def test_the_readme_and_docs_name_what_exists():
    outside = [str(p.relative_to(ROOT)) for name in OUTSIDE for p in (ROOT / name).glob("*.py")]
    files, config, faults = [*house(), *outside], Config(), []
    sections = {name: set(type(getattr(config, name)).model_fields) for name in Config.model_fields}
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        page, where = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))
        faults += unknown_names(page, where, files, sections, path.parent)
    assert faults == []
