"""Records: the schema, what is refused, and that files only grow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastllama_benchmarks import records
from fastllama_benchmarks.environment import commit, environment
from fastllama_benchmarks.records import RecordError, append, new_record, read, read_all

FIELDS = {
    "model": "demo", "dtype": "bfloat16", "device": "cpu", "parity": True, "batch": 1, "prompt_len": 8,
    "new_tokens": 4, "capacity": None, "rounds": 2, "tokens_per_second": 10.0, "tpot_ms": {"p20": 1.0}, "ttft_ms": 3.0,
    "bytes_per_step": 5, "bandwidth_gb_s": 1.0, "memory_bandwidth_gb_s": 2.0, "mbu": 0.5, "floor_ms": 0.1,
    "peak_memory_bytes": None, "compiles_after_warmup": 0, "recordings_after_warmup": 0, "peers": {},
}  # fmt: skip


def test_a_record_says_when_and_where_and_is_read_back(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["/home/me/bin/fastllama", "bench", "--record", str(tmp_path / "r.jsonl"), "./x"])
    record = new_record("decode", FIELDS, environment())
    append(record, tmp_path / "new" / "r.jsonl")
    append(record, tmp_path / "new" / "r.jsonl")
    assert read(tmp_path / "new" / "r.jsonl") == [record, record]
    assert record["schema"] == records.SCHEMA
    found = record["environment"]
    assert {"commit", "dirty", "packages", "cpu", "cpu_instruction_sets", "threads", "system", "device"} <= found.keys()
    assert found["threads"] == torch.get_num_threads()
    assert found["cpu"]
    assert found["argv"] == ["fastllama", "bench", "--record", "r.jsonl", "./x"]


def test_a_record_whose_outputs_are_wrong_is_refused(tmp_path: Path) -> None:
    record = new_record("decode", FIELDS | {"parity": False}, {})
    with pytest.raises(RecordError, match="parity"):
        append(record, tmp_path / "r.jsonl")
    assert not (tmp_path / "r.jsonl").exists()


def test_every_field_at_fault_is_named() -> None:
    faulty = {name: value for name, value in FIELDS.items() if name != "mbu"} | {"batch": "1", "ttft_ms": True}
    with pytest.raises(RecordError, match="not a decode record") as caught:
        new_record("decode", faulty, {})
    assert all(name in str(caught.value) for name in ("batch is str", "mbu is missing", "ttft_ms is bool"))


def test_new_records_of_every_kind_have_the_bandwidth_and_old_ones_without_it_are_read(tmp_path: Path) -> None:
    fields = {name: FIELDS[name] for name in ("model", "dtype", "device", "parity")} | {"schemes": {}, "text": "a"}
    with pytest.raises(RecordError, match="memory_bandwidth_gb_s is missing"):
        new_record("quality", fields, {})
    old = new_record("quality", fields | {"memory_bandwidth_gb_s": 2.0}, {})
    del old["memory_bandwidth_gb_s"]
    append(old, tmp_path / "r.jsonl")
    assert read(tmp_path / "r.jsonl") == [old]


def test_the_committed_records_follow_the_schema() -> None:
    for record in read_all():
        assert record["environment"]["commit"]


def test_the_environment_reports_commit_and_changes(tmp_path: Path, new_repository) -> None:
    assert commit(tmp_path) == {"commit": None, "dirty": None}
    revision = new_repository(tmp_path)("one", file="1")
    assert commit(tmp_path) == {"commit": revision, "dirty": False}
    (tmp_path / "benchmarks" / "records").mkdir(parents=True)
    (tmp_path / "benchmarks" / "records" / "r.jsonl").write_text("")
    assert commit(tmp_path)["dirty"] is False
    (tmp_path / "file").write_text("2")
    assert commit(tmp_path)["dirty"] is True
