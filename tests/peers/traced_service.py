"""A service with OpenTelemetry's instrumentation for WSGI and urllib: COLLECTOR-URL FILE-WITH-THE-SIDECAR'S-ADDRESS."""

import sys
import urllib.request
from wsgiref.simple_server import WSGIRequestHandler, make_server

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.urllib import URLLibInstrumentor
from opentelemetry.instrumentation.wsgi import OpenTelemetryMiddleware
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

collector, sidecar = sys.argv[1:]
provider = TracerProvider(resource=Resource.create({"service.name": "python"}))
provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=collector), schedule_delay_millis=100))
trace.set_tracer_provider(provider)
URLLibInstrumentor().instrument()


def service(_, start_response):
    address = open(sidecar).read()
    request = urllib.request.Request(f"http://{address}/", headers={"Host": "second"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    body = opener.open(request, timeout=10).read()
    start_response("200 OK", [("content-type", "text/plain"), ("content-length", str(len(body)))])
    return [body]


class Quiet(WSGIRequestHandler):
    def log_message(self, *_):
        pass


server = make_server("127.0.0.1", 0, OpenTelemetryMiddleware(service), handler_class=Quiet)
print(f"port {server.server_port}", flush=True)
server.serve_forever()
