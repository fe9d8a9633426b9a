//! Requests of a client between their header block and the decision of `h2`, which either accepts or rejects them.
//! `h2` reports a rejection to the client only, so it is detected from the frames that `h2` sends.

use std::{cell::RefCell, mem, rc::Rc};

use h2::Reason;

use super::hpack::FieldFault;
use crate::http1::target::RejectedRequestLine;

/// The most requests tracked. `h2` decides on each as soon as it has read it, so there are few at a time.
const MAX_PENDING: usize = 1024;

/// Details of a request that `h2` does not see unchanged.
#[derive(Debug, Default)]
pub struct RequestDetails {
    /// The original `:path`, if `h2` decodes a placeholder for it.
    pub path: Option<Rc<[u8]>>,
    /// Why it is malformed; `h2` resets its stream.
    pub fault: Option<FieldFault>,
    /// What can be logged of a malformed request.
    pub request_line: RejectedRequestLine,
}

/// A request that `h2` has rejected.
#[derive(Debug)]
pub struct RejectedRequest {
    pub details: Option<Box<RequestDetails>>,
    /// With 431, because its head is too large.
    pub is_too_large: bool,
}

/// See the [module](self).
#[derive(Debug, Default)]
pub struct PendingRequests {
    pending: RefCell<Vec<(u32, Option<Box<RequestDetails>>)>>,
    refused: RefCell<Vec<RejectedRequest>>,
}

impl PendingRequests {
    /// Records a request that is passed to `h2`.
    pub fn add(&self, stream: u32, note: Option<Box<RequestDetails>>) {
        let mut pending = self.pending.borrow_mut();
        if pending.len() == MAX_PENDING {
            // `h2` ignores requests after its GOAWAY.
            pending.remove(0);
        }
        pending.push((stream, note));
    }

    /// Records that `h2` has accepted a request.
    pub fn remove_accepted(&self, stream: u32) -> Option<Box<RequestDetails>> {
        self.remove(stream).flatten()
    }

    /// Records that `h2` resets a stream.
    pub fn record_reset(&self, stream: u32, reason: Reason) {
        let Some(note) = self.remove(stream) else { return };
        // Other codes reject a request that is not at fault.
        if reason == Reason::PROTOCOL_ERROR {
            self.refused.borrow_mut().push(RejectedRequest { details: note, is_too_large: false });
        }
    }

    /// Records a response. If its request was not accepted, `h2` has created it.
    pub fn record_response(&self, stream: u32) {
        if let Some(note) = self.remove(stream) {
            self.refused.borrow_mut().push(RejectedRequest { details: note, is_too_large: true });
        }
    }

    /// Returns the requests rejected since the last call.
    pub fn take_rejected(&self) -> Vec<RejectedRequest> {
        mem::take(&mut *self.refused.borrow_mut())
    }

    fn remove(&self, stream: u32) -> Option<Option<Box<RequestDetails>>> {
        let mut pending = self.pending.borrow_mut();
        let at = pending.iter().position(|(id, _)| *id == stream)?;
        Some(pending.swap_remove(at).1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_that_h2_rejects_is_reported_once() {
        let arrivals = PendingRequests::default();
        let note =
            || Some(Box::new(RequestDetails { fault: Some(FieldFault::Te), ..RequestDetails::default() }));
        for stream in [1, 3, 5, 7, 9] {
            arrivals.add(stream, if stream == 3 { note() } else { None });
        }
        assert!(arrivals.remove_accepted(1).is_none());
        for _ in 0..2 {
            // The second time, the stream is not tracked any more.
            arrivals.record_reset(1, Reason::PROTOCOL_ERROR);
            arrivals.record_reset(3, Reason::PROTOCOL_ERROR);
            arrivals.record_reset(5, Reason::REFUSED_STREAM);
            arrivals.record_response(7);
            arrivals.record_response(1);
        }
        let rejected = arrivals.take_rejected();
        let summary: Vec<_> = rejected.iter().map(|one| (one.details.is_some(), one.is_too_large)).collect();
        assert_eq!(summary, [(true, false), (false, true)]);
        assert!(arrivals.take_rejected().is_empty());
        for stream in 0..5000 {
            arrivals.add(stream, None);
        }
        assert_eq!(arrivals.pending.borrow().len(), MAX_PENDING);
    }
}
