//! Jaeger's `uber-trace-id`, read only: <https://www.jaegertracing.io/sdk-migration/#propagation-format>.

use http::{HeaderMap, HeaderName};

use super::{
    ParentContext,
    ids::{self, SpanId, TraceId},
};

const UBER_TRACE_ID: HeaderName = HeaderName::from_static("uber-trace-id");
const SAMPLED: u128 = 1;

/// `trace:span:parent:flags`. Leading zeros may be missing, colons may be percent-encoded.
pub fn read(headers: &HeaderMap) -> Option<ParentContext> {
    let text = headers.get(UBER_TRACE_ID)?.to_str().ok()?;
    let decoded;
    let text = if text.contains('%') {
        decoded = text.replace("%3A", ":").replace("%3a", ":");
        &decoded
    } else {
        text
    };
    let mut parts = text.split(':');
    let trace = TraceId::new(ids::parse_hex(parts.next()?, 32)?)?;
    let span = SpanId::new(ids::parse_hex(parts.next()?, 16)? as u64)?;
    let _deprecated_parent = parts.next()?;
    let flags = ids::parse_hex(parts.next()?, 2)?;
    let parent = ParentContext { trace, span, sampled: Some(flags & SAMPLED != 0), random: false };
    parts.next().is_none().then_some(parent)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace_context::tests::headers;

    #[test]
    fn short_ids_are_padded_and_invalid_values_are_ignored() {
        let read = |text: &str| read(&headers(&[("uber-trace-id", text)]));
        let parent = read("3ba864fe8b2a57d3%3Ae457b5a2e4d86bd1%3a0%3A1").unwrap();
        assert_eq!(parent.trace.to_string(), "00000000000000003ba864fe8b2a57d3");
        assert_eq!(parent.sampled, Some(true));
        assert_eq!(read("abc:1f:0:0").unwrap().span.to_string(), "000000000000001f");
        assert_eq!(read("abc:1f:0:2").unwrap().sampled, Some(false));
        for bad in ["", "abc", "0:1:0:1", "1:0:0:1", "1:1:0", "1:1:0:1:1", "1:1:0:x", "g:1:0:1"] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }
}
