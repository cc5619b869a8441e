import contextlib
def cases(rng): return []
@contextlib.contextmanager
def hostile_server():
    yield ""
