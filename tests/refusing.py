"""Errors that a message has to explain by its values."""

import pytest

from pipeline.images import DataError


def refused(call, *values, kind=DataError):
    """The message of the error of ``call``, which names all ``values``."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert [value for value in map(str, values) if value not in message] == [], message
    return message
