"""AI Ticket for `twistd -ny ai_ticket.tac`: settings from the environment -> makeService -> application."""

from twisted.application.service import Application

from ai_ticket.tap import Options, makeService

application = Application("ai-ticket")
makeService(Options()).setServiceParent(application)
