"""`ai-ticket fetch-model`."""

from pathlib import Path

from ai_ticket.backend.model import ModelError
from ai_ticket.cli import main


def test_the_path_alone_on_stdout(monkeypatch, capsys):
    def fetch(report):
        report("half of it")
        return Path("/models/tiny.gguf")

    monkeypatch.setattr("ai_ticket.backend.model.fetch", fetch)
    assert main(["fetch-model"]) == 0
    assert capsys.readouterr() == ("/models/tiny.gguf\n", "half of it\n")


def test_failure(monkeypatch, capsys):
    def fetch(report):
        raise ModelError("the checksum is wrong")

    monkeypatch.setattr("ai_ticket.backend.model.fetch", fetch)
    assert main(["fetch-model"]) == 1
    assert capsys.readouterr() == ("", "error: model_error: the checksum is wrong\n")
