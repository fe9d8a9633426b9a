//! Trace context propagation: extracts it from a request and injects it into attempts.
//!
//! Read: W3C Trace Context (level 2), B3 in one field and in several, `uber-trace-id`. Written: W3C, and B3 in the
//! format that the client used. Invalid fields are ignored, as the standards require; `baggage` passes unchanged.

mod b3;
mod ids;
mod jaeger;
mod sampling;
mod w3c;

pub use ids::{SpanId, TraceId};
pub use sampling::Sampler;

use http::HeaderMap;

use crate::rng::Rng;

/// The trace context of the client: the parent of this request's span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParentContext {
    pub trace: TraceId,
    /// The client's span.
    pub span: SpanId,
    /// None: the decision is left to the next hop (B3).
    pub sampled: Option<bool>,
    /// The last seven bytes of the trace ID are random (level 2).
    pub random: bool,
}

/// The formats besides W3C that are written for the next hop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct B3Formats {
    pub b3_single: bool,
    pub b3_multi: bool,
    /// The B3 debug flag: sample regardless of cost.
    pub debug: bool,
}

/// The trace context in a request's head.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IncomingContext {
    pub parent: Option<ParentContext>,
    /// A decision without a trace (`b3: 0`).
    pub sampled: Option<bool>,
    pub formats: B3Formats,
    /// There is a `tracestate` without a valid `traceparent`, so it is dropped.
    pub stale_state: bool,
    /// The request ID: the trace ID where the head names no trace.
    pub request_id: Option<TraceId>,
}

/// Extracts the trace context from a request's head.
pub fn read(headers: &HeaderMap) -> IncomingContext {
    let mut incoming = IncomingContext::default();
    // Read even where W3C takes precedence: attempts carry B3 in the client's format.
    let b3 = b3::read(headers, &mut incoming.formats);
    if let Some(parent) = w3c::read(headers) {
        return IncomingContext { parent: Some(parent), ..incoming };
    }
    incoming.stale_state = headers.contains_key(w3c::TRACESTATE);
    match b3 {
        Some(b3::B3Context::Parent(parent)) => IncomingContext { parent: Some(parent), ..incoming },
        Some(b3::B3Context::Decision(sampled)) => IncomingContext { sampled: Some(sampled), ..incoming },
        None => IncomingContext { parent: jaeger::read(headers), ..incoming },
    }
}

/// The trace context of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceContext {
    pub trace: TraceId,
    /// The span of this request.
    pub span: SpanId,
    /// The client's span; none: the trace starts here.
    pub parent: Option<SpanId>,
    pub sampled: bool,
    pub random: bool,
    pub formats: B3Formats,
    /// The `tracestate` field does not belong to this trace and is removed.
    pub stale_state: bool,
    /// The span of an inbound request that this one probably belongs to.
    pub link: Option<SpanLink>,
}

/// A span of another trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpanLink {
    pub trace: TraceId,
    pub span: SpanId,
    pub sampled: bool,
}

impl TraceContext {
    /// `decide`: whether to sample a trace without a decision. IDs are generated even where nothing is exported: error
    /// responses carry the trace ID.
    pub fn new(incoming: &IncomingContext, rng: &mut Rng, decide: impl FnOnce(TraceId) -> bool) -> Self {
        let span = SpanId::random(rng);
        let forms = incoming.formats;
        match incoming.parent {
            Some(parent) => Self {
                trace: parent.trace,
                span,
                parent: Some(parent.span),
                sampled: parent.sampled.unwrap_or_else(|| decide(parent.trace)),
                random: parent.random,
                formats: forms,
                stale_state: incoming.stale_state,
                link: None,
            },
            None => {
                let trace = incoming.request_id.unwrap_or_else(|| TraceId::random(rng));
                let sampled = incoming.sampled.unwrap_or_else(|| decide(trace));
                Self {
                    trace,
                    span,
                    parent: None,
                    sampled,
                    random: true,
                    formats: forms,
                    stale_state: incoming.stale_state,
                    link: None,
                }
            }
        }
    }

    /// Injects the context into an attempt's head, with `span` as the parent.
    pub fn inject(&self, span: SpanId, headers: &mut HeaderMap) {
        w3c::write(self, span, headers);
        b3::write(self, span, headers);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use http::{HeaderName, HeaderValue};
    use proptest::prelude::*;

    use super::*;
    use crate::rng::Rng;

    pub fn headers(fields: &[(&str, &str)]) -> HeaderMap {
        let field = |(name, value): &(&str, &str)| {
            (name.parse::<HeaderName>().unwrap(), HeaderValue::from_str(value).unwrap())
        };
        let mut map = HeaderMap::new();
        for (name, value) in fields.iter().map(field) {
            map.append(name, value);
        }
        map
    }

    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
    const SPAN: &str = "b7ad6b7169203331";

    fn context(fields: &[(&str, &str)], decide: bool) -> (TraceContext, HeaderMap) {
        let mut map = headers(fields);
        let context = TraceContext::new(&read(&map), &mut Rng::from_seed(1), |_| decide);
        context.inject(context.span, &mut map);
        (context, map)
    }

    #[test]
    fn the_client_s_trace_is_continued_from_every_format() {
        let single = format!("{TRACE}-{SPAN}-1");
        let w3c = format!("00-{TRACE}-{SPAN}-01");
        let jaeger = format!("{TRACE}:{SPAN}:0:1");
        let forms: [&[(&str, &str)]; 4] = [
            &[("traceparent", &w3c)],
            &[("b3", &single)],
            &[("x-b3-traceid", TRACE), ("x-b3-spanid", SPAN), ("x-b3-sampled", "1")],
            &[("uber-trace-id", &jaeger)],
        ];
        for form in forms {
            let (context, map) = context(form, false);
            assert_eq!(context.trace.to_string(), TRACE, "{form:?}");
            assert_eq!(context.parent.unwrap().to_string(), SPAN, "{form:?}");
            assert!(context.sampled, "the client's decision to sample is followed: {form:?}");
            let written = map["traceparent"].to_str().unwrap();
            assert_eq!(written, format!("00-{TRACE}-{}-01", context.span), "{form:?}");
            assert_ne!(context.span.to_string(), SPAN);
        }
    }

    #[test]
    fn b3_is_written_in_the_client_s_format() {
        let single = format!("{TRACE}-{SPAN}-1-00f067aa0ba902b7");
        let (context, map) = context(&[("b3", &single)], false);
        assert_eq!(map["b3"], format!("{TRACE}-{}-1-{SPAN}", context.span));
        assert!(!map.contains_key("x-b3-traceid"));

        let (context, map) = self::context(
            &[("x-b3-traceid", "8448eb211c80319c"), ("x-b3-spanid", SPAN), ("x-b3-flags", "1")],
            false,
        );
        assert!(context.sampled, "debug means sampled");
        assert_eq!(map["x-b3-traceid"], "8448eb211c80319c", "64 bits, as the client sent");
        assert_eq!(map["x-b3-spanid"], context.span.to_string());
        assert_eq!(map["x-b3-parentspanid"], SPAN);
        assert_eq!(map["x-b3-flags"], "1");
        assert!(!map.contains_key("x-b3-sampled"), "debug implies it");
        assert_eq!(map["traceparent"], format!("00-00000000000000008448eb211c80319c-{}-01", context.span));
        assert!(!map.contains_key("b3"));
    }

    #[test]
    fn without_a_parent_a_trace_starts() {
        let (context, map) = context(&[], true);
        assert_eq!(context.parent, None);
        assert_eq!(
            map["traceparent"],
            format!("00-{}-{}-03", context.trace, context.span),
            "random, sampled"
        );
        let (context, map) = self::context(&[], false);
        assert_eq!(map["traceparent"], format!("00-{}-{}-02", context.trace, context.span));
        let (context, map) = self::context(&[("b3", "0")], true);
        assert!(!context.sampled, "the client has decided");
        assert_eq!(map["b3"], format!("{}-{}-0", context.trace, context.span));
        let (context, _) = self::context(&[("b3", "d")], false);
        assert!(context.sampled);
        // B3 may leave the decision open.
        let open = format!("{TRACE}-{SPAN}");
        assert!(self::context(&[("b3", &open)], true).0.sampled);
        assert!(!self::context(&[("b3", &open)], false).0.sampled);
    }

    #[test]
    fn tracestate_is_forwarded_only_with_its_trace() {
        let w3c = format!("00-{TRACE}-{SPAN}-01");
        let (_, map) = context(&[("traceparent", &w3c), ("tracestate", "a=1"), ("tracestate", "b=2")], true);
        assert_eq!(map.get_all("tracestate").iter().count(), 2);
        for stale in [&[("tracestate", "a=1")][..], &[("traceparent", "00-zz"), ("tracestate", "a=1")]] {
            assert!(!context(stale, true).1.contains_key("tracestate"), "{stale:?}");
        }
        let (_, map) = context(&[("baggage", "k=v"), ("traceparent", "nonsense")], true);
        assert_eq!(map["baggage"], "k=v");
    }

    proptest! {
        /// For any input, a valid context is written, and nothing panics.
        #[test]
        fn any_input_gives_a_valid_context(
            traceparent in "[ -~]{0,70}", b3 in "[0-9a-fd-]{0,70}", id in "[0-9a-f]{0,34}", uber in "[0-9a-f:%A]{0,70}",
        ) {
            let (context, map) = context(
                &[("traceparent", &traceparent), ("b3", &b3), ("x-b3-traceid", &id), ("uber-trace-id", &uber)],
                true,
            );
            let again = read(&map);
            let parent = again.parent.expect("the written context is valid");
            let expected = (context.trace, context.span, Some(context.sampled));
            prop_assert_eq!((parent.trace, parent.span, parent.sampled), expected);
        }
    }
}
