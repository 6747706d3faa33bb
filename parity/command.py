"""`compare.py`: one comparison, printed as it is found, or all of them. Each imports what it needs: that is slow."""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from gallery.options import Family, unknown
from gallery.refused import Refused
from gallery.start import raise_on_ctrl_c
from parity.result import Result, write_text
from parity.sides import Side, find_side

Answered = tuple[dict[str, Any], Callable[[], str], int]  # data for --json, the page for --html, exit status


def run(options: argparse.Namespace, family: Family) -> int:
    """Exit status: 0 within the tolerance, or right; 1 if not. Raises Refused for what the user can fix."""
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
    show = functools.partial(print, file=sys.stderr if options.json == "-" else sys.stdout, flush=True)
    answer = _judge if options.against == "exact" else _compare
    found, page, status = answer(options, family, module, find_side(options.sampler, module, "--sampler"), show)
    text = json.dumps(found, indent=1)
    if options.json == "-":
        print(text)
    elif options.json:
        write_text(Path(options.json), text + "\n")
    if options.html:
        write_text(Path(options.html), page())
        show(f"report in {options.html}")
    return status


def _compare(options: argparse.Namespace, family: Family, module: ModuleType, ours: Side, show: Callable) -> Answered:
    from comfy_ksampler import SCHEDULERS
    from parity.diagnose import compare_sides
    from parity.follow import Session
    from parity.report import report

    theirs = find_side(options.against, module, "--against")
    if ours.is_scheduler:
        raise Refused("--sampler: has to be a sampler; name the scheduler with --against")
    theirs.check_family(family)
    _check_schedule(options, [*module.SCHEDULES, *SCHEDULERS])
    session = Session.load(family, module, options)

    def show_part(result: Result, words: str) -> None:
        """The table with the first words; a paragraph for the others."""
        if words == result.parting():
            show(f"ours    {result.ours}\ntheirs  {result.theirs}\n\n{result.table()}")
            for note in result.notes:
                show(f"note: {note}")
        show(f"\n{words}")

    result, a, b = compare_sides(session, ours, theirs, truths={} if options.truth else None, show=show_part)
    return result.as_json(), lambda: report(session, result, a, b), int(result.cause is not None)


def _judge(options: argparse.Namespace, family: Family, module: ModuleType, side: Side, show: Callable) -> Answered:
    """`--against exact`: a sampler by itself."""
    from parity.judge import judge
    from parity.report import answer_page
    from parity.subject import Subject

    side.check_family(family, "--sampler")
    if side.is_scheduler and options.schedule is not None:
        raise Refused("--schedule: a scheduler has its own levels; name them by its options, as use_karras_sigmas=True")
    _check_schedule(options, module.SCHEDULES)
    answer = judge(Subject(side, family, module, options.schedule, options.parameterization), show)
    return answer.as_json(), lambda: answer_page(answer), int(not answer.right)


def _check_schedule(options: argparse.Namespace, known: Any) -> None:
    if options.schedule is not None and options.schedule not in known:
        raise Refused(f"--schedule: {unknown(options.schedule, list(known))}")
