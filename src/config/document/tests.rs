use std::collections::BTreeSet;

use super::*;
use crate::config::{Config, Source, Sources, effective_tree, load_sources, resolve::SECTIONS};

fn load(text: &str) -> Result<Config, String> {
    let sources = Sources(vec![Source { path: "f".into(), text: text.to_owned() }]);
    load_sources(sources, &|_| None).map(|loaded| (*loaded.config).clone()).map_err(|found| found.to_string())
}

/// The example, with keys that are commented out by one of these prefixes put into effect.
fn uncommented(kinds: &[&str]) -> String {
    let uncomment = |line: &str| {
        // `# key = …` and `# [table]`, but not prose.
        let code = |rest: &str| {
            let key = rest.split(" =").next().unwrap_or("");
            rest.starts_with('[')
                || rest.contains(" = ")
                    && key.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
        };
        let rest = kinds.iter().find_map(|kind| line.strip_prefix(kind)).filter(|rest| code(rest));
        rest.unwrap_or(line).to_owned()
    };
    EXAMPLE.lines().map(uncomment).collect::<Vec<_>>().join("\n")
}

#[test]
fn the_example_says_the_defaults() {
    let example = load(EXAMPLE).unwrap();
    let built_in = load("").unwrap();
    assert_eq!(example, built_in);
}

#[test]
fn the_example_works_with_everything_optional_in_it() {
    // It excludes the certificate files above it.
    let config = load(&uncommented(&["# "]).replace("spiffe = ", "# spiffe = ")).unwrap();
    assert_eq!(config.upstreams.len(), 2);
    assert_eq!(config.upstreams[0].routes.len(), 1);
}

/// All keys of the schema, with those of the tables it refers to.
fn keys(schema: &Json, definitions: &Json, found: &mut BTreeSet<String>) {
    match schema {
        Json::Object(map) => {
            if let Some(Json::Object(properties)) = map.get("properties") {
                found.extend(properties.keys().cloned());
                properties.values().for_each(|schema| keys(schema, definitions, found));
            }
            if let Some(name) =
                map.get("$ref").and_then(Json::as_str).and_then(|name| name.rsplit('/').next())
            {
                keys(&definitions[name], definitions, found);
            }
            for key in ["items", "anyOf", "allOf", "oneOf"] {
                if let Some(schema) = map.get(key) {
                    keys(schema, definitions, found);
                }
            }
        }
        Json::Array(items) => items.iter().for_each(|schema| keys(schema, definitions, found)),
        _ => {}
    }
}

fn all_keys() -> BTreeSet<String> {
    let schema = json_schema();
    let mut found = BTreeSet::new();
    keys(&schema, &schema["definitions"], &mut found);
    found
}

#[test]
fn every_key_of_the_schema_stands_in_the_example_and_in_the_reference() {
    let reference = include_str!("../../../docs/configuration.md");
    let found = all_keys();
    assert!(found.len() > 90, "{found:?}");
    for key in found {
        let written = [format!("{key} = "), format!("[{key}]"), format!("{key}]]"), format!(".{key}]")];
        assert!(written.iter().any(|text| EXAMPLE.contains(text)), "`{key}` is not in the example");
        let written = [format!("`{key}`"), format!(".{key}`"), format!("[{key}]`"), format!(".{key}]`")];
        assert!(
            written.iter().any(|text| reference.contains(text)),
            "`{key}` is not in docs/configuration.md"
        );
    }
}

#[test]
fn the_schema_knows_all_sections_and_its_references_lead_somewhere() {
    let schema = json_schema();
    let mut sections: Vec<&str> =
        schema["properties"].as_object().unwrap().keys().map(String::as_str).collect();
    let mut expected = SECTIONS.to_vec();
    sections.sort_unstable();
    expected.sort_unstable();
    assert_eq!(sections, expected);
    let text = schema.to_string();
    for reference in text.split("\"#/definitions/").skip(1) {
        let name = reference.split('"').next().unwrap();
        assert!(schema["definitions"].get(name).is_some(), "{name}");
    }
    assert_eq!(schema["properties"]["defaults"]["properties"]["timeout"]["default"], "15s");
    assert!(schema["properties"]["upstream"]["items"]["properties"]["timeout"].get("default").is_none());
}

#[test]
fn the_files_for_each_use_pass_check() {
    let mut seen = 0;
    for entry in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/config")).unwrap() {
        let path = entry.unwrap().path();
        // Directories are for other programs: Grafana, Prometheus.
        if path.is_dir() {
            continue;
        }
        let loaded = crate::config::load(&[path], &|_| None).map_err(|found| found.to_string()).unwrap();
        assert!(loaded.warnings.is_empty(), "{}", loaded.warnings);
        seen += 1;
    }
    assert!(seen >= 4);
}

/// Every key with its schema.
fn each_key<'a>(schema: &'a Json, definitions: &'a Json, at: &str, look: &mut dyn FnMut(&str, &'a Json)) {
    match schema {
        Json::Object(map) => {
            if let Some(Json::Object(properties)) = map.get("properties") {
                for (key, schema) in properties {
                    let at = format!("{at}.{key}");
                    look(&at, schema);
                    each_key(schema, definitions, &at, look);
                }
            }
            if let Some(name) =
                map.get("$ref").and_then(Json::as_str).and_then(|name| name.rsplit('/').next())
            {
                each_key(&definitions[name], definitions, at, look);
            }
            for key in ["items", "anyOf", "allOf", "oneOf"] {
                if let Some(schema) = map.get(key) {
                    each_key(schema, definitions, at, look);
                }
            }
        }
        Json::Array(items) => items.iter().for_each(|schema| each_key(schema, definitions, at, look)),
        _ => {}
    }
}

#[test]
fn every_key_of_the_schema_is_described() {
    let schema = json_schema();
    let mut missing = Vec::new();
    each_key(&schema, &schema["definitions"], "", &mut |at, schema| {
        if schema["description"].as_str().is_none_or(str::is_empty) {
            missing.push(at.to_owned());
        }
    });
    assert_eq!(missing, [""; 0]);
}

#[test]
fn texts_have_a_pattern_in_the_schema() {
    let schema = json_schema();
    for name in [
        "Duration",
        "Size",
        "HostPort",
        "ListenAddr",
        "AdminListen",
        "HostPattern",
        "Network",
        "Balance",
        "PoolIdle",
        "UserTimeout",
    ] {
        let pattern = schema["definitions"][name]["pattern"].as_str().unwrap_or_default();
        assert!(pattern.starts_with(r"\$\{|^(?:") && pattern.ends_with('$'), "{name}: {pattern}");
    }
}

/// A secret in every key that takes a text, as a password in a URL and as a variable: no output about the
/// file shows it.
#[test]
fn no_output_shows_a_secret_whatever_key_it_stands_in() {
    const CANARY: &str = "Canary4711";
    let schema = json_schema();
    let mut keys = BTreeSet::new();
    each_key(&schema, &schema["definitions"], "", &mut |at, _| {
        keys.insert(at.trim_start_matches('.').to_owned());
    });
    assert!(keys.len() > 120, "{}", keys.len());
    let env = |name: &str| (name == "DB_PASSWORD").then(|| CANARY.to_owned());
    for key in keys {
        for value in [
            format!("\"http://user:{CANARY}@127.0.0.1:9/\""),
            "\"${DB_PASSWORD}\"".to_owned(),
            "\"http://user:${DB_PASSWORD}@127.0.0.1:9/x?key=${DB_PASSWORD}\"".to_owned(),
            format!("[\"user:{CANARY}@127.0.0.1:9\"]"),
            format!("{{ authorization = \"Bearer {CANARY}\" }}"),
            "{ x-tier = \"${DB_PASSWORD}\" }".to_owned(),
        ] {
            let text = written(&key, &value);
            let sources = Sources(vec![Source { path: "f".into(), text: text.clone() }]);
            let output = match load_sources(sources, &env) {
                Ok(loaded) => {
                    let mut output = loaded.warnings.to_string();
                    // `explain` conceals variables itself.
                    for index in (0..loaded.config.upstreams.len()).filter(|_| !value.contains('$')) {
                        output += &format!("{:?}", loaded.upstream_settings(index));
                    }
                    let tree = effective_tree(&loaded.config).to_string();
                    output + &tree
                }
                Err(found) => format!("{found}{:?}{}", found.lines(), found.to_json()),
            };
            assert!(
                !output.contains(CANARY) && !output.contains(&CANARY.to_ascii_lowercase()),
                "{text}\n{output}"
            );
        }
    }
}

/// A file that sets a key of the schema, given by its path.
fn written(key: &str, value: &str) -> String {
    let mut upstream = String::new();
    if key.starts_with("upstream") && key != "upstream.name" {
        upstream = "name = \"a\"\n".to_owned();
    }
    match key.split_once('.') {
        None => format!("{key} = {value}\n"),
        Some(("upstream", rest)) => match rest.split_once('.') {
            Some(("route", rest)) => {
                format!("[[upstream]]\n{upstream}[[upstream.route]]\n{rest} = {value}\n")
            }
            _ => format!("[[upstream]]\n{upstream}{rest} = {value}\n"),
        },
        Some(("inbound", rest)) => match rest.split_once('.') {
            Some((list @ ("port" | "allow"), rest)) => format!("[[inbound.{list}]]\n{rest} = {value}\n"),
            _ => format!("[inbound]\n{rest} = {value}\n"),
        },
        Some((section, rest)) => format!("[{section}]\n{rest} = {value}\n"),
    }
}
