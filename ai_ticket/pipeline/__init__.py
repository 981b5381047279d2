"""The queue between callers and slots. May import `event`, `errors`, `interfaces`; nothing of `web` or `telemetry`."""
