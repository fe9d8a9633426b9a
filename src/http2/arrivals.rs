//! A client's requests between the header block that opens their stream and what `h2` makes of it. It hands them over or
//! refuses them; it reports a refusal to the client only, so the refusal is read off the frames that it sends.

use std::{cell::RefCell, mem, rc::Rc};

use h2::Reason;

use super::hpack::FieldFault;
use crate::http1::target::RefusedLine;

/// Requests that are followed. `h2` decides on each as soon as it has read it, so few are there at a time.
const MOST_PENDING: usize = 1024;

/// What is known of a request that `h2` does not see as it is.
#[derive(Debug, Default)]
pub struct RequestNote {
    /// Its `:path` as it came, where `h2` has a stand-in for it.
    pub path: Option<Rc<[u8]>>,
    /// Why it is malformed: `h2` resets its stream.
    pub fault: Option<FieldFault>,
    /// What can be shown of a malformed request.
    pub line: RefusedLine,
}

/// A request that `h2` has refused.
#[derive(Debug)]
pub struct RefusedRequest {
    pub note: Option<Box<RequestNote>>,
    /// By 431, as its head is too large.
    pub too_large: bool,
}

/// See the first lines of this file.
#[derive(Debug, Default)]
pub struct Arrivals {
    pending: RefCell<Vec<(u32, Option<Box<RequestNote>>)>>,
    refused: RefCell<Vec<RefusedRequest>>,
}

impl Arrivals {
    /// A request goes to `h2`.
    pub fn arrived(&self, stream: u32, note: Option<Box<RequestNote>>) {
        let mut pending = self.pending.borrow_mut();
        if pending.len() == MOST_PENDING {
            // `h2` ignores what comes behind its GOAWAY.
            pending.remove(0);
        }
        pending.push((stream, note));
    }

    /// `h2` hands a request over.
    pub fn handed_over(&self, stream: u32) -> Option<Box<RequestNote>> {
        self.remove(stream).flatten()
    }

    /// `h2` resets a stream.
    pub fn was_reset(&self, stream: u32, reason: Reason) {
        let Some(note) = self.remove(stream) else { return };
        // Other codes refuse a request without a fault of it.
        if reason == Reason::PROTOCOL_ERROR {
            self.refused.borrow_mut().push(RefusedRequest { note, too_large: false });
        }
    }

    /// A response goes out. Where its request was not handed over, `h2` has made it.
    pub fn was_answered(&self, stream: u32) {
        if let Some(note) = self.remove(stream) {
            self.refused.borrow_mut().push(RefusedRequest { note, too_large: true });
        }
    }

    /// The requests refused since this was asked last.
    pub fn take_refused(&self) -> Vec<RefusedRequest> {
        mem::take(&mut *self.refused.borrow_mut())
    }

    fn remove(&self, stream: u32) -> Option<Option<Box<RequestNote>>> {
        let mut pending = self.pending.borrow_mut();
        let at = pending.iter().position(|(id, _)| *id == stream)?;
        Some(pending.swap_remove(at).1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_h2_refuses_is_reported_once_and_nothing_else() {
        let arrivals = Arrivals::default();
        let note = || Some(Box::new(RequestNote { fault: Some(FieldFault::Te), ..RequestNote::default() }));
        for stream in [1, 3, 5, 7, 9] {
            arrivals.arrived(stream, if stream == 3 { note() } else { None });
        }
        assert!(arrivals.handed_over(1).is_none());
        for _ in 0..2 {
            // The second time of a stream that is not followed any more.
            arrivals.was_reset(1, Reason::PROTOCOL_ERROR);
            arrivals.was_reset(3, Reason::PROTOCOL_ERROR);
            arrivals.was_reset(5, Reason::REFUSED_STREAM);
            arrivals.was_answered(7);
            arrivals.was_answered(1);
        }
        let refused = arrivals.take_refused();
        let found: Vec<_> = refused.iter().map(|one| (one.note.is_some(), one.too_large)).collect();
        assert_eq!(found, [(true, false), (false, true)]);
        assert!(arrivals.take_refused().is_empty());
        for stream in 0..5000 {
            arrivals.arrived(stream, None);
        }
        assert_eq!(arrivals.pending.borrow().len(), MOST_PENDING);
    }
}
