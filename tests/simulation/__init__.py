"""The whole path of an event, with all its processes, in one thread and in virtual time, under faults from a seed."""
