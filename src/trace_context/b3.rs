//! B3 trace context, in one header field or in several: <https://github.com/openzipkin/b3-propagation>.

use http::{HeaderMap, HeaderName, HeaderValue};

use super::{
    B3Formats, ParentContext, TraceContext,
    ids::{self, SpanId, TraceId},
};

const B3: HeaderName = HeaderName::from_static("b3");
const TRACE_ID: HeaderName = HeaderName::from_static("x-b3-traceid");
const SPAN_ID: HeaderName = HeaderName::from_static("x-b3-spanid");
const PARENT_ID: HeaderName = HeaderName::from_static("x-b3-parentspanid");
const SAMPLED: HeaderName = HeaderName::from_static("x-b3-sampled");
const FLAGS: HeaderName = HeaderName::from_static("x-b3-flags");

/// The content of B3 fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum B3Context {
    Parent(ParentContext),
    /// A sampling decision without a trace.
    Decision(bool),
}

/// Reads B3. Notes in `forms` which format was used, so that the request goes on in the same one.
pub fn read(headers: &HeaderMap, forms: &mut B3Formats) -> Option<B3Context> {
    if let Some(value) = text(headers, &B3) {
        forms.b3_single = true;
        if let Some(context) = single(value, forms) {
            return Some(context);
        }
    }
    if headers.contains_key(TRACE_ID) || headers.contains_key(SAMPLED) {
        forms.b3_multi = true;
        return multi(headers, forms);
    }
    None
}

/// `trace-span[-sampled[-parent]]`, or a sampling decision alone.
fn single(value: &str, forms: &mut B3Formats) -> Option<B3Context> {
    if let Some(sampled) = decision(value, forms) {
        return Some(B3Context::Decision(sampled));
    }
    let mut parts = value.split('-');
    let (trace, span) = (trace(parts.next()?)?, span(parts.next()?)?);
    let sampled = match parts.next() {
        Some(word) => Some(decision(word, forms)?),
        None => None,
    };
    if let Some(parent) = parts.next() {
        self::span(parent)?;
    }
    let parent = ParentContext { trace, span, sampled, random: false };
    parts.next().is_none().then_some(B3Context::Parent(parent))
}

fn decision(word: &str, forms: &mut B3Formats) -> Option<bool> {
    match word {
        "0" => Some(false),
        "1" => Some(true),
        "d" => {
            forms.debug = true;
            Some(true)
        }
        _ => None,
    }
}

fn multi(headers: &HeaderMap, forms: &mut B3Formats) -> Option<B3Context> {
    let sampled = match (text(headers, &FLAGS), text(headers, &SAMPLED)) {
        (Some("1"), _) => {
            forms.debug = true;
            Some(true)
        }
        // Old tracers write words.
        (_, Some("1" | "true")) => Some(true),
        (_, Some("0" | "false")) => Some(false),
        _ => None,
    };
    let ids = text(headers, &TRACE_ID).and_then(trace).zip(text(headers, &SPAN_ID).and_then(span));
    match ids {
        Some((trace, span)) => Some(B3Context::Parent(ParentContext { trace, span, sampled, random: false })),
        None => sampled.map(B3Context::Decision),
    }
}

fn text<'h>(headers: &'h HeaderMap, name: &HeaderName) -> Option<&'h str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// A 64-bit ID is the lower half of a 128-bit one.
fn trace(text: &str) -> Option<TraceId> {
    if !matches!(text.len(), 16 | 32) {
        return None;
    }
    TraceId::new(ids::parse_hex(text, 32)?)
}

fn span(text: &str) -> Option<SpanId> {
    if text.len() != 16 {
        return None;
    }
    SpanId::new(ids::parse_hex(text, 16)? as u64)
}

/// Writes the B3 formats that the client used.
pub fn write(context: &TraceContext, span: SpanId, headers: &mut HeaderMap) {
    let forms = context.formats;
    if !forms.b3_single && !forms.b3_multi {
        return;
    }
    // A tracer that uses 64-bit IDs may not accept longer ones.
    let trace = match u64::try_from(context.trace.get()) {
        Ok(short) => format!("{short:016x}"),
        Err(_) => context.trace.to_string(),
    };
    let parent = if span == context.span { context.parent } else { Some(context.span) };
    let value = |text: String| HeaderValue::try_from(text).ok();
    if forms.b3_single {
        let sampled = match (forms.debug, context.sampled) {
            (true, _) => 'd',
            (false, true) => '1',
            (false, false) => '0',
        };
        let suffix = parent.map(|parent| format!("-{parent}")).unwrap_or_default();
        set(headers, B3, value(format!("{trace}-{span}-{sampled}{suffix}")));
    }
    if forms.b3_multi {
        set(headers, TRACE_ID, value(trace));
        set(headers, SPAN_ID, value(span.to_string()));
        set(headers, PARENT_ID, parent.and_then(|parent| value(parent.to_string())));
        let bit = HeaderValue::from_static(if context.sampled { "1" } else { "0" });
        set(headers, SAMPLED, (!forms.debug).then_some(bit));
        set(headers, FLAGS, forms.debug.then_some(HeaderValue::from_static("1")));
    }
}

fn set(headers: &mut HeaderMap, name: HeaderName, value: Option<HeaderValue>) {
    match value {
        Some(value) => headers.insert(name, value),
        None => headers.remove(name),
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace_context::tests::headers;

    fn reads(fields: &[(&str, &str)]) -> Option<B3Context> {
        read(&headers(fields), &mut B3Formats::default())
    }

    #[test]
    fn invalid_fields_are_ignored() {
        const TRACE: &str = "80f198ee56343ba864fe8b2a57d3eff7";
        const SPAN: &str = "e457b5a2e4d86bd1";
        for bad in [
            String::new(),
            TRACE.to_owned(),
            format!("{TRACE}-"),
            format!("{TRACE}-{SPAN}-2"),
            format!("{TRACE}-{SPAN}-1-05e3ac9a4f6e3b90-more"),
            format!("{TRACE}-{SPAN}-1-short"),
            format!("{}-{SPAN}-1", &TRACE[1..]),
            format!("{TRACE}-{}-1", &SPAN[1..]),
            format!("{}-{SPAN}-1", "0".repeat(32)),
            format!("{TRACE}-{}-1", "0".repeat(16)),
            format!("+{}-{SPAN}-1", &TRACE[1..]),
        ] {
            assert_eq!(reads(&[("b3", &bad)]), None, "{bad}");
        }
        assert_eq!(reads(&[("x-b3-traceid", "xyz"), ("x-b3-spanid", SPAN)]), None);
        assert_eq!(reads(&[("x-b3-traceid", TRACE)]), None, "no span");
        assert_eq!(reads(&[("x-b3-sampled", "false")]), Some(B3Context::Decision(false)));
        let parent = |sampled| {
            let (trace, span) = (trace(TRACE).unwrap(), span(SPAN).unwrap());
            Some(B3Context::Parent(ParentContext { trace, span, sampled, random: false }))
        };
        // An invalid single field does not hide valid ones in the other format.
        let both = [("b3", "nonsense"), ("x-b3-traceid", TRACE), ("x-b3-spanid", SPAN)];
        assert_eq!(reads(&both), parent(None));
    }
}
