"""Two kills of a compilation, and that the tool sees what would be wrong. The full run is `make kill`."""

import importlib
import re
import subprocess
import sys


def test_two_kills(tools):
    ended = subprocess.run([sys.executable, tools / "kill_compile.py", "--kills", "2"], capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = ended.stdout.splitlines()
    assert lines[0].startswith("2 kills of a run of ") and lines[3].startswith("0 wrong; two undisturbed runs and every resumed one")
    assert sum(map(int, re.findall(r" (\d+)", lines[2]))) == 2


def test_timings_alone_may_differ(tools, tmp_path):
    from artifact_trust.compiling import contents

    kill = importlib.import_module("kill_compile")
    for name, report in (("a", '{"seconds": {"total": 1.5}, "plan_kl": 0.5}'), ("b", '{"plan_kl": 0.5, "seconds": {"total": 2.5}}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(report)
        (tmp_path / name / "tokenizer.json").write_text("{}")
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert kill.difference(a, b) == ""
    (tmp_path / "b" / "report.json").write_text('{"plan_kl": 0.25, "seconds": {"total": 2.5}}')
    (tmp_path / "b" / "tokenizer.json").unlink()
    assert kill.difference(a, contents(tmp_path / "b")) == "report.json, tokenizer.json"
