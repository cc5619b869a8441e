"""Programs in the process of the tests."""

import contextlib
import io
import os
from unittest import mock

import torch
from conftest import THREADS, clean_env


def call(main, *flags):
    """Exit status, output and errors of a program's ``main`` with ``flags``.

    With one thread, as programs in other processes have: sums depend on the number of threads.
    """
    output, errors = io.StringIO(), io.StringIO()
    torch.set_num_threads(1)
    try:
        with (
            mock.patch.dict(os.environ, clean_env(), clear=True),
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(errors),
        ):
            status = main([str(flag) for flag in flags])
    finally:
        torch.set_num_threads(THREADS)
    return status, output.getvalue(), errors.getvalue()
