//! Formats values as YAML.

use std::fmt::Write as _;

use serde_json::Value;

use super::parse::plain;

/// A whole document, in block style.
pub fn document(value: &Value) -> String {
    let mut out = match value {
        Value::Object(map) if !map.is_empty() => lines(value, 0),
        Value::Array(list) if !list.is_empty() => lines(value, 0),
        other => scalar(other, 0).trim_start().to_owned(),
    };
    out.push('\n');
    out
}

/// The text after `key:`, whose key is indented by `indent`: ` x`, or a line break and a block.
pub fn after_key(value: &Value, indent: usize) -> String {
    match value {
        Value::Object(map) if !map.is_empty() => format!("\n{}", lines(value, indent + 2)),
        Value::Array(list) if !list.is_empty() => format!("\n{}", lines(value, indent + 2)),
        other => scalar(other, indent),
    }
}

/// `key: value`, without a final line break.
pub fn entry(key: &str, value: &Value, indent: usize) -> String {
    format!("{:indent$}{}:{}", "", quoted(key), after_key(value, indent))
}

/// `- value`, without a final line break.
pub fn item(value: &Value, indent: usize) -> String {
    let inner = match value {
        Value::Object(map) if !map.is_empty() => lines(value, indent + 2),
        Value::Array(list) if !list.is_empty() => lines(value, indent + 2),
        other => format!("{:indent$} {}", "", scalar(other, indent)),
    };
    format!("{:indent$}- {}", "", inner.trim_start())
}

/// The lines of a non-empty map or list.
fn lines(value: &Value, indent: usize) -> String {
    let lines: Vec<String> = match value {
        Value::Object(map) => map.iter().map(|(key, value)| entry(key, value, indent)).collect(),
        Value::Array(list) => list.iter().map(|value| item(value, indent)).collect(),
        _ => Vec::new(),
    };
    lines.join("\n")
}

/// ` value` on one line, or ` |` and a block scalar.
fn scalar(value: &Value, indent: usize) -> String {
    match value {
        Value::String(text) if is_block(text) => block(text, indent + 2),
        Value::String(text) => format!(" {}", quoted(text)),
        other => format!(" {other}"),
    }
}

/// Whether a text can be written as a block scalar.
fn is_block(text: &str) -> bool {
    text.trim_end_matches('\n').contains('\n')
        && !text.starts_with([' ', '\n'])
        && !text.ends_with("\n\n")
        && text.chars().all(|letter| letter == '\n' || !letter.is_control())
}

fn block(text: &str, indent: usize) -> String {
    let mut out = if text.ends_with('\n') { " |".to_owned() } else { " |-".to_owned() };
    for line in text.strip_suffix('\n').unwrap_or(text).split('\n') {
        // A blank line needs no spaces.
        let width = if line.is_empty() { 0 } else { indent };
        let _ = write!(out, "\n{:width$}{line}", "");
    }
    out
}

/// The string, quoted unless it is unambiguous without quotes.
fn quoted(text: &str) -> String {
    let digits = text.trim_start_matches(|letter: char| letter.is_ascii_digit());
    let is_quantity = !digits.is_empty() && digits.chars().all(|letter| letter.is_ascii_alphabetic());
    let is_unambiguous = (is_quantity
        || text.starts_with(|first: char| first.is_ascii_alphabetic() || "/._".contains(first)))
        && text.chars().all(|letter| letter.is_ascii_alphanumeric() || "/._@+:-".contains(letter))
        && !text.ends_with(':')
        && plain(text).is_string();
    // JSON strings are valid YAML.
    if is_unambiguous { text.to_owned() } else { Value::from(text).to_string() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::kubernetes::yaml::Document;

    #[test]
    fn the_output_is_conventional_yaml() {
        let value = json!({
            "name": "a", "version": "1.10", "port": 80, "on": "yes", "args": ["run", "-c", "a b"],
            "none": {}, "text": "a = 1\n\n[b]\n", "nested": [{"x": [1, 2], "y": null}, []]
        });
        assert_eq!(
            document(&value),
            "name: a\nversion: \"1.10\"\nport: 80\n\"on\": \"yes\"\nargs:\n  - run\n  - \"-c\"\n  - \"a b\"\n\
             none: {}\ntext: |\n  a = 1\n\n  [b]\nnested:\n  - x:\n      - 1\n      - 2\n    \"y\": null\n  - []\n"
        );
    }

    fn values() -> impl Strategy<Value = Value> {
        let text = prop_oneof!["[ -~\n\t\u{e9}]{0,12}", "(yes|no|0644|1e3|~|null|- a|a: b|#a|\\|)"];
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            text.clone().prop_map(Value::from)
        ];
        leaf.prop_recursive(4, 30, 4, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::vec(("[a-z<:/ ]{1,6}", inner), 0..4).prop_map(|entries| Value::Object(
                    entries.into_iter().filter(|(key, _)| key != "<<").collect()
                )),
            ]
        })
    }

    proptest! {
        #[test]
        fn output_parses_to_the_same_value(value in values()) {
            let text = document(&value);
            prop_assert_eq!(Document::parse(&text).unwrap().value(), value, "{}", text);
        }
    }
}
