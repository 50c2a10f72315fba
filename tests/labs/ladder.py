"""The ladder: a copy of the project in which the functions of a method are yours to write.

    python tests/labs/ladder.py llmr                  blank all functions of "The method"
    python tests/labs/ladder.py llmr returns_to_go    or only this one: the first rung
    python tests/labs/ladder.py llmr --list           the functions, in the order of the file

Signatures and docstrings stay, and the equations are in the docstring of the file. Tests tell what
is still wrong: tests/test_methods.py looks at single functions, and tests/test_oracle.py at the
gradient of the first steps. The command prints how to run them.
"""
import argparse
import ast
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("kd_forward", "llmr", "dpkd", "gold", "ddk")


def functions(text):
    """The functions of "The method": [(name, first line of the body, last line)], from 1."""
    banners = [i for i, line in enumerate(text.splitlines(), 1) if line.startswith("# --- ")]
    begin = next(i for i in banners if text.splitlines()[i - 1].startswith("# --- The method"))
    end = next(i for i in banners if i > begin)
    nodes = [x for x in ast.parse(text).body if begin < x.lineno < end]
    nodes += [x for c in nodes if isinstance(c, ast.ClassDef) for x in c.body]
    found = []
    for node in nodes:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("__"):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            found.append((node.name, body[0].lineno, node.end_lineno))
    return sorted(found, key=lambda one: one[1])


def copy(method, names, target):
    """A copy of the project in which these functions of a method raise NotImplementedError."""
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns("out", ".*", "__pycache__"))
    lines = (target / f"{method}.py").read_text().splitlines()
    for name, first, last in reversed(functions("\n".join(lines))):
        if name in names:
            indent = lines[first - 1][:-len(lines[first - 1].lstrip())]
            lines[first - 1:last] = [f'{indent}raise NotImplementedError("write {name}")']
    (target / f"{method}.py").write_text("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("function", nargs="*", help="only these; without: all")
    parser.add_argument("--list", action="store_true", dest="only_list", help="show the functions")
    args = parser.parse_args()
    known = [name for name, _, _ in functions((ROOT / f"{args.method}.py").read_text())]
    if args.only_list:
        print("\n".join(known))
        return 0
    unknown = [name for name in args.function if name not in known]
    if unknown:
        parser.error(f"{args.method}.py has no {unknown[0]} among {', '.join(known)}")
    target = Path("out/ladder") / args.method
    if target.exists():
        parser.error(f"{target} is there already, maybe with your work: remove or rename it")
    copy(args.method, args.function or known, target)
    print(f"write {', '.join(args.function or known)} in {target / args.method}.py, then\n"
          f"  (cd {target} && python -m pytest -x tests/test_methods.py tests/test_oracle.py "
          f"-k \"test_methods or {args.method}\")\nThe solution is ./{args.method}.py.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
