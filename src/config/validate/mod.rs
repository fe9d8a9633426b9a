//! Validation beyond types: ranges, references to names, keys that need or exclude each other.

mod identity;
mod policy;
mod queue;
mod route;
mod sections;
mod upstream;

use super::{
    diagnostic::{Problem, Problems},
    node::Node,
    source::Origin,
};

pub(super) use identity::identity;
pub(super) use policy::policy;
pub(super) use queue::queues;
pub(super) use route::route;
pub(super) use sections::sections;
pub(super) use upstream::{across_upstreams, references, upstream};

/// A table to check, and its problems.
struct Check<'a> {
    node: &'a Node,
    problems: &'a mut Problems,
}

impl Check<'_> {
    /// The place of a key (items of lists by their number), or of the nearest table around it.
    fn at(&self, path: &[&str]) -> Option<Origin> {
        let mut node = self.node;
        for step in path {
            let next = match step.parse() {
                Ok(index) if node.as_array().is_some() => node.item(index),
                _ => node.get(step),
            };
            match next {
                Some(next) => node = next,
                None => break,
            }
        }
        node.origin.or(self.node.origin)
    }

    fn error(&mut self, path: &[&str], message: impl Into<String>, help: impl Into<String>) {
        let origin = self.at(path);
        self.problems.push(Problem::error(origin, message).help(help));
    }

    /// An error if a list is empty, unless it has items that could not be read.
    fn require_items<T>(&mut self, list: &[T], path: &[&str], message: &str, help: &str) {
        let written = path.iter().try_fold(self.node, |node, step| node.get(step));
        if list.is_empty() && !written.is_some_and(Node::is_filled_list) {
            self.error(path, message, help);
        }
    }

    /// An error about something missing, unless `holds`.
    fn require_present(&mut self, holds: bool, path: &[&str], message: &str, help: &str) {
        if !holds {
            let origin = self.at(path);
            self.problems.push(Problem::error(origin, message).help(help).about_missing());
        }
    }

    /// An error unless `holds`.
    fn require(&mut self, holds: bool, path: &[&str], message: &str, help: &str) {
        if !holds {
            self.error(path, message, help);
        }
    }

    fn method(&mut self, path: &[&str], method: &str) {
        let upper = method.to_ascii_uppercase();
        if method.parse::<http::Method>().is_err() {
            self.error(path, format!("`{method}` is not a method"), "write e.g. \"GET\"");
        } else if upper != method && http::Method::from_bytes(upper.as_bytes()).is_ok_and(is_standard) {
            self.error(
                path,
                format!("methods are case-sensitive: `{method}` is not {upper}"),
                format!("write \"{upper}\""),
            );
        }
    }

    fn header_name(&mut self, path: &[&str], name: &str) {
        if http::HeaderName::from_bytes(name.as_bytes()).is_err() {
            self.error(
                path,
                format!("`{name}` is not a header name"),
                "names are letters, digits and !#$%&'*+-.^_`|~",
            );
        }
    }

    fn header_value(&mut self, path: &[&str], value: &str) {
        if http::HeaderValue::from_str(value).is_err() {
            self.error(path, "this is not a header value", "values hold no line ends or control characters");
        }
    }
}

fn is_standard(method: http::Method) -> bool {
    use http::Method;
    const STANDARD: [Method; 9] = [
        Method::GET,
        Method::HEAD,
        Method::POST,
        Method::PUT,
        Method::DELETE,
        Method::OPTIONS,
        Method::PATCH,
        Method::TRACE,
        Method::CONNECT,
    ];
    STANDARD.contains(&method)
}

#[cfg(test)]
mod tests;
