"""Deadlines kept, in simulated time: measured arrivals and durations under five orders, and how far any could get.

The orders are those of ``functions.policies``, the slots and the time those of ``functions.simulate``. Rooms:
``traces`` (arrivals and durations), ``dags`` (workflows), ``oracle`` (who knows the future), ``makespans`` (workflows
without deadline), ``report`` (the table), ``calibration`` (what the stated p90 covers). ``data/`` holds the traces,
with the notice of their sources.
"""
