//! TLS scanners against the inbound port: testssl and sslyze find no weakness.

use std::{
    fs,
    path::Path,
    process::Command,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde_json::Value;

use crate::support::{
    Proxy, Upstream, has_tool,
    pki::{Params, Pki},
    python_with, text, tool,
};

/// testssl findings that are not about TLS: features that its own OpenSSL lacks, and properties that our certificates,
/// which live for days and come from a private CA, do not need. testssl cannot judge resumption either: it closes at
/// the end of its input, mostly before the TLS 1.3 tickets arrive (`pairs::tls_sessions_are_resumed` covers it).
const IGNORED_FINDINGS: [&str; 4] =
    ["engine_problem", "cert_revocation", "DNS_CAArecord", "sessionresumption_ticket"];

fn scanned(min_tls: &str, sslyze_profile: &str) {
    let Some(python) = python_with("sslyze") else { return };
    if !has_tool(&["testssl"]) {
        return;
    }
    let (pki, service) = (Pki::new(), Upstream::http1(|_| async { text("hello") }));
    let identity = pki.identity("payments");
    let dated = |p: &mut Params| {
        let day = Duration::from_secs(24 * 3600);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock that is set");
        p.not_before = rcgen::date_time_ymd(1970, 1, 1) + now - day;
        p.not_after = p.not_before + 80 * day;
        // The longest lifetime that a public CA issues.
        p.serial_number = None;
    };
    pki.write_leaf("payments", dated);
    pki.write_leaf("scanner", dated);
    let sidecar = |mtls: &str| {
        let address = service.address();
        Proxy::start(format!(
            "{identity}min_tls = \"{min_tls}\"\n[inbound]\nmtls = \"{mtls}\"\nforward_to = \"{address}\"\n"
        ))
    };
    // This client has no certificate.
    let permissive = sidecar("permissive");
    let report = pki.path("testssl.json");
    let said = run(Command::new(tool("testssl").expect("checked before"))
        .args(["--quiet", "--color", "0", "--warnings", "batch", "--nodns", "none", "--ip", "127.0.0.1"])
        // Protocols, ciphers, forward secrecy, preferences, server information, known attacks.
        .args(["-p", "-s", "-f", "-P", "-S", "-U", "--add-ca"])
        .args([&pki.path("ca.crt"), Path::new("--jsonfile"), &report])
        .arg(format!("localhost:{}", permissive.inbound().port())));
    let findings = parsed(&report, &said);
    let findings = findings.as_array().expect("a list");
    assert!(findings.len() > 60, "too few checks ran: {said}");
    for finding in findings {
        let field = |name: &str| finding[name].as_str().unwrap_or_default();
        let fine = matches!(field("severity"), "OK" | "INFO") || IGNORED_FINDINGS.contains(&field("id"));
        assert!(fine, "{finding}\n{said}");
    }
    let offered = |id: &str| {
        let of = findings.iter().find(|finding| finding["id"] == id).unwrap_or_else(|| panic!("no {id}"));
        of["finding"].as_str().is_some_and(|finding| finding.starts_with("offered"))
    };
    assert_eq!((offered("TLS1_2"), offered("TLS1_3")), (min_tls == "1.2", true));

    let strict = sidecar("strict");
    let report = pki.path("sslyze.json");
    // Exit code and last line say whether the server meets Mozilla's recommendation.
    let said = run(Command::new(python)
        .args(["-m", "sslyze", "--slow_connection", "--mozilla_config", sslyze_profile, "--certinfo_ca_file"])
        .args([&pki.path("ca.crt"), Path::new("--cert"), &pki.path("scanner.crt"), Path::new("--key")])
        .args([&pki.path("scanner.key"), Path::new("--json_out"), &report])
        .arg(format!("localhost:{}", strict.inbound().port())));
    assert!(said.contains("OK - Compliant"), "{said}");
    let report = parsed(&report, &said);
    let result = &report["server_scan_results"][0]["scan_result"];
    for (check, path, good) in [
        ("tls_compression", "supports_compression", false),
        ("openssl_ccs_injection", "is_vulnerable_to_ccs_injection", false),
        ("heartbleed", "is_vulnerable_to_heartbleed", false),
        ("session_renegotiation", "is_vulnerable_to_client_renegotiation_dos", false),
        ("tls_1_0_cipher_suites", "is_tls_version_supported", false),
        ("tls_1_1_cipher_suites", "is_tls_version_supported", false),
        ("tls_1_2_cipher_suites", "is_tls_version_supported", min_tls == "1.2"),
        ("tls_1_3_cipher_suites", "is_tls_version_supported", true),
    ] {
        assert_eq!(result[check]["result"][path], good, "{check}: {said}");
    }
}

#[track_caller]
fn run(command: &mut Command) -> String {
    let output = command.output().expect("it runs");
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[track_caller]
fn parsed(report: &Path, said: &str) -> Value {
    let text = fs::read(report).unwrap_or_else(|_| panic!("no report: {said}"));
    serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{error}: {said}"))
}

#[test]
fn scanners_find_no_weakness_with_tls_1_3() {
    scanned("1.3", "modern");
}

#[test]
fn scanners_find_no_weakness_where_tls_1_2_is_allowed() {
    scanned("1.2", "intermediate");
}
