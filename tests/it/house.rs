//! Rules of the house that no compiler checks.

use std::{
    fs,
    path::{Path, PathBuf},
};

fn rust_files(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).expect("a directory").flatten() {
        let path = entry.path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// Decisions get clock and randomness as arguments, so that they can be tested over virtual hours.
#[test]
fn decisions_read_no_clock_and_draw_no_lots() {
    let words = ["Instant::now", "SystemTime::now", ".elapsed()", "thread_rng", "async fn", "tokio::"];
    for file in rust_files(&source().join("resilience")) {
        let text = fs::read_to_string(&file).expect("readable");
        if file.to_string_lossy().ends_with("tests.rs") {
            continue;
        }
        // Tests need some instant to begin at; they stand at a file's end.
        for (number, line) in text.lines().take_while(|line| !line.contains("#[cfg(test)]")).enumerate() {
            let code = line.split("//").next().unwrap_or("");
            if let Some(word) = words.iter().find(|word| code.contains(**word)) {
                panic!("{}:{}: {word}", file.display(), number + 1);
            }
        }
    }
}

/// A map that names rooms which are not there misleads.
#[test]
fn what_the_documentation_names_is_there() {
    let root = source().parent().expect("the project").to_path_buf();
    let pages = fs::read_dir(root.join("docs")).expect("docs").flatten().map(|entry| entry.path());
    let others = ["README.md", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"];
    let pages = pages.chain(others.map(|name| root.join(name)));
    let mut named = 0;
    for page in pages.filter(|page| page.extension().is_some_and(|extension| extension == "md")) {
        let text = fs::read_to_string(&page).expect("readable");
        let folder = page.parent().expect("a folder");
        // Links, which are read from where the page is, and paths in back-ticks, which are the project's.
        let links = text.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next());
        let links =
            links.filter(|link| !link.is_empty() && !link.contains("://")).map(|link| folder.join(link));
        let quoted = text.split('`').filter(|quoted| {
            let rooms = ["src/", "docs/", "tests/", "config/", "benches/", "k8s/", ".ci/"];
            let path = quoted.bytes().all(|b| b.is_ascii_alphanumeric() || b"._/-".contains(&b));
            path && rooms.iter().any(|room| quoted.starts_with(room))
        });
        for path in links.chain(quoted.map(|quoted| root.join(quoted))) {
            assert!(path.exists(), "{} names {}, which is not there", page.display(), path.display());
            named += 1;
        }
    }
    assert!(named > 80, "only {named} were found: is the test looking right?");
}

/// The props by which the corpus judges are themselves strict.
#[test]
fn the_strict_reader_takes_nothing_ambiguous() {
    use crate::support::strict::{Progress, request};
    let complete = |fields: &str, body: &str| {
        let raw = format!("POST / HTTP/1.1\r\nHost: a\r\n{fields}\r\n{body}");
        matches!(request(raw.as_bytes()), Progress::Complete(_, used) if used == raw.len())
    };
    assert!(complete("Content-Length: 5\r\n", "hello"));
    assert!(complete("Transfer-Encoding: chunked\r\n", "5\r\nhello\r\n0\r\nT: 1\r\n\r\n"));
    for (fields, body) in [
        ("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", "0\r\n\r\n"),
        ("Content-Length: 5\r\nContent-Length: 5\r\n", "hello"),
        ("Content-Length: +5\r\n", "hello"),
        ("Host: b\r\n", ""),
        ("X: 1\n", ""),
        ("X : 1\r\n", ""),
        ("X: 1\r\n 2\r\n", ""),
        ("X: \0\r\n", ""),
        ("Transfer-Encoding: chunked\r\n", "5;a\r\nhello\r\n0\r\n\r\n"),
    ] {
        assert!(!complete(fields, body), "{fields:?} {body:?}");
    }
}
