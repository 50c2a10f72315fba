"""The promises about the files themselves: who imports whom, the skeleton of a method, the README's commands."""
import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
from conftest import settings_of

import common

ROOT = Path(__file__).parents[1]
METHODS = ["kd_forward", "llmr", "dpkd", "gold", "ddk"]
PROGRAMS = sorted(str(f.relative_to(ROOT)) for f in ROOT.glob("data/*/prepare.py"))
README = (ROOT / "README.md").read_text()


# ---------------------------------------------------------------------------------------------------------------
# Arrows go one way: tests -> scripts -> common -> libraries
# ---------------------------------------------------------------------------------------------------------------
def python_files():
    """Every .py file of ours, as a path from the top; not what runs, caches and environments hold."""
    files = [f.relative_to(ROOT) for f in ROOT.rglob("*.py")]
    elsewhere = ("out", "shared")
    return sorted(f for f in files if f.parts[0] not in elsewhere and not any(p.startswith((".", "__")) or p == "venv" for p in f.parts))


def imported(tree):
    """The top-level names that a file imports, wherever the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield "a relative import" if node.level else node.module.split(".")[0]


FILES = python_files()
OURS = {f.stem for f in FILES} | {part for f in FILES for part in f.parts[:-1]} | {"a relative import"}


@pytest.mark.parametrize("file", [str(f) for f in FILES])
def test_no_import_goes_up(file):
    """The scripts import common of ours and nothing else; common and the programs in data/ nothing; tests may all."""
    path = Path(file)
    if path.parts[0] == "tests":
        return
    allowed = {"common"} if file in [f"{m}.py" for m in METHODS] else set()
    text = (ROOT / file).read_text()
    ours = set(imported(ast.parse(text))) & OURS
    assert ours <= allowed, f"{file} imports {', '.join(sorted(ours - allowed))}"
    assert not re.search(r"\b(importlib|__import__|runpy)\b", text), "no import by name"


def test_python_files_stand_where_the_house_has_them():
    assert {str(f) for f in FILES if len(f.parts) == 1} == {"common.py", *(f"{m}.py" for m in METHODS)}
    assert {f.parts[0] for f in FILES if len(f.parts) > 1} == {"data", "tests"}  # assets/ holds no code
    assert [str(f) for f in FILES if f.parts[0] == "data"] == PROGRAMS and len(PROGRAMS) == 4


def test_the_tests_folder_holds_tests_and_its_tools_have_folders():
    # torchrun_worker.py is what test_torchrun.py lets torchrun start
    loose = {f.name for f in FILES if f.parts[0] == "tests" and len(f.parts) == 2 and not f.name.startswith("test_")}
    assert loose == {"conftest.py", "torchrun_worker.py"}
    assert {f.parts[1] for f in FILES if f.parts[0] == "tests" and len(f.parts) > 2} == {"controls", "labs", "evidence"}


# ---------------------------------------------------------------------------------------------------------------
# The scripts and common.py
# ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", METHODS)
def test_skeleton(name):
    text = (ROOT / f"{name}.py").read_text()
    marks = ['"""', "\nimport", "@dataclass", "class Config(common.Settings):", "\n    # method\n", "\n    # optimization\n", "\n    unused = (",
             "# The method\n", "# The loop", "def train(cfg) -> dict:", "\n    # models: ", "\n    # data", "\n    # optimizer", "    for step in range(start, ",
             'if __name__ == "__main__":']
    places = [text.find(m) for m in marks]
    assert -1 not in places and places == sorted(places), dict(zip(marks, places))
    assert len(text.split('if __name__ == "__main__":')[1].strip().splitlines()) == 1
    docstring = text.split('"""')[1]
    for part in ("http", "differs from the paper", "What to watch", f"python {name}.py"):
        assert part in docstring, part
    for raw in ("torch.optim.AdamW(", ".backward()", "clip_grad_norm_", "optimizer.step()", "torch.autocast(", "common.lr_at(step, cfg)"):
        assert raw in text, f"{raw} belongs in the loop of the method file"
    imports = set(imported(ast.parse(text)))
    assert imports <= {"math", "sys", "dataclasses", "torch", "common", "json", "copy", "random", "re", "numpy"}


def test_common_has_no_branch_on_a_method():
    names = set(METHODS)
    for node in ast.walk(ast.parse((ROOT / "common.py").read_text())):
        found = {getattr(node, "id", None), getattr(node, "attr", None), getattr(node, "arg", None)}
        found |= {node.value} if isinstance(node, ast.Constant) and isinstance(node.value, str) else set()
        assert not found & names, f"line {node.lineno}: {found & names}"


def test_everything_in_common_is_used():
    """A function, class or constant of common.py that nothing of ours names any more should go."""
    tree = ast.parse((ROOT / "common.py").read_text())
    made = [n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    made += [t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)]
    product = "\n".join((ROOT / f).read_text() for f in ["common.py", *(f"{m}.py" for m in METHODS)])
    assert not [name for name in made if len(re.findall(rf"\b{name}\b", product)) < 2]


def test_settings_that_mean_the_same_are_spelled_the_same():
    wanted = "teacher student data out steps batch_size lr seed device dtype compile resume overwrite".split()
    for name in METHODS:
        config = importlib.import_module(name).Config
        assert set(wanted) <= settings_of(config), name
        assert set(config.unused) <= set(common.Settings.__dataclass_fields__), "a script's own settings have an effect"
        assert {type(f.default) for f in config.__dataclass_fields__.values()} <= {str, int, float, bool}


def test_requirements_have_lower_and_upper_bounds():
    lines = (ROOT / "requirements.txt").read_text().split("\n")
    names = [re.match(r"(\w+)>=[\d.]+,<\d+", line)[1] for line in lines if line and not line.startswith("#")]
    assert names == ["torch", "transformers", "datasets", "numpy", "pytest"]


@pytest.mark.parametrize("file", ["common.py", *(f"{m}.py" for m in METHODS), *PROGRAMS])
def test_nothing_unsafe(file):
    text = (ROOT / file).read_text()
    assert "trust_remote_code=True" not in text and not re.search(r"(?<![.\w])(eval|exec)\(", text)
    assert all("weights_only=True" in call for call in re.findall(r"torch\.load\([^\n]*", text))
    assert not re.search(r"\b(pickle|os\.system|popen|shell=|marshal|numpy\.load|np\.load)\b", text)
    assert all("**SAFE" in x for x in re.findall(r"Auto\w*\.from_pretrained\([^\n]*|auto\.from_pretrained\([^\n]*", text))
    # a tiny world is made by programs of ours: common.py starts prepare.py, and that starts a script
    assert len(re.findall(r"subprocess\.(?!PIPE|STDOUT)\w+\(", text)) == (0 if file in [f"{m}.py" for m in METHODS] else 1)


# ---------------------------------------------------------------------------------------------------------------
# What the documentation says
# ---------------------------------------------------------------------------------------------------------------
def commands(text):
    """Every `python <script>.py ...` in a text."""
    joined = text.replace("\\\n", " ")
    return sorted({re.sub(r"\s{2,}.*", "", re.sub(r"\s+--", " --", line)).strip()
                   for line in re.findall(rf"python ((?:{'|'.join(METHODS)})\.py[^\n`]*)", joined)})


DOCSTRINGS = "\n".join((ROOT / f"{m}.py").read_text().split('"""')[1] for m in METHODS)


@pytest.mark.parametrize("command", commands(DOCSTRINGS))
def test_commands_in_docstrings_parse(command):
    words = shlex.split(command)
    module = importlib.import_module(words[0].removesuffix(".py"))
    cfg = common.parse_args(module.Config, words[1:])
    common.check_settings(cfg)


def test_programs_that_a_docstring_names_exist():
    for file in FILES:
        text = (ROOT / file).read_text() if file.name != Path(__file__).name else ""
        for name in re.findall(r"python ((?:tests|assets|data)/[\w/]+\.py)", text):
            assert (ROOT / name).exists(), f"{file}: {name}"
        for name in re.findall(r"python -m ((?:tests|assets)[\w.]+\w)", text):
            path = ROOT / name.replace(".", "/")
            assert path.is_dir() or path.with_suffix(".py").exists(), f"{file}: {name}"


# ---------------------------------------------------------------------------------------------------------------
# README.md
# ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("command", commands(README))
def test_commands_in_the_readme_parse(command):
    test_commands_in_docstrings_parse(command)


def test_the_readme_has_at_most_250_lines():
    assert len(README.splitlines()) <= 250


def test_files_named_in_the_readme_exist():
    for name in set(re.findall(r"\]\(([^)#:]+)\)", README)) | set(re.findall(r"`((?:tests|assets|data)/[\w./]+)`", README)):
        assert (ROOT / name).exists(), name


def test_what_the_readme_tells_to_run_exists():
    for name in re.findall(r"python ((?:tests|data)/[\w/]+\.py)", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"python -m ((?:tests|assets)[\w.]+\w)", README):
        assert (ROOT / f"{name.replace('.', '/')}.py").exists(), name
