"""Calls all kinds of gRPC methods and checks the responses.

grpc_client.py TARGET AUTHORITY           all kinds of methods
grpc_client.py TARGET AUTHORITY refused   a request that cannot be forwarded: the status must be UNAVAILABLE
With http_proxy set, the library uses a CONNECT tunnel.
"""

import queue
import sys

import grpc

target, authority = sys.argv[1:3]
channel = grpc.insecure_channel(target, options=[("grpc.default_authority", authority)])


def call(kind, method):
    return getattr(channel, kind)(f"/test.Test/{method}")


def expect(got, wanted):
    assert got == wanted, f"{got!r} is not {wanted!r}"


def fails(action):
    try:
        action()
    except grpc.RpcError as error:
        return error
    raise AssertionError("the call succeeded")


if sys.argv[3:] == ["refused"]:
    error = fails(lambda: call("unary_unary", "Unary")(b"x", timeout=10))
    expect(error.code(), grpc.StatusCode.UNAVAILABLE)
    print("refused:", error.details())
    sys.exit(0)

# Unary, with metadata both before and after the message.
for payload in (b"", b"hello", b"x" * 1_000_000):
    answer, info = call("unary_unary", "Unary").with_call(payload, timeout=20)
    expect(answer, payload)
    first, last = dict(info.initial_metadata()), dict(info.trailing_metadata())
    expect((first.get("x-first"), last.get("x-last"), last.get("x-raw-bin")), ("1", "2", b"\x00\xff"))

# Streams.
numbers = call("unary_stream", "ServerStream")(b"100", timeout=20)
expect([int(number) for number in numbers], list(range(100)))
expect(call("stream_unary", "ClientStream")(iter([b"x" * 1000] * 100), timeout=20), b"100000")

# Bidirectional: each response arrives before the next request message is sent.
questions = queue.Queue()
answers = call("stream_stream", "Bidi")(iter(questions.get, None), timeout=20)
for word in ("one", "two", "three"):
    questions.put(word.encode())
    expect(next(answers), word.upper().encode())
questions.put(None)
expect(list(answers), [])

# Errors: trailers only, and after messages.
error = fails(lambda: call("unary_unary", "Fail")(b"", timeout=20))
expect((error.code(), error.details()), (grpc.StatusCode.NOT_FOUND, "nothing: ä%"))
got, late = [], call("unary_stream", "FailLate")(b"", timeout=20)
error = fails(lambda: [got.append(message) for message in late])
expect((got, error.code(), error.details()), ([b"one", b"two"], grpc.StatusCode.DATA_LOSS, "lost"))
error = fails(lambda: call("unary_unary", "Missing")(b"", timeout=20))
expect(error.code(), grpc.StatusCode.UNIMPLEMENTED)

# The deadline is forwarded and only shortened; without one none is added.
left = int(call("unary_unary", "Remaining")(b"", timeout=20))
assert 1000 < left < 21_000, left
expect(call("unary_unary", "Remaining")(b""), b"none")
error = fails(lambda: call("unary_unary", "Hang")(b"", timeout=0.3))
expect(error.code(), grpc.StatusCode.DEADLINE_EXCEEDED)

# A cancellation reaches the server.
future = call("unary_unary", "Hang").future(b"")
future.cancel()
expect(call("unary_unary", "Unary")(b"after", timeout=20), b"after")
print("all calls as expected")
