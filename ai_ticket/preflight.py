"""What of the settings can be wrong beyond their values: files that are not there, or do not fit."""

import ssl
from collections.abc import Iterator
from itertools import chain

from ai_ticket.backend import model
from ai_ticket.backend.address import parse_api_urls
from ai_ticket.backend.http_client import trust_root
from ai_ticket.environment import problem, read_text
from ai_ticket.settings import Settings
from ai_ticket.web.auth import parse_token_list, parse_tokens
from ai_ticket.web.tls import CertificateError, server_context


def problems(settings: Settings) -> list[str]:
    """One line for each reason why the service can't start with these settings. Reads files, so it blocks."""
    return [*_certificate(settings), *_tokens(settings), *_backend(settings), *_collector(settings)]


def _certificate(settings: Settings) -> Iterator[str]:
    try:
        server_context(settings.tls_cert_file, settings.tls_key_file)
    except CertificateError as error:
        yield str(error)


def _tokens(settings: Settings) -> Iterator[str]:
    if not settings.ai_ticket_auth:
        return
    fixed = parse_token_list(settings.ai_ticket_auth_token or "")
    path = settings.ai_ticket_auth_token_file
    if path is None:
        if not fixed:
            yield problem("AI_TICKET_AUTH_TOKEN", settings.ai_ticket_auth_token, "no token in it")
        return
    try:
        parse_tokens(read_text(path))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        yield problem("AI_TICKET_AUTH_TOKEN_FILE", path, reason or "can't be read")


def _backend(settings: Settings) -> Iterator[str]:
    for address in chain.from_iterable(parse_api_urls(settings.koboldcpp_api_url)):
        reason = model.problem(address.model_path) if address.url is None else None
        if reason is not None:
            yield problem("KOBOLDCPP_API_URL", settings.koboldcpp_api_url, reason)
    if settings.koboldcpp_ca_file is not None:
        try:
            trust_root(settings.koboldcpp_ca_file)
        except (OSError, ValueError) as error:
            yield problem("KOBOLDCPP_CA_FILE", settings.koboldcpp_ca_file, f"can't be read: {error}")


def _collector(settings: Settings) -> Iterator[str]:
    ca_file = settings.otel_exporter_otlp_certificate
    if ca_file is not None:
        try:
            ssl.create_default_context(cafile=ca_file)
        except OSError as error:
            yield problem("OTEL_EXPORTER_OTLP_CERTIFICATE", ca_file, f"can't be read: {error}")
    certificate = settings.otel_exporter_otlp_client_certificate
    if certificate is not None:
        key = settings.otel_exporter_otlp_client_key
        try:
            # Without a password, OpenSSL would ask for that of an encrypted key on the terminal.
            ssl.create_default_context().load_cert_chain(certificate, key, password="")
        except OSError as error:
            reason = f"can't be read, or has no private key that fits: {error}"
            yield problem("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", certificate, reason)
