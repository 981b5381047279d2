"""A fake KoboldCPP in a process of its own, quicker and with more slots than the real one: `fake_process.py PORT`."""

import sys
from typing import Any

from twisted.internet import reactor as _reactor

from ai_ticket.backend.fake import FakeKobold, Pace, Settings

reactor: Any = _reactor


def main() -> None:
    pace = Pace(first_event=0.03, close=0.0)
    fake = FakeKobold(reactor, Settings(tokens_per_second=300.0, parallel=4, pace=pace))
    port = reactor.listenTCP(int(sys.argv[1]), fake, interface="127.0.0.1").getHost().port
    reactor.callWhenRunning(print, "listening", port, flush=True)
    reactor.run()


if __name__ == "__main__":
    main()
