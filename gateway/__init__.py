"""The front door: HTTP in, promises out.

Rooms: ``app`` (the one place that puts the others together), ``table`` (every endpoint, once), ``problems`` (errors as
RFC 9457), ``auth`` (bearer tokens), ``gate`` (how much may be in flight), ``media`` (content types and what a body
claims to be), ``cloudevents`` (events read from a request), ``ingest`` (events and triggers become runs), ``runs``
(reading and canceling them), ``live`` (server-sent events), ``catalog`` (functions, routes, sites), ``uploads`` (large
data), ``status`` (health and metrics), ``openapi``, ``page`` (the live page), ``server`` (connections), ``limits``,
``needs`` (what it asks of the rest).

May import ``headrace``, ``streams`` and ``functions``. It never runs, imports or unpickles what users send.
"""
