//! The output of the demo, and the count of failed checks.

use std::{fmt::Display, io::IsTerminal};

use super::http::Reply;

#[derive(Debug)]
pub struct Story {
    colour: bool,
    scene: u32,
    checks: u32,
    failed: u32,
}

impl Story {
    pub fn new() -> Self {
        Self { colour: std::io::stdout().is_terminal(), scene: 0, checks: 0, failed: 0 }
    }

    pub fn scene(&mut self, title: &str) {
        self.scene += 1;
        println!("\n{}", self.paint("1", format!("{}. {title}", self.scene)));
    }

    pub fn print(&self, text: impl Display) {
        println!("   {text}");
    }

    /// Prints a result, and whether it is the expected one.
    pub fn check(&mut self, holds: bool, text: impl Display) {
        self.checks += 1;
        if holds {
            println!("   {} {text}", self.paint("32", "✓"));
        } else {
            self.failed += 1;
            println!("   {} {text}", self.paint("31", "✗ not as expected:"));
        }
    }

    /// Prints the parts of a response that explain a failure.
    pub fn show(&self, reply: &Reply) {
        println!("     {}", self.paint("33", reply.status));
        if let Some(field) = reply.headers.get("proxy-status").and_then(|value| value.to_str().ok()) {
            println!("     {}", self.paint("2", format!("proxy-status: {field}")));
        }
        let problem: serde_json::Value = serde_json::from_slice(&reply.body).unwrap_or_default();
        for member in ["title", "cause", "detail", "upstream", "attempts"] {
            if let Some(value) = problem.get(member) {
                println!("     {}", self.paint("2", format!("{member}: {value}")));
            }
        }
    }

    /// Prints what `outrigger status` shows.
    pub fn show_status(&self, text: impl Display) {
        println!("     {}", self.paint("2", format!("outrigger status: {text}")));
    }

    /// Prints the summary; returns whether all checks passed.
    pub fn summary(&self) -> bool {
        let passed = self.checks - self.failed;
        println!("\n{}", self.paint("1", format!("{passed} of {} checks passed", self.checks)));
        self.failed == 0
    }

    fn paint(&self, code: &str, text: impl Display) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_string() }
    }
}

/// The cause in a response that the proxy made itself; `None` for a response of a service.
pub fn cause(reply: &Reply) -> Option<String> {
    let problem: serde_json::Value = serde_json::from_slice(&reply.body).ok()?;
    problem.get("cause")?.as_str().map(ToOwned::to_owned)
}
