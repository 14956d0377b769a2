"""Wrong input ends in one message; the README's map points at things that exist."""

import re
import subprocess
import sys

import pytest

from config import ROOT


def run(*words, folder):
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), f"run.root={folder}", *words],
        capture_output=True,
        text=True,
        cwd=folder,
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dpo.bata=1"], "did you mean 'dpo.beta'?"),
        (["data.users=nothing.jsonl"], "data.users=nothing.jsonl: no such file"),
        (["data.impressions=" + __file__], "needs data.users"),
        (["--config", "nothing.yaml"], "no such config file"),
    ],
)
def test_wrong_input_is_one_message_and_exit_code_2(words, message, tmp_path):
    done = run(*words, folder=tmp_path)
    assert done.returncode == 2 and message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_bad_line_is_named_before_any_model_loads(tmp_path):
    (tmp_path / "users.jsonl").write_text('{"user_id": "a", "sessions": []}\n{"user_id": 3}\n')
    done = run("data.users=users.jsonl", folder=tmp_path)
    assert done.returncode == 2 and "users.jsonl:2: user_id:" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_row_of_the_readme_map_exists():
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| (?:Eq|Algorithm).*\| (.+) \| (.+) \|$", readme, re.MULTILINE)
    assert len(rows) >= 9
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for code, test in rows:
        module = None
        for name in re.findall(r"`([\w.]+)`", code):
            module, _, symbol = name.rpartition(".") if "." in name else (module, "", name)
            source = (ROOT / f"{module}.py").read_text()
            assert re.search(rf"^(?:def|class) {symbol}\b", source, re.MULTILINE), name
        for name in re.findall(r"`(\w+)`", test):
            assert f"def {name}(" in tests, name
