//! A collector that decodes what it receives and keeps it with the header fields of the request.

use std::{
    convert::Infallible,
    io::Read,
    net::SocketAddr,
    sync::{Arc, Mutex},
    thread,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use prost::Message;
use tokio::{net::TcpListener, runtime, task::LocalSet};
use tokio_rustls::TlsAcceptor;

use super::{tls::server_config, upstream::LocalExec};

/// A received request.
pub struct ExportRequest {
    pub path: String,
    pub fields: HeaderMap,
    pub request: ExportTraceServiceRequest,
}

impl ExportRequest {
    pub fn field(&self, name: &str) -> &str {
        self.fields.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    /// The names of all spans.
    pub fn spans(&self) -> Vec<&str> {
        let scopes = self.request.resource_spans.iter().flat_map(|resource| &resource.scope_spans);
        scopes.flat_map(|scope| &scope.spans).map(|span| span.name.as_str()).collect()
    }
}

/// Accepts OTLP over TLS, by gRPC or HTTP. It ends with the test's process.
pub struct Collector {
    address: SocketAddr,
    got: Arc<Mutex<Vec<ExportRequest>>>,
}

impl Collector {
    pub fn start(grpc: bool, certificate: &(String, String)) -> Self {
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("bind");
        listener.set_nonblocking(true).expect("non-blocking");
        let address = listener.local_addr().expect("an address");
        let alpn: &[&str] = if grpc { &["h2"] } else { &["http/1.1"] };
        let acceptor = TlsAcceptor::from(Arc::new(server_config(certificate, None, alpn)));
        let got = Arc::<Mutex<Vec<ExportRequest>>>::default();
        let kept = Arc::clone(&got);
        thread::spawn(move || {
            let runtime = runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            LocalSet::new().block_on(&runtime, serve(listener, acceptor, grpc, kept));
        });
        Self { address, got }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Takes all that has arrived since.
    pub fn take(&self) -> Vec<ExportRequest> {
        std::mem::take(&mut self.got.lock().expect("a lock"))
    }
}

async fn serve(
    listener: std::net::TcpListener,
    acceptor: TlsAcceptor,
    grpc: bool,
    got: Arc<Mutex<Vec<ExportRequest>>>,
) {
    let listener = TcpListener::from_std(listener).expect("a listener");
    while let Ok((stream, _)) = listener.accept().await {
        let (acceptor, got) = (acceptor.clone(), Arc::clone(&got));
        tokio::task::spawn_local(async move {
            // A client that rejects the certificate disconnects.
            let Ok(stream) = acceptor.accept(stream).await else { return };
            let service = service_fn(move |request| {
                let got = Arc::clone(&got);
                async move { Ok::<_, Infallible>(answer(request, grpc, &got).await) }
            });
            let io = TokioIo::new(stream);
            let _ = if grpc {
                hyper::server::conn::http2::Builder::new(LocalExec).serve_connection(io, service).await
            } else {
                hyper::server::conn::http1::Builder::new().serve_connection(io, service).await
            };
        });
    }
}

async fn answer(
    request: Request<Incoming>,
    grpc: bool,
    got: &Mutex<Vec<ExportRequest>>,
) -> Response<impl hyper::body::Body<Data = Bytes, Error = Infallible> + use<>> {
    let (head, body) = request.into_parts();
    let mut body = body.collect().await.expect("a body").to_bytes();
    let mut packed = head.headers.get("content-encoding").is_some_and(|coding| coding == "gzip");
    if grpc {
        // A gRPC message: compressed flag, length, content.
        packed = body[0] == 1;
        assert_eq!(u32::from_be_bytes([body[1], body[2], body[3], body[4]]) as usize, body.len() - 5);
        body = body.slice(5..);
    }
    let mut bytes = Vec::new();
    if packed {
        flate2::read::GzDecoder::new(&body[..]).read_to_end(&mut bytes).expect("gzip");
    } else {
        bytes.extend_from_slice(&body);
    }
    let request = ExportTraceServiceRequest::decode(&bytes[..]).expect("protobuf");
    let path = head.uri.path().to_owned();
    got.lock().expect("a lock").push(ExportRequest { path, fields: head.headers, request });
    // An empty message means success.
    let (kind, message, trailers) = match grpc {
        true => ("application/grpc", &[0; 5][..], Some(("grpc-status", HeaderValue::from_static("0")))),
        false => ("application/x-protobuf", &[][..], None),
    };
    let trailers = trailers.map(|(name, value)| {
        let mut fields = HeaderMap::new();
        fields.insert(name, value);
        Ok(fields)
    });
    let body = Full::new(Bytes::from_static(message)).with_trailers(std::future::ready(trailers));
    let mut response = Response::new(body);
    response.headers_mut().insert("content-type", HeaderValue::from_static(kind));
    response
}
