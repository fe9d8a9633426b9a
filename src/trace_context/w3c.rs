//! W3C Trace Context, <https://www.w3.org/TR/trace-context-2/>.

use http::{HeaderMap, HeaderName, HeaderValue};

use super::{
    ParentContext, TraceContext,
    ids::{self, SpanId, TraceId},
};

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
pub const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// `00-` trace id `-` span id `-` flags.
const LENGTH: usize = 55;
const SAMPLED: u128 = 1;
const RANDOM: u128 = 2;

/// Reads `traceparent` (§3.2). Of a later version, only the part that this version defines is read.
pub fn read(headers: &HeaderMap) -> Option<ParentContext> {
    let mut fields = headers.get_all(TRACEPARENT).iter();
    let text = fields.next()?.as_bytes();
    if fields.next().is_some() || text.len() < LENGTH {
        return None;
    }
    let version = ids::parse_lower_hex(&text[..2])?;
    let is_complete = match version {
        0 => text.len() == LENGTH,
        0xff => false,
        _ => matches!(text.get(LENGTH), None | Some(b'-')),
    };
    if !is_complete || [text[2], text[35], text[52]] != *b"---" {
        return None;
    }
    let flags = ids::parse_lower_hex(&text[53..LENGTH])?;
    Some(ParentContext {
        trace: TraceId::new(ids::parse_lower_hex(&text[3..35])?)?,
        span: SpanId::new(ids::parse_lower_hex(&text[36..52])? as u64)?,
        sampled: Some(flags & SAMPLED != 0),
        random: flags & RANDOM != 0,
    })
}

pub fn write(context: &TraceContext, span: SpanId, headers: &mut HeaderMap) {
    let mut text = *b"00-................................-................-00";
    context.trace.encode(&mut text[3..35]);
    span.encode(&mut text[36..52]);
    text[54] += u8::from(context.sampled) + 2 * u8::from(context.random);
    if let Ok(value) = HeaderValue::from_bytes(&text) {
        headers.insert(TRACEPARENT, value);
    }
    if context.stale_state {
        headers.remove(TRACESTATE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace_context::tests::headers;

    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
    const SPAN: &str = "b7ad6b7169203331";

    #[test]
    fn valid_fields_are_read() {
        for (good, sampled, random) in [
            (format!("00-{TRACE}-{SPAN}-01"), true, false),
            (format!("00-{TRACE}-{SPAN}-00"), false, false),
            (format!("00-{TRACE}-{SPAN}-03"), true, true),
            (format!("00-{TRACE}-{SPAN}-ff"), true, true),
            (format!("cc-{TRACE}-{SPAN}-01"), true, false),
            (format!("cc-{TRACE}-{SPAN}-01-what-the-future-brings"), true, false),
        ] {
            let parent = read(&headers(&[("traceparent", &good)])).expect(&good);
            assert_eq!((parent.sampled, parent.random), (Some(sampled), random), "{good}");
            assert_eq!((parent.trace.to_string(), parent.span.to_string()), (TRACE.into(), SPAN.into()));
        }
    }

    /// The cases of the specification's test suite.
    #[test]
    fn invalid_fields_are_ignored() {
        for bad in [
            String::new(),
            format!("ff-{TRACE}-{SPAN}-01"),
            format!("00-{TRACE}-{SPAN}-01-more"),
            format!("00-{TRACE}-{SPAN}-01."),
            format!("cc-{TRACE}-{SPAN}-01."),
            format!("0.-{TRACE}-{SPAN}-01"),
            format!("00-{}-{SPAN}-01", TRACE.to_uppercase()),
            format!("00-{TRACE}-{}-01", SPAN.to_uppercase()),
            format!("00-{TRACE}-{SPAN}-0X"),
            format!("00-{TRACE}-{SPAN}-1"),
            format!("00-{}-{SPAN}-01", "0".repeat(32)),
            format!("00-{TRACE}-{}-01", "0".repeat(16)),
            format!("00-{TRACE}_{SPAN}-01"),
            format!("00-{}-{SPAN}-01", &TRACE[1..]),
        ] {
            assert_eq!(read(&headers(&[("traceparent", &bad)])), None, "{bad}");
        }
        let good = format!("00-{TRACE}-{SPAN}-01");
        assert_eq!(read(&headers(&[("traceparent", &good), ("traceparent", &good)])), None, "two of them");
    }
}
