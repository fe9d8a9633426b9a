//! Configuration diagnostics: what is wrong, where, and what to write instead.

use std::fmt;

use annotate_snippets::{AnnotationKind, Level, Renderer, Snippet, normalize_untrusted_str};
use serde_json::json;

use super::source::{Origin, Sources};
use crate::redact;

/// The most problems that are listed; further ones are only counted.
pub const MAX_PROBLEMS: usize = 100;
/// Shorter values of the environment are not concealed: they also occur in texts that are no secrets.
const SHORTEST_SECRET: usize = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// The configuration cannot be used.
    Error,
    /// It can be used, but probably does not do what was intended.
    Warning,
}

/// One problem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub severity: Severity,
    /// One line: what is wrong.
    pub message: String,
    /// Where; `None` if it concerns no place in a file.
    pub origin: Option<Origin>,
    /// Shown at the place.
    pub label: String,
    /// What to do about it.
    pub help: Option<String>,
    /// Another place that is involved.
    pub related: Option<(Origin, String)>,
    /// Something is missing, which may be in a part that could not be read.
    about_missing: bool,
}

impl Problem {
    pub fn error(origin: Option<Origin>, message: impl Into<String>) -> Self {
        Self {
            severity: Severity::Error,
            message: message.into(),
            origin,
            label: String::new(),
            help: None,
            related: None,
            about_missing: false,
        }
    }

    pub fn warning(origin: Option<Origin>, message: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, ..Self::error(origin, message) }
    }

    pub fn label(self, label: impl Into<String>) -> Self {
        Self { label: label.into(), ..self }
    }

    pub fn help(self, help: impl Into<String>) -> Self {
        Self { help: Some(help.into()), ..self }
    }

    /// Marks a problem about something missing. It is reported only if everything could be read.
    pub(super) fn about_missing(self) -> Self {
        Self { about_missing: true, ..self }
    }

    pub fn related(self, origin: Option<Origin>, text: impl Into<String>) -> Self {
        Self { related: origin.map(|origin| (origin, text.into())), ..self }
    }
}

/// Collects problems, each place and message once.
#[derive(Debug, Default)]
pub(super) struct Problems {
    list: Vec<Problem>,
    omitted: usize,
    /// Part of the configuration could not be read.
    incomplete: bool,
    /// The first syntax error of each broken file, by the file's index.
    broken: Vec<(usize, usize)>,
    /// See [`Problems::add_secret`].
    secrets: Vec<String>,
}

impl Problems {
    /// Part of the configuration could not be read, which is a problem of its own. What seems to be missing from now on
    /// may be in that part.
    pub fn mark_incomplete(&mut self) {
        self.incomplete = true;
    }

    /// The first syntax error of a file is at this byte. Later parts of the file are not checked.
    pub fn mark_broken(&mut self, file: usize, byte: usize) {
        self.incomplete = true;
        self.broken.push((file, byte));
    }

    fn is_consequence(&self, problem: &Problem) -> bool {
        let is_after_syntax_error = |origin: Origin| {
            self.broken
                .iter()
                .any(|(file, byte)| *file == origin.watched_file() && *byte <= origin.span().start)
        };
        (problem.about_missing && self.incomplete) || problem.origin.is_some_and(is_after_syntax_error)
    }

    /// Registers a value from the environment that is a credential by its variable's name. No message shows it.
    pub fn add_secret(&mut self, value: String) {
        if value.len() >= SHORTEST_SECRET && !self.secrets.contains(&value) {
            self.secrets.push(value);
        }
    }

    pub fn secrets(&self) -> &[String] {
        &self.secrets
    }

    fn shown(&self, text: String) -> String {
        redact::redact_secrets(&self.secrets, redact::redact_any_userinfo(&text).into_owned())
    }

    pub fn push(&mut self, problem: Problem) {
        if self.is_consequence(&problem) {
            return;
        }
        let Problem { message, label, help, related, .. } = problem;
        let problem = Problem {
            message: self.shown(message),
            label: self.shown(label),
            help: help.map(|help| self.shown(help)),
            related: related.map(|(origin, text)| (origin, self.shown(text))),
            ..problem
        };
        let known = |other: &Problem| other.origin == problem.origin && other.message == problem.message;
        if self.list.iter().any(known) {
            return;
        }
        if self.list.len() < MAX_PROBLEMS {
            self.list.push(problem);
        } else {
            self.omitted += 1;
        }
    }

    pub fn is_full(&self) -> bool {
        self.list.len() >= MAX_PROBLEMS
    }

    pub fn has_errors(&self) -> bool {
        self.list.iter().any(|problem| problem.severity == Severity::Error)
    }

    /// Sorted by file and position, errors and warnings together.
    pub fn finish(mut self, sources: Sources) -> Diagnostics {
        self.list.sort_by_key(|problem| problem.origin);
        Diagnostics { problems: self.list, omitted: self.omitted, sources }
    }
}

/// All problems of a configuration, with its text.
#[derive(Clone, Debug, Default)]
pub struct Diagnostics {
    pub problems: Vec<Problem>,
    /// How many further problems are not listed.
    pub omitted: usize,
    pub sources: Sources,
}

impl std::error::Error for Diagnostics {}

/// Plain text, for logs.
impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render(false))
    }
}

impl Diagnostics {
    pub fn is_empty(&self) -> bool {
        self.problems.is_empty()
    }

    /// The number of listed errors and of listed warnings.
    pub fn count(&self) -> (usize, usize) {
        let errors = self.problems.iter().filter(|problem| problem.severity == Severity::Error).count();
        (errors, self.problems.len() - errors)
    }

    /// Every problem with file, line, column, the offending snippet and a suggestion, separated by empty lines.
    pub fn render(&self, colour: bool) -> String {
        let renderer = if colour { Renderer::styled() } else { Renderer::plain() };
        let mut out = String::new();
        for problem in &self.problems {
            out += &self.render_one(problem, &renderer);
            out += "\n\n";
        }
        if self.omitted > 0 {
            out += &format!("and {} more\n", self.omitted);
        }
        out
    }

    /// One line for each problem: `file:line:column: error: message`. For logs and the admin page.
    pub fn lines(&self) -> Vec<String> {
        let line = |problem: &Problem| {
            let place = problem.origin.and_then(|origin| self.sources.position(origin));
            let place = place.map_or(String::new(), |p| format!("{}:{}:{}: ", p.file, p.line, p.column));
            let label = if problem.label.is_empty() { String::new() } else { format!(": {}", problem.label) };
            format!("{place}{}: {}{label}", severity_name(problem.severity), problem.message)
        };
        self.problems.iter().map(line).collect()
    }

    /// As JSON, for programs.
    pub fn to_json(&self) -> serde_json::Value {
        let one = |problem: &Problem| {
            let place = problem.origin.and_then(|origin| self.sources.position(origin));
            json!({
                "severity": severity_name(problem.severity),
                "message": problem.message,
                "file": place.as_ref().map(|place| &place.file),
                "line": place.as_ref().map(|place| place.line),
                "column": place.as_ref().map(|place| place.column),
                "detail": problem.label,
                "help": problem.help,
            })
        };
        self.problems.iter().map(one).collect()
    }

    fn render_one(&self, problem: &Problem, renderer: &Renderer) -> String {
        let level = match problem.severity {
            Severity::Error => Level::ERROR,
            Severity::Warning => Level::WARNING,
        };
        // Without a line to show it at, the label is appended to the title.
        let placed = problem.origin.is_some() || problem.label.is_empty();
        let title =
            if placed { problem.message.clone() } else { format!("{}: {}", problem.message, problem.label) };
        let mut group = level.primary_title(normalize_untrusted_str(&title)).elements(
            problem.origin.and_then(|at| self.snippet(at, &problem.label, AnnotationKind::Primary)),
        );
        if let Some((at, label)) = &problem.related {
            group = group.elements(self.snippet(*at, label, AnnotationKind::Context));
        }
        if let Some(help) = &problem.help {
            group = group.element(Level::HELP.message(normalize_untrusted_str(help)));
        }
        renderer.render(&[group])
    }

    /// Only the line of the place, so that the cost of rendering does not depend on the length of the file.
    fn snippet(
        &self,
        origin: Origin,
        label: &str,
        kind: AnnotationKind,
    ) -> Option<Snippet<'_, annotate_snippets::Annotation<'_>>> {
        let source = self.sources.0.get(origin.watched_file())?;
        let place = self.sources.position(origin)?;
        let span = origin.span();
        let line_start = source.text[..span.start].rfind('\n').map_or(0, |at| at + 1);
        let line_end = source.text[span.start..].find('\n').map_or(source.text.len(), |at| span.start + at);
        let marked = span.start - line_start..span.end.clamp(span.start, line_end) - line_start;
        let label = (!label.is_empty()).then(|| normalize_untrusted_str(label));
        Some(
            Snippet::source(redact::redact_line(&source.text[line_start..line_end]))
                .line_start(place.line)
                .path(place.file)
                .annotation(kind.span(marked).label(label)),
        )
    }
}

fn severity_name(severity: Severity) -> &'static str {
    match severity {
        Severity::Error => "error",
        Severity::Warning => "warning",
    }
}

/// The valid name that is most similar, if one is similar enough.
pub fn did_you_mean<'a>(written: &str, valid: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    valid
        .into_iter()
        .map(|name| (strsim::jaro_winkler(written, name), name))
        .filter(|(likeness, _)| *likeness > 0.8)
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, name)| name)
}
