"""AI Ticket: the daemon between callers and their self-hosted language models.

Rooms, each importing only what stands left of it: `event`, `errors`, `interfaces` <- `backend` <- `pipeline` <- `web`;
`telemetry` wraps them, `service` runs them, `tap` alone puts them together.
"""

__version__ = "0.1.0"
