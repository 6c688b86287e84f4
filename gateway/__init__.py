"""The front door: HTTP in, promises out.

Rooms: ``app`` (puts the others together), ``table`` (every endpoint, once), ``server`` (connections), ``problems``
(errors as RFC 9457), ``auth`` (the token), ``limits``, ``gate`` and ``quota`` (how much may be in flight and open),
``media`` (what a body claims to be), ``cloudevents`` (events read from a request), ``entrance`` (what they come
through), ``ingest`` (events and triggers come in), ``admitting`` (they become runs, quoted and not yet sent),
``acceptance`` with ``probes`` (these go to the log), ``quote`` (the dry run of all that), ``waiting`` (callers that
stay for the answer), ``runs`` (reading and canceling), ``history`` (what has ended, for a replay of the past), ``dead``
(what was given up on; replays), ``story`` (facts become events) and ``live`` (which are followed), ``catalog``
(functions, routes), ``sites`` (how they are), ``reports`` (what jobs say of themselves), ``uploads``, ``spool`` and
``direct`` (large data, by us or past us), ``status``, ``metrics``, ``openapi``, ``page``, ``needs`` (what all this asks
of the rest).

May import ``headrace``, ``streams`` and ``functions``. It never runs, imports or unpickles what users send.
"""
