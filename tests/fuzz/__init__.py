"""Fuzzing: input that nobody would send by mistake, at every place where the service reads what others wrote.

`test_fuzz.py` tries a little of each with the other tests; `tox -e fuzz` as long as you like, in memory and then
against the running service.
"""
