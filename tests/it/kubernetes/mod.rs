//! Kubernetes without a cluster: the tests play API server, kubelet and files.

mod inject;
mod manifests;
mod probes;
mod webhook;

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use outrigger::kubernetes::yaml;
use serde_json::Value;

pub use inject::started_with;

use crate::support::{binary, python_with};

/// The workloads that the tests inject.
pub fn corpus() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/kubernetes/corpus");
    let mut files: Vec<PathBuf> =
        fs::read_dir(folder).expect("the corpus").flatten().map(|entry| entry.path()).collect();
    files.sort();
    files
}

/// Runs the binary with this standard input.
pub fn outrigger(arguments: &[&str], input: &str) -> Output {
    let mut child = Command::new(binary())
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut stdin = child.stdin.take().expect("a pipe");
    // It may have rejected its arguments and exited.
    let _ = stdin.write_all(input.as_bytes());
    drop(stdin);
    child.wait_with_output().expect("it ends")
}

/// The documents of a YAML stream.
pub fn values(text: &str) -> Vec<Value> {
    let read = |part: &str| yaml::Document::parse(part).expect("YAML").value();
    yaml::documents(text).into_iter().map(read).filter(|value| !value.is_null()).collect()
}

/// Validates the files against the API's schemas, strictly; false if there is no validator.
#[track_caller]
pub fn validate(files: &[PathBuf]) -> bool {
    let Some(python) = python_with("kubernetes_validate") else { return false };
    let output = Command::new(python)
        .args(["-m", "kubernetes_validate", "-k", "1.32", "--strict", "--quiet"])
        .args(files)
        .output()
        .expect("python runs");
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    true
}
