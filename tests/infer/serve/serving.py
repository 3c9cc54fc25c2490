"""A server of a tiny model on a free port, in a thread of the test's process."""

import contextlib
import threading

from infer.serve.__main__ import listen, server_of
from infer.serve.app import Models, make_app

NOTE = "Left breast mass of 2.5 cm, grade 2. A cyst of 2.5 cm."


@contextlib.contextmanager
def served(weights, adapter=None, waiting=8, idle=5, connections=512, **options):
    """(the address, the application) of a server that answers until the block is left."""
    listening = listen("127.0.0.1", 0)
    port = listening.getsockname()[1]
    app = make_app(Models(weights, adapter), "127.0.0.1", port, None, waiting, **options)
    server = server_of(app, idle, connections)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}", app
    finally:
        server.should_exit = True
        thread.join()
