"""The HTTP surface: connections, requests, routes, authentication, errors to statuses.

May import everything inside (`event`, `errors`, `interfaces`); nothing imports it but `service` and `tap`.
"""
