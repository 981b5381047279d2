"""h2's state of an HTTP/2 connection, and the compression of its fields (HPACK), within bounds."""

import re
from collections.abc import Iterable

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.settings import SettingCodes, Settings
from hpack import Decoder, Encoder, HeaderTuple, HPACKError, OversizedHeaderListError

from ai_ticket.web.heads import MAX_HEAD_BYTES
from ai_ticket.web.http2_frames import MAX_BLOCK_BYTES, PREFACE, ConnectionFault

MAX_CONCURRENT_STREAMS = 100
MAX_TABLE_BYTES = 4096

_RESIZES = re.compile(rb"(?:[\x20-\x3e]|\x3f[\x80-\xff]*[\x00-\x7f]){3}")
"""More changes of the table's size than a block may begin with (RFC 7541, 4.2)."""


class FieldEncoder(Encoder):
    """Does not let the peer have a larger table than is good for us."""

    @property
    def header_table_size(self) -> int:
        """The size of the table, in bytes."""
        return self.header_table.maxsize

    @header_table_size.setter
    def header_table_size(self, value: int) -> None:
        size = min(value, MAX_TABLE_BYTES)
        if size != self.header_table.maxsize:
            self.header_table.maxsize = size
            # The peer is to be told of the smallest size in between and of the last (RFC 7541, 4.2).
            self.table_size_changes = [min([*self.table_size_changes, size]), size]


class FieldDecoder(Decoder):
    """Keeps the `fields` of the last block for us, and none for h2.

    h2 would check them, and make what is wrong with one request a fault of the whole connection; and it takes longer.
    """

    def __init__(self) -> None:
        super().__init__(MAX_BLOCK_BYTES)
        self.fields: list[HeaderTuple] = []

    def decode(self, data: bytes, raw: bool = True) -> Iterable[HeaderTuple]:
        """Read a block.

        @raise ConnectionFault: it is malformed, or too large.
        """
        if _RESIZES.match(data):
            raise ConnectionFault(ErrorCodes.COMPRESSION_ERROR)
        try:
            self.fields = list(super().decode(data, raw=True))
        except OversizedHeaderListError:
            raise ConnectionFault(ErrorCodes.ENHANCE_YOUR_CALM)
        except HPACKError:
            raise ConnectionFault(ErrorCodes.COMPRESSION_ERROR)
        return ()


class ServerConnection(H2Connection):
    """h2's state of a connection, with less of a memory for streams that are over."""

    MAX_CLOSED_STREAMS = 1000

    def __init__(self) -> None:
        config = H2Configuration(client_side=False, header_encoding=None)
        config.validate_inbound_headers = config.normalize_inbound_headers = False  # it does not get them
        super().__init__(config)
        self.encoder = FieldEncoder()
        self.decoder: FieldDecoder = FieldDecoder()
        self.local_settings = _settings(MAX_CONCURRENT_STREAMS)
        self.initiate_connection()
        # To h2 a stream too many is a fault of the connection; we refuse the stream, as we told the peer we would.
        self.local_settings = _settings(2**31 - 1)
        self.receive_data(PREFACE)

    def dismantle(self) -> None:
        """It is used no more. It has a table of its own methods: it would be garbage to be searched for."""
        self._frame_dispatch_table.clear()


def _settings(streams: int) -> Settings:
    values = {SettingCodes.MAX_CONCURRENT_STREAMS: streams, SettingCodes.MAX_HEADER_LIST_SIZE: MAX_HEAD_BYTES}
    return Settings(client=False, initial_values=values)
