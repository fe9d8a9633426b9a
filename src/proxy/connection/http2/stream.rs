//! One stream of a client's HTTP/2 connection, which carries one request.

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
    http2::{body::Body, fields, send::BodySender, tunnel::Tunnel},
    net::{io::Io, watchdog::Watchdog},
    present::Present,
    proxy::{
        body::{CallerBody, ResponseBody},
        call,
        progress::{Progress, poll_watched},
        room::Room,
    },
};

/// A stream under way.
pub(super) struct Stream {
    session: Rc<Session>,
    respond: SendResponse<Bytes>,
    progress: Rc<Progress>,
    /// Its request has turned out to be malformed.
    malformed: Option<Rc<Cell<bool>>>,
    /// What comes inside of CONNECT.
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

/// Where the stream of a tunnel is awaited.
type Handover = oneshot::Sender<Box<dyn Io>>;

impl Session {
    /// Begins to serve a stream, by a task and under a watch of its own: one that stands still is reset, the others go on.
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
                // By `h2`, for what came behind the head: the request is reported when that goes out.
                return;
            }
            // Taken back before anybody has looked at it.
            self.wire.arrivals.handed_over(respond.stream_id().into());
            self.conduct.borrow_mut().taken_back(Duration::ZERO, now.into_std());
            return;
        }
        let note = self.wire.arrivals.handed_over(respond.stream_id().into());
        let path = note.and_then(|note| note.path);
        let request = match self.checked(request, path) {
            Ok(request) => request,
            Err(refused) => return self.refuse(*refused, respond),
        };
        let progress = Rc::new(Progress::new(now));
        let present = Present::of(request.headers());
        let (head, body) = request.into_parts();
        let (mut malformed, mut tunnel) = (None, None);
        let body = if head.method == Method::CONNECT {
            tunnel = Some(body);
            CallerBody::default()
        } else if body.is_end_stream() {
            CallerBody::default()
        } else {
            let found = malformed.insert(Rc::default());
            CallerBody::Http2(Body::of_request(body, &head.headers, Rc::clone(found)))
        };
        let mut request = Request::from_parts(head, body);
        let stream =
            Stream { session: Rc::clone(self), respond, progress: Rc::clone(&progress), malformed, tunnel };
        let connection = Rc::clone(&self.connection);
        let open = OpenStream::new(&connection);
        // In a room of its own, as it is moved about.
        let call = {
            let progress = Rc::clone(&progress);
            Room::new(async move { call::answer(&connection, &mut request, present, &progress).await })
        };
        spawn_local(async move {
            let mut carried = pin!(stream.carry(call));
            let mut watchdog = Watchdog::default();
            let look = || (Some(Rc::clone(&progress)), progress.cut_at());
            poll_fn(|cx| poll_watched(cx, &mut watchdog, |cx| carried.as_mut().poll(cx), look).map(drop))
                .await;
            drop(open);
        });
    }
}

impl Stream {
    /// Of a request of which nothing more is read.
    pub(super) fn new(session: &Rc<Session>, respond: SendResponse<Bytes>, progress: Rc<Progress>) -> Self {
        Self { session: Rc::clone(session), respond, progress, malformed: None, tunnel: None }
    }

    /// Has the request answered, and sends the response. Whatever ends this early resets the stream.
    pub(super) async fn carry(mut self, call: impl Future<Output = Response<ResponseBody>>) {
        let mut handover = None;
        let response = {
            let mut call = pin!(call);
            poll_fn(|cx| self.poll_call(cx, |cx| call.as_mut().poll(cx), &mut handover)).await
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
            // Nobody waits for it: dropped, it is reset.
            let _ = handover.map(|handover: Handover| handover.send(tunnel));
        } else if !ends && let Err(error) = BodySender::new(body, sent).await {
            tracing::debug!(%error, "response not sent to its end");
        }
    }

    /// Ready without a response where none can be sent any more.
    fn poll_call(
        &mut self,
        cx: &mut Context<'_>,
        call: impl FnOnce(&mut Context<'_>) -> Poll<Response<ResponseBody>>,
        handover: &mut Option<Handover>,
    ) -> Poll<Option<Response<ResponseBody>>> {
        let connection = &self.session.connection;
        let polled = call(cx);
        // The call has asked for its stream just now: no other runs on this thread at the same time.
        if let Some(asked) = connection.handover.take() {
            *handover = Some(asked);
        }
        if self.malformed.as_ref().is_some_and(|malformed| malformed.get()) {
            // The call ends by this, and notes why.
            ready!(polled);
            self.respond.send_reset(Reason::PROTOCOL_ERROR);
            return Poll::Ready(None);
        }
        if let Poll::Ready(response) = polled {
            return Poll::Ready(Some(response));
        }
        let _ = ready!(self.respond.poll_reset(cx));
        if self.malformed.is_some() && self.session.wire.has_faulted(self.respond.stream_id().into()) {
            // Reset here for what the client sent: reading the request's body fails, which ends the request.
            return Poll::Pending;
        }
        let now = Instant::now();
        let age = now - self.progress.started();
        self.session.conduct.borrow_mut().taken_back(age, now.into_std());
        Poll::Ready(None)
    }
}
