"""What a batch has written: kept, resumed, guarded."""

import json
import os
import stat

import pytest

from ai_ticket.cli.batch_input import Survey
from ai_ticket.cli.batch_output import open_output
from ai_ticket.cli.outcome import CommandError

INPUT = Survey(sha256="5a", lines=20, events=20)
OK = {"status": 200, "completion": "é"}
ERROR = {"status": 422, "error": "prompt_extraction_failed"}


@pytest.fixture
def opened():
    """Opens `out`, and closes it in the end."""
    outputs = []

    def opened(surveyed=INPUT, *, name="out", overwrite=False, retry_failed=False):
        outputs.append(open_output(name, surveyed, overwrite=overwrite, retry_failed=retry_failed))
        return outputs[-1]

    yield opened
    for output in outputs:
        output.close()


@pytest.fixture
def earlier(tmp_path):
    """The output of a run that was ended after these answers."""

    def earlier(*results, surveyed=INPUT, torn=b""):
        output = open_output("out", surveyed, overwrite=False, retry_failed=False)
        for result in results:
            output.write(result)
        output.close()
        with (tmp_path / "out").open("ab") as file:
            file.write(torn)

    return earlier


def content(tmp_path):
    return [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]


def done(output):
    return [number for number in range(INPUT.lines) if number in output.done]


def test_an_answer_is_there_at_once(opened, tmp_path):
    output = opened()
    assert output.resumable
    assert (output.done.count, done(output)) == (0, [])
    output.write({"index": 3} | OK)
    assert content(tmp_path) == [{"index": 3} | OK]


def test_resuming(opened, earlier, tmp_path):
    """What is there stays and is known; what comes goes after it."""
    earlier({"index": 8} | OK, {"index": 3} | ERROR)
    output = opened()
    assert (output.done.count, output.done.failed, done(output)) == (2, 1, [3, 8])
    output.write({"index": 0} | OK)
    assert [result["index"] for result in content(tmp_path)] == [8, 3, 0]


@pytest.mark.parametrize("torn", [b'{"index":4,"sta', b'{"index":4,"status":200}', b"\0\0\0"])
def test_a_torn_last_line_is_cut_off(torn, opened, earlier, tmp_path):
    earlier({"index": 8} | OK, torn=torn)
    output = opened()
    assert done(output) == [8]
    output.write({"index": 4} | OK)
    assert [result["index"] for result in content(tmp_path)] == [8, 4]


def test_nothing_but_a_torn_line(opened, earlier, tmp_path):
    earlier(torn=b'{"ind')
    assert done(opened()) == []
    assert content(tmp_path) == []


def test_the_answers_to_another_input_are_not_touched(opened, earlier, tmp_path):
    earlier({"index": 0} | OK, torn=b"{")
    before = (tmp_path / "out").read_bytes()
    other = Survey(sha256="5b", lines=20, events=20)
    with pytest.raises(CommandError, match="another input") as raised:
        opened(other)
    assert "--overwrite" in raised.value.details
    assert (tmp_path / "out").read_bytes() == before
    assert done(opened(other, overwrite=True)) == []
    assert content(tmp_path) == []
    assert json.loads((tmp_path / "out.state").read_text())["sha256"] == "5b"


def test_a_file_that_is_no_output_is_not_touched(opened, tmp_path):
    (tmp_path / "out").write_text("my diary")
    with pytest.raises(CommandError, match="not of an earlier run"):
        opened()
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out").read_text() == "my diary"


@pytest.mark.parametrize("line", [b"my diary", b"{}", b'{"index":20,"status":200}', b'{"index":-1,"status":200}'])
def test_a_line_that_is_no_answer(line, opened, earlier):
    earlier({"index": 0} | OK, torn=line + b"\n")
    with pytest.raises(CommandError, match="Line 2 of out"):
        opened()


def test_one_run_at_a_time(opened, earlier):
    earlier({"index": 0} | ERROR)
    first = opened(retry_failed=True)
    for options in ({}, {"overwrite": True}, {"retry_failed": True}):
        with pytest.raises(CommandError, match="Another run"):
            opened(**options)
    first.close()
    first.close = lambda: None
    assert done(opened()) == []


def test_sending_failed_ones_again(opened, earlier, tmp_path):
    """Their lines go, the others and the file's mode stay; nothing else is left."""
    earlier({"index": 8} | OK, {"index": 3} | ERROR, {"index": 1} | OK, torn=b"{")
    (tmp_path / "out").chmod(0o640)
    output = opened(retry_failed=True)
    assert (output.done.count, output.done.failed, done(output)) == (2, 0, [1, 8])
    output.write({"index": 3} | OK)
    assert [result["index"] for result in content(tmp_path)] == [8, 1, 3]
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o640
    assert sorted(os.listdir(tmp_path)) == ["out", "out.state"]


def test_the_file_behind_a_link(opened, earlier, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "out").symlink_to("folder/real")
    earlier({"index": 3} | ERROR)
    opened(retry_failed=True).write({"index": 3} | OK)
    assert (tmp_path / "out").is_symlink()
    assert json.loads((tmp_path / "folder" / "real").read_text()) == {"index": 3} | OK


def test_an_input_that_can_be_read_only_once(opened, earlier, tmp_path):
    """Its output is guarded as well, but never resumed."""
    output = opened(None)
    assert not output.resumable
    output.write({"index": 0} | OK)
    with pytest.raises(CommandError, match="Another run"):
        opened(None, overwrite=True)
    output.close()
    output.close = lambda: None
    with pytest.raises(CommandError, match="can't be resumed"):
        opened(None)
    with pytest.raises(CommandError, match="another input"):
        opened()
    assert content(tmp_path) == [{"index": 0} | OK]
    opened(None, overwrite=True)
    assert content(tmp_path) == []


@pytest.mark.parametrize("name", ["-", "/dev/null"])
def test_an_output_that_is_no_file(name, opened, tmp_path, capfd):
    output = opened(name=name)
    assert not output.resumable
    output.write({"index": 0} | OK)
    assert capfd.readouterr().out == ('{"index":0,"status":200,"completion":"é"}\n' if name == "-" else "")
    assert os.listdir(tmp_path) == []
    for options in ({"overwrite": True}, {"retry_failed": True}):
        with pytest.raises(CommandError) as raised:
            opened(name=name, **options)
        assert raised.value.status == 2


def test_failed_ones_of_a_pipe(opened):
    with pytest.raises(CommandError) as raised:
        opened(None, retry_failed=True)
    assert raised.value.status == 2


def test_a_full_disk(opened):
    """It is told, and no answer is taken for written."""
    with pytest.raises(OSError, match="No space left"):
        opened(name="/dev/full").write({"index": 0} | OK)
