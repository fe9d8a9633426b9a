"""Responds to every request, whatever its method, with its x-forwarded-client-cert."""

import sys
from wsgiref.simple_server import make_server


def answer(environ, start_response):
    print("request", environ.get("HTTP_X_FORWARDED_CLIENT_CERT"), flush=True)
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"caller={environ.get('HTTP_X_FORWARDED_CLIENT_CERT')}\n".encode()]


server = make_server("127.0.0.1", 0, answer)
print("port", server.server_port, flush=True)
server.serve_forever()
