//! WebSocket and other upgrades: Autobahn's verdict is the same with the proxy as without it.

use std::{
    fs,
    io::{Read, Write},
    net::SocketAddr,
};

use serde_json::{Value, json};

use crate::support::{Daemon, Proxy, RawClient, RawServer, has_tool, peer_script, python_with, tool};

#[test]
fn autobahn_results_are_the_same_through_the_proxy() {
    if !has_tool(&["wstest"]) {
        return;
    }
    let Some(python) = python_with("websockets.asyncio.server") else { return };
    let script = peer_script("websocket_echo.py").display().to_string();
    let server = Daemon::start(&python.display().to_string(), &[&script], &[]);
    let output = server.wait_for_output("port ");
    let port: u16 = output.split("port ").nth(1).and_then(|rest| rest.trim().parse().ok()).expect("a port");
    let echo = SocketAddr::from(([127, 0, 0, 1], port));
    let proxy = Proxy::start(format!(
        "[inbound]\nforward_to = \"{echo}\"\n[[upstream]]\nname = \"up\"\nhosts = [\"*\"]\nendpoints = [\"{echo}\"]\n"
    ));
    let directory = tempfile::tempdir().expect("a temporary directory");
    let agents = [("direct", echo), ("inbound", proxy.inbound()), ("outbound", proxy.outbound())];
    let servers: Vec<Value> = agents
        .iter()
        .map(|(agent, address)| json!({"agent": agent, "url": format!("ws://{address}"), "options": {"version": 18}}))
        .collect();
    let specification = json!({
        "options": {"failByDrop": false}, "outdir": directory.path().join("report"), "servers": servers,
        "cases": ["1.*", "2.*", "3.*", "4.*", "5.*", "7.*"], "exclude-cases": [], "exclude-agent-cases": {},
    });
    fs::write(directory.path().join("fuzz.json"), specification.to_string()).expect("write");
    let run = std::process::Command::new(tool("wstest").expect("checked before"))
        .args(["-m", "fuzzingclient", "-s", "fuzz.json"])
        .current_dir(directory.path())
        .output()
        .expect("wstest runs");
    let report = fs::read(directory.path().join("report/index.json"))
        .unwrap_or_else(|_| panic!("no report: {}", String::from_utf8_lossy(&run.stdout)));
    let report: Value = serde_json::from_slice(&report).expect("JSON");
    // NON-STRICT passes: whether the echo of a message just before an invalid frame arrives depends on timing.
    let verdicts = |agent: &str| -> Vec<(String, bool, Value)> {
        let cases = report[agent].as_object().unwrap_or_else(|| panic!("nothing of {agent} in the report"));
        let passes = |case: &Value| matches!(case.as_str(), Some("OK" | "NON-STRICT" | "INFORMATIONAL"));
        let verdict = |(id, case): (&String, &Value)| {
            (id.clone(), passes(&case["behavior"]), case["behaviorClose"].clone())
        };
        cases.iter().map(verdict).collect()
    };
    let direct = verdicts("direct");
    assert!(direct.len() > 90, "only {} cases ran", direct.len());
    for agent in ["inbound", "outbound"] {
        for (with, without) in verdicts(agent).iter().zip(&direct) {
            assert_eq!(with, without, "{agent}");
        }
    }
}

/// Any protocol may be switched to; after 101 both sides may send any bytes, and each may half-close.
#[test]
fn upgraded_connections_forward_bytes_both_ways() {
    let server = RawServer::start(|mut stream| {
        let (mut got, mut chunk) = (Vec::new(), [0; 1000]);
        while !got.ends_with(b"\r\n\r\n") {
            match stream.read(&mut chunk) {
                Ok(0) | Err(_) => return,
                Ok(count) => got.extend_from_slice(&chunk[..count]),
            }
        }
        let asked = String::from_utf8_lossy(&got).to_ascii_lowercase();
        assert!(asked.contains("upgrade: chatter"), "{asked}");
        let _ = stream.write_all(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: chatter\r\n\r\nfirst\n",
        );
        while let Ok(count @ 1..) = stream.read(&mut chunk) {
            let _ = stream.write_all(&chunk[..count]);
        }
        let _ = stream.write_all(b"last\n");
    });
    let proxy = Proxy::start(format!(
        "[inbound]\nforward_to = \"{0}\"\n[[upstream]]\nname = \"up\"\nendpoints = [\"{0}\"]\n",
        server.address()
    ));
    for address in [proxy.outbound(), proxy.inbound()] {
        let mut client = RawClient::connect(address);
        client.send("GET /chat HTTP/1.1\r\nHost: up\r\nConnection: Upgrade\r\nUpgrade: chatter\r\n\r\n");
        let got = client.read_until(b"first\n");
        assert!(got.starts_with(b"HTTP/1.1 101 "), "{:?}", String::from_utf8_lossy(&got));
        client.send("GET / HTTP/1.1\r\nnot HTTP any more\n");
        assert_eq!(client.read_until(b"more\n"), b"GET / HTTP/1.1\r\nnot HTTP any more\n");
        client.finish();
        assert_eq!(client.read_to_close(), (b"last\n".to_vec(), true), "by {address}");
    }
}
