"""Faults on purpose: every command killed, starved, raced and given damaged files (``make faults``)."""
