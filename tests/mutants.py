"""Changes one place of a copied file at a time, and runs the tests that reach it: which changes do no tests notice?

    uv run tests/mutants.py --map     # once: which test reaches which line, about ten minutes
    uv run tests/mutants.py           # 200 mutants, some hours; continues where it was stopped
    uv run tests/mutants.py --report  # the share, and the mutants that survived

The sample is seeded. A mutant of the shared block changes all files that have it. The working tree stays as it is: the
tests run in a copy. Results are in `tests/.mutants`.
"""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import blocks
import pytest

ROOT, WORK = blocks.ROOT, Path(__file__).parent / ".mutants"
FILES = (blocks.FIRST, *blocks.OTHERS, "comfy_ksampler.py")
MAPPED = """brownian callbacks closed_form comfy comfyui files flux loading both_pipelines models modes recipes sampling
    scheduler scheduler_bases scheduler_traps sdxl settings side_by_side""".split()
SECONDS = (25, 250)  # of the tests that run for a mutant, as they took for the map: first, and for those that survive
OTHER: dict[type, type] = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq}
OTHER |= {ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}
OTHER |= {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div}
OTHER |= {ast.Pow: ast.Mult, ast.And: ast.Or, ast.Or: ast.And, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr}


def changes(node: ast.AST) -> list[ast.AST]:
    """The mutants of one node of the syntax tree."""
    found = []

    def change(**fields: Any) -> None:
        found.append(mutant := copy.copy(node))
        vars(mutant).update(fields)

    if isinstance(node, ast.Compare) and type(node.ops[0]) in OTHER:
        change(ops=[OTHER[type(node.ops[0])](), *node.ops[1:]])
    elif isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in OTHER:
        change(op=OTHER[type(node.op)]())
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        change(value=not node.value if isinstance(node.value, bool) else node.value + 1)
    elif isinstance(node, ast.UnaryOp):
        found.append(node.operand)
    elif isinstance(node, ast.IfExp):
        found += [node.body, node.orelse]
    elif isinstance(node, ast.If):
        change(test=ast.UnaryOp(ast.Not(), node.test))
        change(body=[ast.Pass()])
    elif isinstance(node, ast.Call):
        for keyword in node.keywords:
            if keyword.arg:
                change(keywords=[one for one in node.keywords if one is not keyword])
    return found


def mutants(name: str) -> list[tuple[str, int, str, str]]:
    """(file, line, the change, the changed text) of all mutants of a file, without those of a copied block."""
    text = (ROOT / name).read_text()
    starts = [*itertools.accumulate((len(line.encode()) for line in text.splitlines(keepends=True)), initial=0)]
    block = range(0) if name not in blocks.OTHERS else range(*(text.index(mark) for mark in (blocks.BEGIN, blocks.END)))
    found, tree = [], ast.parse(text)
    hints = [getattr(node, field, None) for node in ast.walk(tree) for field in ("annotation", "returns")]
    skipped = {inner for hint in hints if hint for inner in ast.walk(hint)}  # type annotations have no effect
    for node in ast.walk(tree):
        text_alone = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if not hasattr(node, "lineno") or text_alone or node in skipped:
            continue
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        if start in block:
            continue
        for mutant in changes(node):
            new = ast.unparse(ast.fix_missing_locations(mutant))
            if isinstance(mutant, ast.expr):
                new = f"({new})"
            else:  # a statement keeps its indentation
                new = "el" * text.encode()[start:].startswith(b"elif") + new.replace("\n", "\n" + " " * node.col_offset)
            changed = text.encode()[:start].decode() + new + text.encode()[end:].decode()
            try:
                ast.parse(changed)
            except SyntaxError:  # a part of an f-string
                continue
            place = f"{text.splitlines()[node.lineno - 1].strip()} [{node.col_offset}]"
            what = f"{place}: {ast.unparse(node).splitlines()[0]}  ->  {new.splitlines()[0]}"
            found.append((name, node.lineno, what, changed))
    return found


def texts(name: str, changed: str) -> dict[str, str]:
    """The texts of all files with this one changed, and with its block in the others."""
    found = {file: (ROOT / file).read_text() for file in FILES} | {name: changed}
    if name == blocks.FIRST:
        block = changed[changed.index(blocks.BEGIN) : changed.index(blocks.END)]
        for other in blocks.OTHERS:
            before, _, after = blocks.parts(other)
            found[other] = before + blocks.expected(other, block) + after
    return found


REACHED: dict[str, list] = {}  # of the tests that ran in this process


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: Any):
    """Notes the lines of the files that a test reaches: {test: [seconds, {file: lines}]}."""
    lines: dict[str, set[int]] = {str(ROOT / name): set() for name in FILES}

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if (reached := lines.get(frame.f_code.co_filename)) is None:
            return None
        reached.add(frame.f_lineno)
        return trace

    began = time.process_time()
    sys.settrace(trace)
    yield
    sys.settrace(None)
    found = {Path(name).name: sorted(reached) for name, reached in lines.items() if reached}
    REACHED[item.nodeid] = [time.process_time() - began, found]


def pytest_sessionfinish(session: Any) -> None:
    if REACHED:
        (WORK / f"map-{os.getpid()}.json").write_text(json.dumps(REACHED))


def tests_of(name: str, line: int, reached: dict[str, list], seconds: float) -> list[str]:
    """Tests that reach a line, one of each function in turn. Of a line that only an import reaches: any tests."""
    text = (ROOT / name).read_text().splitlines()
    places = {name: line}
    if name == blocks.FIRST:  # the same line of the block in the other files
        for other in blocks.OTHERS:
            theirs = (ROOT / other).read_text().splitlines()
            same = [i for i, one in enumerate(theirs, 1) if one == text[line - 1] and theirs[i - 2] == text[line - 2]]
            places |= {other: same[0]} if same and line > text.index(next(t for t in text if blocks.BEGIN in t)) else {}
    hits = [test for test, (_, at) in reached.items() if any(n in at.get(file, ()) for file, n in places.items())]
    functions = defaultdict(list)
    for test in sorted(hits or reached, key=lambda test: reached[test][0]):
        functions[test.split("[")[0]].append(test)
    chosen, total = list[str](), 0.0
    for test in itertools.chain.from_iterable(itertools.zip_longest(*functions.values())):
        if test and total + reached[test][0] < seconds:
            chosen.append(test)
            total += reached[test][0]
    return chosen


def killed_by(changed: dict[str, str], tests: list[str], folder: str) -> str:
    """The first test that fails, "time", "import" for a mutant that can't be imported, or "" for one that survives."""
    for name, text in changed.items():
        Path(folder, name).write_text(text)
    line = [sys.executable, "-m", "pytest", "-x", "-n0", "-p", "no:cacheprovider", "-W", "ignore", *tests]
    try:
        run = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        return "time"
    failed = re.search("^(?:FAILED|ERROR) (tests/.+?)(?: - |$)", run.stdout, re.MULTILINE)
    return "" if run.returncode == 0 else failed.group(1) if failed else "import"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--map", action="store_true", help="find out which test reaches which line")
    parser.add_argument("--report", action="store_true", help="print the results so far")
    args = parser.parse_args()
    WORK.mkdir(exist_ok=True)
    results = WORK / "results.jsonl"
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if args.map:
        for old in WORK.glob("map-*.json"):
            old.unlink()
        tests = [f"tests/test_{name}.py" for name in MAPPED]
        line = [sys.executable, "-m", "pytest", "-p", "mutants", "-W", "ignore", *tests]
        sys.exit(subprocess.run(line, cwd=ROOT, env={**os.environ, "PYTHONPATH": "tests"}).returncode)
    every = [mutant for name in FILES for mutant in mutants(name)]
    # by a hash of the change, so that most of a sample stays the same when the files change
    chosen = sorted(every, key=lambda one: hashlib.sha256(f"{args.seed} {one[0]} {one[2]}".encode()).digest())
    chosen = chosen[: args.count]
    done = {one["mutant"]: one for one in map(json.loads, results.read_text().splitlines())} if results.exists() else {}
    titles = [f"{name}: {what}" for name, _, what, _ in chosen]
    if not args.report:
        reached = {test: at for path in WORK.glob("map-*.json") for test, at in json.loads(path.read_text()).items()}
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "__pycache__"), dirs_exist_ok=True)
            for title, (name, line, _, changed) in zip(titles, chosen):
                if title in done:
                    continue
                for seconds in SECONDS:
                    tests = tests_of(name, line, reached, seconds)
                    if killer := killed_by(texts(name, changed), tests, folder):
                        break
                done[title] = {"mutant": title, "killer": killer, "tests": len(tests)}
                with results.open("a") as file:
                    file.write(json.dumps(done[title]) + "\n")
                print(f"{'survives' if not killer else 'killed  '} {title}  {killer}", flush=True)
    here = [done[title] for title in titles if title in done]
    survivors = [one for one in here if not one["killer"]]
    print(f"{len(every)} mutants, {len(here)} tried, {len(here) - len(survivors)} killed; survivors:")
    print("\n".join(one["mutant"] for one in survivors))


if __name__ == "__main__":
    main()
