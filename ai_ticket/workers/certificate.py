"""The certificate that all workers serve: read once, by the parent, so that none has another than the others."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from OpenSSL import SSL

from ai_ticket.web.tls import Profile, server_context
from ai_ticket.workers.messages import Pem


def read_pem(certificate_file: str, key_file: str, profile: Profile) -> Pem:
    """What is in the files, if it can be served. Blocks while it reads them.

    @raise CertificateError: it can't.
    """
    server_context(certificate_file, key_file, profile)
    with open(certificate_file, "rb") as certificate, open(key_file, "rb") as key:
        pem = Pem(certificate.read(), key.read())
    context_of(pem, profile)  # the files may have changed in between
    return pem


def context_of(pem: Pem, profile: Profile) -> SSL.Context:
    """A context for new connections.

    @raise CertificateError: it can't be served.
    """
    with _in_memory(pem.certificate) as certificate, _in_memory(pem.key) as key:
        return server_context(certificate, key, profile)


@contextmanager
def _in_memory(content: bytes) -> Iterator[str]:
    """A file's path, as OpenSSL wants one, for what is to be on no disk."""
    fd = os.memfd_create("pem")
    try:
        os.write(fd, content)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)
