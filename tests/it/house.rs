//! Rules of the house that no compiler checks.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// Words of a private language: (word or phrase, what to say instead). They match in any case, as whole words, in prose
/// and inside identifiers (`is_told`, `ToldTry`). docs/glossary.md has the vocabulary.
const BANNED_WORDS: &[(&str, &str)] = &[
    // Pronouns for things that have a name.
    ("nobody", "name it: no client, no request, no endpoint; `nothing` for a port without a listener"),
    ("somebody", "name it: another client, another process"),
    ("ours", "name it: of this proxy, of this project"),
    ("theirs", "name it: of the peer, of the other proxy"),
    ("whoever", "name it: the client that …, a request that …"),
    ("whom", "name it: the upstream, the endpoint, the peer; the type of a named upstream is `Destination`"),
    // Telemetry, policy, trust, HTTP: the field has a word.
    ("teller", "reporter, recorder"),
    ("told", "reported, recorded, logged, notified; `distinguished` for `told apart`"),
    ("heed", "follow, honour, respect"),
    ("heeds", "follows, honours, respects"),
    ("proven", "verified"),
    ("room", "buffer, pool, free list, slab; capacity, slot"),
    ("wish", "connection option, setting, request"),
    ("believed", "verified, trusted, accepted"),
    ("believes", "verifies, trusts, accepts"),
    ("squeeze", "CPU throttling, memory pressure: what it is"),
    ("bell", "notify, waker"),
    ("what it was worth", "the severity, the outcome"),
    ("asked for leave", "requested a permit"),
    ("ran out of time", "timed out; the deadline expired"),
    ("runs out of time", "times out; the deadline expires"),
    ("way in", "entry point, listener"),
    ("ways in", "entry points, listeners"),
    // Idiom.
    ("to the byte", "byte for byte, unchanged"),
    ("comes to", "results in, reaches, is"),
    ("is woken", "is notified, is polled"),
    ("lends", "allows, grants"),
    ("the dead", "failed, closed or unreachable: what it is"),
];

/// Names that say nothing about their type or module: (name, what to name it for). They match the whole name in a
/// declaration (`struct`, `enum`, `trait`, `type`, `mod`).
const BANNED_NAMES: &[(&str, &str)] = &[
    ("Absence", "the ejection"),
    ("Anyone", "the peer pattern or its default"),
    ("Asked", "the request or query"),
    ("Begun", "the state that has begun"),
    ("Held", "the permit, slot or guard"),
    ("Met", "the result of discovery"),
    ("Over", "the event: limit exceeded, timeout, end of stream"),
    ("Room", "the buffer, pool, free list or slab"),
    ("SoFar", "the progress or partial result"),
    ("Spent", "the exhausted budget or attempts"),
    ("Taken", "the permit or slot"),
    ("Tried", "the attempt"),
    ("Try", "the attempt"),
    ("kept", "the buffer"),
    ("leaving", "the drain"),
    ("room", "the buffer, pool, free list or slab"),
    ("spent", "the exhausted budget or attempts"),
    ("spoken", "the protocol"),
];

/// Where a banned word is the right one: (file, word, why). An entry without an occurrence fails the test.
const ALLOWED: &[(&str, &str, &str)] =
    &[("docs/glossary.md", "way in", "no phrase: the label `way`, in status, metrics and spans")];

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

/// The pages of `docs/`, and these of the root.
fn pages(root: &Path, others: &[&str]) -> Vec<PathBuf> {
    let pages = fs::read_dir(root.join("docs")).expect("docs").flatten().map(|entry| entry.path());
    let pages = pages.chain(others.iter().map(|name| root.join(name)));
    pages.filter(|page| page.extension().is_some_and(|extension| extension == "md")).collect()
}

/// The words of a line in lower case, those inside identifiers too: `is_told` and `IsTold` are two words each.
fn words(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut after_lower_case = false;
    for character in line.chars() {
        if !character.is_alphanumeric() || (after_lower_case && character.is_uppercase()) {
            words.push(String::new());
        }
        after_lower_case = character.is_lowercase();
        if let Some(word) = words.last_mut().filter(|_| character.is_alphanumeric()) {
            word.extend(character.to_lowercase());
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

/// The name of the type or module that a line declares.
fn declared_name(line: &str) -> Option<&str> {
    if line.trim_start().starts_with("//") {
        return None;
    }
    let tokens = line.split(|character: char| !character.is_alphanumeric() && character != '_');
    let mut tokens = tokens.filter(|token| !token.is_empty());
    let keyword = tokens.find(|token| !["pub", "crate", "super", "self", "in"].contains(token))?;
    if ["struct", "enum", "trait", "type", "mod"].contains(&keyword) { tokens.next() } else { None }
}

/// Decisions get clock and randomness as arguments, so that they can be tested over virtual hours.
#[test]
fn decisions_read_no_clock_and_no_random_numbers() {
    let words = ["Instant::now", "SystemTime::now", ".elapsed()", "thread_rng", "async fn", "tokio::"];
    for file in rust_files(&source().join("resilience")) {
        let text = fs::read_to_string(&file).expect("readable");
        if file.to_string_lossy().ends_with("tests.rs") {
            continue;
        }
        // Tests need some instant to begin at; they are at the end of a file.
        for (number, line) in text.lines().take_while(|line| !line.contains("#[cfg(test)]")).enumerate() {
            let code = line.split("//").next().unwrap_or("");
            if let Some(word) = words.iter().find(|word| code.contains(**word)) {
                panic!("{}:{}: {word}", file.display(), number + 1);
            }
        }
    }
}

/// Links and paths in the documentation are valid.
#[test]
fn files_named_in_the_documentation_exist() {
    let root = source().parent().expect("the project").to_path_buf();
    let others = ["README.md", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"];
    let mut named = 0;
    for page in pages(&root, &others) {
        let text = fs::read_to_string(&page).expect("readable");
        let folder = page.parent().expect("a folder");
        // Links are relative to the page, paths in back-ticks to the project.
        let links = text.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next());
        let links =
            links.filter(|link| !link.is_empty() && !link.contains("://")).map(|link| folder.join(link));
        let quoted = text.split('`').filter(|quoted| {
            let folders = ["src/", "docs/", "tests/", "config/", "benches/", "k8s/", ".ci/"];
            let path = quoted.bytes().all(|b| b.is_ascii_alphanumeric() || b"._/-".contains(&b));
            path && folders.iter().any(|folder| quoted.starts_with(folder))
        });
        for path in links.chain(quoted.map(|quoted| root.join(quoted))) {
            assert!(path.exists(), "{} names {}, which is not there", page.display(), path.display());
            named += 1;
        }
    }
    assert!(named > 80, "only {named} were found: does the test read the pages correctly?");
}

/// The image's compiler reads the learned profile: it is the one that recorded it, and the base image cannot change unseen.
#[test]
fn the_image_is_built_by_the_compiler_that_recorded_the_profile() {
    let root = source().parent().expect("the project").to_path_buf();
    let read = |name: &str| fs::read_to_string(root.join(name)).expect("readable");
    let measured: serde_json::Value = serde_json::from_str(&read("benches/instructions.json")).expect("JSON");
    let version =
        measured["rustc"].as_str().and_then(|rustc| rustc.strip_prefix("rustc ")).expect("a version");
    let dockerfile = read("Dockerfile");
    let base = dockerfile.lines().find(|line| line.starts_with("FROM ")).expect("a base image");
    let pinned = format!(" rust:{version}-slim-bookworm@sha256:");
    assert!(
        base.contains(&pinned),
        "the Dockerfile begins with `{base}`, but the profile is that of rustc {version}"
    );
}

/// An engineer who knows Envoy, HAProxy or Linkerd understands names, comments and pages at first reading.
#[test]
fn source_and_documentation_use_the_common_vocabulary() {
    let root = source().parent().expect("the project").to_path_buf();
    let phrases: Vec<Vec<String>> = BANNED_WORDS.iter().map(|(word, _)| words(word)).collect();
    let (mut found, mut used) = (Vec::new(), BTreeSet::new());
    let mut report = |file: &str, number: usize, word: &str, instead: &str| {
        let allowed = ALLOWED.iter().position(|entry| (entry.0, entry.1) == (file, word));
        match allowed {
            Some(entry) => {
                used.insert(entry);
            }
            None => found.push(format!("{file}:{}: `{word}`: {instead}", number + 1)),
        }
    };
    let pages = pages(&root, &["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"]);
    for file in rust_files(&source()).into_iter().chain(pages) {
        let text = fs::read_to_string(&file).expect("readable");
        let name = file.strip_prefix(&root).expect("a file of the project").to_string_lossy();
        for (number, line) in text.lines().enumerate() {
            let in_line = words(line);
            for (phrase, (word, instead)) in phrases.iter().zip(BANNED_WORDS) {
                if in_line.windows(phrase.len()).any(|window| window == phrase.as_slice()) {
                    report(&name, number, word, instead);
                }
            }
            let declared = declared_name(line).filter(|_| name.ends_with(".rs"));
            let banned = BANNED_NAMES.iter().find(|(banned, _)| declared == Some(*banned));
            if let Some((banned, instead)) = banned {
                report(&name, number, banned, instead);
            }
        }
    }
    assert!(
        found.is_empty(),
        "{} words outside the common vocabulary (say instead):\n{}",
        found.len(),
        found.join("\n")
    );
    for (entry, (file, word, _)) in ALLOWED.iter().enumerate() {
        assert!(used.contains(&entry), "{file} has no `{word}` any more: remove it from ALLOWED");
    }
}

#[test]
fn the_vocabulary_check_finds_words_inside_identifiers() {
    let expected = ["fn", "is", "told", "whom", "told", "try", "so", "far"];
    assert_eq!(words("fn is_told(whom: ToldTry) // So far."), expected);
    assert_eq!(words("// HTTP/2's PINGs"), ["http", "2", "s", "pings"]);
    assert_eq!(declared_name("    pub(super) struct SoFar<'a> {"), Some("SoFar"));
    assert_eq!(declared_name("mod room;"), Some("room"));
    assert_eq!(declared_name("/// The type Told"), None);
    assert_eq!(declared_name("let told = 1;"), None);
}

/// The parser that the request corpus relies on is itself strict.
#[test]
fn the_strict_reader_rejects_ambiguous_messages() {
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
