"""A name of another module replaced for a while."""

from contextlib import contextmanager


@contextmanager
def swapped(owner, name: str, value):
    """Inside, `owner.name` is `value`; afterwards what it was. AttributeError where `owner` has no such name."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
