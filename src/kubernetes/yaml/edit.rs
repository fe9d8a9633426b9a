//! Edits of YAML text that leave everything else byte for byte unchanged.
//!
//! Removing what was added restores the original text, whatever its style and line ends.

use serde_json::Value;

use super::{
    parse::{Document, MapEntry, Node, NodeKind},
    write,
};
use crate::kubernetes::patch::{Operation, segments};

/// The text cannot be edited in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("anchors, aliases or an unsupported layout prevent editing in place")]
pub struct UnsupportedLayout;

/// Applies an operation to the text.
///
/// # Errors
///
/// If the value is shared by an alias, or the layout is not supported.
pub fn apply(text: &str, operation: &Operation) -> Result<String, UnsupportedLayout> {
    let document = Document::parse(text).map_err(|_| UnsupportedLayout)?;
    let path = segments(operation.path());
    let (last, parents) = path.split_last().ok_or(UnsupportedLayout)?;
    let container = find(&document, parents)?;
    let edit = match operation {
        Operation::Add { value, .. } => container.add(text, last, value)?,
        Operation::Replace { value, .. } => container.replace(text, last, value)?,
        Operation::Remove { .. } => container.remove(text, last)?,
    };
    Ok(edit.apply_to(text))
}

/// The text of the value at this path, from after the colon; for [`restore`].
pub fn original_text<'t>(text: &'t str, document: &Document, path: &str) -> Option<&'t str> {
    let path = segments(path);
    let (last, parents) = path.split_last()?;
    let entry = find(document, parents).ok()?.entry(last).ok()?;
    text.get(after_colon(text, entry).ok()?..entry.node.end)
}

/// Whether the text of the value is what [`apply`] would write.
pub fn is_default_format(text: &str, document: &Document, path: &str, value: &Value) -> bool {
    let edited = apply(text, &Operation::Replace { path: path.to_owned(), value: value.clone() });
    document.root.is_some() && edited.as_deref() == Ok(text)
}

/// Restores text that was replaced by placeholders.
///
/// # Errors
///
/// Like [`apply`].
pub fn restore(text: &str, path: &str, raw: &str) -> Result<String, UnsupportedLayout> {
    let document = Document::parse(text).map_err(|_| UnsupportedLayout)?;
    let path = segments(path);
    let (last, parents) = path.split_last().ok_or(UnsupportedLayout)?;
    let entry = find(&document, parents)?.entry(last)?;
    let edit = Edit { from: after_colon(text, entry)?, to: entry.node.end, with: raw.to_owned() };
    Ok(edit.apply_to(text))
}

struct Edit {
    from: usize,
    to: usize,
    with: String,
}

impl Edit {
    fn apply_to(&self, text: &str) -> String {
        format!("{}{}{}", &text[..self.from], self.with, &text[self.to..])
    }
}

/// A map or a list, and its position in the text.
struct Container<'d> {
    node: &'d Node,
    /// The end of its key in the parent map: items may be inserted after that line.
    key_end: Option<usize>,
}

fn find<'d>(document: &'d Document, path: &[String]) -> Result<Container<'d>, UnsupportedLayout> {
    let mut container = Container { node: document.root.as_ref().ok_or(UnsupportedLayout)?, key_end: None };
    for segment in path {
        container = match &container.node.kind {
            _ if container.node.is_shared => return Err(UnsupportedLayout),
            NodeKind::Map { .. } => {
                let entry = container.entry(segment)?;
                Container { node: &entry.node, key_end: Some(entry.key_end) }
            }
            NodeKind::Seq { items, .. } => {
                let item =
                    segment.parse().ok().and_then(|at: usize| items.get(at)).ok_or(UnsupportedLayout)?;
                Container { node: item, key_end: None }
            }
            _ => return Err(UnsupportedLayout),
        };
    }
    if container.node.is_shared { Err(UnsupportedLayout) } else { Ok(container) }
}

impl<'d> Container<'d> {
    fn entry(&self, key: &str) -> Result<&'d MapEntry, UnsupportedLayout> {
        let NodeKind::Map { entries, .. } = &self.node.kind else { return Err(UnsupportedLayout) };
        entries.iter().find(|entry| entry.key == key).ok_or(UnsupportedLayout)
    }

    fn add(&self, text: &str, last: &str, value: &Value) -> Result<Edit, UnsupportedLayout> {
        let insert = |at: usize, with: String| Ok(Edit { from: at, to: at, with });
        let lines = |at: usize, lines: String| {
            let nl = newline(text);
            insert(at, format!("{nl}{}", lines.replace('\n', nl)))
        };
        match &self.node.kind {
            NodeKind::Map { flow: true, entries } => {
                let after = entries.last().ok_or(UnsupportedLayout)?.node.end;
                insert(after, format!(", {}: {value}", Value::from(last)))
            }
            NodeKind::Map { flow: false, entries } => {
                let (first, after) =
                    (entries.first().ok_or(UnsupportedLayout)?, entries.last().ok_or(UnsupportedLayout)?);
                let indent = column(text, first.key_start);
                lines(line_end(text, after.node.end), write::entry(last, value, indent))
            }
            NodeKind::Seq { flow, items } => {
                let at: usize = last.parse().map_err(|_| UnsupportedLayout)?;
                let first = items.first().ok_or(UnsupportedLayout)?;
                match (at.checked_sub(1).and_then(|before| items.get(before)), flow) {
                    (None, true) => insert(first.start, format!("{value}, ")),
                    (Some(before), true) => insert(before.end, format!(", {value}")),
                    (before, false) => {
                        let dash = dash(text, first)?;
                        let after =
                            before.map(|before| before.end).or(self.key_end).ok_or(UnsupportedLayout)?;
                        lines(line_end(text, after), write::item(value, column(text, dash)))
                    }
                }
            }
            _ => Err(UnsupportedLayout),
        }
    }

    fn replace(&self, text: &str, last: &str, value: &Value) -> Result<Edit, UnsupportedLayout> {
        let NodeKind::Map { flow, .. } = self.node.kind else { return Err(UnsupportedLayout) };
        let entry = self.entry(last)?;
        if flow {
            return Ok(Edit { from: entry.node.start, to: entry.node.end, with: value.to_string() });
        }
        let with = write::after_key(value, column(text, entry.key_start));
        let with = with.replace('\n', newline(text));
        Ok(Edit { from: after_colon(text, entry)?, to: entry.node.end, with })
    }

    fn remove(&self, text: &str, last: &str) -> Result<Edit, UnsupportedLayout> {
        // Start and end of each member; with the dash for items in block style.
        let (flow, at, spans): (bool, usize, Vec<(usize, usize)>) = match &self.node.kind {
            NodeKind::Map { flow, entries } => {
                let at = entries.iter().position(|entry| entry.key == last).ok_or(UnsupportedLayout)?;
                (*flow, at, entries.iter().map(|entry| (entry.key_start, entry.node.end)).collect())
            }
            NodeKind::Seq { flow, items } => {
                let start = |item: &Node| if *flow { Ok(item.start) } else { dash(text, item) };
                let spans = items.iter().map(|item| Ok((start(item)?, item.end)));
                (*flow, last.parse().map_err(|_| UnsupportedLayout)?, spans.collect::<Result<_, _>>()?)
            }
            _ => return Err(UnsupportedLayout),
        };
        let (start, end) = *spans.get(at).ok_or(UnsupportedLayout)?;
        let (from, to) = if flow {
            match (at.checked_sub(1), spans.get(at + 1)) {
                (Some(before), _) => (spans[before].1, end),
                (None, Some((next, _))) => (start, *next),
                (None, None) => (start, end),
            }
        } else {
            let line = line_start(text, start);
            // The first key of an item follows the dash, so the line cannot be removed.
            if spans.len() == 1 || !text[line..start].trim().is_empty() {
                return Err(UnsupportedLayout);
            }
            let line_break = line.checked_sub(1).map(|at| at - usize::from(text[..at].ends_with('\r')));
            match line_break {
                Some(before) => (before, line_end(text, end)),
                None => (0, (line_end(text, end) + newline(text).len()).min(text.len())),
            }
        };
        Ok(Edit { from, to, with: String::new() })
    }
}

fn after_colon(text: &str, entry: &MapEntry) -> Result<usize, UnsupportedLayout> {
    let gap = text[entry.key_end..].find(':').ok_or(UnsupportedLayout)?;
    let only_space = text[entry.key_end..entry.key_end + gap].trim().is_empty();
    if only_space { Ok(entry.key_end + gap + 1) } else { Err(UnsupportedLayout) }
}

/// The position of the dash of an item in block style.
fn dash(text: &str, item: &Node) -> Result<usize, UnsupportedLayout> {
    let before = text[..item.start].trim_end_matches([' ', '\t']);
    if before.ends_with('-') { Ok(before.len() - 1) } else { Err(UnsupportedLayout) }
}

fn line_start(text: &str, at: usize) -> usize {
    text[..at].rfind('\n').map_or(0, |end| end + 1)
}

/// The end of the line, without the line break.
fn line_end(text: &str, at: usize) -> usize {
    let end = text[at..].find('\n').map_or(text.len(), |end| at + end);
    end - usize::from(end > at && text[..end].ends_with('\r'))
}

fn column(text: &str, at: usize) -> usize {
    text[line_start(text, at)..at].chars().count()
}

fn newline(text: &str) -> &'static str {
    if text.contains("\r\n") { "\r\n" } else { "\n" }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn add(path: &str, value: Value) -> Operation {
        Operation::Add { path: path.to_owned(), value }
    }

    /// Adds a value, checks the result, and removes it again.
    fn assert_round_trip(text: &str, path: &str, expected: &str) {
        let value = json!({"name": "o", "args": ["a"]});
        let operation = add(path, value);
        let edited = apply(text, &operation).unwrap();
        assert_eq!(edited, expected);
        let mut expected_value = Document::parse(text).unwrap().value();
        operation.apply(&mut expected_value).unwrap();
        assert_eq!(Document::parse(&edited).unwrap().value(), expected_value);
        assert_eq!(apply(&edited, &Operation::Remove { path: path.to_owned() }).unwrap(), text);
    }

    #[test]
    fn removing_an_addition_restores_the_text() {
        assert_round_trip(
            "s:\n- name: x # mine\n  v: |\n    t\n\n# end\n",
            "/s/1",
            "s:\n- name: x # mine\n  v: |\n    t\n- name: o\n  args:\n    - a\n\n# end\n",
        );
        assert_round_trip(
            "s: # of s\n    # of x\n    - x\n",
            "/s/0",
            "s: # of s\n    - name: o\n      args:\n        - a\n    # of x\n    - x\n",
        );
        assert_round_trip(
            "a:\r\n  b: 1\r\nc: 2",
            "/a/d",
            "a:\r\n  b: 1\r\n  d:\r\n    name: o\r\n    args:\r\n      - a\r\nc: 2",
        );
        assert_round_trip("- a: 1", "/0/d", "- a: 1\n  d:\n    name: o\n    args:\n      - a");
        assert_round_trip("{\"s\": [1,2]}", "/s/0", "{\"s\": [{\"name\":\"o\",\"args\":[\"a\"]}, 1,2]}");
        assert_round_trip("{\"s\": [1,2]}", "/s/1", "{\"s\": [1, {\"name\":\"o\",\"args\":[\"a\"]},2]}");
        assert_round_trip(
            "{\n  \"a\": 1\n}\n",
            "/b",
            "{\n  \"a\": 1, \"b\": {\"name\":\"o\",\"args\":[\"a\"]}\n}\n",
        );
    }

    #[test]
    fn restoring_a_replacement_restores_the_text() {
        for text in [
            "p: # why\n    http: {path: /a,  port: web}   # what\n    t: 1 # end\nq: 1\n",
            "p: {http: {path: /a,  port: web}}\nq: 1\n",
            "{\"p\":   {\"http\": 1}, \"q\": 1}",
            "p:\nq: 1\n",
            "q: 1\np:   {} # none",
        ] {
            let document = Document::parse(text).unwrap();
            let original = original_text(text, &document, "/p").unwrap().to_owned();
            let edited =
                apply(text, &Operation::Replace { path: "/p".into(), value: json!({"x": [1]}) }).unwrap();
            assert_eq!(
                Document::parse(&edited).unwrap().value(),
                json!({"p": {"x": [1]}, "q": 1}),
                "{edited}"
            );
            assert_eq!(restore(&edited, "/p", &original).unwrap(), text);
        }
    }

    #[test]
    fn shared_values_are_not_edited() {
        for text in ["a: &x {b: 1}\nc: *x\n", "c: &x {b: 1}\n", "d: &x {b: 1}\nc:\n  <<: *x\n"] {
            assert!(
                apply(text, &Operation::Replace { path: "/c/b".into(), value: 1.into() }).is_err(),
                "{text}"
            );
        }
    }
}
