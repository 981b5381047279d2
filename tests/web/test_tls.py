"""TLS: the profile, by real handshakes in memory, and certificates that can't be used."""

import ssl
import warnings
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID
from OpenSSL import SSL

from ai_ticket.web.tls import CertificateError, Profile, TlsConnections, certificate_warnings, server_context

BEGINS = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)
ENDS = BEGINS + timedelta(days=90)


def self_signed(key: rsa.RSAPrivateKey, begins: datetime, ends: datetime) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, begins, ends)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    for name in ("one", "two"):
        certificate = authority.issue_cert("localhost")
        certificate.private_key_pem.write_to_path(folder / f"{name}.key")
        (folder / f"{name}.crt").write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    authority.cert_pem.write_to_path(folder / "ca.pem")
    intermediate = authority.create_child_ca()
    leaf = intermediate.issue_cert("localhost", key_type=trustme.KeyType.RSA)
    leaf.private_key_pem.write_to_path(folder / "chain.key")
    (folder / "chain.crt").write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
    (folder / "rubbish").write_text("rubbish")
    rsa_key = rsa.generate_private_key(65537, 2048)
    pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / "rsa.key").write_bytes(rsa_key.private_bytes(*pem, serialization.NoEncryption()))
    weak_key = rsa.generate_private_key(65537, 1024)
    (folder / "weak.key").write_bytes(weak_key.private_bytes(*pem, serialization.NoEncryption()))
    (folder / "weak.crt").write_bytes(self_signed(weak_key, BEGINS, ENDS))
    (folder / "dated.key").write_bytes(rsa_key.private_bytes(*pem, serialization.NoEncryption()))
    (folder / "dated.crt").write_bytes(self_signed(rsa_key, BEGINS, ENDS))
    (folder / "locked.key").write_bytes(rsa_key.private_bytes(*pem, serialization.BestAvailableEncryption(b"x")))
    return folder


def connections(files: Path, name: str = "one", profile: Profile = "intermediate") -> TlsConnections:
    return TlsConnections(server_context(str(files / f"{name}.crt"), str(files / f"{name}.key"), profile))


def handshake(server: TlsConnections, client: ssl.SSLContext) -> ssl.SSLObject:
    """Both ends' handshake, in memory; the client's end."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    peer = client.wrap_bio(to_client, to_server, server_hostname="localhost")
    connection = server.serverConnectionForTLS(None)  # type: ignore[arg-type]
    connection.set_accept_state()
    for _ in range(10):
        try:
            peer.do_handshake()
            done = True
        except ssl.SSLWantReadError:
            done = False
        if to_server.pending:
            connection.bio_write(to_server.read())
        try:
            connection.do_handshake()
        except Exception as error:
            if "WantRead" not in type(error).__name__:
                raise
        try:
            to_client.write(connection.bio_read(65536))
        except Exception as error:
            if "WantRead" not in type(error).__name__:
                raise
        if done:
            return peer
    raise AssertionError("no handshake")


def client(files: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(files / "ca.pem"))
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


def test_tls_13_and_alpn(files: Path) -> None:
    peer = handshake(connections(files), client(files))
    assert (peer.version(), peer.selected_alpn_protocol()) == ("TLSv1.3", "h2")


def test_clients_that_speak_only_http1(files: Path) -> None:
    context = client(files)
    context.set_alpn_protocols(["http/1.1"])
    assert handshake(connections(files), context).selected_alpn_protocol() == "http/1.1"


def test_clients_without_alpn(files: Path) -> None:
    context = ssl.create_default_context(cafile=str(files / "ca.pem"))
    assert handshake(connections(files), context).selected_alpn_protocol() is None


@pytest.mark.parametrize("cipher", ["ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-ECDSA-CHACHA20-POLY1305"])
def test_tls_12(files: Path, cipher: str) -> None:
    context = client(files)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(cipher)
    peer = handshake(connections(files), context)
    assert peer.version() == "TLSv1.2"
    assert (peer.cipher() or [""])[0] == cipher


TLS12_CIPHERS = {
    "one": ["ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-ECDSA-AES256-GCM-SHA384", "ECDHE-ECDSA-CHACHA20-POLY1305"],
    "chain": ["ECDHE-RSA-AES128-GCM-SHA256", "ECDHE-RSA-AES256-GCM-SHA384", "ECDHE-RSA-CHACHA20-POLY1305"],
}


@pytest.mark.parametrize("name", TLS12_CIPHERS)
def test_the_suites_of_tls_12_are_those_and_no_others(files: Path, name: str) -> None:
    """Whatever else this machine's OpenSSL has, however weak."""
    found = set()
    context = client(files)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ALL:COMPLEMENTOFALL:!aNULL:!eNULL:@SECLEVEL=0")
    for cipher in context.get_ciphers():
        only = client(files)
        only.maximum_version = ssl.TLSVersion.TLSv1_2
        with suppress(Exception):
            only.set_ciphers(f"{cipher['name']}:@SECLEVEL=0")
            found.add((handshake(connections(files, name), only).cipher() or [""])[0])
    assert found == set(TLS12_CIPHERS[name])


@pytest.mark.parametrize("order", [1, -1])
def test_which_suite_is_the_clients_choice(files: Path, order: int) -> None:
    """One without hardware for AES prefers ChaCha20."""
    context = client(files)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    ciphers = TLS12_CIPHERS["one"][::order]
    context.set_ciphers(":".join(ciphers))
    assert (handshake(connections(files), context).cipher() or [""])[0] == ciphers[0]


def test_the_modern_profile_is_tls_13_alone(files: Path) -> None:
    server = connections(files, profile="modern")
    assert handshake(server, client(files)).version() == "TLSv1.3"
    context = client(files)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(Exception, match=r"(?i)version|protocol"):
        handshake(server, context)


@pytest.mark.parametrize("profile", ["intermediate", "modern"])
def test_the_chain_is_served_whole(files: Path, profile: Profile) -> None:
    """The client knows the root alone: without the intermediate it would find no way to it."""
    peer = handshake(connections(files, "chain", profile), client(files))
    assert peer.getpeercert()
    # The root is the client's to have.
    [leaf, intermediate] = x509.load_pem_x509_certificates((files / "chain.crt").read_bytes())
    assert leaf.issuer == intermediate.subject
    assert isinstance(leaf.public_key(), rsa.RSAPublicKey)


@pytest.mark.parametrize("cipher", ["ECDHE-ECDSA-AES128-SHA256", "ECDHE-ECDSA-AES256-CCM", "AES128-GCM-SHA256"])
def test_suites_outside_the_profile(files: Path, cipher: str) -> None:
    context = client(files)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(cipher)
    with pytest.raises(Exception, match=r"(?i)no shared cipher|handshake"):
        handshake(connections(files), context)


def test_old_versions(files: Path) -> None:
    context = client(files)
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings(action="ignore"):
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(Exception, match=r"(?i)version|protocol"):
        handshake(connections(files), context)


@pytest.mark.parametrize(("curve", "good"), [("prime256v1", True), ("secp384r1", True), ("secp521r1", False)])
def test_curves(files: Path, curve: str, good: bool) -> None:
    context = client(files)
    context.set_ecdh_curve(curve)
    if good:
        handshake(connections(files), context)
    else:
        with pytest.raises(Exception, match=r"(?i)suitable|shared|handshake"):
            handshake(connections(files), context)


@pytest.mark.parametrize("profile", ["intermediate", "modern"])
@pytest.mark.parametrize(
    ("groups", "used"),
    [
        ("X25519MLKEM768", "X25519MLKEM768"),
        ("X25519", "x25519"),
        ("P-256", "secp256r1"),
        ("P-384", "secp384r1"),
        ("P-521", None),
        ("X448", None),
        ("ffdhe2048", None),
        ("SecP256r1MLKEM768", None),
        ("P-521:P-384:X25519", "secp384r1"),
    ],
)
def test_groups(files: Path, profile: Profile, groups: str, used: str | None) -> None:
    """As a client that knows them all has them."""
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    assert SSL._lib.SSL_CTX_set1_curves_list(context._context, groups.encode()) == 1  # type: ignore[attr-defined]
    ends = SSL.Connection(context, None), connections(files, profile=profile).serverConnectionForTLS(None)  # type: ignore[arg-type]
    ends[0].set_connect_state()
    ends[1].set_accept_state()
    done = False
    for _ in range(5):
        for end, other in (ends, ends[::-1]):
            try:
                end.do_handshake()
                done = end is ends[0] or done
            except SSL.WantReadError:
                pass
            except SSL.Error:
                assert used is None
                return
            with suppress(SSL.WantReadError):
                other.bio_write(end.bio_read(65536))
    assert done
    name = ends[0].get_group_name()
    assert name is not None
    assert used is not None
    assert name.lower() in {used.lower(), {"secp256r1": "prime256v1"}.get(used)}


def test_a_new_context_serves_new_connections(files: Path) -> None:
    server = connections(files)
    before = handshake(server, client(files)).getpeercert(binary_form=True)
    server.context = server_context(str(files / "two.crt"), str(files / "two.key"), "intermediate")
    assert handshake(server, client(files)).getpeercert(binary_form=True) != before


@pytest.mark.parametrize(
    ("certificate", "key", "variable", "reason"),
    [
        ("none", "one.key", "TLS_CERT_FILE", "No such file"),
        ("one.crt", "none", "TLS_KEY_FILE", "No such file"),
        ("rubbish", "one.key", "TLS_CERT_FILE", "no PEM certificate"),
        ("one.crt", "rubbish", "TLS_KEY_FILE", "no PEM private key"),
        ("one.crt", "two.key", "TLS_KEY_FILE", "not the key of the certificate"),
        ("one.crt", "rsa.key", "TLS_KEY_FILE", "not the key of the certificate"),
        ("weak.crt", "weak.key", "TLS_CERT_FILE", "too weak to be served: ee key too small"),
        ("one.crt", "locked.key", "TLS_KEY_FILE", "without a pass phrase"),
    ],
)
def test_what_can_not_be_used(files: Path, certificate: str, key: str, variable: str, reason: str) -> None:
    with pytest.raises(CertificateError) as caught:
        server_context(str(files / certificate), str(files / key), "intermediate")
    assert (caught.value.variable, reason in caught.value.reason) == (variable, True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("time", "said"),
    [
        (BEGINS - timedelta(seconds=1), "is not valid before 2026-03-01 12:30 UTC: callers refuse it until then"),
        (BEGINS + timedelta(seconds=1), None),
        (ENDS - timedelta(days=14), None),
        (
            ENDS - timedelta(days=14) + timedelta(seconds=1),
            "expires on 2026-05-30 12:30 UTC, in 13 days; replace it and send SIGHUP",
        ),
        (ENDS - timedelta(hours=1), "expires on 2026-05-30 12:30 UTC, in 0 days; replace it and send SIGHUP"),
        (
            ENDS + timedelta(seconds=1),
            "has expired on 2026-05-30 12:30 UTC: callers refuse it; replace it and send SIGHUP",
        ),
    ],
)
def test_what_callers_refuse_or_soon_will(files: Path, time: datetime, said: str | None) -> None:
    context = server_context(str(files / "dated.crt"), str(files / "dated.key"), "intermediate")
    found = list(certificate_warnings(context, "my.crt", time.timestamp()))
    assert found == ([] if said is None else [f"TLS_CERT_FILE='my.crt': the certificate {said}"])
    assert TlsConnections(context).expires == ENDS.timestamp()
