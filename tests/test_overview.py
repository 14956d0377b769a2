"""The page of all results: what is missing is said, and lifts have no base of their own."""

import shutil

from files import ROOT
from tables import overview
from tables.seeds import cell


def test_a_paper_without_values_is_said_to_be_missing(tmp_path):
    (tmp_path / "values").mkdir()
    for path in (ROOT / "results" / "values").glob("qualeqs-*.json"):
        shutil.copy(path, tmp_path / "values")
    overview.write(tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert page.count("Not measured by the code as it stands.") == 2  # of three papers
    assert "| QualEQS |" in page and "| IceBreaker |" not in page


def test_pe_has_no_lift_over_itself():
    values = {m: {"utility": {"u": x}} for m, x in (("PE", 0.1), ("SFT", 0.3))}
    seeds = [{"values": values}]
    assert cell(seeds, "PE", "r_score", ".1f") == "–"
    assert cell(seeds, "SFT", "r_score", ".1f") == "0.2 [0.2, 0.2]"
    assert cell(seeds, "SFT", "click_rate", ".1f") == "–"
