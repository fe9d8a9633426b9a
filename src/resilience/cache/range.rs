//! `Range` requests answered from a whole stored response (RFC 9110 §14): one range; of several the whole is sent.

use std::ops::Range;

use http::HeaderValue;

/// What a `Range` field selects of a body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Send all of it: the field is absent, invalid, has another unit or several ranges.
    Whole,
    /// Send these bytes: 206.
    Bytes(Range<usize>),
    /// It is beyond the end: 416.
    Unsatisfiable,
}

/// The part that a request selects of `length` bytes.
pub fn select(field: Option<&HeaderValue>, length: usize) -> Part {
    let text = field.and_then(|field| field.to_str().ok()).and_then(|text| {
        let (unit, ranges) = text.split_once('=')?;
        unit.trim().eq_ignore_ascii_case("bytes").then_some(ranges.trim())
    });
    let Some((first, last)) = text.and_then(|text| text.split_once('-')) else { return Part::Whole };
    let (first, last) = (first.trim(), last.trim());
    let number = |text: &str| match !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        true => Some(text.parse::<usize>().unwrap_or(usize::MAX)),
        false => None,
    };
    match (number(first), number(last)) {
        (None, Some(suffix)) if first.is_empty() => match suffix.min(length) {
            0 => Part::Unsatisfiable,
            suffix => Part::Bytes(length - suffix..length),
        },
        (Some(first), None) if last.is_empty() => bounded(first, usize::MAX, length),
        (Some(first), Some(last)) if first <= last => bounded(first, last, length),
        _ => Part::Whole,
    }
}

fn bounded(first: usize, last: usize, length: usize) -> Part {
    if first >= length { Part::Unsatisfiable } else { Part::Bytes(first..last.saturating_add(1).min(length)) }
}
