"""How a payload becomes the arguments of a function, and what it returns becomes a payload.

A function takes one payload, and a context if it names one. Annotated ``Event`` it gets the whole event; otherwise the
event's data, decoded into the annotated type. The same code runs in a worker's child and in ``headrace.testing``.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable
from contextvars import copy_context
from email.message import Message
from functools import lru_cache
from typing import Any, Final, NamedTuple, Union, get_args, get_origin, get_type_hints
