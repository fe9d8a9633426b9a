//! One stream of a client's HTTP/2 connection, with its request.

use std::{
    cell::Cell,
    future::{Future, poll_fn},
    pin::pin,
    rc::Rc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use h2::{Reason, RecvStream, server::SendResponse};
use http::{
    HeaderValue, Method, Request, Response,
    header::{CONTENT_LENGTH, DATE},
};
use http_body::Body as _;
use tokio::{sync::oneshot, task::spawn_local, time::Instant};

use super::{
    super::{Connection, http1},
    Session,
};
use crate::{
    field_set::FieldSet,
    http2::{body::StreamBody, fields, send::BodySender, tunnel::Tunnel},
    net::{io::Io, watchdog::Watchdog},
    proxy::{
        body::{ClientBody, ResponseBody},
        future_pool::PooledFuture,
        progress::{Progress, poll_watched},
        request_handler,
    },
};

/// An open stream.
pub(super) struct Stream {
    session: Rc<Session>,
    respond: SendResponse<Bytes>,
    progress: Rc<Progress>,
    /// Set when the request's body turns out to be malformed.
    malformed: Option<Rc<Cell<bool>>>,
    /// The bytes that the client sends inside CONNECT.
    tunnel: Option<RecvStream>,
}

/// Counts a stream until it is dropped.
struct OpenStream(Rc<Connection>);

impl OpenStream {
    fn new(connection: &Rc<Connection>) -> Self {
        connection.streams.set(connection.streams.get() + 1);
        Self(Rc::clone(connection))
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.streams.set(self.0.streams.get().saturating_sub(1));
        self.0.idle_since.set(Instant::now());
    }
}

/// Receives the stream of a tunnel.
type Handover = oneshot::Sender<Box<dyn Io>>;

impl Session {
    /// Serves a stream in its own task with its own watchdog: a stalled stream is reset, the others go on.
    pub(super) fn open(
        self: &Rc<Self>,
        cx: &mut Context<'_>,
        request: Request<RecvStream>,
        mut respond: SendResponse<Bytes>,
    ) {
        self.connection.has_served.set(true);
        let now = Instant::now();
        if let Poll::Ready(reset) = respond.poll_reset(cx) {
            if reset.is_ok_and(|reason| reason == Reason::PROTOCOL_ERROR) {
                // `h2` reset it for what followed the head: the request is reported when the reset is sent.
                return;
            }
            // The client reset it before it was accepted.
            self.wire.pending_requests.remove_accepted(respond.stream_id().into());
            self.conduct.borrow_mut().record_early_reset(Duration::ZERO, now.into_std());
            return;
        }
        let note = self.wire.pending_requests.remove_accepted(respond.stream_id().into());
        let path = note.and_then(|note| note.path);
        let request = match self.check(request, path) {
            Ok(request) => request,
            Err(refused) => return self.refuse(*refused, respond),
        };
        let progress = Rc::new(Progress::new(now));
        let present = FieldSet::of(request.headers());
        let (head, body) = request.into_parts();
        let (mut malformed, mut tunnel) = (None, None);
        let body = if head.method == Method::CONNECT {
            tunnel = Some(body);
            ClientBody::default()
        } else if body.is_end_stream() {
            ClientBody::default()
        } else {
            let found = malformed.insert(Rc::default());
            ClientBody::Http2(StreamBody::of_request(body, &head.headers, Rc::clone(found)))
        };
        let mut request = Request::from_parts(head, body);
        let stream =
            Stream { session: Rc::clone(self), respond, progress: Rc::clone(&progress), malformed, tunnel };
        let connection = Rc::clone(&self.connection);
        let open = OpenStream::new(&connection);
        // Boxed, as the future is moved several times.
        let handled = {
            let progress = Rc::clone(&progress);
            PooledFuture::new(async move {
                request_handler::handle(&connection, &mut request, present, &progress).await
            })
        };
        spawn_local(async move {
            let mut served = pin!(stream.serve(handled));
            let mut watchdog = Watchdog::default();
            let look = || (Some(Rc::clone(&progress)), progress.cut_at());
            poll_fn(|cx| poll_watched(cx, &mut watchdog, |cx| served.as_mut().poll(cx), look).map(drop))
                .await;
            drop(open);
        });
    }
}

impl Stream {
    /// The stream of a request whose body is not read.
    pub(super) fn new(session: &Rc<Session>, respond: SendResponse<Bytes>, progress: Rc<Progress>) -> Self {
        Self { session: Rc::clone(session), respond, progress, malformed: None, tunnel: None }
    }

    /// Handles the request and sends the response. The stream is reset if this is dropped early.
    pub(super) async fn serve(mut self, request: impl Future<Output = Response<ResponseBody>>) {
        let mut handover = None;
        let response = {
            let mut request = pin!(request);
            poll_fn(|cx| self.poll_request(cx, |cx| request.as_mut().poll(cx), &mut handover)).await
        };
        let Some(response) = response else { return };
        let (mut head, body) = response.into_parts();
        fields::strip_connection_fields(&mut head.headers);
        if !head.headers.contains_key(DATE)
            && let Ok(now) = HeaderValue::from_bytes(&http1::date())
        {
            head.headers.insert(DATE, now);
        }
        let is_tunnel = self.tunnel.is_some() && head.status.is_success();
        if is_tunnel {
            head.headers.remove(CONTENT_LENGTH);
        } else if !body.is_end_stream()
            && !head.headers.contains_key(CONTENT_LENGTH)
            && let Some(length) = body.size_hint().exact()
        {
            head.headers.insert(CONTENT_LENGTH, length.into());
        }
        let ends = body.is_end_stream() && !is_tunnel;
        let sent = match self.respond.send_response(Response::from_parts(head, ()), ends) {
            Ok(sent) => sent,
            Err(error) => {
                tracing::debug!(%error, "response not sent");
                return self.respond.send_reset(Reason::INTERNAL_ERROR);
            }
        };
        if let (true, Some(received)) = (is_tunnel, self.tunnel.take()) {
            let tunnel: Box<dyn Io> = Box::new(Tunnel::new(sent, received));
            // If nothing waits for the tunnel, it is dropped, which resets the stream.
            let _ = handover.map(|handover: Handover| handover.send(tunnel));
        } else if !ends && let Err(error) = BodySender::new(body, sent).await {
            tracing::debug!(%error, "response not sent completely");
        }
    }

    /// Ready with `None` where no response can be sent any more.
    fn poll_request(
        &mut self,
        cx: &mut Context<'_>,
        poll: impl FnOnce(&mut Context<'_>) -> Poll<Response<ResponseBody>>,
        handover: &mut Option<Handover>,
    ) -> Poll<Option<Response<ResponseBody>>> {
        let connection = &self.session.connection;
        let polled = poll(cx);
        // Set by this request: no other request runs on this thread during the poll.
        if let Some(sender) = connection.handover.take() {
            *handover = Some(sender);
        }
        if self.malformed.as_ref().is_some_and(|malformed| malformed.get()) {
            // The request ends with this error and records it.
            ready!(polled);
            self.respond.send_reset(Reason::PROTOCOL_ERROR);
            return Poll::Ready(None);
        }
        if let Poll::Ready(response) = polled {
            return Poll::Ready(Some(response));
        }
        let _ = ready!(self.respond.poll_reset(cx));
        if self.malformed.is_some() && self.session.wire.has_peer_fault(self.respond.stream_id().into()) {
            // The stream was reset on this side for what the client sent: reading the body fails, which ends the
            // request.
            return Poll::Pending;
        }
        let now = Instant::now();
        let age = now - self.progress.started();
        self.session.conduct.borrow_mut().record_early_reset(age, now.into_std());
        Poll::Ready(None)
    }
}
