"""A SPIFFE Workload API, by the published workload.proto: serves the files of a directory, and sends them again when they change.

usage: workload_api.py SOCKET DIRECTORY TRUST_DOMAIN    (svid.crt, svid.key, ca.crt; NAME.federated for others; crl.pem)
"""
import base64
import os
import sys
import threading
import time
from concurrent import futures

import grpc

socket, directory, trust_domain = sys.argv[1:]


def read(name):
    with open(os.path.join(directory, name)) as file:
        return file.read()


def ders(pem):
    blocks = pem.split("-----BEGIN ")[1:]
    return [base64.b64decode("".join(b.split("-----")[1].split())) for b in blocks]


def field(number, data):
    length, out = len(data), bytearray([number << 3 | 2])
    while length > 0x7F:
        out.append(length & 0x7F | 0x80)
        length >>= 7
    out.append(length)
    return bytes(out) + data


def response():
    svid = field(1, read("id").strip().encode())
    svid += field(2, b"".join(ders(read("svid.crt"))))
    svid += field(3, ders(read("svid.key"))[0])
    svid += field(4, b"".join(ders(read("ca.crt"))))
    message = field(1, svid)
    for name in sorted(os.listdir(directory)):
        if name.endswith(".federated"):
            domain = name.removesuffix(".federated")
            entry = field(1, f"spiffe://{domain}".encode()) + field(2, b"".join(ders(read(name))))
            message += field(3, entry)
    if os.path.exists(os.path.join(directory, "crl.pem")):
        for revoked in ders(read("crl.pem")):
            message += field(2, revoked)
    return message


def fetch(request, context):
    metadata = dict(context.invocation_metadata())
    if metadata.get("workload.spiffe.io") != "true":
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "security header missing")
    sent = None
    while context.is_active():
        try:
            now = response()
        except OSError:
            now = None
        if now is None and sent is None:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "no identity issued")
        if now and now != sent:
            sent = now
            yield now
        time.sleep(0.02)


class Handler(grpc.GenericRpcHandler):
    def service(self, details):
        if details.method == "/SpiffeWorkloadAPI/FetchX509SVID":
            return grpc.unary_stream_rpc_method_handler(fetch)
        return None


server = grpc.server(futures.ThreadPoolExecutor(8))
server.add_generic_rpc_handlers((Handler(),))
server.add_insecure_port(f"unix:{socket}")
server.start()
print("ready", flush=True)
threading.Event().wait()
