"""Where it runs: work is taken, run in a child process, and its outcome committed.

Rooms: ``worker`` (take, run, commit), ``joins`` (branches that end together, counted in the log), ``pool`` (warm child
processes).

May import ``headrace``, ``streams`` and ``functions``.
"""
