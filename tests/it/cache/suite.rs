//! The public tests for HTTP caches, http-tests/cache-tests, through the real binary. They take a minute, mostly waiting.

use std::{collections::BTreeSet, process::Command};

use crate::support::{binary, has_folder, has_tool, peer_script};

/// Tests that need less than a second between two requests may miss it on a loaded machine: so many optimal ones may fail
/// besides those that are known.
const OPTIMAL_MARGIN: usize = 3;

#[test]
fn the_public_suite_passes_but_for_what_is_known() {
    let Some(folder) = has_folder("cache-tests").filter(|_| has_tool(&["node"])) else { return };
    let output = Command::new(peer_script("cache-tests")).args([folder, binary()]).output().expect("bash");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let known = include_str!("../../peers/cache-tests-known.txt");
    let known: BTreeSet<&str> = known.lines().filter(|line| !line.starts_with('#')).collect();
    let (mut required, mut optimal) = (Vec::new(), Vec::new());
    let lines: Vec<&str> = text.lines().collect();
    let (counts, others) = lines.split_last().expect("the counts");
    for line in others {
        let mut words = line.split('\t');
        let (kind, id) = (words.next().unwrap_or_default(), words.nth(1).unwrap_or_default());
        if !known.contains(format!("{kind} {id}").as_str()) {
            if kind == "required" { required.push(*line) } else { optimal.push(*line) }
        }
    }
    assert!(required.is_empty(), "{required:#?}\n{counts}");
    assert!(optimal.len() <= OPTIMAL_MARGIN, "{optimal:#?}\n{counts}");
    let counts: serde_json::Value = serde_json::from_str(counts).expect("JSON");
    let passed = |kind: &str| counts[kind]["pass"].as_u64().unwrap_or(0);
    assert!(passed("required") >= 148 && passed("optimal") >= 79, "{counts}");
}
