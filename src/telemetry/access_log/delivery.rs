//! A line of the access log for the end of a delivery. Its acceptance and its attempts have lines as requests.

use std::time::SystemTime;

use serde::Serialize;

use crate::{delivery_id::DeliveryId, telemetry::timestamp::Timestamp};

/// How a delivery ended.
#[derive(Clone, Debug)]
pub struct DeliveryEnd {
    pub at: SystemTime,
    pub id: DeliveryId,
    pub queue: String,
    /// Why it is a dead letter; `None`: it is done.
    pub dead: Option<&'static str>,
    /// The number of its last attempt; `None` if none reached the service.
    pub attempts: Option<u32>,
    /// The status of the last response.
    pub status: Option<u16>,
    /// The stable word of the last failure.
    pub cause: Option<String>,
}

/// The fields, in order.
#[derive(Serialize)]
struct DeliveryLine<'a> {
    time: String,
    delivery: String,
    queue: &'a str,
    state: &'static str,
    reason: Option<&'static str>,
    attempts: Option<u32>,
    status: Option<u16>,
    why: Option<&'a str>,
}

/// Appends the line, with a newline.
pub fn write(out: &mut Vec<u8>, end: &DeliveryEnd) {
    let line = DeliveryLine {
        time: Timestamp::from(end.at).to_string(),
        delivery: end.id.to_string(),
        queue: &end.queue,
        state: if end.dead.is_some() { "dead" } else { "done" },
        reason: end.dead,
        attempts: end.attempts,
        status: end.status,
        why: end.cause.as_deref(),
    };
    let before = out.len();
    match serde_json::to_writer(&mut *out, &line) {
        Ok(()) => out.push(b'\n'),
        // Drop the partial line.
        Err(_) => out.truncate(before),
    }
}
