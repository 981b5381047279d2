"""The model servers: addresses, one attempt at a completion, the bundled server.

May import `event`, `errors`, `interfaces`; nothing of `pipeline`, `web` or `telemetry`.
"""
