"""What of the settings can be wrong or unwise beyond their values: files that are not there, or open to others."""

import os
import ssl
import stat
import time
from collections.abc import Iterator
from importlib.util import find_spec
from ipaddress import ip_address
from itertools import chain

from ai_ticket.backend import model
from ai_ticket.backend.address import parse_api_urls
from ai_ticket.backend.http_client import trust_root
from ai_ticket.environment import ENV_FILE, Loaded, problem, read_file
from ai_ticket.limit.address import parse_redis_url
from ai_ticket.memory import MEGABYTE, memory_limit, used_memory
from ai_ticket.settings import Settings, variables
from ai_ticket.tokens import parse_tokens
from ai_ticket.web.tls import CertificateError, certificate_warnings, server_context
from ai_ticket.workers.cores import worker_count

LEAST_MEMORY = 128 * MEGABYTE
"""The service takes some 60 MB while it does nothing."""


def problems(settings: Settings) -> list[str]:
    """One line for each reason why the service can't start with these settings. Reads files, so it blocks."""
    return [
        *_certificate(settings),
        *_tokens(settings),
        *_redis(settings),
        *_backend(settings),
        *_collector(settings),
        *_workers(settings),
    ]


def warnings(loaded: Loaded) -> list[str]:
    """One line for each thing that the operator may not have meant. Looks at files, so it blocks."""
    return [
        *_open_files(loaded),
        *_open_doors(loaded.settings),
        *_little_memory(loaded.settings),
        *_certificate_dates(loaded.settings),
    ]


def _open_files(loaded: Loaded) -> Iterator[str]:
    settings = loaded.settings
    secrets = {name for name, variable in variables().items() if variable.secret}
    if any(loaded.env_file.get(name, "").strip() for name in secrets):
        yield from _others_may(loaded.origin.env_file, ENV_FILE)
    if settings.ai_ticket_auth and settings.ai_ticket_auth_token_file is not None:
        yield from _others_may(settings.ai_ticket_auth_token_file, "AI_TICKET_AUTH_TOKEN_FILE")
    yield from _others_may(settings.tls_key_file, "TLS_KEY_FILE")


def _others_may(path: str, variable: str) -> Iterator[str]:
    try:
        status = os.stat(path)
    except OSError:
        return  # where it matters, `problems` says so
    mode = stat.S_IMODE(status.st_mode)
    # What belongs to somebody else is ours to read by its group. What is ours needs none.
    group = mode >> 3 if status.st_uid == os.geteuid() else 0
    for who, bits in (("every user of this machine", mode), (f"the group {status.st_gid}", group & ~mode)):
        can = " and ".join(word for bit, word in ((stat.S_IROTH, "read"), (stat.S_IWOTH, "change")) if bits & bit)
        if can:
            yield f"{variable}: {who} may {can} {path} (mode {mode:04o}); chmod 600 it"


def _open_doors(settings: Settings) -> Iterator[str]:
    if not settings.ai_ticket_auth and not _is_loopback(settings.bind_host):
        where = settings.bind_host or "all addresses"
        yield f"AI_TICKET_AUTH=off: whoever reaches this machine may call, for the service listens on {where}"


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _little_memory(settings: Settings) -> Iterator[str]:
    limit = memory_limit(settings.memory_limit_mb)
    if limit is None:
        return
    if used_memory() is None:
        yield "MEMORY_LIMIT_MB: of no effect, for this system does not tell how much memory a process uses"
    elif limit < LEAST_MEMORY:
        what = "the control group" if settings.memory_limit_mb is None else "MEMORY_LIMIT_MB"
        yield (
            f"{what} limits memory to {limit // MEGABYTE} MB: what is refused near that limit may be refused for ever; "
            f"{LEAST_MEMORY // MEGABYTE} MB is the least that makes sense"
        )


def _certificate(settings: Settings) -> Iterator[str]:
    try:
        server_context(settings.tls_cert_file, settings.tls_key_file, settings.tls_profile)
    except CertificateError as error:
        yield str(error)


def _certificate_dates(settings: Settings) -> Iterator[str]:
    try:
        context = server_context(settings.tls_cert_file, settings.tls_key_file, settings.tls_profile)
    except CertificateError:
        return  # `problems` says so
    yield from certificate_warnings(context, settings.tls_cert_file, time.time())


def _tokens(settings: Settings) -> Iterator[str]:
    path = settings.ai_ticket_auth_token_file
    if not settings.ai_ticket_auth or path is None:
        return
    try:
        parse_tokens(read_file(path))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        yield problem("AI_TICKET_AUTH_TOKEN_FILE", path, reason or "can't be read")


def _redis(settings: Settings) -> Iterator[str]:
    if settings.rate_limit_backend != "redis":
        return
    if find_spec("txredisapi") is None:
        reason = "needs the package txredisapi: install ai-ticket with the extra [redis]"
        yield problem("RATE_LIMIT_BACKEND", "redis", reason)
    try:
        parse_redis_url(settings.redis_url or "")
    except ValueError as error:
        yield problem("REDIS_URL", settings.redis_url, str(error))


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


def _workers(settings: Settings) -> Iterator[str]:
    if worker_count(settings) > 1 and not hasattr(os, "memfd_create"):
        yield problem("WORKERS", settings.workers, "must be 1 on this system: more needs Linux")


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
