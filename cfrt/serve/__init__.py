"""Streams for a browser, for ffmpeg and for curl: `cfrt serve`, and the Python client of such a server.

    cfrt serve                                                  # a page at http://127.0.0.1:8000
    cfrt.serve.client.Client("http://127.0.0.1:8000")           # the same streams from Python; standard library

The server needs `pip install 'cfrt[serve]'`; the client needs nothing more than cfrt.
"""
