//! Parses YAML text into a tree with byte offsets.

use std::{collections::HashMap, rc::Rc};

use saphyr_parser::{Event, Parser, ScalarStyle, Span, Tag};
use serde_json::{Map, Number, Value};

/// Deeper than any manifest, and safe for the stack.
const MAX_DEPTH: usize = 100;
/// Most values in a document with its aliases expanded, against exponential growth (`&a [*b, *b]`).
const MAX_VALUES: usize = 500_000;

/// Why a text is not YAML that Kubernetes accepts.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("line {line}: {reason}")]
pub struct YamlError {
    /// From 1, in the text that was parsed.
    pub line: usize,
    pub reason: String,
}

/// A document of a stream.
#[derive(Debug)]
pub struct Document {
    /// `None` if there are only comments.
    pub root: Option<Node>,
}

/// A value and its byte offsets.
#[derive(Clone, Debug)]
pub struct Node {
    pub kind: NodeKind,
    pub start: usize,
    /// After its last character; following comments and blank lines are not included.
    pub end: usize,
    /// An alias, or a value with an anchor or a tag: it must not be edited.
    pub is_shared: bool,
}

#[derive(Clone, Debug)]
pub enum NodeKind {
    Scalar(Value),
    Map {
        flow: bool,
        entries: Vec<MapEntry>,
    },
    Seq {
        flow: bool,
        items: Vec<Node>,
    },
    /// The value of the anchor.
    Alias(Rc<Value>),
}

#[derive(Clone, Debug)]
pub struct MapEntry {
    pub key: String,
    pub key_start: usize,
    pub key_end: usize,
    pub node: Node,
}

impl Document {
    /// Parses one document, as split by [`super::documents`].
    ///
    /// # Errors
    ///
    /// If it is not valid YAML, or not representable in JSON.
    pub fn parse(text: &str) -> Result<Self, YamlError> {
        let mut reader = Reader {
            text,
            bytes: text.char_indices().map(|(at, _)| at).chain([text.len()]).collect(),
            events: Parser::new_from_str(text),
            anchors: HashMap::new(),
            values: 0,
        };
        let mut root = None;
        loop {
            match reader.next()? {
                None | Some((Event::StreamEnd, _)) => return Ok(Self { root }),
                Some((
                    Event::StreamStart | Event::DocumentStart(_) | Event::DocumentEnd | Event::Nothing,
                    _,
                )) => {}
                Some((event, span)) => {
                    let node = reader.node(event, span, 0)?;
                    // The parser emits an empty scalar for a missing document.
                    let nothing =
                        matches!(node.kind, NodeKind::Scalar(Value::Null)) && node.start == node.end;
                    if !nothing && root.replace(node).is_some() {
                        return Err(YamlError { line: 1, reason: "unexpected second document".to_owned() });
                    }
                }
            }
        }
    }

    /// The value of the document.
    pub fn value(&self) -> Value {
        self.root.as_ref().map_or(Value::Null, Node::value)
    }
}

impl Node {
    /// The value, with merge keys (`<<`) applied.
    pub fn value(&self) -> Value {
        match &self.kind {
            NodeKind::Scalar(value) => value.clone(),
            NodeKind::Alias(value) => Value::clone(value),
            NodeKind::Seq { items, .. } => items.iter().map(Self::value).collect(),
            NodeKind::Map { entries, .. } => {
                let mut map = Map::new();
                for entry in entries.iter().filter(|entry| entry.key != "<<") {
                    map.insert(entry.key.clone(), entry.node.value());
                }
                for entry in entries.iter().filter(|entry| entry.key == "<<") {
                    let merged = match entry.node.value() {
                        Value::Array(several) => several,
                        one => vec![one],
                    };
                    for (key, value) in merged
                        .into_iter()
                        .filter_map(|one| match one {
                            Value::Object(map) => Some(map),
                            _ => None,
                        })
                        .flatten()
                    {
                        map.entry(key).or_insert(value);
                    }
                }
                Value::Object(map)
            }
        }
    }
}

struct Reader<'t> {
    text: &'t str,
    /// The byte offset of each character: the parser counts characters.
    bytes: Vec<usize>,
    events: Parser<'t, saphyr_parser::StrInput<'t>>,
    anchors: HashMap<usize, Rc<Value>>,
    values: usize,
}

impl<'t> Reader<'t> {
    fn next(&mut self) -> Result<Option<(Event<'t>, Span)>, YamlError> {
        let convert = |error: saphyr_parser::ScanError| YamlError {
            line: error.marker().line(),
            reason: error.info().to_owned(),
        };
        self.events.next().transpose().map_err(convert)
    }

    fn expect_next(&mut self, line: usize) -> Result<(Event<'t>, Span), YamlError> {
        self.next()?.ok_or_else(|| YamlError { line, reason: "unexpected end".to_owned() })
    }

    fn at(&self, index: usize) -> usize {
        self.bytes.get(index).copied().unwrap_or(self.text.len())
    }

    /// The offset after the closing bracket of a collection in flow style. The parser's span extends to the next
    /// token, over comments and line breaks, and is that of the comma if one precedes the bracket.
    fn after_bracket(&self, span: Span) -> usize {
        let mut rest = &self.text[self.at(span.start.index())..];
        loop {
            rest = rest.trim_start_matches(|letter: char| letter.is_whitespace() || letter == ',');
            let Some(comment) = rest.strip_prefix('#') else { break };
            rest = comment.find('\n').map_or("", |end| &comment[end..]);
        }
        (self.text.len() - rest.len() + 1).min(self.text.len())
    }

    fn node(&mut self, event: Event<'t>, span: Span, depth: usize) -> Result<Node, YamlError> {
        let (start, line) = (self.at(span.start.index()), span.start.line());
        let error = |reason: &str| YamlError { line, reason: reason.to_owned() };
        self.values += 1;
        if depth > MAX_DEPTH || self.values > MAX_VALUES {
            return Err(error("it is nested too deeply, or its aliases expand to too much"));
        }
        let end = self.at(span.end.index());
        // For the parser, an unindented list in block style starts with its first item, which may be `{…}`.
        let bracket = if matches!(event, Event::SequenceStart(..)) { '[' } else { '{' };
        let flow = self.text[start..].starts_with(bracket);
        let (node, anchor) = match event {
            Event::Alias(anchor) => {
                let value =
                    self.anchors.get(&anchor).ok_or_else(|| error("alias of an undefined anchor"))?.clone();
                self.values += size(&value);
                (Node { kind: NodeKind::Alias(value), start, end, is_shared: true }, 0)
            }
            Event::Scalar(text, style, anchor, tag) => {
                let value = scalar(&text, style, tag.as_deref());
                let end = match style {
                    // The parser's span extends to the next token.
                    ScalarStyle::SingleQuoted => start + quoted_length(&self.text[start..], '\''),
                    ScalarStyle::DoubleQuoted => start + quoted_length(&self.text[start..], '"'),
                    _ => start + self.text[start..end].trim_end().len(),
                };
                (
                    Node {
                        kind: NodeKind::Scalar(value),
                        start,
                        end,
                        is_shared: anchor != 0 || tag.is_some(),
                    },
                    anchor,
                )
            }
            Event::SequenceStart(anchor, tag) => {
                let (mut items, mut end) = (Vec::new(), start);
                loop {
                    let (event, span) = self.expect_next(line)?;
                    if event == Event::SequenceEnd {
                        let end = if flow { self.after_bracket(span) } else { end };
                        let shared = anchor != 0 || tag.is_some();
                        break (
                            Node { kind: NodeKind::Seq { flow, items }, start, end, is_shared: shared },
                            anchor,
                        );
                    }
                    let item = self.node(event, span, depth + 1)?;
                    end = end.max(item.end);
                    items.push(item);
                }
            }
            Event::MappingStart(anchor, tag) => {
                let (mut entries, mut end) = (Vec::new(), start);
                loop {
                    let (event, span) = self.expect_next(line)?;
                    if event == Event::MappingEnd {
                        let end = if flow { self.after_bracket(span) } else { end };
                        let shared = anchor != 0 || tag.is_some();
                        break (
                            Node { kind: NodeKind::Map { flow, entries }, start, end, is_shared: shared },
                            anchor,
                        );
                    }
                    let entry = self.entry(event, span, depth)?;
                    end = end.max(entry.node.end);
                    entries.push(entry);
                }
            }
            _ => return Err(error("a value is expected")),
        };
        if anchor != 0 {
            self.anchors.insert(anchor, Rc::new(node.value()));
        }
        Ok(node)
    }

    fn entry(&mut self, event: Event<'t>, span: Span, depth: usize) -> Result<MapEntry, YamlError> {
        let line = span.start.line();
        let (key_start, key_end) = (self.at(span.start.index()), self.at(span.end.index()));
        let key = match event {
            // `on: 1` and `8080: x` have string keys, as in kubectl.
            Event::Scalar(text, ..) => text.into_owned(),
            _ => return Err(YamlError { line, reason: "a key that is not a string".to_owned() }),
        };
        let (event, span) = self.expect_next(line)?;
        let mut node = self.node(event, span, depth + 1)?;
        if node.start == node.end {
            // No value: the position after the colon.
            let colon = self.text[key_end..].find(':').map_or(key_end, |at| key_end + at + 1);
            (node.start, node.end) = (colon, colon);
        }
        Ok(MapEntry { key, key_start, key_end, node })
    }
}

/// The length of a terminated string with its quotes.
fn quoted_length(text: &str, quote: char) -> usize {
    let mut letters = text.char_indices().skip(1).peekable();
    while let Some((at, letter)) = letters.next() {
        if letter == '\\' && quote == '"' {
            letters.next();
        } else if letter == quote {
            // A doubled quote is an escaped one in a single-quoted string.
            if quote == '"' || letters.next_if(|(_, next)| *next == quote).is_none() {
                return at + 1;
            }
        }
    }
    text.len()
}

fn size(value: &Value) -> usize {
    1 + match value {
        Value::Array(items) => items.iter().map(size).sum(),
        Value::Object(map) => map.values().map(size).sum(),
        _ => 0,
    }
}

/// The value of a scalar as in kubectl: YAML 1.1 with its `yes` and its octal numbers.
fn scalar(text: &str, style: ScalarStyle, tag: Option<&Tag>) -> Value {
    let is_tag = |suffix: &str| tag.is_some_and(|tag| tag.is_yaml_core_schema() && tag.suffix == suffix);
    if style != ScalarStyle::Plain || is_tag("str") {
        return text.into();
    }
    plain(text)
}

/// The value of an unquoted scalar.
pub(super) fn plain(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "true" | "True" | "TRUE" | "yes" | "Yes" | "YES" | "on" | "On" | "ON" | "y" | "Y" => {
            return true.into();
        }
        "false" | "False" | "FALSE" | "no" | "No" | "NO" | "off" | "Off" | "OFF" | "n" | "N" => {
            return false.into();
        }
        _ => {}
    }
    let (sign, digits) = match text.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, text.strip_prefix('+').unwrap_or(text)),
    };
    let radix = |digits: &str, radix| i64::from_str_radix(&digits.replace('_', ""), radix).ok();
    let whole = match digits.as_bytes() {
        [b'0', b'x', ..] => radix(&digits[2..], 16),
        [b'0', b'o', ..] => radix(&digits[2..], 8),
        [b'0', b'b', ..] => radix(&digits[2..], 2),
        [b'0', _, ..] if digits.bytes().all(|byte| byte.is_ascii_digit()) => radix(digits, 8),
        [b'0'..=b'9', ..] => radix(digits, 10),
        _ => None,
    };
    if let Some(whole) = whole {
        return (sign * whole).into();
    }
    let number = digits.starts_with(|first: char| first.is_ascii_digit() || first == '.')
        && digits.contains(|digit: char| digit.is_ascii_digit())
        && digits.bytes().all(|byte| byte.is_ascii_digit() || b".eE+-".contains(&byte));
    let float = number.then(|| text.parse::<f64>().ok()).flatten();
    float.and_then(Number::from_f64).map_or_else(|| text.into(), Value::Number)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(text: &str) -> Value {
        Document::parse(text).unwrap().value()
    }

    #[test]
    fn scalars_have_the_types_of_kubectl() {
        assert_eq!(
            read(
                "[yes, off, 0644, 0x1f, 0b11, 1_000, -3, 1.5, 1e3, 1.2.3, 08, 12:30, ~, '1', 100m, !!str 1]"
            ),
            json!([
                true, false, 420, 31, 3, 1000, -3, 1.5, 1000.0, "1.2.3", 8.0, "12:30", null, "1", "100m", "1"
            ])
        );
        assert_eq!(read("a: |\n  x\n  y\nb: >-\n  x\n  y\n"), json!({"a": "x\ny\n", "b": "x y"}));
    }

    #[test]
    fn anchors_and_merge_keys_are_resolved() {
        let text = "base: &b {x: 1, y: 2}\nof: {<<: *b, y: 3}\nlist: [*b]\n";
        assert_eq!(
            read(text),
            json!({"base": {"x": 1, "y": 2}, "of": {"y": 3, "x": 1}, "list": [{"x": 1, "y": 2}]})
        );
    }

    #[test]
    fn the_end_of_a_value_is_its_last_character() {
        for (source, end) in [("a: 'it''s' # x\n", 10), ("a: \"\\\"\\\\\" # x\n", 9)] {
            let document = Document::parse(source).unwrap();
            assert_eq!(document.root.unwrap().end, end, "{source}");
        }
        for flow in [
            "{b: 1}",
            "{b: 1,}",
            "{b: 1 , # c\n }",
            "[1]",
            "[1, ]",
            "[\n {b: 1,}, # c\n # d\n ]",
            "{}",
            "[ ]",
        ] {
            for (before, behind) in
                [("a: ", " # c\n\n# d\ne: 1\n"), ("a: ", "\n"), ("- ", "\n"), ("[", ", 2]"), ("{x: ", ",}")]
            {
                let text = format!("{before}{flow}{behind}");
                let document = Document::parse(&text).unwrap();
                let inner = match &document.root.as_ref().unwrap().kind {
                    NodeKind::Map { entries, .. } => &entries[0].node,
                    NodeKind::Seq { items, .. } => &items[0],
                    other => panic!("{other:?}"),
                };
                assert_eq!(&text[inner.start..inner.end], flow, "{text}");
            }
        }
        let text = "a:\n  - b: c # of c\n\n# of d\nd:\n";
        let document = Document::parse(text).unwrap();
        let NodeKind::Map { entries, .. } = &document.root.as_ref().unwrap().kind else { panic!() };
        assert_eq!(&text[entries[0].node.start..entries[0].node.end], "- b: c");
        assert_eq!(entries[1].node.end, text.len() - 1);
    }

    #[test]
    fn exponential_and_deep_documents_are_rejected() {
        let mut bomb = "a: &a [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for (of, by) in ["ab", "bc", "cd", "de", "ef", "fg", "gh"].iter().map(|pair| pair.split_at(1)) {
            bomb += &format!("{by}: &{by} [{}]\n", vec![format!("*{of}"); 10].join(", "));
        }
        assert!(Document::parse(&bomb).unwrap_err().reason.contains("too much"));
        assert!(Document::parse(&"[".repeat(5000)).is_err());
        assert!(Document::parse("a: [1\nb: {{ .Values.x }}\n").is_err());
        assert_eq!(Document::parse("# only a comment\n---\n").unwrap().value(), Value::Null);
    }
}
