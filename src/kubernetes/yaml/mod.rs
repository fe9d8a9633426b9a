//! YAML edited in place: everything that a patch does not touch is left byte for byte unchanged, with comments and
//! quotes.
//!
//! A document is parsed into a tree with the byte offsets of its values ([`parse`]); edits insert or remove lines of
//! the text ([`edit`]); [`mod@write`] formats new values. Callers parse the edited text again and compare. If that fails
//! (anchors in the edited part), the whole document is rewritten.

pub mod edit;
pub mod parse;
pub mod write;

pub use parse::{Document, YamlError};

/// Splits a stream at its `---` lines. The concatenated parts are the stream.
pub fn documents(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let (mut start, mut at, mut directives) = (0, 0, false);
    for line in text.split_inclusive('\n') {
        let bare = line.trim_end();
        // In the first column this is always a marker, even in a block scalar.
        let marker =
            bare.strip_prefix("---").is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t']));
        if marker && at > start && !directives {
            parts.push(&text[start..at]);
            start = at;
        }
        directives = !marker && (bare.starts_with('%') || (directives && bare.is_empty()));
        at += line.len();
        if bare == "..." {
            parts.push(&text[start..at]);
            start = at;
            directives = false;
        }
    }
    if start < text.len() {
        parts.push(&text[start..]);
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_the_sum_of_its_documents() {
        for (text, count) in [
            ("", 0),
            ("a: 1", 1),
            ("a: 1\n---\nb: 2\n", 2),
            ("# head\n---\na: 1\n---\n# nothing\n--- # c\nb: |\n  ---\n", 4),
            ("%YAML 1.2\n---\na: 1\n...\n---\nb: 1\r\n---\r\nc: 1", 3),
            ("---a: 1\n", 1),
        ] {
            let parts = documents(text);
            assert_eq!(parts.concat(), text);
            assert_eq!(parts.len(), count, "{parts:?}");
        }
    }
}
