"""README and docstrings: every command parses and every file exists. Help and imports."""
import ast
import importlib
import re
import shlex
import sys

import pytest
from conftest import ROOT

import common

SCRIPTS = ["kd_forward", "llmr", "dpkd", "gold", "ddk"]
FILES = ["common", *SCRIPTS]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(text):
    """The lines that begin with python or torchrun, \\ at an end joined, without their comments."""
    joined = re.sub(r"\\\n\s*", "", text)
    found = re.findall(r"^ *(?:\$ )?((?:python|torchrun) .*)$", joined, re.M)
    found += re.findall(r"`((?:python|torchrun) [^`\n]*\.py[^`\n]*)`", joined)
    parts = [part.strip() for x in found for part in re.sub(r"   .*|  #.*", "", x).split("&&")]
    parts = [x for x in parts if x.startswith(("python ", "torchrun "))]
    return [x for x in parts if not x.startswith("python -m venv")]


COURSE = "".join((ROOT / f"assets/{name}.md").read_text(encoding="utf-8")
                 for name in ("exercises", "lecturer"))
IN_README = commands(README + COURSE)
IN_SCRIPTS = [(s, c) for s in SCRIPTS for c in commands(importlib.import_module(s).__doc__)]


@pytest.mark.parametrize("command", [*dict.fromkeys([*IN_README, *(c for _, c in IN_SCRIPTS)])])
def test_every_command_of_readme_and_docstrings_parses(command, capsys):
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if i and not word.startswith("--nproc"))
    program, rest = words[at], words[at + 1:]
    if program == "-m" and rest[0] == "pytest":
        assert all((ROOT / word).exists() for word in rest[1:] if word.startswith("tests"))
        return
    name = rest.pop(0) if program == "-m" else program.removesuffix(".py").replace("/", ".")
    assert (ROOT / f"{name.replace('.', '/')}.py").is_file(), command
    if name.startswith("data.") or name.startswith("tests.evidence") or "labs" in name:
        return  # a program with a command line of its own
    sys.path.insert(0, str(ROOT))
    module = importlib.import_module(name)
    if "--help" in rest:
        with pytest.raises(SystemExit) as done:
            common.parse_args(module.Config, rest)
        assert done.value.code == 0
    else:
        cfg = common.parse_args(module.Config, [w for w in rest if "..." not in w])
        common.check_settings(cfg)


def test_every_file_that_readme_names_exists():
    assert len(IN_README) >= 5 and {s for s, _ in IN_SCRIPTS} == set(SCRIPTS)
    linked = re.findall(r"\]\(([^)#\s]+)\)", README) + re.findall(r'src="([^"]+)"', README)
    linked = [x for x in linked if "://" not in x]
    named = re.findall(r"`([\w/.-]+\.(?:py|md|json|toml|txt))`", README)
    own = [x for x in named if "/" in x or x.removesuffix(".py") in FILES]
    own += re.findall(r"(?<![\w/.-])((?:tests|data|assets)/[\w/.-]*\w)", README)
    missing = [x for x in dict.fromkeys([*linked, *own]) if not (ROOT / x).exists()]
    made = {"teacher", "student", "student-kl", "text"}  # the shipped models and texts
    assert not [x for x in missing if x.split("/")[-1] not in made]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_setting(script, capsys):
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as done:
        common.parse_args(module.Config, ["--help"])
    shown = re.findall(r"^  --([a-z-]+)", capsys.readouterr().out, re.M)
    assert done.value.code == 0
    assert {name.replace("-", "_") for name in shown} == set(common.settings_of(module.Config))


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_what_it_may(name):
    """No trainer and no framework. `datasets` takes a second: it is imported where it is needed."""
    text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    found = [ast.unparse(node) for node in ast.walk(ast.parse(text))
             if isinstance(node, (ast.Import, ast.ImportFrom))]
    foreign = {line.split()[1].split(".")[0] for line in found} - set(sys.stdlib_module_names)
    extra = {"datasets", "tqdm"} if name == "common" else {"common"}
    assert foreign <= {"torch", "transformers", "numpy"} | extra
    assert "\nimport datasets" not in text


def test_tables_of_results_are_those_of_the_csv_and_each_row_has_a_command(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests/evidence"))
    results = importlib.import_module("results")
    page, values = results.PAGE.read_text(encoding="utf-8"), results.read()
    assert results.fill(page, values) == page
    for row, (_, seeds, _) in results.ROWS.items():
        script, *words = results.command_of(row, seeds[0], values)
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        common.check_settings(common.parse_args(module.Config, words))
