//! Which trace a request belongs to, and how the next hop is told.
//!
//! Read: W3C Trace Context (level 2), B3 in one field and in several, `uber-trace-id`. Written: W3C, and B3 in the form
//! in which the caller used it. What is not valid is treated as if it were not there, as the standards say; `baggage`
//! is passed on untouched.

mod b3;
mod ids;
mod jaeger;
mod sampling;
mod w3c;

pub use ids::{Span, Trace};
pub use sampling::Sampler;

use http::HeaderMap;

use crate::rng::Rng;

/// What a caller said of its trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    pub trace: Trace,
    /// Its span.
    pub span: Span,
    /// None: it leaves the decision to whoever comes next (B3).
    pub sampled: Option<bool>,
    /// The trace id's last seven bytes are random (level 2).
    pub random: bool,
}

/// The forms besides W3C in which the next hop is told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Forms {
    pub b3_single: bool,
    pub b3_multi: bool,
    /// B3's wish to see this call whatever it costs.
    pub debug: bool,
}

/// What a request's head says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Said {
    pub caller: Option<Caller>,
    /// A decision without a trace (`b3: 0`).
    pub sampled: Option<bool>,
    pub forms: Forms,
    /// There is a `tracestate`, and no `traceparent` without which it is worth nothing.
    pub stale_state: bool,
    /// The id of the request, which is that of the trace where nobody says another.
    pub request: Option<Trace>,
}

/// Reads a request's head.
pub fn read(headers: &HeaderMap) -> Said {
    let mut said = Said::default();
    // Read even where W3C decides, since it is answered in kind.
    let b3 = b3::read(headers, &mut said.forms);
    if let Some(caller) = w3c::read(headers) {
        return Said { caller: Some(caller), ..said };
    }
    said.stale_state = headers.contains_key(w3c::TRACESTATE);
    match b3 {
        Some(b3::B3::Caller(caller)) => Said { caller: Some(caller), ..said },
        Some(b3::B3::Decision(sampled)) => Said { sampled: Some(sampled), ..said },
        None => Said { caller: jaeger::read(headers), ..said },
    }
}

/// Where a call stands in its trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    pub trace: Trace,
    /// The span of this call.
    pub span: Span,
    /// The span of the caller; none: the trace begins here.
    pub parent: Option<Span>,
    pub sampled: bool,
    pub random: bool,
    pub forms: Forms,
    /// `tracestate` does not belong to the trace.
    pub stale_state: bool,
    /// Another trace that this call probably belongs to.
    pub link: Option<Link>,
}

/// A span of another trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    pub trace: Trace,
    pub span: Span,
    pub sampled: bool,
}

impl Context {
    /// `decide`: whether a trace without a decision is to be sampled. Ids are drawn whether or not anybody exports
    /// them: an error names its trace.
    pub fn new(said: &Said, rng: &mut Rng, decide: impl FnOnce(Trace) -> bool) -> Self {
        let span = Span::random(rng);
        let forms = said.forms;
        match said.caller {
            Some(caller) => Self {
                trace: caller.trace,
                span,
                parent: Some(caller.span),
                sampled: caller.sampled.unwrap_or_else(|| decide(caller.trace)),
                random: caller.random,
                forms,
                stale_state: said.stale_state,
                link: None,
            },
            None => {
                let trace = said.request.unwrap_or_else(|| Trace::random(rng));
                let sampled = said.sampled.unwrap_or_else(|| decide(trace));
                Self {
                    trace,
                    span,
                    parent: None,
                    sampled,
                    random: true,
                    forms,
                    stale_state: said.stale_state,
                    link: None,
                }
            }
        }
    }

    /// Tells the next hop that `span` calls it.
    pub fn write(&self, span: Span, headers: &mut HeaderMap) {
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

    fn context(fields: &[(&str, &str)], decide: bool) -> (Context, HeaderMap) {
        let mut map = headers(fields);
        let context = Context::new(&read(&map), &mut Rng::from_seed(1), |_| decide);
        context.write(context.span, &mut map);
        (context, map)
    }

    #[test]
    fn a_caller_is_followed_in_every_form() {
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
            assert!(context.sampled, "a sampled caller is always followed: {form:?}");
            let written = map["traceparent"].to_str().unwrap();
            assert_eq!(written, format!("00-{TRACE}-{}-01", context.span), "{form:?}");
            assert_ne!(context.span.to_string(), SPAN);
        }
    }

    #[test]
    fn b3_is_answered_in_kind() {
        let single = format!("{TRACE}-{SPAN}-1-00f067aa0ba902b7");
        let (context, map) = context(&[("b3", &single)], false);
        assert_eq!(map["b3"], format!("{TRACE}-{}-1-{SPAN}", context.span));
        assert!(!map.contains_key("x-b3-traceid"));

        let (context, map) = self::context(
            &[("x-b3-traceid", "8448eb211c80319c"), ("x-b3-spanid", SPAN), ("x-b3-flags", "1")],
            false,
        );
        assert!(context.sampled, "debug means sampled");
        assert_eq!(map["x-b3-traceid"], "8448eb211c80319c", "as short as it came");
        assert_eq!(map["x-b3-spanid"], context.span.to_string());
        assert_eq!(map["x-b3-parentspanid"], SPAN);
        assert_eq!(map["x-b3-flags"], "1");
        assert!(!map.contains_key("x-b3-sampled"), "debug implies it");
        assert_eq!(map["traceparent"], format!("00-00000000000000008448eb211c80319c-{}-01", context.span));
        assert!(!map.contains_key("b3"));
    }

    #[test]
    fn without_a_caller_a_trace_begins() {
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
        assert!(!context.sampled, "the caller has decided");
        assert_eq!(map["b3"], format!("{}-{}-0", context.trace, context.span));
        let (context, _) = self::context(&[("b3", "d")], false);
        assert!(context.sampled);
        // B3 may leave the decision open.
        let open = format!("{TRACE}-{SPAN}");
        assert!(self::context(&[("b3", &open)], true).0.sampled);
        assert!(!self::context(&[("b3", &open)], false).0.sampled);
    }

    #[test]
    fn state_goes_on_with_its_trace_only() {
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
        /// Whatever a caller sends, something valid goes on, and nothing panics.
        #[test]
        fn anything_can_be_read(
            traceparent in "[ -~]{0,70}", b3 in "[0-9a-fd-]{0,70}", id in "[0-9a-f]{0,34}", uber in "[0-9a-f:%A]{0,70}",
        ) {
            let (context, map) = context(
                &[("traceparent", &traceparent), ("b3", &b3), ("x-b3-traceid", &id), ("uber-trace-id", &uber)],
                true,
            );
            let again = read(&map);
            let caller = again.caller.expect("what we write is valid");
            prop_assert_eq!((caller.trace, caller.span, caller.sampled), (context.trace, context.span, Some(context.sampled)));
        }
    }
}
