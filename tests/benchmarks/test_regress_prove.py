"""The proof of the gate: equal and slowed heads, interleaved, and what counts as a proof."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from fastllama_benchmarks.regress import prove


@pytest.mark.parametrize(("slowdown", "code"), [("10", 0), ("1", 1)])
def test_equal_and_slowed_heads_are_judged_interleaved(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, slowdown: str, code: int
) -> None:
    asked: list[list[str]] = []

    def invoke(options: list[str]) -> dict[str, Any]:
        asked.append(options)
        return {"exit": int(options[-1] == "10.0"), "headline": ""}  # a gate that sees 10 %, but not 1 %

    monkeypatch.setattr(prove, "invoke", invoke)
    app = typer.Typer()
    app.command()(prove.main)
    common = ["--runs", "2", "--base", "v1", "--slowdown", slowdown, "--log", str(tmp_path / "log")]
    done = CliRunner().invoke(app, [*common, "--", "--threads", "1"])
    assert done.exit_code == code, done.output
    plain = ["--base", "v1", "--head", "v1", "--threads", "1"]
    assert asked == [plain, [*plain, "--slowdown", f"{float(slowdown)}"]] * 2
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "log").read_text().splitlines()]
    assert kinds == ["equal", "slowed"] * 2
    assert f"slowed: {0 if code else 2} of 2 failed" in done.stdout
