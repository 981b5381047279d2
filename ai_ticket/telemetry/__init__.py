"""Logs and metrics: observers of what the other rooms do. Only `service` and `tap` import it."""
