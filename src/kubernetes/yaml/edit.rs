//! Changes in the text, by which everything else stays as it is to the byte.
//!
//! Taking out what was put in gives the text from before, whatever its style and its line ends.

use serde_json::Value;

use super::{
    parse::{Document, Entry, Kind, Node},
    write,
};
use crate::kubernetes::patch::{Operation, segments};

/// Why a change cannot be made in the text alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("anchors, aliases or an unusual layout stand where the sidecar goes")]
pub struct TooUnusual;

/// The text with the change made.
///
/// # Errors
///
/// Where the place is shared with another by an alias, or stands in no usual way.
pub fn apply(text: &str, operation: &Operation) -> Result<String, TooUnusual> {
    let document = Document::parse(text).map_err(|_| TooUnusual)?;
    let path = segments(operation.path());
    let (last, parents) = path.split_last().ok_or(TooUnusual)?;
    let found = find(&document, parents)?;
    let edit = match operation {
        Operation::Add { value, .. } => found.add(text, last, value)?,
        Operation::Replace { value, .. } => found.replace(text, last, value)?,
        Operation::Remove { .. } => found.remove(text, last)?,
    };
    Ok(edit.made_in(text))
}

/// What stands behind the key at this place, from its colon on; for [`restore`].
pub fn raw<'t>(text: &'t str, document: &Document, path: &str) -> Option<&'t str> {
    let path = segments(path);
    let (last, parents) = path.split_last()?;
    let entry = find(document, parents).ok()?.entry(last).ok()?;
    text.get(behind_colon(text, entry).ok()?..entry.node.end)
}

/// Whether this is how a value at that place would be written anyhow.
pub fn is_usual(text: &str, document: &Document, path: &str, value: &Value) -> bool {
    let edited = apply(text, &Operation::Replace { path: path.to_owned(), value: value.clone() });
    document.root.is_some() && edited.as_deref() == Ok(text)
}

/// Puts back what [`raw`] gave.
///
/// # Errors
///
/// Like [`apply`].
pub fn restore(text: &str, path: &str, raw: &str) -> Result<String, TooUnusual> {
    let document = Document::parse(text).map_err(|_| TooUnusual)?;
    let path = segments(path);
    let (last, parents) = path.split_last().ok_or(TooUnusual)?;
    let entry = find(&document, parents)?.entry(last)?;
    let edit = Edit { from: behind_colon(text, entry)?, to: entry.node.end, with: raw.to_owned() };
    Ok(edit.made_in(text))
}

struct Edit {
    from: usize,
    to: usize,
    with: String,
}

impl Edit {
    fn made_in(&self, text: &str) -> String {
        format!("{}{}{}", &text[..self.from], self.with, &text[self.to..])
    }
}

/// A map or a list, and what its own key is.
struct Place<'d> {
    node: &'d Node,
    /// Where the line ends in which it is named: items may be put behind.
    named: Option<usize>,
}

fn find<'d>(document: &'d Document, path: &[String]) -> Result<Place<'d>, TooUnusual> {
    let mut place = Place { node: document.root.as_ref().ok_or(TooUnusual)?, named: None };
    for segment in path {
        place = match &place.node.kind {
            _ if place.node.shared => return Err(TooUnusual),
            Kind::Map { .. } => {
                let entry = place.entry(segment)?;
                Place { node: &entry.node, named: Some(entry.key_end) }
            }
            Kind::Seq { items, .. } => {
                let item = segment.parse().ok().and_then(|at: usize| items.get(at)).ok_or(TooUnusual)?;
                Place { node: item, named: None }
            }
            _ => return Err(TooUnusual),
        };
    }
    if place.node.shared { Err(TooUnusual) } else { Ok(place) }
}

impl<'d> Place<'d> {
    fn entry(&self, key: &str) -> Result<&'d Entry, TooUnusual> {
        let Kind::Map { entries, .. } = &self.node.kind else { return Err(TooUnusual) };
        entries.iter().find(|entry| entry.key == key).ok_or(TooUnusual)
    }

    fn add(&self, text: &str, last: &str, value: &Value) -> Result<Edit, TooUnusual> {
        let put = |at: usize, with: String| Ok(Edit { from: at, to: at, with });
        let lines = |at: usize, lines: String| {
            let nl = newline(text);
            put(at, format!("{nl}{}", lines.replace('\n', nl)))
        };
        match &self.node.kind {
            Kind::Map { flow: true, entries } => {
                let behind = entries.last().ok_or(TooUnusual)?.node.end;
                put(behind, format!(", {}: {value}", Value::from(last)))
            }
            Kind::Map { flow: false, entries } => {
                let (first, behind) = (entries.first().ok_or(TooUnusual)?, entries.last().ok_or(TooUnusual)?);
                let indent = column(text, first.key_start);
                lines(line_end(text, behind.node.end), write::entry(last, value, indent))
            }
            Kind::Seq { flow, items } => {
                let at: usize = last.parse().map_err(|_| TooUnusual)?;
                let first = items.first().ok_or(TooUnusual)?;
                match (at.checked_sub(1).and_then(|before| items.get(before)), flow) {
                    (None, true) => put(first.start, format!("{value}, ")),
                    (Some(before), true) => put(before.end, format!(", {value}")),
                    (before, false) => {
                        let dash = dash(text, first)?;
                        let behind = before.map(|before| before.end).or(self.named).ok_or(TooUnusual)?;
                        lines(line_end(text, behind), write::item(value, column(text, dash)))
                    }
                }
            }
            _ => Err(TooUnusual),
        }
    }

    fn replace(&self, text: &str, last: &str, value: &Value) -> Result<Edit, TooUnusual> {
        let Kind::Map { flow, .. } = self.node.kind else { return Err(TooUnusual) };
        let entry = self.entry(last)?;
        if flow {
            return Ok(Edit { from: entry.node.start, to: entry.node.end, with: value.to_string() });
        }
        let with = write::behind_key(value, column(text, entry.key_start));
        let with = with.replace('\n', newline(text));
        Ok(Edit { from: behind_colon(text, entry)?, to: entry.node.end, with })
    }

    fn remove(&self, text: &str, last: &str) -> Result<Edit, TooUnusual> {
        // Where each member begins and ends; of an item in block style, with its dash.
        let (flow, at, spans): (bool, usize, Vec<(usize, usize)>) = match &self.node.kind {
            Kind::Map { flow, entries } => {
                let at = entries.iter().position(|entry| entry.key == last).ok_or(TooUnusual)?;
                (*flow, at, entries.iter().map(|entry| (entry.key_start, entry.node.end)).collect())
            }
            Kind::Seq { flow, items } => {
                let start = |item: &Node| if *flow { Ok(item.start) } else { dash(text, item) };
                let spans = items.iter().map(|item| Ok((start(item)?, item.end)));
                (*flow, last.parse().map_err(|_| TooUnusual)?, spans.collect::<Result<_, _>>()?)
            }
            _ => return Err(TooUnusual),
        };
        let (start, end) = *spans.get(at).ok_or(TooUnusual)?;
        let (from, to) = if flow {
            match (at.checked_sub(1), spans.get(at + 1)) {
                (Some(before), _) => (spans[before].1, end),
                (None, Some((next, _))) => (start, *next),
                (None, None) => (start, end),
            }
        } else {
            let line = line_start(text, start);
            // The first key of an item stands behind the dash: that line is not its own.
            if spans.len() == 1 || !text[line..start].trim().is_empty() {
                return Err(TooUnusual);
            }
            let broken = line.checked_sub(1).map(|at| at - usize::from(text[..at].ends_with('\r')));
            match broken {
                Some(before) => (before, line_end(text, end)),
                None => (0, (line_end(text, end) + newline(text).len()).min(text.len())),
            }
        };
        Ok(Edit { from, to, with: String::new() })
    }
}

fn behind_colon(text: &str, entry: &Entry) -> Result<usize, TooUnusual> {
    let gap = text[entry.key_end..].find(':').ok_or(TooUnusual)?;
    let only_space = text[entry.key_end..entry.key_end + gap].trim().is_empty();
    if only_space { Ok(entry.key_end + gap + 1) } else { Err(TooUnusual) }
}

/// The dash of an item in block style.
fn dash(text: &str, item: &Node) -> Result<usize, TooUnusual> {
    let before = text[..item.start].trim_end_matches([' ', '\t']);
    if before.ends_with('-') { Ok(before.len() - 1) } else { Err(TooUnusual) }
}

fn line_start(text: &str, at: usize) -> usize {
    text[..at].rfind('\n').map_or(0, |end| end + 1)
}

/// The end of the line, before what breaks it.
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

    /// Puts it in, checks what it says then, and takes it out again.
    fn there_and_back(text: &str, path: &str, expected: &str) {
        let value = json!({"name": "o", "args": ["a"]});
        let operation = add(path, value);
        let edited = apply(text, &operation).unwrap();
        assert_eq!(edited, expected);
        let mut meant = Document::parse(text).unwrap().value();
        operation.apply(&mut meant).unwrap();
        assert_eq!(Document::parse(&edited).unwrap().value(), meant);
        assert_eq!(apply(&edited, &Operation::Remove { path: path.to_owned() }).unwrap(), text);
    }

    #[test]
    fn what_is_put_in_can_be_taken_out_to_the_byte() {
        there_and_back(
            "s:\n- name: x # mine\n  v: |\n    t\n\n# end\n",
            "/s/1",
            "s:\n- name: x # mine\n  v: |\n    t\n- name: o\n  args:\n    - a\n\n# end\n",
        );
        there_and_back(
            "s: # of s\n    # of x\n    - x\n",
            "/s/0",
            "s: # of s\n    - name: o\n      args:\n        - a\n    # of x\n    - x\n",
        );
        there_and_back(
            "a:\r\n  b: 1\r\nc: 2",
            "/a/d",
            "a:\r\n  b: 1\r\n  d:\r\n    name: o\r\n    args:\r\n      - a\r\nc: 2",
        );
        there_and_back("- a: 1", "/0/d", "- a: 1\n  d:\n    name: o\n    args:\n      - a");
        there_and_back("{\"s\": [1,2]}", "/s/0", "{\"s\": [{\"name\":\"o\",\"args\":[\"a\"]}, 1,2]}");
        there_and_back("{\"s\": [1,2]}", "/s/1", "{\"s\": [1, {\"name\":\"o\",\"args\":[\"a\"]},2]}");
        there_and_back(
            "{\n  \"a\": 1\n}\n",
            "/b",
            "{\n  \"a\": 1, \"b\": {\"name\":\"o\",\"args\":[\"a\"]}\n}\n",
        );
    }

    #[test]
    fn what_is_replaced_can_be_put_back_to_the_byte() {
        for text in [
            "p: # why\n    http: {path: /a,  port: web}   # what\n    t: 1 # end\nq: 1\n",
            "p: {http: {path: /a,  port: web}}\nq: 1\n",
            "{\"p\":   {\"http\": 1}, \"q\": 1}",
            "p:\nq: 1\n",
            "q: 1\np:   {} # none",
        ] {
            let document = Document::parse(text).unwrap();
            let kept = raw(text, &document, "/p").unwrap().to_owned();
            let edited =
                apply(text, &Operation::Replace { path: "/p".into(), value: json!({"x": [1]}) }).unwrap();
            assert_eq!(
                Document::parse(&edited).unwrap().value(),
                json!({"p": {"x": [1]}, "q": 1}),
                "{edited}"
            );
            assert_eq!(restore(&edited, "/p", &kept).unwrap(), text);
        }
    }

    #[test]
    fn what_is_shared_is_not_edited() {
        for text in ["a: &x {b: 1}\nc: *x\n", "c: &x {b: 1}\n", "d: &x {b: 1}\nc:\n  <<: *x\n"] {
            assert!(
                apply(text, &Operation::Replace { path: "/c/b".into(), value: 1.into() }).is_err(),
                "{text}"
            );
        }
    }
}
