//! What is wrong with a configuration, where, and what to write instead.

use std::fmt;

use annotate_snippets::{AnnotationKind, Level, Renderer, Snippet, normalize_untrusted_str};
use serde_json::json;

use super::source::{Origin, Sources};
use crate::redact;

/// More problems than this help nobody; the rest is counted only.
pub const MAX_PROBLEMS: usize = 100;
/// A shorter value of the environment would also be found where it is no secret.
const SHORTEST_SECRET: usize = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// The configuration cannot be used.
    Error,
    /// It can, but probably does not do what was meant.
    Warning,
}

/// One problem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub severity: Severity,
    /// One line: what is wrong.
    pub message: String,
    /// Where; `None` where it is about no place in a file.
    pub origin: Option<Origin>,
    /// Said at the place.
    pub label: String,
    /// What to do about it.
    pub help: Option<String>,
    /// Another place that has to do with it.
    pub related: Option<(Origin, String)>,
    /// Something is missing, which may stand in what could not be read.
    of_absence: bool,
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
            of_absence: false,
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

    /// Of something that is missing: told only where all that is written could be read.
    pub(super) fn of_absence(self) -> Self {
        Self { of_absence: true, ..self }
    }

    pub fn related(self, origin: Option<Origin>, text: impl Into<String>) -> Self {
        Self { related: origin.map(|origin| (origin, text.into())), ..self }
    }
}

/// Collects problems, each place and message once.
#[derive(Debug, Default)]
pub(super) struct Problems {
    list: Vec<Problem>,
    left_out: usize,
    /// Something that is written could not be read.
    incomplete: bool,
    /// Where the syntax of a file was first left, by the file's index.
    broken: Vec<(usize, usize)>,
    /// See [`Problems::conceal`].
    concealed: Vec<String>,
}

impl Problems {
    /// Something could not be read, which is told of as a problem of its own: what seems to be missing from now on
    /// may stand there.
    pub fn incomplete(&mut self) {
        self.incomplete = true;
    }

    /// The syntax of a file holds up to this byte only: what it seems to say behind it is not judged.
    pub fn broken_at(&mut self, file: usize, byte: usize) {
        self.incomplete = true;
        self.broken.push((file, byte));
    }

    fn is_consequence(&self, problem: &Problem) -> bool {
        let behind = |origin: Origin| {
            self.broken.iter().any(|(file, byte)| *file == origin.file() && *byte <= origin.span().start)
        };
        (problem.of_absence && self.incomplete) || problem.origin.is_some_and(behind)
    }

    /// A value that was filled in from the environment and is a credential by the name of its variable: no message shows
    /// it.
    pub fn conceal(&mut self, value: String) {
        if value.len() >= SHORTEST_SECRET && !self.concealed.contains(&value) {
            self.concealed.push(value);
        }
    }

    pub fn concealed(&self) -> &[String] {
        &self.concealed
    }

    fn shown(&self, text: String) -> String {
        redact::without(&self.concealed, redact::without_any_userinfo(&text).into_owned())
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
            self.left_out += 1;
        }
    }

    pub fn is_full(&self) -> bool {
        self.list.len() >= MAX_PROBLEMS
    }

    pub fn has_errors(&self) -> bool {
        self.list.iter().any(|problem| problem.severity == Severity::Error)
    }

    /// In the order of the files, errors and warnings mixed as they come.
    pub fn finish(mut self, sources: Sources) -> Diagnostics {
        self.list.sort_by_key(|problem| problem.origin);
        Diagnostics { problems: self.list, left_out: self.left_out, sources }
    }
}

/// All problems of a configuration, with the text they are about.
#[derive(Clone, Debug, Default)]
pub struct Diagnostics {
    pub problems: Vec<Problem>,
    /// How many more there were than are listed.
    pub left_out: usize,
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

    /// How many errors and how many warnings are listed.
    pub fn count(&self) -> (usize, usize) {
        let errors = self.problems.iter().filter(|problem| problem.severity == Severity::Error).count();
        (errors, self.problems.len() - errors)
    }

    /// Every problem with file, line, column, the offending snippet and a suggestion; an empty line between.
    pub fn render(&self, colour: bool) -> String {
        let renderer = if colour { Renderer::styled() } else { Renderer::plain() };
        let mut out = String::new();
        for problem in &self.problems {
            out += &self.render_one(problem, &renderer);
            out += "\n\n";
        }
        if self.left_out > 0 {
            out += &format!("and {} more\n", self.left_out);
        }
        out
    }

    /// One line for each problem: `file:line:column: error: message`. For logs and the admin page.
    pub fn lines(&self) -> Vec<String> {
        let line = |problem: &Problem| {
            let place = problem.origin.and_then(|origin| self.sources.place(origin));
            let place = place.map_or(String::new(), |p| format!("{}:{}:{}: ", p.file, p.line, p.column));
            let label = if problem.label.is_empty() { String::new() } else { format!(": {}", problem.label) };
            format!("{place}{}: {}{label}", severity_name(problem.severity), problem.message)
        };
        self.problems.iter().map(line).collect()
    }

    /// For programs.
    pub fn to_json(&self) -> serde_json::Value {
        let one = |problem: &Problem| {
            let place = problem.origin.and_then(|origin| self.sources.place(origin));
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
        // With no line to show it at, the label ends the title.
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

    /// The line of the place alone: rendering then costs the same however long the file is.
    fn snippet(
        &self,
        origin: Origin,
        label: &str,
        kind: AnnotationKind,
    ) -> Option<Snippet<'_, annotate_snippets::Annotation<'_>>> {
        let source = self.sources.0.get(origin.file())?;
        let place = self.sources.place(origin)?;
        let span = origin.span();
        let line_start = source.text[..span.start].rfind('\n').map_or(0, |at| at + 1);
        let line_end = source.text[span.start..].find('\n').map_or(source.text.len(), |at| span.start + at);
        let marked = span.start - line_start..span.end.clamp(span.start, line_end) - line_start;
        let label = (!label.is_empty()).then(|| normalize_untrusted_str(label));
        Some(
            Snippet::source(redact::line(&source.text[line_start..line_end]))
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

/// The nearest of what could have been meant, where one is near enough.
pub fn did_you_mean<'a>(written: &str, valid: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    valid
        .into_iter()
        .map(|name| (strsim::jaro_winkler(written, name), name))
        .filter(|(likeness, _)| *likeness > 0.8)
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, name)| name)
}
