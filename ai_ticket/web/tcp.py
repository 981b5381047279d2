"""What the kernel knows of a TCP connection and does not tell unless it is asked."""

import socket
import struct
import sys
from typing import Any

from msgspec import Struct
from twisted.protocols.policies import ProtocolWrapper

_ESTABLISHED = 1
_ACKED = struct.Struct("=Q")
_ACKED_AT = 120
"""Where Linux' `struct tcp_info` has `tcpi_bytes_acked` (since 4.1); its first byte is the state."""


class TcpState(Struct, frozen=True):
    """A connection as the kernel sees it.

    `established`: neither end has closed it. `acked` counts the bytes that the peer's end has taken: once its buffer is
    full, no faster than the peer reads.
    """

    established: bool
    acked: int


def ask_tcp(transport: Any) -> TcpState | None:
    """The state of a transport's TCP connection, below its TLS; None where it can't be had: Linux alone tells it."""
    while isinstance(transport, ProtocolWrapper):
        transport = transport.transport
    if sys.platform != "linux" or not hasattr(transport, "getHandle"):
        return None
    try:
        info = transport.getHandle().getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACKED_AT + _ACKED.size)
    except OSError:  # not TCP, or closed already
        return None
    if len(info) < _ACKED_AT + _ACKED.size:
        return None
    return TcpState(info[0] == _ESTABLISHED, _ACKED.unpack_from(info, _ACKED_AT)[0])
