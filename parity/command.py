"""`compare.py`: one comparison, printed as it is found, or all of them. Each imports what it needs: that is slow."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from gallery.options import Family, unknown
from gallery.refused import Refused
from gallery.start import raise_on_ctrl_c
from parity.result import Result, write_text
from parity.sides import Side, find_side


def run(options: argparse.Namespace, family: Family) -> int:
    """Exit status: 0 within the tolerance, 1 past it. Raises Refused for what the user can fix."""
    raise_on_ctrl_c()
    if options.all:
        from parity.table import write_table

        return write_table(options)
    for path in (options.json, options.html):
        if path not in (None, "-") and not Path(path).resolve().parent.is_dir():
            raise Refused(f"can't write {path}: there is no folder {Path(path).resolve().parent}")
    if options.against is None:
        raise Refused("--against: name a scheduler, a sampler or a function, or use --all")
    try:
        module = importlib.import_module(family.module)
    except ImportError as error:
        raise Refused(str(error)) from error
    out = sys.stderr if options.json == "-" else sys.stdout
    ours = find_side(options.sampler, module, "--sampler")
    return (_judge if options.against == "exact" else _compare)(options, family, module, out, ours)


def _compare(options: argparse.Namespace, family: Family, module: ModuleType, out: TextIO, ours: Side) -> int:
    from comfy_ksampler import SCHEDULERS
    from parity.diagnose import compare_sides
    from parity.follow import Session
    from parity.report import report

    theirs = find_side(options.against, module, "--against")
    if ours.is_scheduler:
        raise Refused("--sampler: has to be a sampler; name the scheduler with --against")
    theirs.check_family(family)
    if options.schedule is not None and options.schedule not in (known := [*module.SCHEDULES, *SCHEDULERS]):
        raise Refused(f"--schedule: {unknown(options.schedule, known)}")
    session = Session.load(family, module, options)

    def show(result: Result, words: str) -> None:
        """The table with the first words; a paragraph for the others."""
        if words == result.parting():
            print(f"ours    {result.ours}\ntheirs  {result.theirs}\n\n{result.table()}", file=out)
            for note in result.notes:
                print(f"note: {note}", file=out)
        print(f"\n{words}", file=out, flush=True)

    result, a, b = compare_sides(session, ours, theirs, truths={} if options.truth else None, show=show)
    _write(options, result.as_json(), lambda: report(session, result, a, b), out)
    return int(result.cause is not None)


def _judge(options: argparse.Namespace, family: Family, module: ModuleType, out: TextIO, side: Side) -> int:
    """`--against exact`: a sampler by itself."""
    from parity.judge import judge
    from parity.subject import Function, Stock

    side.check_family(family, "--sampler")
    if side.is_scheduler and options.schedule is not None:
        raise Refused("--schedule: a scheduler has its own levels; name them by its options, as use_karras_sigmas=True")
    if options.schedule not in (None, *module.SCHEDULES):
        raise Refused(f"--schedule: {unknown(options.schedule, list(module.SCHEDULES))}")
    choice = options.schedule, options.parameterization
    subject = Stock(side, family, module) if side.is_scheduler else Function(side, family, module, *choice)
    answer = judge(subject, lambda words: print(words, file=out, flush=True))

    def page() -> str:
        from parity.page import page

        return page(answer)

    _write(options, answer.as_json(), page, out)
    return int(not answer.right)


def _write(options: argparse.Namespace, found: dict[str, Any], page: Callable[[], str], out: TextIO) -> None:
    """What --json and --html ask for."""
    text = json.dumps(json.loads(json.dumps(found), parse_constant=lambda _: None), indent=1)  # JSON has no NaN
    if options.json == "-":
        print(text)
    elif options.json:
        write_text(Path(options.json), text + "\n")
    if options.html:
        write_text(Path(options.html), page())
        print(f"report in {options.html}", file=out)
