"""Standard streams that nobody reads any more: writing to them neither waits nor fails."""

from __future__ import annotations

import os
import sys

import pytest

from megatron_lite import output
from megatron_lite.background import Lost
from megatron_lite.output import Output, output_in_background


@pytest.fixture
def pipe():
    """(reading end, a text stream at the writing end)."""
    reading, writing = os.pipe()
    stream = os.fdopen(writing, "w", encoding="utf-8")
    yield reading, stream
    stream.close()
    os.close(reading)


def test_all_that_is_written_arrives_in_order(pipe):
    lost = Lost()
    out = Output(pipe[1], name="it", on_loss=lost)
    for number in range(100):
        print(f"line {number} \u00e9", file=out, flush=True)
    out.finish()
    assert os.read(pipe[0], 1 << 16).decode() == "".join(f"line {number} \u00e9\n" for number in range(100))
    assert lost.reasons == []


def test_a_full_pipe_is_left_behind(pipe, monkeypatch, recwarn):
    monkeypatch.setattr(output, "PATIENCE_SECONDS", 0.1)
    lost = Lost()
    out = Output(pipe[1], name="it", on_loss=lost)
    out.write("x" * (1 << 20))  # a pipe takes 64 KiB
    out.finish()
    pipe[1].write("y" * (1 << 20))  # to nowhere: else this would wait for ever
    pipe[1].flush()
    assert [reason.split(":")[0] for reason in lost.reasons] == ["it is left out"]
    assert "it is left out" in str(recwarn.pop(UserWarning).message)


def test_a_closed_pipe_is_said_once_and_harms_nobody(monkeypatch, recwarn):
    reading, writing = os.pipe()
    os.close(reading)
    lost = Lost()
    with os.fdopen(writing, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with output_in_background(lost):
            for _ in range(3):
                print("unheard", flush=True)
        stream.write("Python's own flush at its end")
    assert len(lost.reasons) == 1
    assert "standard output is left out: BrokenPipe" in str(recwarn.pop(UserWarning).message)


def test_a_stream_that_was_closed_from_the_start(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with output_in_background(Lost()):
        print("unheard")
    assert sys.stdout is None
