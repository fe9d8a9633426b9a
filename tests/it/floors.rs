//! The order of the modules: one imports only what is below it, so there is no circle.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// The top-level modules of `src/`, the lowest first; each line may import from the lines above it. `src/lib.rs`
/// describes them.
const FLOORS: &[&[&str]] = &[
    &["platform"],
    &[
        "units",
        "unix_time",
        "rng",
        "redact",
        "descriptors",
        "watch",
        "cause",
        "header_names",
        "url_path",
        "net",
    ],
    &["field_set", "trace_context", "dns", "delivery_id"],
    &["durations", "http1"],
    &["http2", "resilience", "authorization"],
    &["queue"],
    &["config", "cache"],
    &["fetch", "redirect"],
    &["identity"],
    &["upstream"],
    &["discovery"],
    &["model"],
    &["telemetry"],
    &["proxy"],
    &["runtime"],
    &["admin", "kubernetes"],
    &["cli"],
];

fn floor_of(module: &str) -> Option<usize> {
    FLOORS.iter().position(|floor| floor.contains(&module))
}

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
    files.sort();
    files
}

/// Tests may use what is above them: they start whole proxies.
fn is_test(path: &Path) -> bool {
    let name = path.file_stem().and_then(|name| name.to_str()).unwrap_or_default();
    name == "tests" || name.ends_with("_tests") || name.starts_with("test_")
}

/// The code without comments and without the test module at its end, each line as it was.
fn code(text: &str) -> Vec<&str> {
    let tests = text.find("#[cfg(test)]\nmod tests {").unwrap_or(text.len());
    text[..tests].lines().map(|line| line.split("//").next().unwrap_or_default()).collect()
}

/// The first segments after each `crate::`, with line numbers; a group in braces has one for each member.
fn imports(lines: &[&str]) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    // The depth of braces inside `crate::{…}`; 0 outside.
    let mut depth = 0;
    let mut at_member = false;
    for (number, line) in lines.iter().enumerate() {
        let mut rest = *line;
        while !rest.is_empty() {
            if depth == 0 {
                let Some(at) = rest.find("crate::") else { break };
                rest = &rest[at + "crate::".len()..];
                if let Some(group) = rest.strip_prefix('{') {
                    (rest, depth, at_member) = (group, 1, true);
                    continue;
                }
                found.push((number + 1, first_segment(rest).to_owned()));
                continue;
            }
            let character = rest.chars().next().unwrap_or_default();
            match character {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 1 => at_member = true,
                _ if at_member && (character.is_alphabetic() || character == '_') => {
                    at_member = false;
                    found.push((number + 1, first_segment(rest).to_owned()));
                }
                _ => {}
            }
            rest = &rest[character.len_utf8()..];
        }
    }
    found
}

fn first_segment(path: &str) -> &str {
    let end = path.find(|character: char| !character.is_alphanumeric() && character != '_');
    &path[..end.unwrap_or(path.len())]
}

#[test]
fn no_module_imports_from_a_floor_above_it() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut wrong, mut checked) = (Vec::new(), 0);
    for path in rust_files(&source) {
        let relative = path.strip_prefix(&source).expect("it is below src");
        let first =
            relative.components().next().and_then(|part| part.as_os_str().to_str()).unwrap_or_default();
        let module = first.trim_end_matches(".rs");
        if matches!(module, "lib" | "main") || is_test(&path) {
            continue;
        }
        let Some(own) = floor_of(module) else {
            wrong.push(format!("src/{}: the module `{module}` is on no floor", relative.display()));
            continue;
        };
        let text = fs::read_to_string(&path).expect("a source file");
        for (line, target) in imports(&code(&text)) {
            // A macro that is exported at the root has no floor: `text_value`, of `units`.
            let Some(floor) = floor_of(&target).filter(|_| target != module) else { continue };
            checked += 1;
            if floor >= own {
                wrong.push(format!("src/{}:{line}: `{module}` imports from `{target}`", relative.display()));
            }
        }
    }
    assert!(checked > 300, "only {checked} imports were found");
    assert!(wrong.is_empty(), "imports that point upwards or sideways:\n{}", wrong.join("\n"));
}

#[test]
fn imports_are_found_in_groups_and_in_paths() {
    let lines = [
        "use crate::{",
        "    config::{Config, Policy},",
        "    units::Ratio, upstream,",
        "};",
        "let a = crate::proxy::run();",
    ];
    let found: Vec<_> =
        imports(&lines).into_iter().map(|(line, module)| format!("{line} {module}")).collect();
    assert_eq!(found, ["2 config", "3 units", "3 upstream", "5 proxy"]);
}
