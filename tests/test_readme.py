"""What the README shows runs as it stands."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def test_the_example_of_every_operator_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert "native" in capsys.readouterr().out


def test_the_two_commands_are_named() -> None:
    for command in ("make demo", "make test"):
        assert command in README
