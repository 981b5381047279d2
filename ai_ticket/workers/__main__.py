"""The program of a worker process: `python -m ai_ticket.workers`, started by the parent alone."""

from ai_ticket.tap import run_worker

run_worker()
