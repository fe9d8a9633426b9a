//! The two exposition formats, OpenMetrics and Prometheus text: negotiation, and conversion of the first to the second.

use std::fmt::Write;

use http::{HeaderMap, header::ACCEPT};

/// An exposition format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpositionFormat {
    OpenMetrics,
    /// Prometheus text 0.0.4: no exemplars, no units.
    Prometheus,
}

impl ExpositionFormat {
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
        }
    }

    /// Negotiates by `Accept` (RFC 9110 §12.5.1): OpenMetrics, unless plain text has the higher quality value.
    pub fn negotiate(headers: &HeaderMap) -> Self {
        let mut open_metrics = 0.0_f32;
        let mut plain = 0.0_f32;
        let fields = headers.get_all(ACCEPT).iter().filter_map(|field| field.to_str().ok());
        for range in fields.flat_map(|field| field.split(',')) {
            let mut parts = range.split(';').map(str::trim);
            let kind = parts.next().unwrap_or_default().to_ascii_lowercase();
            let quality: f32 = parts.find_map(|part| part.strip_prefix("q=")?.parse().ok()).unwrap_or(1.0);
            match kind.as_str() {
                "application/openmetrics-text" => open_metrics = quality.max(open_metrics),
                "text/plain" => plain = quality.max(plain),
                _ => {}
            }
        }
        if plain > open_metrics { Self::Prometheus } else { Self::OpenMetrics }
    }
}

/// Converts OpenMetrics text to Prometheus text.
pub fn prometheus(open_metrics: &str) -> String {
    let mut out = String::with_capacity(open_metrics.len());
    let lines = open_metrics.lines().peekable();
    // `# HELP` comes before `# TYPE`, but a counter's name needs its `_total` in both.
    let counters: Vec<&str> = open_metrics
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter"))
        .collect();
    for line in lines {
        let meta = ["# HELP ", "# TYPE "].into_iter().find_map(|kind| Some((kind, line.strip_prefix(kind)?)));
        // Writing to a string cannot fail.
        let _ = match meta {
            Some((kind, rest)) => {
                let (name, rest) = rest.split_once(' ').unwrap_or((rest, ""));
                let total = if counters.contains(&name) { "_total" } else { "" };
                writeln!(out, "{kind}{name}{total} {rest}")
            }
            None if line.starts_with('#') => Ok(()),
            None => writeln!(out, "{}", without_exemplar(line)),
        };
    }
    out
}

/// The line without its exemplar. ` # {` inside a label value does not start one.
fn without_exemplar(line: &str) -> &str {
    let labels_end = line.split_once("_bucket{").and_then(|_| line.find("\"} ")).unwrap_or(line.len());
    match line[labels_end..].find(" # {") {
        Some(at) => &line[..labels_end + at],
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn the_format_is_negotiated_by_accept() {
        let wanted = |accept: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(ACCEPT, HeaderValue::from_static(accept));
            ExpositionFormat::negotiate(&headers)
        };
        assert_eq!(ExpositionFormat::negotiate(&HeaderMap::new()), ExpositionFormat::OpenMetrics);
        for accept in [
            "*/*",
            "application/openmetrics-text",
            "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
            "text/html",
        ] {
            assert_eq!(wanted(accept), ExpositionFormat::OpenMetrics, "{accept}");
        }
        for accept in [
            "text/plain",
            "Text/Plain;version=0.0.4",
            "text/plain;version=0.0.4;q=1,*/*;q=0.1",
            "application/openmetrics-text;q=0.2, text/plain;q=0.3",
        ] {
            assert_eq!(wanted(accept), ExpositionFormat::Prometheus, "{accept}");
        }
    }

    #[test]
    fn prometheus_text_has_neither_units_nor_exemplars() {
        let open_metrics = "\
# HELP calls Calls.
# TYPE calls counter
calls_total{way=\" # {\"} 3
# HELP d_seconds How long.
# TYPE d_seconds histogram
# UNIT d_seconds seconds
d_seconds_bucket{le=\"0.1\",up=\"a # {b\"} 1 # {trace_id=\"0af7\"} 0.05 1.0
d_seconds_bucket{le=\"+Inf\",up=\"a # {b\"} 1
# EOF
";
        let expected = "\
# HELP calls_total Calls.
# TYPE calls_total counter
calls_total{way=\" # {\"} 3
# HELP d_seconds How long.
# TYPE d_seconds histogram
d_seconds_bucket{le=\"0.1\",up=\"a # {b\"} 1
d_seconds_bucket{le=\"+Inf\",up=\"a # {b\"} 1
";
        assert_eq!(prometheus(open_metrics), expected);
    }
}
