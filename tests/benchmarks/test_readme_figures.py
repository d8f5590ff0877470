"""README.md's figures: which records are shown, how, and that a table that is out of date is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastllama_benchmarks import labels
from fastllama_benchmarks.readme import BEGIN, END, ROWS, ReadmeError, figures, fill, main, newest, number
from fastllama_benchmarks.records import read

DATA = Path(__file__).parent / "data"
RECORDS = read(DATA / "records.jsonl")
PAGE = f"# Title\n\n{BEGIN}\nold\n{END}\n\nMore.\n"


def row(table: str, label: str) -> list[str]:
    """The cells of the row whose label starts so."""
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {label}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def named(table: str, label: str) -> dict[str, str]:
    header = [cell.strip() for cell in table.splitlines()[0].strip("|").split("|")]
    return dict(zip(header, row(table, label), strict=True))


def with_argv(*argv: str) -> dict[str, Any]:
    return RECORDS[0] | {"environment": RECORDS[0]["environment"] | {"argv": list(argv)}}


# ---- the table -----------------------------------------------------------------------------------------------------


def test_a_decode_shows_the_newest_record_with_its_peers() -> None:
    cells = named(figures(RECORDS), "demo checkpoint")
    assert cells["fastllama"] == "2662"
    assert (cells["transformers"], cells["static+compile"]) == ("389", "612")
    assert (cells["gpt-fast"], cells["llama.cpp"]) == ("not run", "1800 (unchecked)")
    assert (cells["ratio"], cells["MBU"]) == ("6.84 x", "62 %")


def test_wrong_outputs_show_no_figure() -> None:
    cells = named(figures(RECORDS), "1.24B, tokens/s")
    assert (cells["fastllama"], cells["gpt-fast"]) == ("16.1", "wrong output")


def test_points_of_a_sweep_are_no_plain_decodes() -> None:
    newer = [record for record in RECORDS if record.get("sweep") == "batch"]
    assert max(record["time"] for record in newer) > "2026-01-05"
    assert named(figures(RECORDS), "1.24B, tokens/s")["fastllama"] == "16.1"


def test_prefill_and_startup_show_times() -> None:
    table = figures(RECORDS)
    assert named(table, "1.24B, 512-token prompt")["fastllama"] == "1850"
    assert named(table, "1.24B, 512-token prompt")["ratio"] == "1.03 x"
    cells = named(table, "1.24B, process to first token")
    assert (cells["fastllama"], cells["transformers"]) == ("19.0 / 5.80", "8.00 / 7.90")
    assert (cells["ratio"], cells["llama.cpp"]) == ("0.42 x / 1.36 x", "not run")


def test_capacities_are_compared_by_turns() -> None:
    cells = named(figures(RECORDS), "1.24B, 64 live tokens in 8192 slots / in 128")
    assert cells["fastllama"] == "61.7 / 60.6"
    alone = [record | {"peers": {}} for record in RECORDS]
    assert "64 live tokens" not in figures(alone)


def test_rows_say_where_they_were_measured() -> None:
    table = figures(RECORDS)
    assert named(table, "demo")["on"] == named(table, "1.24B, tokens/s")["on"] == "1"
    assert named(table, "8.03B on a GPU")["on"] == "2"
    assert "1. Example CPU, 2 threads, torch 2.13.0, commit 012345678, 2026-01-03\n" in table
    assert table.endswith("2. Example GPU, torch 2.13.0, CUDA 13.0, commit 012345678 with changes, 2026-01-04")


def test_rows_without_a_record_and_peers_that_never_ran_are_left_out() -> None:
    table = figures(RECORDS[:1])
    assert table.count("\n| ") == 1
    assert "gpt-fast" not in table
    assert figures([]) == ""


def test_the_order_of_the_records_does_not_matter() -> None:
    assert figures(RECORDS[::-1]) == figures(RECORDS)


def test_of_equally_old_records_the_last_counts() -> None:
    twins = [RECORDS[0] | {"tokens_per_second": speed} for speed in (1.0, 2.0)]
    assert newest(twins, {"kind": "decode"}) == twins[1]


def test_every_row_takes_records_of_one_kind_model_precision_and_device() -> None:
    for each in ROWS:
        assert each.fields.keys() >= {"kind", "model", "dtype", "device"}
    assert len({each.label for each in ROWS}) == len(ROWS)


@pytest.mark.parametrize(("value", "text"), [(2662.4, "2662"), (100, "100"), (61.73, "61.7"), (9.5, "9.50")])
def test_numbers_have_three_digits(value, text) -> None:
    assert number(value) == text


# ---- the command that measured it ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("fastllama", "bench", "--record", "/a/b", "--new-tokens", "9", "-q"), "fastllama bench --new-tokens 9"),
        (("fastllama", "bench", "--json=-", "--plot", "x.png"), "fastllama bench"),
        (("fastllama", "bench", "--gpt-fast", "/home/me/g"), "fastllama bench --gpt-fast DIR"),
        (("__main__.py", "bench"), "fastllama bench"),
        (
            ("gpu_suite.py", "--step", "1b", "--workspace", "/tmp/w", "--records", "/r", "--profile", "/p"),
            "python -m benchmarks.gpu_suite --only 1b",
        ),
    ],
)
def test_commands_are_shown_without_places_and_outputs(argv, expected) -> None:
    assert labels.command(with_argv(*argv)) == expected


# ---- the page ------------------------------------------------------------------------------------------------------


def test_only_what_is_between_the_markers_changes() -> None:
    assert fill(PAGE, "| a |") == f"# Title\n\n{BEGIN}\n\n| a |\n\n{END}\n\nMore.\n"
    assert fill(fill(PAGE, "| a |"), "") == f"# Title\n\n{BEGIN}\n{END}\n\nMore.\n"


@pytest.mark.parametrize("page", ["", BEGIN, END + BEGIN, f"{BEGIN}{END}{BEGIN}{END}"])
def test_markers_that_are_not_there_once_are_told(page) -> None:
    with pytest.raises(ReadmeError, match="figures:begin"):
        fill(page, "")


def test_the_page_is_written_and_then_found_up_to_date(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "README.md"
    page.write_text(PAGE)
    arguments = ["--readme", str(page), "--records", str(DATA)]
    assert main([*arguments, "--check"]) == 1
    assert page.read_text() == PAGE
    assert capsys.readouterr().err == (
        "readme: README.md is not what the records say: run python -m benchmarks.readme\n"
    )
    assert main(arguments) == 0
    assert "demo checkpoint" in page.read_text()
    assert main([*arguments, "--check"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("content", ["{", json.dumps({"schema": 1, "kind": "decode"})])
def test_bad_records_and_pages_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], content) -> None:
    page = tmp_path / "README.md"
    page.write_text(PAGE)
    (tmp_path / "bad.jsonl").write_text(content + "\n")
    assert main(["--readme", str(page), "--records", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["--readme", str(tmp_path / "none.md"), "--records", str(DATA)]) == 1
    assert page.read_text() == PAGE


def test_the_readme_shows_what_the_committed_records_say() -> None:
    assert main(["--check"]) == 0
