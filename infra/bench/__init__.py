"""``make bench``: what Headrace does per second, beside the raw floor, measured in one run on one machine.

Rooms: ``load`` (an HTTP client that costs next to nothing), ``floor`` (the plain nats-py loop), ``processes`` (memory
and CPU of the platform), ``cases`` (what is measured), ``__main__`` (the table).
"""
