"""Several processes as one service: what the parent does for all, and how its workers ask for it.

The parent holds the ports, the quotas, the queue and the slots; workers do TLS, HTTP, tokens and the exchange with the
model servers. May import all but `cli`; nothing but `tap` imports it.
"""
