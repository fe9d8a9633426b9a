//! HTTP/1.1 from clients: request by request, in one task. [`server_connection`] has the bytes, [`response_head`] the
//! head of a response.
//!
//! # States
//!
//! Of a [`ServerConnection`] (`Stage`), and what leads to the next:
//!
//! ```text
//!            part of a head       whole head
//! new --> IDLE ---------> HEAD ----------------> EXCHANGE ------------------> HANDED OVER
//!         ^ | |            |                     ^ |  |    take_stream: 101,
//!         | | +----------- | -- whole head ------+ |  |    2xx to CONNECT
//!         | |              |                       |  |
//!         | |              |                       |  | Close: no other request may follow
//!         | | no request   | malformed, cut short, |  |
//!         | | follows      | no request follows    |  |
//!         | +--------------+--> CLOSING <-------------+
//!         |                                        |
//!         +-- become_idle: the response is sent, --+
//!             its request received, both persist
//! ```
//!
//! Each state ends with `shut_down`: after CLOSING, when a deadline of `next_deadline` has passed, when the client is gone
//! while it is served, or when the drain ends. A malformed head or framing gets its response in IDLE or HEAD.
//!
//! What is still to be received of the request in EXCHANGE (`RequestRest`):
//!
//! | state | meaning | next |
//! | --- | --- | --- |
//! | Nothing | the next bytes are another request | `begin_request` with a body: Body |
//! | Body | its reader polls it | the last frame: Nothing; `discard_body`: Unneeded; an error, `shut_down`, a final response before `100 Continue`: Broken |
//! | Unneeded | read and dropped as far as it has arrived, up to 64 KiB | its end: Nothing; an error: Broken; else the connection closes |
//! | Broken | its end is unknown | the connection closes |
//!
//! # Wakers
//!
//! The socket keeps one waker for each direction. Two tasks poll the connection: the one that serves it, and the reader of
//! the request's body, if that is another.
//!
//! - Reading: the reader while it waits for bytes (`is_reader_waiting`). Otherwise the serving task, which so notices that
//!   the client closes; not while bytes are unread, because the end of the stream is behind them.
//! - Writing: only the serving task. The reader puts `100 Continue` into the buffer and wakes it.
//! - `task` has the serving task's waker for what no socket reports: the body's end, if it awaits that (`awaits_body`); a
//!   body that broke or was discarded, because from then on it has to notice the close itself.
//! - `reader` has the reader's: `shut_down` replaces the socket, so it wakes the reader, which gets an error.

pub mod body;
#[cfg(test)]
mod conformance_tests;
mod response_head;
#[cfg(test)]
mod response_head_tests;
pub mod server_connection;
#[cfg(test)]
mod tests;

use std::{
    cell::RefCell,
    future::{Future, poll_fn},
    mem::take,
    pin::{Pin, pin},
    rc::Rc,
    task::{Poll, ready},
};

use bytes::Bytes;
use http::{Method, Request, Response, Version, header::CONTENT_LENGTH};
use http_body::Body as _;
use tokio::time::Instant;

pub use response_head::date;

use self::{
    body::Body,
    response_head::{RequestInfo, ResponsePlan, write_head},
    server_connection::ServerConnection,
};
use super::{Connection, ConnectionError, DrainWatch};
use crate::{
    field_set::{Field, FieldSet},
    http1::{
        Error,
        framing::{Framing, FramingError},
        head::{RequestHead, recycle_header_map},
    },
    net::{io::Io, watchdog::Watchdog},
    proxy::{
        body::{ClientBody, ResponseBody},
        future_pool::PooledFuture,
        progress::{Progress, poll_watched},
        request_handler,
    },
};

type SharedConnection = Rc<RefCell<ServerConnection>>;

/// Shuts the connection down when it is no longer served.
struct ConnectionGuard(SharedConnection);

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        self.0.borrow_mut().shut_down();
    }
}

/// A request to be handled.
struct PendingRequest {
    request: Request<ClientBody>,
    present: FieldSet,
    request_info: RequestInfo,
    progress: Rc<Progress>,
}

/// Bytes that are not a valid request, and why.
struct RefusedRequest {
    /// As far as it was parsed.
    request: Request<ClientBody>,
    error: Error,
}

/// What happens to a connection after a request.
enum NextStep {
    /// It serves the next request.
    NextRequest,
    /// It closes. `lingers`: the client may still be sending.
    Close { lingers: bool },
    /// Its stream has been handed over to another protocol.
    HandedOver,
}

impl Connection {
    /// Serves requests until the client closes, the process drains, or the connection stalls. `read_ahead`: the bytes
    /// that were read already.
    pub(super) async fn serve_http1(
        self: &Rc<Self>,
        stream: Box<dyn Io>,
        read_ahead: Bytes,
    ) -> Result<(), ConnectionError> {
        let served = ConnectionGuard(ServerConnection::new(stream, read_ahead));
        let connection = &served.0;
        let mut requests = pin!(self.requests(connection));
        let (mut drain, mut watchdog) = (DrainWatch::new(self), Watchdog::default());
        let mut closing = pin!(self.wait_for_close());
        poll_fn(|cx| {
            if drain.poll(cx, self, closing.as_mut()) {
                connection.borrow_mut().stop_reading_requests();
            }
            if let Poll::Ready(cut) = drain.poll_cut(cx) {
                return Poll::Ready(Err(cut));
            }
            let look = || {
                let exchange = self.exchange.borrow().clone();
                let (due, _) = connection.borrow().next_deadline(exchange.as_deref());
                (exchange, due)
            };
            let served = ready!(poll_watched(cx, &mut watchdog, |cx| requests.as_mut().poll(cx), look));
            let cut = || {
                ConnectionError::Cut(connection.borrow().next_deadline(self.exchange.borrow().as_deref()).1)
            };
            Poll::Ready(served.unwrap_or_else(|| Err(cut())))
        })
        .await
    }

    async fn requests(self: &Rc<Self>, connection: &SharedConnection) -> Result<(), ConnectionError> {
        let keeps_spelling = || self.worker.view().preserves_case;
        let lingers = loop {
            let head = match poll_fn(|cx| connection.borrow_mut().poll_head(cx, keeps_spelling)).await {
                Ok(Some(head)) => head,
                // Closing with unread bytes resets the connection, which could destroy the last response.
                Ok(None) => break connection.borrow_mut().has_unread_bytes(),
                Err(Error::UnexpectedEnd) => break false,
                Err(Error::Io(error)) => return Err(error.into()),
                Err(error) => {
                    self.refuse(connection, unparsed_request(connection, error)).await?;
                    break true;
                }
            };
            // Boxed, so that an idle connection does not hold the memory of a request.
            let exchange = self
                .begin_exchange(connection, head)
                .map(|pending| PooledFuture::new(self.serve_request(connection, pending)));
            let after = match exchange {
                Ok(exchange) => exchange.await?,
                Err(refused) => {
                    self.refuse(connection, refused).await?;
                    break true;
                }
            };
            match after {
                NextStep::NextRequest => {}
                NextStep::Close { lingers } => break lingers,
                NextStep::HandedOver => return Ok(()),
            }
        };
        poll_fn(|cx| connection.borrow_mut().poll_close(cx)).await?;
        if lingers {
            let mut read = 0;
            poll_fn(|cx| connection.borrow_mut().poll_linger(cx, &mut read)).await;
        }
        Ok(())
    }

    /// Makes a request from a head. The error has the request whose body cannot be framed.
    fn begin_exchange(
        self: &Rc<Self>,
        connection: &SharedConnection,
        mut head: RequestHead,
    ) -> Result<PendingRequest, Box<RefusedRequest>> {
        let mut present = head.present;
        let mut request_info = RequestInfo::of(&head);
        if present.has(Field::ContentLength) && present.has(Field::TransferEncoding) {
            // Forward it as `chunked` alone, and close the connection after it (RFC 9112 §6.3).
            head.fields.remove(CONTENT_LENGTH);
            present.remove(Field::ContentLength);
            request_info.persists = false;
        }
        let framing = match framing(&head, present) {
            Ok(framing) => framing,
            Err(error) => {
                let request = request(head, Body::default());
                return Err(Box::new(RefusedRequest { request, error: error.into() }));
            }
        };
        let expects_continue = present.has(Field::Expect) && head.version == Version::HTTP_11;
        let body = ServerConnection::begin_request(connection, framing, expects_continue);
        let progress = Rc::new(Progress::new(Instant::now()));
        self.exchange.replace(Some(Rc::clone(&progress)));
        Ok(PendingRequest { request: request(head, body), present, request_info, progress })
    }

    /// Refuses an invalid request, after which the connection closes. Boxed, as it is rare.
    fn refuse(
        self: &Rc<Self>,
        connection: &SharedConnection,
        refused: Box<RefusedRequest>,
    ) -> Pin<Box<dyn Future<Output = Result<(), ConnectionError>>>> {
        let (this, connection) = (Rc::clone(self), Rc::clone(connection));
        Box::pin(async move {
            let RefusedRequest { mut request, error } = *refused;
            let error = connection.borrow().parse_error(&error, request.uri().path());
            let present = FieldSet::of(request.headers());
            let progress = Rc::new(Progress::new(Instant::now()));
            let mut response = request_handler::refuse(&this, &mut request, present, &error, &progress);
            let request_info = RequestInfo::closing(request.version(), request.method());
            let mut plan =
                write_head(connection.borrow_mut().outlet.head_buffer(), &mut response, &request_info, false);
            // The body is complete, so sending cannot fail midway.
            send(&connection, response.into_body(), &mut plan).await.map(drop)
        })
    }

    /// Serves one request, from its head to the last byte of its response.
    // Not an `async fn`, which would store its arguments twice.
    fn serve_request(
        self: &Rc<Self>,
        connection: &SharedConnection,
        mut pending: PendingRequest,
    ) -> impl Future<Output = Result<NextStep, ConnectionError>> + use<> {
        let (this, connection) = (Rc::clone(self), Rc::clone(connection));
        async move {
            let response = {
                let PendingRequest { request, present, progress, .. } = &mut pending;
                let handled = pin!(request_handler::handle(&this, request, *present, progress));
                this.wait_for_response(&connection, handled).await?
            };
            // The rest of the body is not needed.
            drop(take(pending.request.body_mut()));
            this.write_response(&connection, response, &pending).await
        }
    }

    /// Writes a response and decides what happens to the connection.
    async fn write_response(
        self: &Rc<Self>,
        connection: &SharedConnection,
        mut response: Response<ResponseBody>,
        PendingRequest { request_info, progress, .. }: &PendingRequest,
    ) -> Result<NextStep, ConnectionError> {
        connection.borrow_mut().abandon_unrequested_body();
        let request_finished =
            poll_fn(|cx| Poll::Ready(connection.borrow_mut().poll_request_finished(cx))).await;
        // A body that is still being read will reach its end.
        let may_persist = !matches!(request_finished, Poll::Ready(false)) && !self.is_close_requested();
        let switched = request_info.switches_protocol(response.status());
        let mut plan = write_head(
            connection.borrow_mut().begin_response(&self.interim),
            &mut response,
            request_info,
            may_persist,
        );
        let (parts, body) = response.into_parts();
        recycle_header_map(parts.headers);
        if let Err(error) = send(connection, body, &mut plan).await? {
            tracing::debug!(%error, "response broke off");
            // Its framing shows that it is incomplete. The complete responses before it must still arrive.
            return if plan.ends_by_close() {
                Err(ConnectionError::Cut("the response broke off"))
            } else {
                Ok(NextStep::Close { lingers: true })
            };
        }

        let handover = self.handover.take();
        if switched {
            if let Some(handover) = handover
                && request_finished == Poll::Ready(true)
            {
                // The receiver may be gone.
                let _ = handover.send(connection.borrow_mut().take_stream());
                return Ok(NextStep::HandedOver);
            }
            return Ok(NextStep::Close { lingers: true });
        }
        let request_finished = poll_fn(|cx| {
            let mut connection = connection.borrow_mut();
            match connection.poll_request_finished(cx) {
                Poll::Ready(request_finished) => Poll::Ready(Ok(request_finished)),
                Poll::Pending => connection.poll_client_closed(cx).map(Err),
            }
        })
        .await?;
        if !request_finished || !plan.persists {
            let more = |connection: &SharedConnection| connection.borrow_mut().has_unread_bytes();
            return Ok(NextStep::Close {
                lingers: !request_finished || request_info.may_switch_protocol() || more(connection),
            });
        }
        connection.borrow_mut().become_idle(progress.last_moved());
        self.exchange.take();
        Ok(NextStep::NextRequest)
    }

    /// Waits for the response of a request, and writes interim responses meanwhile. Ends early when the client closes.
    async fn wait_for_response(
        self: &Rc<Self>,
        connection: &SharedConnection,
        mut handled: Pin<&mut impl Future<Output = Response<ResponseBody>>>,
    ) -> Result<Response<ResponseBody>, ConnectionError> {
        poll_fn(|cx| {
            if let Poll::Ready(response) = handled.as_mut().poll(cx) {
                return Poll::Ready(Ok(response));
            }
            let mut connection = connection.borrow_mut();
            connection.poll_interim(cx, &self.interim)?;
            connection.poll_client_closed(cx).map(|error| Err(error.into()))
        })
        .await
    }
}

/// The request of a parsed head.
fn request(head: RequestHead, body: Body) -> Request<ClientBody> {
    let mut request = Request::new(ClientBody::Http1(body));
    *request.method_mut() = head.method;
    *request.uri_mut() = head.target;
    *request.version_mut() = head.version;
    *request.headers_mut() = head.fields;
    if let Some(spelling) = head.spelling {
        request.extensions_mut().insert(spelling);
    }
    if let Some(raw_target) = head.raw_target {
        request.extensions_mut().insert(raw_target);
    }
    request
}

/// The framing of a request's body. Content-Length must be one number of digits only, as no two parsers read that
/// differently.
fn framing(head: &RequestHead, present: FieldSet) -> Result<Framing, FramingError> {
    let (length, coding) = (present.has(Field::ContentLength), present.has(Field::TransferEncoding));
    if !length && !coding {
        return Ok(Framing::EMPTY);
    }
    let mut lengths = head.fields.get_all(CONTENT_LENGTH).iter();
    if lengths.any(|length| !length.as_bytes().iter().all(u8::is_ascii_digit)) {
        return Err(FramingError::Length);
    }
    Framing::of_request(head.version, &head.fields, present)
}

/// A request whose head could not be parsed, as far as its start line is known.
fn unparsed_request(connection: &SharedConnection, error: Error) -> Box<RefusedRequest> {
    let line = connection.borrow().refused_start_line();
    let mut request = Request::new(ClientBody::default());
    // Shown in logs; no method has this name.
    let unknown = || Method::from_bytes(b"-").unwrap_or_default();
    *request.method_mut() = line.method.unwrap_or_else(unknown);
    *request.version_mut() = if line.http10 { Version::HTTP_10 } else { Version::HTTP_11 };
    Box::new(RefusedRequest { request, error })
}

/// Writes what is buffered and then the body, frame by frame; polls the body when the buffer has space. The inner
/// result says why the body is incomplete, if it is.
async fn send(
    connection: &SharedConnection,
    mut body: ResponseBody,
    plan: &mut ResponsePlan,
) -> Result<Result<(), Error>, ConnectionError> {
    let mut ended = plan.bodiless || body.is_end_stream();
    while !ended {
        if !connection.borrow().outlet.accepts_more() {
            flush(connection).await?;
        }
        let part = poll_fn(|cx| {
            if let Poll::Ready(part) = Pin::new(&mut body).poll_frame(cx) {
                return Poll::Ready(Ok(part));
            }
            // Write what is buffered meanwhile.
            let mut connection = connection.borrow_mut();
            match connection.poll_flush(cx) {
                Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
                _ => connection.poll_client_closed(cx).map(Err),
            }
        })
        .await?;
        let last = body.is_end_stream();
        let put = plan.put(&mut connection.borrow_mut().outlet, part, last);
        match put {
            Ok(last) => ended = last,
            Err(error) => return flush(connection).await.map(|()| Err(error)),
        }
    }
    flush(connection).await.map(Ok)
}

/// Writes everything that is buffered, unless the client closes.
async fn flush(connection: &SharedConnection) -> Result<(), ConnectionError> {
    let flushed = poll_fn(|cx| {
        let mut connection = connection.borrow_mut();
        match connection.poll_flush(cx) {
            Poll::Ready(flushed) => Poll::Ready(flushed),
            Poll::Pending => connection.poll_client_closed(cx).map(Err),
        }
    });
    Ok(flushed.await?)
}
