//! A response on its way into the store, and to its clients at the same time.

use std::{
    future::poll_fn,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Poll, ready},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, header::TRANSFER_ENCODING};
use http_body::Body as _;
use tokio::task::spawn_local;

use super::{ClientRequest, detached::watch};
use crate::{
    cache::{
        Entry, Store,
        fill::{Fill, FillEnd},
        flight::{FlightState, Leader},
        reservation::Reservation,
        store::Ticket,
    },
    proxy::{body::ResponseBody, progress::Progress},
};

/// Fields that are not stored (RFC 9111 §3.1), or that tell of one request alone.
const NOT_STORED: [&str; 8] = [
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authentication-info",
    "proxy-authorization",
    "proxy-connection",
    "proxy-status",
    "x-outrigger-retry",
];

/// The header fields of a response that are stored.
pub fn storable_fields(headers: &HeaderMap) -> HeaderMap {
    let mut stored = headers.clone();
    NOT_STORED.into_iter().map(HeaderName::from_static).for_each(|name| {
        stored.remove(name);
    });
    stored.remove(TRANSFER_ENCODING);
    stored
}

/// A response to be stored.
pub struct Storing {
    pub store: Arc<Store>,
    pub key: Vec<u8>,
    pub request: Rc<ClientRequest>,
    pub ticket: Ticket,
    /// Others may get it.
    pub is_fresh: bool,
    /// Without its body.
    pub entry: Entry,
    pub lead: Option<Leader>,
    /// The largest body that is stored.
    pub limit: u64,
    /// The length that its head announces.
    pub length: Option<u64>,
    pub progress: Rc<Progress>,
}

impl Storing {
    /// Begins to read the body. Returns the client's view of it.
    pub fn begin(mut self, mut body: ResponseBody) -> ResponseBody {
        let mut reservation = Reservation::new(Arc::clone(&self.store));
        if !reservation.grow(self.length.unwrap_or(0)) {
            self.resolve(FlightState::Alone);
            return body;
        }
        if let ResponseBody::Empty | ResponseBody::Whole(_) = body {
            let whole = match &body {
                ResponseBody::Whole(Some(bytes)) => Bytes::copy_from_slice(bytes),
                _ => Bytes::new(),
            };
            self.complete(whole);
            return body;
        }
        if !self.is_fresh {
            // Others do not get it: they need not wait for its end, which may never come.
            self.resolve(FlightState::Alone);
        }
        let fill = Arc::new(Fill::new(reservation));
        let client = ResponseBody::shared(fill.reader(), self.length, Rc::clone(&self.progress));
        if self.is_fresh
            && self.length.is_some()
            && let Some(lead) = &self.lead
        {
            let head = Entry {
                headers: self.entry.headers.clone(),
                timing: self.entry.timing.clone(),
                selection: self.entry.selection.clone(),
                body: Bytes::new(),
                ..self.entry
            };
            lead.stream(&Arc::new(head), &fill);
        }
        let progress = Rc::clone(&self.progress);
        let guard = EndGuard(Arc::clone(&fill));
        spawn_local(watch(
            Box::pin(async move {
                self.drive(&mut body, &fill).await;
                drop(guard);
            }),
            progress,
        ));
        client
    }

    /// Reads the body to its end, at the speed of the upstream. A body of unknown length may have no end (a watch, a feed):
    /// it is read only as long as a client reads it or waits for it.
    async fn drive(mut self, body: &mut ResponseBody, fill: &Arc<Fill>) {
        let mut received: u64 = 0;
        let mut is_relay = false;
        loop {
            let next = poll_fn(|cx| {
                let may_stop = is_relay || self.length.is_none();
                if may_stop && fill.poll_unread(cx).is_ready() && !self.is_awaited() {
                    return Poll::Ready(None);
                }
                if is_relay {
                    ready!(fill.poll_capacity(cx));
                }
                Pin::new(&mut *body).poll_frame(cx).map(Some)
            });
            let Some(next) = next.await else { return };
            match next {
                Some(Ok(frame)) => {
                    let Ok(data) = frame.into_data() else { continue };
                    received += data.len() as u64;
                    if !is_relay && (received > self.limit || !fill.reserve(received)) {
                        is_relay = true;
                        fill.relay();
                        self.store.forget(&self.key, &self.request.headers, true);
                        self.resolve(FlightState::Alone);
                    }
                    fill.push(data);
                }
                Some(Err(_)) => {
                    fill.end(FillEnd::Broken);
                    return self.resolve(FlightState::Failed("reset"));
                }
                None => break,
            }
        }
        let is_whole = self.length.is_none_or(|length| length == received);
        if is_relay || !is_whole {
            fill.end(if is_whole { FillEnd::Complete } else { FillEnd::Broken });
            return;
        }
        self.complete(fill.complete());
    }

    fn is_awaited(&self) -> bool {
        self.lead.as_ref().is_some_and(Leader::has_followers)
    }

    /// Stores the response.
    fn complete(mut self, body: Bytes) {
        let entry = Entry {
            status: self.entry.status,
            headers: std::mem::take(&mut self.entry.headers),
            body,
            timing: self.entry.timing.clone(),
            selection: self.entry.selection.clone(),
            stored_at: self.entry.stored_at,
        };
        let entry = Arc::new(entry);
        let is_stored = self.store.insert(&self.key, &entry, self.ticket, !self.is_fresh);
        let shared = self.is_fresh && is_stored;
        self.resolve(if shared { FlightState::Stored(entry) } else { FlightState::Alone });
    }

    fn resolve(&mut self, state: FlightState) {
        if let Some(lead) = self.lead.take() {
            lead.resolve(state);
        }
    }
}

/// Ends the body for its readers where its writer is cut.
struct EndGuard(Arc<Fill>);

impl Drop for EndGuard {
    fn drop(&mut self) {
        self.0.end_if_open(FillEnd::Broken);
    }
}
