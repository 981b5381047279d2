"""Lets `twistd ai-ticket` find the service."""

from twisted.application.service import ServiceMaker

service_maker = ServiceMaker(
    "AI Ticket", "ai_ticket.tap", "Events in over HTTPS, answers of a self-hosted language model out.", "ai-ticket"
)
