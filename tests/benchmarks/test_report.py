"""The report: tables, what figures are worth, README's region, plots; old records are read as new ones."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from fastllama_benchmarks import readme
from fastllama_benchmarks.plots import plot
from fastllama_benchmarks.readme import BEGIN, END, figures, fill
from fastllama_benchmarks.records import read, read_all
from fastllama_benchmarks.report import cells, command, console, markdown

DATA = Path(__file__).parent / "data"
RECORDS = read(DATA / "records.jsonl")
ONE_B = next(record for record in RECORDS[::-1] if record["model"] == readme.ONE_B and record["kind"] == "decode")
PAGE = f"# Title\n\n{BEGIN}\nold\n{END}\n\nMore.\n"


def text_of(record: dict[str, Any]) -> str:
    """What is printed on a terminal of 80 columns, on one line."""
    output = io.StringIO()
    Console(file=output, width=80).print(console(record))
    assert "…" not in output.getvalue()
    return " ".join(output.getvalue().split())


def with_argv(*argv: str) -> dict[str, Any]:
    return RECORDS[0] | {"environment": RECORDS[0]["environment"] | {"argv": list(argv)}}


# ---- tables --------------------------------------------------------------------------------------------------------


def test_a_decode_shows_the_bound_every_contender_and_what_the_figures_are_worth() -> None:
    text = text_of(RECORDS[1] | {"disturbed": ["it was noisy"]})
    assert text.index("bound") < text.index("fastllama")
    for words in (
        "2662", "62%", "6.84 x", "11.0 MB", "0 compilations, 0 graph recordings", "100.0 MB",
        "llama.cpp reports no tokens", "gpt-fast not run: head_dim", "DISTURBED: it was noisy",
    ):  # fmt: skip
        assert words in text, words


def test_every_committed_record_can_be_shown() -> None:
    for record in [*read_all(), *RECORDS]:
        assert "fastllama" in text_of(record) or record["kind"] in ("kernels", "speculation")
        if record["kind"] != "launches":
            assert markdown(cells(record)).count("\n") >= 2


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("fastllama", "bench", "--record", "/a/b", "--new-tokens", "9", "-q"), "fastllama bench --new-tokens 9"),
        (("fastllama", "bench", "--json=-", "--plot", "x.png"), "fastllama bench"),
        (("fastllama", "bench", "--gpt-fast", "/home/me/g"), "fastllama bench --gpt-fast DIR"),
        (("__main__.py", "bench"), "fastllama bench"),
        (("cli.py", "decode", "--batch", "1", "--record=/r"), "fastllama bench decode --batch 1"),
    ],
)
def test_commands_are_shown_without_places_and_outputs(argv, expected) -> None:
    assert command(with_argv(*argv)) == expected


# ---- README --------------------------------------------------------------------------------------------------------


def test_the_region_is_one_small_table_its_origins_and_who_wins() -> None:
    region = figures(RECORDS)
    header, _, *rows = [line for line in region.splitlines() if line.startswith("|")]
    assert header.count("|") <= 7
    assert len(rows) <= 3
    assert "| tokens/s, batch 1 | fastllama | transformers |" in header + "|"
    assert "16.1" in rows[0]
    assert "Example CPU, 2 threads, torch 2.13.0" in region
    assert "memory-bandwidth utilisation" in region
    assert figures(RECORDS[::-1]) == region, "the order of the records does not matter"
    assert figures([]) == ""


@pytest.mark.parametrize(
    ("peers", "words"),
    [
        ({"transformers": (8.0, True)}, "fastllama is 2.00 times as fast as transformers, at 62 %"),
        ({"gpt-fast": (4.0, True), "llama.cpp": (20.0, None)}, "4.00 times as fast as gpt-fast, and 20 % slower than"),
        ({"llama.cpp": (20.0, None)}, "| 20.0\\* |"),
        ({"gpt-fast": (20.0, False), "transformers": (8.0, True)}, "| 8.00 | wrong output |"),
    ],
)
def test_sentences_follow_from_the_records(peers, words) -> None:
    found = {
        name: {"tokens_per_second": speed, "parity": parity, "ratio": 16.0 / speed}
        for name, (speed, parity) in peers.items()
    }
    sizes = {"dtype": "bfloat16", "prompt_len": 64, "batch": 1, "sweep": None, "tokens_per_second": 16.0, "mbu": 0.62}
    assert words in figures([ONE_B | sizes | {"device": "cpu", "peers": found}])


def test_where_fastllama_loses_a_sentence_says_so() -> None:
    region = figures(RECORDS)
    assert "It is slower to the first token" in region
    assert "at a first start with empty compile caches (19.0 s; transformers 8.00 s" in region
    assert "The machine was not quiet" not in region
    noisy = [record | {"disturbed": ["the memory bandwidth varied"]} for record in RECORDS]
    assert "The machine was not quiet: the memory bandwidth varied." in figures(noisy)
    faster = [record | {"ttft_ms": 1.0} if record["kind"] == "prefill" else record for record in RECORDS]
    assert "a prompt of 512" not in figures(faster)


def test_only_what_is_between_the_markers_changes() -> None:
    assert fill(PAGE, "| a |") == f"# Title\n\n{BEGIN}\n\n| a |\n\n{END}\n\nMore.\n"
    assert fill(fill(PAGE, "| a |"), "") == f"# Title\n\n{BEGIN}\n{END}\n\nMore.\n"
    for page in ("", BEGIN, END + BEGIN, f"{BEGIN}{END}{BEGIN}{END}"):
        with pytest.raises(ValueError, match="figures:begin"):
            fill(page, "")


def run(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(readme.main)
    return CliRunner().invoke(app, list(arguments))


def test_the_page_is_written_and_then_found_up_to_date(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(PAGE)
    arguments = ("--readme", str(page), "--records", str(DATA))
    stale = run(*arguments, "--check")
    assert stale.exit_code == 1
    assert page.read_text() == PAGE
    assert (
        stale.stderr == "fastllama: error: README.md is not what the records say: run fastllama bench report --readme\n"
    )
    assert run(*arguments).exit_code == 0
    assert "Llama-3.2-1B shape" in page.read_text()
    assert run(*arguments, "--check").exit_code == 0


def test_the_readme_shows_what_the_committed_records_say() -> None:
    assert run("--check").exit_code == 0


# ---- plots ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["decode", "grid", "kernels"])
def test_equal_records_give_equal_plots(tmp_path: Path, kind: str) -> None:
    decodes = [RECORDS[1] | {"batch": batch} for batch in (1, 2, 4)]
    kernels = [record for record in RECORDS if record["kind"] == "kernels"]
    records = {"decode": decodes[:1], "grid": decodes, "kernels": kernels}[kind]
    for name in ("a.svg", "b.svg"):
        plot(records, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
