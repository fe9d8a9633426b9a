//! HTTP/1.1 towards a caller: request by request, in one task. The bytes are in [`link`], the head of an answer in
//! [`answer`].

mod answer;
pub mod body;
pub mod link;
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

pub use answer::date;

use self::{
    answer::{Asked, Plan, write_head},
    body::Body,
    link::Link,
};
use super::{Connection, ConnectionError, Leaving};
use crate::{
    http1::{
        Error,
        framing::{Framing, FramingError},
        head::{RequestHead, leave},
    },
    net::{io::Io, watchdog::Watchdog},
    present::{Field, Present},
    proxy::{
        body::{CallerBody, ResponseBody},
        call,
        progress::{Progress, poll_watched},
        room::Room,
    },
};

type Shared = Rc<RefCell<Link>>;

/// A connection for as long as it is served.
struct Served(Shared);

impl Drop for Served {
    fn drop(&mut self) {
        self.0.borrow_mut().end();
    }
}

/// A request that is to be answered.
struct Begun {
    request: Request<CallerBody>,
    present: Present,
    asked: Asked,
    progress: Rc<Progress>,
}

/// What is no request, and why.
struct RefusedRequest {
    /// As far as it was understood.
    request: Request<CallerBody>,
    error: Error,
}

/// What becomes of a connection after a request.
enum After {
    /// It serves the next one.
    Next,
    /// It ends; the caller may still be sending.
    Close { lingers: bool },
    /// It carries another protocol now, elsewhere.
    HandedOver,
}

impl Connection {
    /// Serves requests, until the caller or the process leaves, or the connection stands still. `begun` is what was read
    /// already.
    pub(super) async fn serve_http1(
        self: &Rc<Self>,
        stream: Box<dyn Io>,
        begun: Bytes,
    ) -> Result<(), ConnectionError> {
        let served = Served(Link::new(stream, begun));
        let link = &served.0;
        let mut requests = pin!(self.requests(link));
        let (mut leaving, mut watchdog) = (Leaving::new(self), Watchdog::default());
        let mut closing = pin!(self.closing());
        poll_fn(|cx| {
            if leaving.poll(cx, self, closing.as_mut()) {
                link.borrow_mut().leave();
            }
            if let Poll::Ready(cut) = leaving.poll_cut(cx) {
                return Poll::Ready(Err(cut));
            }
            let look = || {
                let exchange = self.exchange.borrow().clone();
                let (due, _) = link.borrow().due(exchange.as_deref());
                (exchange, due)
            };
            let served = ready!(poll_watched(cx, &mut watchdog, |cx| requests.as_mut().poll(cx), look));
            let cut = || ConnectionError::Cut(link.borrow().due(self.exchange.borrow().as_deref()).1);
            Poll::Ready(served.unwrap_or_else(|| Err(cut())))
        })
        .await
    }

    async fn requests(self: &Rc<Self>, link: &Shared) -> Result<(), ConnectionError> {
        let keeps_spelling = || self.worker.view().preserves_case;
        let lingers = loop {
            let head = match poll_fn(|cx| link.borrow_mut().poll_head(cx, keeps_spelling)).await {
                Ok(Some(head)) => head,
                // A request that came just now must not take the last answer with it.
                Ok(None) => break link.borrow_mut().has_more(),
                Err(Error::CutOff) => break false,
                Err(Error::Io(error)) => return Err(error.into()),
                Err(error) => {
                    self.refuse(link, unread_request(link, error)).await?;
                    break true;
                }
            };
            // An idle connection holds no room for it.
            let exchange = self.begin_exchange(link, head).map(|begun| Room::new(self.exchange(link, begun)));
            let after = match exchange {
                Ok(exchange) => exchange.await?,
                Err(refused) => {
                    self.refuse(link, refused).await?;
                    break true;
                }
            };
            match after {
                After::Next => {}
                After::Close { lingers } => break lingers,
                After::HandedOver => return Ok(()),
            }
        };
        poll_fn(|cx| link.borrow_mut().poll_close(cx)).await?;
        if lingers {
            let mut read = 0;
            poll_fn(|cx| link.borrow_mut().poll_linger(cx, &mut read)).await;
        }
        Ok(())
    }

    /// Makes a request of a head, and says what becomes of the connection as far as that hangs on it. The error has the
    /// request whose body cannot be found.
    fn begin_exchange(
        self: &Rc<Self>,
        link: &Shared,
        mut head: RequestHead,
    ) -> Result<Begun, Box<RefusedRequest>> {
        let mut present = head.present;
        let mut asked = Asked::of(&head);
        if present.has(Field::ContentLength) && present.has(Field::TransferEncoding) {
            // It goes on as `chunked` alone, and nothing comes behind it (RFC 9112 §6.3).
            head.fields.remove(CONTENT_LENGTH);
            present.remove(Field::ContentLength);
            asked.persists = false;
        }
        let framing = match framing(&head, present) {
            Ok(framing) => framing,
            Err(error) => {
                let request = request(head, Body::default());
                return Err(Box::new(RefusedRequest { request, error: error.into() }));
            }
        };
        let expects_continue = present.has(Field::Expect) && head.version == Version::HTTP_11;
        let body = Link::begin(link, framing, expects_continue);
        let progress = Rc::new(Progress::new(Instant::now()));
        self.exchange.replace(Some(Rc::clone(&progress)));
        Ok(Begun { request: request(head, body), present, asked, progress })
    }

    /// Answers what is no request, after which the connection ends. Boxed, as few connections come to this.
    fn refuse(
        self: &Rc<Self>,
        link: &Shared,
        refused: Box<RefusedRequest>,
    ) -> Pin<Box<dyn Future<Output = Result<(), ConnectionError>>>> {
        let (this, link) = (Rc::clone(self), Rc::clone(link));
        Box::pin(async move {
            let RefusedRequest { mut request, error } = *refused;
            let error = link.borrow().explain(&error, request.uri().path());
            let present = Present::of(request.headers());
            let progress = Rc::new(Progress::new(Instant::now()));
            let mut response = call::refuse(&this, &mut request, present, &error, &progress);
            let asked = Asked::closing(request.version(), request.method());
            let mut plan = write_head(link.borrow_mut().outlet.head(), &mut response, &asked, false);
            // All of it is there.
            send(&link, response.into_body(), &mut plan).await.map(drop)
        })
    }

    /// One request, from its head to the last byte of its answer.
    // No `async fn`, as that has room for what it is given twice.
    fn exchange(
        self: &Rc<Self>,
        link: &Shared,
        mut begun: Begun,
    ) -> impl Future<Output = Result<After, ConnectionError>> + use<> {
        let (this, link) = (Rc::clone(self), Rc::clone(link));
        async move {
            let response = {
                let Begun { request, present, progress, .. } = &mut begun;
                let call = pin!(call::answer(&this, request, *present, progress));
                this.answered(&link, call).await?
            };
            // What nobody took of it nobody will read.
            drop(take(begun.request.body_mut()));
            this.pass_on(&link, response, &begun).await
        }
    }

    /// Writes an answer, and sees what becomes of the connection.
    async fn pass_on(
        self: &Rc<Self>,
        link: &Shared,
        mut response: Response<ResponseBody>,
        Begun { asked, progress, .. }: &Begun,
    ) -> Result<After, ConnectionError> {
        link.borrow_mut().give_up_unasked();
        let over = poll_fn(|cx| Poll::Ready(link.borrow_mut().is_request_over(cx))).await;
        // A body that somebody still reads will come to its end.
        let may_persist = !matches!(over, Poll::Ready(false)) && !self.is_leaving();
        let switched = asked.is_switched_by(response.status());
        let mut plan = write_head(link.borrow_mut().answer(&self.interim), &mut response, asked, may_persist);
        let (parts, body) = response.into_parts();
        leave(parts.headers);
        if let Err(error) = send(link, body, &mut plan).await? {
            tracing::debug!(%error, "a response broke off");
            // Its framing says that it is incomplete. Responses before it, which are complete, must still arrive.
            return if plan.ends_by_close() {
                Err(ConnectionError::Cut("the answer broke off"))
            } else {
                Ok(After::Close { lingers: true })
            };
        }

        let handover = self.handover.take();
        if switched {
            if let Some(handover) = handover
                && over == Poll::Ready(true)
            {
                // Nobody may want it any more.
                let _ = handover.send(link.borrow_mut().hand_over());
                return Ok(After::HandedOver);
            }
            return Ok(After::Close { lingers: true });
        }
        let over = poll_fn(|cx| {
            let mut link = link.borrow_mut();
            match link.is_request_over(cx) {
                Poll::Ready(over) => Poll::Ready(Ok(over)),
                Poll::Pending => link.poll_gone(cx).map(Err),
            }
        })
        .await?;
        if !over || !plan.persists {
            let more = |link: &Shared| link.borrow_mut().has_more();
            return Ok(After::Close { lingers: !over || asked.may_switch() || more(link) });
        }
        link.borrow_mut().rest(progress.last_moved());
        self.exchange.take();
        Ok(After::Next)
    }

    /// Has a call answered, and passes on meanwhile what comes before its answer; until the caller leaves.
    async fn answered(
        self: &Rc<Self>,
        link: &Shared,
        mut call: Pin<&mut impl Future<Output = Response<ResponseBody>>>,
    ) -> Result<Response<ResponseBody>, ConnectionError> {
        poll_fn(|cx| {
            if let Poll::Ready(response) = call.as_mut().poll(cx) {
                return Poll::Ready(Ok(response));
            }
            let mut link = link.borrow_mut();
            link.poll_interim(cx, &self.interim)?;
            link.poll_gone(cx).map(|error| Err(error.into()))
        })
        .await
    }
}

/// A request as calls know it.
fn request(head: RequestHead, body: Body) -> Request<CallerBody> {
    let mut request = Request::new(CallerBody::Http1(body));
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

/// Where a request's body ends. A length is digits, once: two readers must not differ.
fn framing(head: &RequestHead, present: Present) -> Result<Framing, FramingError> {
    let (length, coding) = (present.has(Field::ContentLength), present.has(Field::TransferEncoding));
    if !length && !coding {
        return Ok(Framing::EMPTY);
    }
    let mut said = head.fields.get_all(CONTENT_LENGTH).iter();
    if said.any(|said| !said.as_bytes().iter().all(u8::is_ascii_digit)) {
        return Err(FramingError::Length);
    }
    Framing::of_request(head.version, &head.fields, present)
}

/// What can be told of a request whose head could not be read.
fn unread_request(link: &Shared, error: Error) -> Box<RefusedRequest> {
    let line = link.borrow().refused_line();
    let mut request = Request::new(CallerBody::default());
    // A token that no method has, in logs.
    let unknown = || Method::from_bytes(b"-").unwrap_or_default();
    *request.method_mut() = line.method.unwrap_or_else(unknown);
    *request.version_mut() = if line.http10 { Version::HTTP_10 } else { Version::HTTP_11 };
    Box::new(RefusedRequest { request, error })
}

/// Writes what there is, and the body behind it, part by part: more is asked for when there is room for it. Says why the
/// body is incomplete, if it is.
async fn send(
    link: &Shared,
    mut body: ResponseBody,
    plan: &mut Plan,
) -> Result<Result<(), Error>, ConnectionError> {
    let mut ended = plan.bodiless || body.is_end_stream();
    while !ended {
        if !link.borrow().outlet.has_room() {
            flush(link).await?;
        }
        let part = poll_fn(|cx| {
            if let Poll::Ready(part) = Pin::new(&mut body).poll_frame(cx) {
                return Poll::Ready(Ok(part));
            }
            // What there is goes out meanwhile.
            let mut link = link.borrow_mut();
            match link.poll_flush(cx) {
                Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
                _ => link.poll_gone(cx).map(Err),
            }
        })
        .await?;
        let last = body.is_end_stream();
        let put = plan.put(&mut link.borrow_mut().outlet, part, last);
        match put {
            Ok(last) => ended = last,
            Err(error) => return flush(link).await.map(|()| Err(error)),
        }
    }
    flush(link).await.map(Ok)
}

/// Writes all that there is, unless the caller leaves.
async fn flush(link: &Shared) -> Result<(), ConnectionError> {
    let flushed = poll_fn(|cx| {
        let mut link = link.borrow_mut();
        match link.poll_flush(cx) {
            Poll::Ready(flushed) => Poll::Ready(flushed),
            Poll::Pending => link.poll_gone(cx).map(Err),
        }
    });
    Ok(flushed.await?)
}
