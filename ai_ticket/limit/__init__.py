"""How often a client may call: sliding windows in memory and in Redis.

May import `interfaces` and `server_identity`; nothing of `pipeline`, `web` or `telemetry`.
"""
