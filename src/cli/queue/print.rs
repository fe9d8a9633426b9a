//! Deliveries as text.

use std::io::{self, Write};

use crate::admin::deliveries::report::{BodyContent, DeliveryDetail, DeliveryReport};

pub fn heading(out: &mut impl Write) -> io::Result<()> {
    writeln!(
        out,
        "{:26}  {:16} {:10} {:10} {:>8} {:>8} {:>9}  LAST",
        "ID", "QUEUE", "STATE", "REASON", "ATTEMPTS", "AGE", "BYTES"
    )
}

/// One line of the list.
pub fn row(out: &mut impl Write, delivery: &DeliveryReport, as_json: bool) -> io::Result<()> {
    if as_json {
        return writeln!(out, "{}", serde_json::to_string(delivery)?);
    }
    writeln!(
        out,
        "{:26}  {:16} {:10} {:10} {:>8} {:>8} {:>9}  {}",
        delivery.id,
        delivery.queue,
        delivery.state,
        delivery.reason.as_deref().unwrap_or("-"),
        delivery.attempts,
        age(delivery.age_seconds),
        delivery.bytes,
        last_outcome(delivery)
    )
}

pub fn detail(out: &mut impl Write, detail: &DeliveryDetail) -> io::Result<()> {
    let DeliveryDetail { delivery, request, response } = detail;
    writeln!(out, "id          {}", delivery.id)?;
    writeln!(out, "queue       {}", delivery.queue)?;
    let reason = delivery.reason.as_ref().map_or_else(String::new, |reason| format!(" ({reason})"));
    writeln!(out, "state       {}{reason}", delivery.state)?;
    writeln!(out, "attempts    {}", delivery.attempts)?;
    writeln!(out, "last        {}", last_outcome(delivery))?;
    writeln!(out, "accepted    {}", delivery.accepted)?;
    let client = Some(&delivery.client).filter(|client| !client.is_empty()).cloned();
    let lines = [
        ("next", &delivery.next),
        ("ended", &delivery.ended),
        ("client", &client),
        ("key", &delivery.key),
        ("order", &delivery.order),
    ];
    for (name, value) in lines {
        if let Some(value) = value {
            writeln!(out, "{name:11} {value}")?;
        }
    }
    writeln!(out, "\n{} request\n{} {}", request.direction, request.method, request.url)?;
    for (name, value) in &request.fields {
        writeln!(out, "{name}: {value}")?;
    }
    body(out, &request.body)?;
    if let Some(response) = response {
        writeln!(out, "\nresponse {}", response.status)?;
        body(out, &response.body)?;
    }
    Ok(())
}

fn body(out: &mut impl Write, body: &BodyContent) -> io::Result<()> {
    match body.content().filter(|content| !content.is_empty()) {
        Some(content) => {
            writeln!(out)?;
            out.write_all(&content)?;
            writeln!(out)
        }
        None => writeln!(out, "({} bytes of body)", body.bytes),
    }
}

fn last_outcome(delivery: &DeliveryReport) -> String {
    match (delivery.status, &delivery.cause) {
        (Some(status), Some(cause)) => format!("{status} {cause}"),
        (Some(status), None) => status.to_string(),
        (None, Some(cause)) => cause.clone(),
        (None, None) => "-".to_owned(),
    }
}

fn age(seconds: u64) -> String {
    let (number, unit) = match seconds {
        0..60 => (seconds, "s"),
        60..3600 => (seconds / 60, "m"),
        3600..86_400 => (seconds / 3600, "h"),
        _ => (seconds / 86_400, "d"),
    };
    format!("{number}{unit}")
}
