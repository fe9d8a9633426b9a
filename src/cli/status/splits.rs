//! The table of split routes.

use super::{Row, row};
use crate::admin::upstreams::UpstreamStatus;

/// One row for each upstream of a split route, with titles; empty without any.
pub fn rows<'a>(upstreams: impl Iterator<Item = (&'a str, &'a UpstreamStatus)>) -> Vec<Row> {
    let mut rows = Vec::new();
    for (name, upstream) in upstreams {
        for split in &upstream.splits {
            for (at, share) in split.to.iter().enumerate() {
                let route = if at == 0 { format!("{name}/{}", split.route) } else { String::new() };
                let is_set = split.set_percent.is_some() && at + 1 == split.to.len();
                let source = if is_set { "set at run time" } else { "" };
                let percent = format!("{} %", share.percent);
                rows.push(row([&route, &share.upstream, &percent, &share.requests.to_string(), source]));
            }
        }
    }
    if !rows.is_empty() {
        rows.insert(0, row(["ROUTE", "TO", "SHARE", "REQUESTS", ""]));
    }
    rows
}
