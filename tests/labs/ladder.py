"""The build-it ladder: a copy of the project in which a method is yours to write; its tests say when it is right.

    python tests/labs/ladder.py llmr                     blank all functions of the section "The method" of llmr.py
    python tests/labs/ladder.py llmr returns_to_go       or only this one: the first rung
    python tests/labs/ladder.py llmr --list              the functions, in the order in which to write them
    python -m pytest out/ladder/llmr/tests/test_llmr.py -x      what is still wrong (as the first command tells)
    python tests/labs/ladder.py --prove                  blank every function in turn: at least one test must fail (long)

Signatures and docstrings stay; the equations are in the docstring of the file.
"""
import argparse
import ast
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
METHODS = [m for m in ("kd_forward", "llmr", "dpkd", "gold", "ddk") if (ROOT / f"{m}.py").exists()]


def functions(text):
    """The functions of the method's section in their order: [(name, first line of the body, last line)], from 1."""
    lines = text.splitlines()
    begin = lines.index("# The method")
    end = next(i for i, line in enumerate(lines) if line.startswith("# The loop"))
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and begin < node.lineno <= end and not node.name.startswith("__"):
            body = node.body[1:] if ast.get_docstring(node) is not None and len(node.body) > 1 else node.body
            found.append((node.name, body[0].lineno, node.end_lineno))
    found.sort(key=lambda f: f[1])
    return [f for f in found if not any(g[1] <= f[1] and f[2] <= g[2] and g != f for g in found)]  # outermost only


def blank(text, names):
    lines = text.splitlines()
    for name, first, last in reversed(functions(text)):
        if name in names:
            indent = lines[first - 1][:len(lines[first - 1]) - len(lines[first - 1].lstrip())]
            lines[first - 1:last] = [f'{indent}raise NotImplementedError("{name} is yours to write")']
    return "\n".join(lines) + "\n"


def copy(method, names, target):
    ignore = shutil.ignore_patterns("out", ".*", "__pycache__", "*.png")
    shutil.copytree(ROOT, target, ignore=ignore)
    file = target / f"{method}.py"
    file.write_text(blank(file.read_text(), names))


def failing(target, method):
    """The names of the tests that fail in a copy, at most three of them."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "--maxfail=3", f"tests/test_{method}.py"], cwd=target,
                          capture_output=True, text=True)
    return [line.split("::")[1].split(" ")[0] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))
            and "::" in line]


def prove():
    """Every function that a reader may have to write is needed by a test."""
    survivors, n = [], 0
    for method in METHODS:
        for name, _, _ in functions((ROOT / f"{method}.py").read_text()):
            target = ROOT / "out/ladder/prove"
            shutil.rmtree(target, ignore_errors=True)
            copy(method, [name], target)
            found, n = failing(target, method), n + 1
            print(f"{method}.{name}: {', '.join(found) or 'NO TEST FAILS'}", flush=True)
            survivors += [] if found else [name]
    shutil.rmtree(ROOT / "out/ladder/prove", ignore_errors=True)
    print(f"needed {n - len(survivors)} of {n}")
    return bool(survivors)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", nargs="?", choices=METHODS)
    parser.add_argument("function", nargs="*", help="only these; without: all")
    parser.add_argument("--list", action="store_true", dest="only_list")
    parser.add_argument("--prove", action="store_true")
    args = parser.parse_args()
    if args.prove:
        return prove()
    if not args.method:
        parser.error(f"which method? one of {', '.join(METHODS)}")
    known = [name for name, _, _ in functions((ROOT / f"{args.method}.py").read_text())]
    if args.only_list:
        print("\n".join(known))
        return 0
    unknown = [name for name in args.function if name not in known]
    if unknown:
        parser.error(f"{args.method}.py has no {unknown[0]} in its method section: {', '.join(known)}")
    target = Path("out/ladder") / args.method
    if target.exists():
        parser.error(f"{target} is there already, perhaps with your work in it: remove or rename it")
    copy(args.method, args.function or known, target)
    print(f"write {', '.join(args.function or known)} in {target / (args.method + '.py')}, then\n"
          f"  python -m pytest {target}/tests/test_{args.method}.py -x\nThe solution is {args.method}.py here.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
