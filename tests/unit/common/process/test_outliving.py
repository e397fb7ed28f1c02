"""What is printed while nobody reads it."""

import io
import os

import pytest

from common.process.outliving import Outliving, outliving_output


def test_a_reader_that_goes_away_is_no_error() -> None:
    read, write = os.pipe()
    with os.fdopen(write, "w", encoding="utf-8", closefd=False) as pipe:
        stream = Outliving(pipe)
        print("step 1", file=stream, flush=True)
        assert os.read(read, 100) == b"step 1\n"
        os.close(read)
        for step in (2, 3):
            print(f"step {step}", file=stream, flush=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), write)  # for what the buffer holds still
    os.close(write)


@pytest.mark.parametrize(("encoding", "shown"), [("utf-8", "\\ud83d \u00e9\n"), ("ascii", "\\ud83d \\xe9\n")])
def test_what_has_no_code_is_escaped(encoding: str, shown: str) -> None:
    file = io.BytesIO()
    stream = Outliving(io.TextIOWrapper(file, encoding=encoding))
    print("\ud83d \u00e9", file=stream, flush=True)
    assert file.getvalue().decode(encoding) == shown
    assert stream.encoding == encoding


def test_all_of_a_block_is_printed_like_that(capsys: pytest.CaptureFixture[str]) -> None:
    with outliving_output():
        print("half of a pair: \ud83d")
    print("as before")
    assert capsys.readouterr().out == "half of a pair: \\ud83d\nas before\n"
