"""The scripts of docs/parity.md run and show what they say, and the page has `compare.py --all`'s table."""

from __future__ import annotations

import json
import re

import pytest
from conftest import ROOT

from gallery.options import FLUX, SDXL
from gallery.refused import Refused
from parity import table
from parity.command import parse_compare
from parity.table import FLUX_PAIRS, jobs, load, make, overview, write_table

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
    session = load(FLUX, parse_all(tmp_path))
    made = [make(session, job) for job in jobs(FLUX)]
    runs = {(row["pair"][0], row["pair"][1].split(",")[0]) for row in made if row["cell"] != "does not run"}
    assert len(runs) == len({(ours, theirs) for ours, theirs, _ in FLUX_PAIRS})
    assert sum(row["cell"] == "does not run" for row in made) == 1


def test_all_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    """A row that is there with the same settings is not made again; with others it is."""
    monkeypatch.setattr(
        table, "SDXL_PAIRS", [("euler", "DDIMScheduler(clip_sample=False)"), ("heun", "LMSDiscreteScheduler")]
    )
    monkeypatch.setattr(table, "LEVELS", {"own": None})
    made = []

    def stopping(session, job):
        made.append(job.pair[0])
        if len(made) == 2:
            raise KeyboardInterrupt
        return make(session, job)

    monkeypatch.setattr(table, "make", stopping)
    chosen = ("--family", "sdxl", "--resume")
    with pytest.raises(KeyboardInterrupt):
        write_table(parse_all(tmp_path, *chosen))
    first = json.loads((tmp_path / "parity.json").read_text())
    assert [row["pair"][0] for row in first] == ["euler"] and not (tmp_path / "parity.md").exists()
    assert write_table(parse_all(tmp_path, *chosen)) == 1
    assert made == ["euler", "heun", "heun"]
    assert json.loads((tmp_path / "parity.json").read_text())[0] == first[0]
    assert "`heun`" in (tmp_path / "parity.md").read_text() and "sdxl 2 of 2" in capsys.readouterr().out
    write_table(parse_all(tmp_path, *chosen, "--seed", "3"))
    assert made[3:] == ["euler", "heun"]


def test_a_table_that_is_none_is_not_overwritten(tmp_path):
    (tmp_path / "parity.json").write_text('{"mine": 1}')
    with pytest.raises(Refused, match="parity.json is no table"):
        write_table(parse_all(tmp_path, "--resume"))
    assert (tmp_path / "parity.json").read_text() == '{"mine": 1}'


def test_the_rows_of_sdxl():
    """Each pair once with its own levels, and with the named ones that its scheduler has."""
    levels = {name: {job.levels for job in jobs(SDXL) if name in job.pair[1]} for name in ("DDIM", "Heun")}
    assert levels == {"DDIM": {"own"}, "Heun": {"own", "Karras", "exponential", "beta"}}
