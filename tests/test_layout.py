"""The promises about the files themselves: skeleton, line budgets, README commands."""
import importlib
import re
import shlex
from pathlib import Path

import pytest

import common

ROOT = Path(__file__).parents[1]
METHODS = [f for f in ("kd_forward", "llmr", "dpkd", "gold", "ddk") if (ROOT / f"{f}.py").exists()]
README = (ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else ""


@pytest.mark.parametrize("name", METHODS)
def test_line_budget_and_skeleton(name):
    text = (ROOT / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 300
    marks = ['"""', "\nimport", "@dataclass", "class Config:", "# models and data", "# method", "# optimization", "# system",
             "# The method", "# The loop", "def train(cfg):", "    # models: ", "    # data\n", "    # optimizer\n", 'if __name__ == "__main__":']
    places = [text.find(m) for m in marks]
    assert -1 not in places and places == sorted(places), dict(zip(marks, places))
    assert len(text.split('if __name__ == "__main__":')[1].strip().splitlines()) == 1
    docstring = text.split('"""')[1]
    for part in ("http", "differs from the paper", "What to watch", f"python {name}.py"):
        assert part in docstring, part
    for raw in ("torch.optim.AdamW(", ".backward()", "clip_grad_norm_", "optimizer.step()", "torch.autocast("):
        assert raw in text, f"{raw} belongs in the loop of the method file"
    imports = re.findall(r"^(?:import|from) (\w+)", text, re.M)
    assert set(imports) <= {"math", "sys", "dataclasses", "torch", "common", "json", "copy", "random", "re"}


def test_common_stays_readable():
    text = (ROOT / "common.py").read_text()
    assert len(text.splitlines()) <= 900
    assert not re.search(r"\b(llmr|dpkd|gold|ddk)\b", text.replace("five method files", "")), "no branch on a method in common.py"


def test_settings_that_mean_the_same_are_spelled_the_same():
    wanted = "teacher student data out steps batch_size lr seed device dtype compile resume overwrite".split()
    for name in METHODS:
        fields = importlib.import_module(name).Config.__dataclass_fields__
        assert not [w for w in wanted if w not in fields], name
        assert {type(f.default) for f in fields.values()} <= {str, int, float, bool}


def commands():
    """Every `python <script>.py ...` in README and docstrings."""
    texts = [README] + [(ROOT / f"{m}.py").read_text().split('"""')[1] for m in METHODS]
    joined = "\n".join(texts).replace("\\\n", " ")
    return sorted({re.sub(r"\s{2,}.*", "", re.sub(r"\s+--", " --", line)).strip()
                   for line in re.findall(rf"python ((?:{'|'.join(METHODS)})\.py[^\n`]*)", joined)})


@pytest.mark.parametrize("command", commands())
def test_commands_in_the_documentation_parse(command):
    words = shlex.split(command)
    module = importlib.import_module(words[0].removesuffix(".py"))
    cfg = common.parse_args(module.Config, words[1:])
    common.check_settings(cfg)


def test_files_named_in_the_readme_exist():
    for name in set(re.findall(r"\]\(([^)#:]+)\)", README)) | set(re.findall(r"`((?:tests|assets)/[\w./]+)`", README)):
        assert (ROOT / name).exists(), name


def test_what_the_readme_tells_to_run_exists():
    for name in set(re.findall(r"python ((?:tests|assets)/\w+\.py)", README)):
        assert (ROOT / name).exists(), name
    for name in set(re.findall(r"python -m (assets[\w.]+)", README)):
        assert (ROOT / f"{name.replace('.', '/')}.py").exists(), name


def test_tables_of_the_readme_are_made_from_the_committed_runs():
    import bench
    import results
    marks = set(re.findall(r"<!-- table (.+) -->", README))
    assert marks == {*results.TABLES, "summary", "bench"}
    assert README == results.with_tables(README, results.load()), "python tests/results.py --print --readme"
    assert README == bench.with_table(README), "python tests/bench.py --readme"


def test_requirements_have_lower_and_upper_bounds():
    lines = (ROOT / "requirements.txt").read_text().split("\n")
    names = [re.match(r"(\w+)>=[\d.]+,<\d+", line)[1] for line in lines if line and not line.startswith("#")]
    assert names == ["torch", "transformers", "datasets", "numpy", "pytest"]


def test_nothing_unsafe():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("assets/*.py")]:
        text = path.read_text()
        assert "trust_remote_code=True" not in text and not re.search(r"(?<![.\w])(eval|exec)\(", text), path
        assert all("weights_only=True" in call for call in re.findall(r"torch\.load\([^\n]*", text)), path
        assert not re.search(r"\b(pickle|subprocess|os\.system|popen|shell=|marshal|numpy\.load|np\.load)\b", text), path
        assert all("**SAFE" in x for x in re.findall(r"Auto\w*\.from_pretrained\([^\n]*|auto\.from_pretrained\([^\n]*", text)), path
