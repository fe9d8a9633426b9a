//! What scanners say that look for weak TLS: testssl and sslyze, on the inbound port.

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

/// What testssl finds fault with that is no matter of TLS: what its own OpenSSL lacks, and what our certificates, which
/// live for days and come from a private CA, have no use for. Nor can it say about resumption: it hangs up with the end
/// of its input, mostly before the tickets of TLS 1.3 are there (`pairs::sessions_are_resumed` shows it).
const NO_MATTER: [&str; 4] =
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
        // As long as a public CA makes them.
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
    // This one has no certificate to show.
    let permissive = sidecar("permissive");
    let report = pki.path("testssl.json");
    let said = run(Command::new(tool("testssl").expect("checked before"))
        .args(["--quiet", "--color", "0", "--warnings", "batch", "--nodns", "none", "--ip", "127.0.0.1"])
        // Protocols, ciphers, forward secrecy, preferences, what the server says of itself, known attacks.
        .args(["-p", "-s", "-f", "-P", "-S", "-U", "--add-ca"])
        .args([&pki.path("ca.crt"), Path::new("--jsonfile"), &report])
        .arg(format!("localhost:{}", permissive.inbound().port())));
    let findings = parsed(&report, &said);
    let findings = findings.as_array().expect("a list");
    assert!(findings.len() > 60, "too few checks ran: {said}");
    for finding in findings {
        let field = |name: &str| finding[name].as_str().unwrap_or_default();
        let fine = matches!(field("severity"), "OK" | "INFO") || NO_MATTER.contains(&field("id"));
        assert!(fine, "{finding}\n{said}");
    }
    let offered = |id: &str| {
        let of = findings.iter().find(|finding| finding["id"] == id).unwrap_or_else(|| panic!("no {id}"));
        of["finding"].as_str().is_some_and(|finding| finding.starts_with("offered"))
    };
    assert_eq!((offered("TLS1_2"), offered("TLS1_3")), (min_tls == "1.2", true));

    let strict = sidecar("strict");
    let report = pki.path("sslyze.json");
    // Exit code and last words say whether it is as Mozilla recommends.
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
fn nothing_is_weak_with_tls_1_3() {
    scanned("1.3", "modern");
}

#[test]
fn nothing_is_weak_where_tls_1_2_is_allowed() {
    scanned("1.2", "intermediate");
}
