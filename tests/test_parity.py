"""The scripts of docs/parity.md run and show what they say, and the README has `compare.py --all`'s table."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from gallery import parity
from gallery.options import parse_compare
from gallery.parity import FLUX_PAIRS, _flux, overview

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


def test_a_script_runs_by_itself(tmp_path):
    path = tmp_path / "sign.py"
    path.write_text(next(code for title, code in SCRIPTS if "a sign" in title))
    done = subprocess.run([sys.executable, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_readme_has_the_table_that_was_made():
    rows = json.loads((ROOT / "output" / "parity.json").read_text(encoding="utf-8"))
    table = "\n".join(overview(rows))
    assert table in (ROOT / "README.md").read_text(encoding="utf-8")
    assert table in (ROOT / "output" / "parity.md").read_text(encoding="utf-8")
    pairs = {tuple(row["pair"]) for row in rows}
    assert len(pairs) >= 18 and {row["levels"] for row in rows} == {"own", "Karras", "exponential", "beta"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sampler", "heun"], "goes without --sampler"),
        (["--schedule", "karras"], "goes without --schedule"),
        (["--html", "report.html"], "goes without --html"),
        (["--model", "demo/sdxl"], "needs --family"),
    ],
)
def test_all_refuses_what_it_would_not_heed(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        parse_compare(["--all", *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("family", ["sdxl", "flux", None])
def test_all_of_one_family(family, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(parity, "_sdxl", lambda options: asked.append("sdxl") or [])
    monkeypatch.setattr(parity, "_flux", lambda options: asked.append("flux") or [])
    chosen = [] if family is None else ["--family", family, "--model", f"{ROOT}/demo/{family}"]
    assert parity.write_parity(parse_compare(["--all", "--output", str(tmp_path), *chosen])[0]) == 0
    assert asked == ([family] if family else ["sdxl", "flux"]) and (tmp_path / "parity.md").exists()


def test_every_pair_of_flux_gets_its_row():
    """Over two steps. One that diffusers can't run has a row that says so, and a second one that runs."""
    options, _ = parse_compare(["--all", "--steps", "2", "--no-switches", "--no-truth"])
    rows = _flux(options)
    runs = {(row["pair"][0], row["pair"][1].split(",")[0]) for row in rows if row["cell"] != "does not run"}
    assert len(runs) == len({(ours, theirs) for ours, theirs, _ in FLUX_PAIRS})
    assert sum(row["cell"] == "does not run" for row in rows) == 1
