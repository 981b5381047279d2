"""Logs, metrics and traces: observers of what the other rooms do.

Only `service` and `tap` import it, and `environment` what OpenTelemetry's variables may say (`tracing_values`).
"""
