"""The scripts of docs/parity.md run and show what they say, and the page has `compare.py --all`'s table."""

from __future__ import annotations

import json
import re

import pytest
from conftest import ROOT

from gallery.options import FLUX, SDXL
from parity import table
from parity.command import parse_compare
from parity.follow import Session
from parity.table import FLUX_PAIRS, jobs, make, overview, write_table

PAGE = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
FINDINGS = re.findall(r"^## (.+?)$(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
SCRIPTS = [(title, code) for title, text in FINDINGS for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]


@pytest.mark.parametrize("title, code", SCRIPTS, ids=[title[:40] for title, _ in SCRIPTS])
def test_scripts_show_what_they_say(title, code, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT))
    exec(compile(code, f"docs/parity.md: {title}", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out


def test_there_is_a_script_for_every_defect():
    with_script = {title for title, _ in SCRIPTS}
    assert {title for title, _ in FINDINGS if "(defect)" in title} <= with_script


def test_the_page_has_the_table_that_was_made():
    rows = json.loads((ROOT / "output" / "parity.json").read_text(encoding="utf-8"))
    table = "\n".join(overview(rows))
    assert table in PAGE
    assert table in (ROOT / "output" / "parity.md").read_text(encoding="utf-8")
    pairs = {tuple(row["pair"]) for row in rows}
    assert len(pairs) >= 18 and {row["levels"] for row in rows} == {"own", "Karras", "exponential", "beta"}


def parse_all(folder, *arguments):
    few = ["--all", "--steps", "2", "--no-switches", "--no-truth"]
    return parse_compare([*few, "--output", str(folder), *arguments])[0]


@pytest.mark.parametrize("family", ["sdxl", "flux", None])
def test_all_of_one_family(family, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "jobs", lambda family: asked.append(family.name) or [])
    asked = []
    chosen = [] if family is None else ["--family", family, "--model", f"{ROOT}/demo/{family}"]
    assert write_table(parse_all(tmp_path, *chosen)) == 0
    assert asked == ([family] if family else ["sdxl", "flux"]) and (tmp_path / "parity.md").exists()


def test_every_pair_of_flux_gets_its_row(tmp_path):
    """Over two steps. One that diffusers can't run has a row that says so, and a second one that runs."""
    session = Session.load(FLUX, parse_all(tmp_path))
    made = [make(session, job) for job in jobs(FLUX)]
    runs = {(row["pair"][0], row["pair"][1].split(",")[0]) for row in made if row["cell"] != "does not run"}
    assert len(runs) == len({(ours, theirs) for ours, theirs, _ in FLUX_PAIRS})
    assert sum(row["cell"] == "does not run" for row in made) == 1


def test_the_files_that_all_writes(tmp_path, monkeypatch, capsys):
    pairs = [("euler", "DDIMScheduler(clip_sample=False)"), ("heun", "LMSDiscreteScheduler")]
    monkeypatch.setattr(table, "SDXL_PAIRS", pairs)
    monkeypatch.setattr(table, "LEVELS", {"own": None})
    assert write_table(parse_all(tmp_path, "--family", "sdxl")) == 1
    rows = json.loads((tmp_path / "parity.json").read_text())
    assert [(*row["pair"], row["identical"]) for row in rows] == [(*pairs[0], True), (*pairs[1], False)]
    assert "`heun`" in (tmp_path / "parity.md").read_text() and "sdxl 2 of 2" in capsys.readouterr().out


def test_the_rows_of_sdxl():
    """Each pair once with its own levels, and with the named ones that its scheduler has."""
    levels = {name: {job.levels for job in jobs(SDXL) if name in job.pair[1]} for name in ("DDIM", "Heun")}
    assert levels == {"DDIM": {"own"}, "Heun": {"own", "Karras", "exponential", "beta"}}
