"""What the parent holds for all workers, and what of the settings each of them is told."""

from pathlib import Path

import pytest
import trustme

from ai_ticket.settings import Settings
from ai_ticket.tokens import Token
from ai_ticket.web.tls import CertificateError, TlsConnections, server_context
from ai_ticket.workers.certificate import context_of, read_pem
from ai_ticket.workers.messages import Pem
from ai_ticket.workers.parent import Shared, settings_of_worker

PEM = Pem(b"certificate", b"key")
TOKENS = [Token(b"1" * 32, "one")]


class World:
    def __init__(self, **settings: object) -> None:
        self.told = 0
        self.shared = Shared(Settings(**settings), 3, PEM)  # type: ignore[arg-type]
        self.shared.tell = self._tell

    def _tell(self) -> None:
        self.told += 1


def test_what_is_in_force_from_the_start() -> None:
    found = World(log_level="WARN", ai_ticket_auth_token="a,b", memory_limit_mb=2).shared.for_worker(0)
    assert found.memory_limit == 2_097_152
    assert (found.log_level, found.payloads, found.pem, found.file_tokens) == ("WARN", 0, PEM, [])
    assert len(found.configured_tokens) == 2


def test_each_change_is_told_and_holds_for_those_that_start_later() -> None:
    world = World(ai_ticket_auth_token="a")
    world.shared.accept(TOKENS)
    world.shared.configure([])
    world.shared.log_from("DEBUG")
    world.shared.serve(Pem(b"new", b"new"))
    world.shared.limit_memory(4096)
    assert world.told == 5
    found = world.shared.for_worker(2)
    assert (found.log_level, found.file_tokens, found.configured_tokens) == ("DEBUG", TOKENS, [])
    assert found.pem == Pem(b"new", b"new")
    assert found.memory_limit == 4096, "of all together"


def test_tokens_of_whom_none_would_be_left_change_nothing() -> None:
    world = World(ai_ticket_auth_token="a")
    with pytest.raises(ValueError, match="no token would be left"):
        world.shared.configure([])
    assert world.told == 0
    assert world.shared.for_worker(0).configured_tokens
    World(ai_ticket_auth=False).shared.configure([])


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10])
def test_the_workers_share_what_payloads_may_be_logged(count: int) -> None:
    world = World(ai_ticket_auth=False)
    world.shared.log_payloads(count)
    shares = [world.shared.for_worker(number).payloads for number in range(3)]
    assert sum(shares) == count
    assert max(shares) - min(shares) <= 1


def test_a_worker_does_not_get_what_it_need_not_know_and_its_share_of_the_connections() -> None:
    settings = Settings(ai_ticket_auth_token="secret", redis_url="redis://:secret@x", koboldcpp_password="needed")
    found = settings_of_worker(settings, 3)
    assert (found.ai_ticket_auth_token, found.redis_url) == (None, None)
    assert found.koboldcpp_password == "needed"
    assert (found.max_connections, found.max_connections_per_client) == (3334, 334)


class TestCertificate:
    @pytest.fixture
    def files(self, tmp_path: Path) -> tuple[str, str]:
        issued = trustme.CA().issue_cert("localhost")
        chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
        (tmp_path / "c").write_bytes(chain)
        issued.private_key_pem.write_to_path(tmp_path / "k")
        return str(tmp_path / "c"), str(tmp_path / "k")

    def test_what_is_read_is_served_without_the_files(self, files: tuple[str, str]) -> None:
        expires = TlsConnections(server_context(*files, "intermediate")).expires
        pem = read_pem(*files, "intermediate")
        for file in files:
            Path(file).unlink()
        assert TlsConnections(context_of(pem, "intermediate")).expires == expires

    def test_what_can_not_be_served_is_named(self, files: tuple[str, str]) -> None:
        Path(files[1]).write_text("rubbish")
        with pytest.raises(CertificateError) as found:
            read_pem(*files, "intermediate")
        assert (found.value.variable, found.value.path) == ("TLS_KEY_FILE", files[1])
