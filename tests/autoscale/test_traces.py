"""Traces in their three formats, the sentences for wrong files, and stretching."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscale.traces import Trace, TraceError, load, stretch

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURSTGPT = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
GIVEN = Path(__file__).parents[3] / "shared/traces/azure-llm-2023-code.csv.gz"


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_an_azure_trace_begins_at_0_and_keeps_tenths_of_microseconds(tmp_path: Path):
    lines = AZURE + "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319601,3180,8\n"
    trace = load(written(tmp_path / "t.csv", lines))
    assert trace.arrival_s == pytest.approx([0.0, 0.0520001], abs=1e-6)
    assert trace.prompt_tokens.tolist() == [4808, 3180]
    assert trace.generated_tokens.tolist() == [10, 8]


def test_a_compressed_trace_reads_like_the_plain_one(tmp_path: Path):
    text = AZURE + "2023-11-16 18:17:03,5,6\n2023-11-16 18:18:03,7,8\n"
    plain = load(written(tmp_path / "t.csv", text))
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(text.encode()))
    packed = load(tmp_path / "t.csv.gz")
    assert packed.arrival_s.tolist() == plain.arrival_s.tolist() == [0, 60]


def test_a_burstgpt_trace_leaves_out_requests_that_failed(tmp_path: Path):
    lines = (
        "5,,1.5,ChatGPT,472,18,490,Conversation log\n45,,2,GPT-4,10,0,10,API log\n118,,2,GPT-4,1087,230,1317,API log\n"
    )
    trace = load(written(tmp_path / "t.csv", BURSTGPT + lines))
    assert trace.arrival_s.tolist() == [0, 113]
    assert trace.generated_tokens.tolist() == [18, 230]


def test_a_mooncake_trace_counts_milliseconds(tmp_path: Path):
    lines = (
        '{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46]}\n'
        '{"timestamp": 30482, "input_length": 6472, "output_length": 26, "hash_ids": []}\n'
    )
    trace = load(written(tmp_path / "t.jsonl", lines))
    assert trace.arrival_s.tolist() == [0, 3]
    assert trace.prompt_tokens.tolist() == [6955, 6472]


def test_requests_in_any_order_are_sorted(tmp_path: Path):
    trace = load(written(tmp_path / "t.csv", AZURE + "2023-11-16 00:00:09,2,2\n2023-11-16 00:00:01,1,1\n"))
    assert trace.arrival_s.tolist() == [0, 8]
    assert trace.prompt_tokens.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (AZURE + "2023-11-16 00:00:01,1,1\nyesterday,1,1\n", "line 3: 'yesterday' is no time"),
        (AZURE + "\n2023-11-16 00:00:01,-4,1\n", "line 3: '-4' is no number of tokens"),
        (AZURE + "2023-11-16 00:00:01,4.5,1\n", "line 2: '4.5' is no number of tokens"),
        (AZURE + "2023-11-16 00:00:01,4\n", "line 2: 2 fields; needed: 3 or more"),
        (BURSTGPT + "nan,,,,1,1,2,\n", "line 2: 'nan' is no time"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1}\n{"timestamp": 1}\n', "line 2: no JSON object with"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1}\n\n[1\n', "line 3: no JSON object with"),
        ('{"timestamp": null, "input_length": 1, "output_length": 1}\n', "line 1: None is no time"),
        ("\n\ntime,tokens\n1,2\n", "line 3: 'time,tokens' begins no known trace"),
        ("", "line 1: '' begins no known trace"),
        (AZURE, "holds no request"),
    ],
)
def test_a_wrong_file_is_one_sentence_with_the_line(tmp_path: Path, text: str, said: str):
    with pytest.raises(TraceError) as caught:
        load(written(tmp_path / "t.csv", text))
    assert said in str(caught.value)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_files_that_are_missing_damaged_or_no_text_are_said_to_be(tmp_path: Path):
    with pytest.raises(TraceError, match=r"cannot be read: No such file"):
        load(tmp_path / "none.csv")
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress((AZURE + "2023-11-16 00:00:01,1,1\n" * 50).encode())[:-9])
    with pytest.raises(TraceError, match=r"cannot be read"):
        load(tmp_path / "cut.csv.gz")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TraceError, match=r"is no text"):
        load(tmp_path / "bytes.csv")


@pytest.mark.skipif(not GIVEN.exists(), reason="the given trace lies outside the checkout, and is not there")
def test_the_given_trace_is_what_its_source_says():
    trace = load(GIVEN)
    assert len(trace) == 8819
    assert trace.duration_s == pytest.approx(3435.948, abs=0.001)
    assert trace.prompt_tokens.mean() == pytest.approx(2047.8, abs=0.1)


SHORT = Trace(np.array([0.0, 1.0, 1.0, 50.0]), np.array([1, 2, 3, 4]), np.array([5, 6, 7, 8]))


def test_a_trace_that_is_not_stretched_is_the_same():
    assert stretch(SHORT, None, 1, 0.6, 0) is SHORT


def test_a_whole_rate_scale_repeats_every_request_that_often():
    trace = stretch(SHORT, None, 3, 0.6, 0)
    assert len(trace) == 12
    assert sorted(trace.prompt_tokens.tolist()) == [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    assert trace.duration_s <= 52


def test_a_day_is_busiest_at_14_and_quietest_at_2():
    trace = stretch(SHORT, 24, 20, 0.8, 1)
    per_hour = np.histogram(trace.arrival_s, 24, (0, 86400))[0]
    assert trace.duration_s == pytest.approx(86400, abs=120)
    assert per_hour[13:15].mean() == pytest.approx(9 * per_hour[1:3].mean(), rel=0.1)


@given(scale=st.floats(2, 5), seed=st.integers(0, 5), hours=st.none() | st.floats(0.02, 2))
def test_stretching_is_deterministic_sorted_and_begins_at_0(scale: float, seed: int, hours: float | None):
    one, other = (stretch(SHORT, hours, scale, 0.2, seed) for _ in range(2))
    assert one.arrival_s.tolist() == other.arrival_s.tolist()
    assert one.prompt_tokens.tolist() == other.prompt_tokens.tolist()
    assert one.arrival_s[0] == 0
    assert np.all(np.diff(one.arrival_s) >= 0)


def test_more_requests_than_memory_is_refused():
    with pytest.raises(TraceError, match=r"allowed: 20,000,000 at most"):
        stretch(SHORT, 168, 1e4, 0.6, 0)
