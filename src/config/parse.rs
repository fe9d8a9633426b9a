//! Parses a file's text into a tree with origins, and expands `${VAR}`.

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    diagnostic::{Problem, Problems},
    hints,
    node::{Node, NodeEntry, Table, Value},
    source::Origin,
};
use crate::redact::is_credential_name;

/// Looks up an environment variable.
pub type Env<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Nesting of tables and arrays: the format needs six levels, and the conversion is recursive.
const MAX_DEPTH: usize = 32;

/// Reads what is readable of a file; the rest becomes problems.
pub(super) fn parse(text: &str, file: usize, env: Env<'_>, problems: &mut Problems) -> Node {
    let (root, errors) = DeTable::parse_recoverable(text);
    if !errors.is_empty()
        && let Some(sentence) = hints::foreign_notation(text)
    {
        let line = text.lines().find(|line| !line.trim().is_empty() && !line.trim_start().starts_with('#'));
        let start = line.map_or(0, |line| line.as_ptr().addr() - text.as_ptr().addr());
        let end = start + line.map_or(0, str::len);
        let (wrong, remedy) = sentence.split_once(": ").unwrap_or((sentence, ""));
        problems.push(Problem::error(Some(Origin::new(file, start..end)), wrong).help(remedy));
        problems.mark_broken(file, 0);
        return Node::table(None);
    }
    syntax(text, file, &errors, problems);
    let mut converter = Converter { file, env, problems };
    let span = root.span();
    Node {
        origin: Some(converter.origin(span)),
        value: Value::Table(converter.table(root.into_inner(), MAX_DEPTH)),
    }
}

/// Reports only the first syntax error of a line: further ones mostly follow from it.
fn syntax(text: &str, file: usize, errors: &[toml::de::Error], problems: &mut Problems) {
    let start = |error: &toml::de::Error| error.span().map_or(0, |span| span.start);
    let mut errors: Vec<_> = errors.iter().collect();
    errors.sort_by_key(|error| start(error));
    let first = errors.first().map(|error| start(error));
    let mut last = None;
    for error in errors {
        let at = start(error);
        let same_line = last.is_some_and(|last| {
            text.as_bytes().get(last..at).is_some_and(|between| !between.contains(&b'\n'))
        });
        last = Some(at);
        if !same_line {
            let origin = error.span().map(|span| Origin::new(file, span));
            problems.push(Problem::error(origin, "this is not TOML").label(error.message().trim()));
        }
    }
    if let Some(first) = first {
        problems.mark_broken(file, first);
    }
}

struct Converter<'a> {
    file: usize,
    env: Env<'a>,
    problems: &'a mut Problems,
}

impl Converter<'_> {
    fn origin(&self, span: std::ops::Range<usize>) -> Origin {
        Origin::new(self.file, span)
    }

    fn table(&mut self, table: DeTable<'_>, depth: usize) -> Table {
        table
            .into_iter()
            .map(|(key, value)| {
                let key_origin = Some(self.origin(key.span()));
                (key.into_inner().into_owned(), NodeEntry { key: key_origin, node: self.node(value, depth) })
            })
            .collect()
    }

    fn node(&mut self, spanned: Spanned<DeValue<'_>>, depth: usize) -> Node {
        let origin = self.origin(spanned.span());
        let mut fail = |message: &str, help: &str| {
            self.problems.push(Problem::error(Some(origin), message).help(help));
            self.problems.mark_incomplete();
            Value::Unknown
        };
        let value = match spanned.into_inner() {
            DeValue::Array(_) | DeValue::Table(_) if depth == 0 => {
                fail("tables and arrays are nested too deep", "no key needs more than a few levels")
            }
            DeValue::Array(items) => {
                Value::Array(items.into_iter().map(|item| self.node(item, depth - 1)).collect())
            }
            DeValue::Table(table) => Value::Table(self.table(table, depth - 1)),
            DeValue::Integer(number) => {
                let digits = number.as_str().replace('_', "");
                match i64::from_str_radix(&digits, number.radix()) {
                    Ok(number) => Value::Integer(number),
                    Err(_) => fail("this number is too large", "whole numbers have at most 64 bits"),
                }
            }
            DeValue::Float(number) => match number.as_str().replace('_', "").parse() {
                Ok(number) => Value::Float(number),
                Err(_) => fail("this is not a number", "write e.g. 0.5"),
            },
            DeValue::Boolean(flag) => Value::Bool(flag),
            DeValue::Datetime(date) => Value::Datetime(date.to_string()),
            DeValue::String(written) => match expand(&written, self.env) {
                Ok(None) => Value::String { text: written.into_owned(), expanded: false },
                Ok(Some(text)) => {
                    let variables = variable_names(&written).filter(|name| is_credential_name(name));
                    variables.filter_map(self.env).for_each(|value| self.problems.add_secret(value));
                    Value::String { text, expanded: true }
                }
                Err(wrong) => {
                    let (label, help) = wrong.explain();
                    self.problems.push(
                        Problem::error(Some(origin), "an environment variable cannot be filled in")
                            .label(label)
                            .help(help),
                    );
                    self.problems.mark_incomplete();
                    Value::Unknown
                }
            },
        };
        Node { origin: Some(origin), value }
    }
}

/// The variables in a text.
fn variable_names(text: &str) -> impl Iterator<Item = &str> {
    text.split("${").skip(1).filter_map(|rest| rest.split(['}', ':']).next())
}

#[derive(Debug, PartialEq)]
enum ExpandError {
    Unset(String),
    NotClosed,
    BadName(String),
}

impl ExpandError {
    fn explain(self) -> (String, String) {
        match self {
            Self::Unset(name) => (
                format!("{name} is not set"),
                format!("set it, or give a default: ${{{name}:-DEFAULT}}; a literal ${{ is written $${{"),
            ),
            Self::NotClosed => {
                ("`${` has no `}`".to_owned(), "write ${NAME}; a literal ${ is written $${".to_owned())
            }
            Self::BadName(name) => (
                format!("`{name}` is not a variable's name"),
                "names are letters, digits and _; a literal ${ is written $${".to_owned(),
            ),
        }
    }
}

/// Expands `${VAR}` and `${VAR:-default}` (used if VAR is unset or empty, as in a shell); `$${` is a literal `${`.
/// `None` if there is nothing to expand. Values are not expanded again.
fn expand(text: &str, env: Env<'_>) -> Result<Option<String>, ExpandError> {
    if !text.contains("${") {
        return Ok(None);
    }
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("${") {
        if rest[..at].ends_with('$') {
            out += &rest[..at];
            out.push('{');
            rest = &rest[at + 2..];
            continue;
        }
        out += &rest[..at];
        let inside = &rest[at + 2..];
        let end = inside.find('}').ok_or(ExpandError::NotClosed)?;
        let (name, default) = match inside[..end].split_once(":-") {
            Some((name, default)) => (name, Some(default)),
            None => (&inside[..end], None),
        };
        if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
            return Err(ExpandError::BadName(name.to_owned()));
        }
        match (env(name), default) {
            (Some(value), Some(default)) if value.is_empty() => out += default,
            (Some(value), _) => out += &value,
            (None, Some(default)) => out += default,
            (None, None) => return Err(ExpandError::Unset(name.to_owned())),
        }
        rest = &inside[end + 1..];
    }
    out += rest;
    Ok(Some(out))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(name: &str) -> Option<String> {
        match name {
            "HOST" => Some("db".to_owned()),
            "EMPTY" => Some(String::new()),
            "TRICK" => Some("${HOST}".to_owned()),
            _ => None,
        }
    }

    #[test]
    fn expands_variables() {
        for (text, expected) in [
            ("${HOST}:80", "db:80"),
            ("${NONE:-x}", "x"),
            ("${NONE:-}", ""),
            ("${EMPTY:-x}${EMPTY}", "x"),
            ("$${HOST}", "${HOST}"),
            ("a$${b${HOST}c", "a${bdbc"),
            ("${TRICK}", "${HOST}"),
            ("$ ${HOST} $", "$ db $"),
        ] {
            assert_eq!(expand(text, &env), Ok(Some(expected.to_owned())), "{text}");
        }
        assert_eq!(expand("plain $HOST", &env), Ok(None));
        assert_eq!(expand("${NONE}", &env), Err(ExpandError::Unset("NONE".to_owned())));
        assert_eq!(expand("${HOST", &env), Err(ExpandError::NotClosed));
        assert_eq!(expand("${a b}", &env), Err(ExpandError::BadName("a b".to_owned())));
    }

    #[test]
    fn every_value_has_its_place() {
        let text = "[a]\nb = [1, 'x']\n";
        let mut problems = Problems::default();
        let root = parse(text, 0, &env, &mut problems);
        let item = root.get("a").and_then(|a| a.get("b")).and_then(|b| b.item(1)).unwrap();
        assert_eq!(item.as_str(), Some("x"));
        assert_eq!(&text[item.origin.unwrap().span()], "'x'");
        assert_eq!(&text[root.get("a").unwrap().origin.unwrap().span()], "[a]");
        assert!(!problems.has_errors());
    }

    #[test]
    fn nesting_and_numbers_are_bounded() {
        let deep = format!("a = {}{}", "[".repeat(60), "]".repeat(60));
        for (text, message) in [
            (deep.as_str(), "tables and arrays are nested too deep"),
            ("a = 99999999999999999999", "this number is too large"),
        ] {
            let mut problems = Problems::default();
            parse(text, 0, &env, &mut problems);
            let found = problems.finish(Default::default());
            assert_eq!(found.problems[0].message, message);
        }
        let mut problems = Problems::default();
        parse("a = 1\nb = \nc = \n", 0, &env, &mut problems);
        assert_eq!(problems.finish(Default::default()).count(), (2, 0), "every syntax error is reported");
    }
}
