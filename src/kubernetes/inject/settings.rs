//! The annotations `outrigger.dev/…`, parsed and validated.

use std::collections::BTreeMap;

use serde_json::Value;

use super::InjectError;
use crate::{telemetry::log::LogFilter, units::HumanDuration};

/// The prefix of all annotations.
pub const PREFIX: &str = "outrigger.dev/";
/// The keys of annotations with settings.
pub const KEYS: &[&str] = &[
    "mode",
    "config",
    "identity",
    "app-port",
    "skip-inbound-ports",
    "skip-outbound-ports",
    "image",
    "cpu",
    "cpu-limit",
    "memory",
    "log",
    "drain-delay",
    "native-sidecar",
];
/// Annotations with the same prefix that are not settings.
const NOT_SETTINGS: &[&str] = &["inject", "injected"];
/// Most port ranges. Each is a rule that every new connection traverses; `outrigger redirect` has the same limit.
const MAX_RANGES: usize = 256;
/// The largest drain delay, in seconds.
const MAX_DRAIN_DELAY: u64 = 300;

/// How the service's traffic reaches the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Kernel rules, installed by an init container with NET_ADMIN.
    Redirect,
    /// Proxy variables; needs no privilege.
    Env,
}

/// Where the sidecar's certificate comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Identity {
    /// The configuration, if at all.
    None,
    /// cert-manager's csi-driver-spiffe.
    CsiSpiffe,
    /// SPIRE's CSI driver, which mounts the agent's socket.
    Spire,
    /// A Secret with `tls.crt`, `tls.key` and `ca.crt`.
    Secret(String),
}

/// The settings for one pod.
#[derive(Clone, Debug)]
pub struct Settings {
    pub mode: Mode,
    /// The required ConfigMap; `None`: `outrigger`, if it exists.
    pub config: Option<String>,
    pub identity: Identity,
    pub app_port: Option<u16>,
    pub skip_inbound_ports: String,
    pub skip_outbound_ports: String,
    pub image: String,
    pub cpu: String,
    /// `None`: no limit. A limit can add latency.
    pub cpu_limit: Option<String>,
    pub memory: String,
    pub log: Option<String>,
    /// Seconds.
    pub drain_delay: u64,
    /// Whether the pod's own annotation sets that delay.
    pub has_own_drain_delay: bool,
    pub native_sidecar: bool,
    /// Configuration layers above and below the ConfigMap.
    pub proxy: ProxyLayers,
}

/// Configuration of all proxies, as TOML.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProxyLayers {
    /// Overrides the ConfigMap.
    pub overrides: Option<String>,
    /// Defaults below the ConfigMap.
    pub defaults: Option<String>,
}

/// Defaults for pods without annotations; `--defaults FILE`.
#[derive(Clone, Debug, Default)]
pub struct Defaults {
    values: BTreeMap<String, String>,
    proxy: ProxyLayers,
}

impl Defaults {
    /// Parses a file with values of annotations, without `outrigger.dev/`, and two tables of proxy configuration:
    /// `[proxy]` overrides every pod's ConfigMap, `[proxy-defaults]` is below it.
    ///
    /// # Errors
    ///
    /// Names the invalid key, or the errors in the configuration.
    pub fn parse(text: &str) -> Result<Self, InjectError> {
        let invalid = |reason: String| InjectError::Defaults(reason);
        let table: toml::Table = text
            .parse()
            .map_err(|error: toml::de::Error| invalid(error.to_string().trim_end().to_owned()))?;
        let mut defaults = Self::default();
        for (key, value) in table {
            match (&*key, value) {
                ("proxy" | "proxy-defaults", toml::Value::Table(proxy)) => {
                    let text = toml::to_string(&proxy).map_err(|error| invalid(error.to_string()))?;
                    super::proxy_config::check(&format!("[{key}]"), &text).map_err(invalid)?;
                    let ProxyLayers { overrides: above, defaults: beneath } = &mut defaults.proxy;
                    *if key == "proxy" { above } else { beneath } = Some(text);
                }
                ("proxy" | "proxy-defaults", _) => {
                    return Err(invalid(format!("`{key}` must be a table, [{key}]")));
                }
                (key, value) if KEYS.contains(&key) => {
                    let text = match value {
                        toml::Value::String(text) => text,
                        other => other.to_string(),
                    };
                    defaults.set(key, text);
                }
                (key, _) => return Err(invalid(unknown(key))),
            }
        }
        defaults.read(&Value::Null)?;
        Ok(defaults)
    }

    pub fn set(&mut self, key: &str, value: String) {
        self.values.insert(key.to_owned(), value);
    }

    /// The settings of a pod with these annotations.
    ///
    /// # Errors
    ///
    /// Names the invalid annotation and its valid values.
    pub fn read(&self, annotations: &Value) -> Result<Settings, InjectError> {
        let mut values = self.values.clone();
        for (key, value) in annotations.as_object().into_iter().flatten() {
            let Some(key) = key.strip_prefix(PREFIX).filter(|key| !NOT_SETTINGS.contains(key)) else {
                continue;
            };
            if !KEYS.contains(&key) {
                return Err(InjectError::Annotation { key: key.to_owned(), reason: unknown(key) });
            }
            let Some(text) = value.as_str() else {
                let reason = format!("an annotation is a string: write \"{value}\"");
                return Err(InjectError::Annotation { key: key.to_owned(), reason });
            };
            values.insert(key.to_owned(), text.trim().to_owned());
        }
        let get = |key: &str| values.get(key).map(String::as_str);
        let or = |key: &str, default: &str| get(key).unwrap_or(default).to_owned();
        let mode = match get("mode") {
            None | Some("redirect") => Mode::Redirect,
            Some("env") => Mode::Env,
            Some(other) => return Err(invalid_value("mode", other, "`redirect` or `env`")),
        };
        let identity = match get("identity") {
            None | Some("none") => Identity::None,
            Some("csi-spiffe") => Identity::CsiSpiffe,
            Some("spire") => Identity::Spire,
            Some(text) => match text.strip_prefix("secret/") {
                Some(name) if is_name(name) => Identity::Secret(name.to_owned()),
                _ => {
                    return Err(invalid_value(
                        "identity",
                        text,
                        "`csi-spiffe`, `spire`, `secret/NAME` or `none`",
                    ));
                }
            },
        };
        let native_sidecar = match get("native-sidecar") {
            None | Some("true") => true,
            Some("false") => false,
            Some(other) => return Err(invalid_value("native-sidecar", other, "`true` or `false`")),
        };
        let checked = |key: &'static str, is_valid: fn(&str) -> bool, wanted| match get(key) {
            Some(text) if !is_valid(text) => Err(invalid_value(key, text, wanted)),
            found => Ok(found.map(ToOwned::to_owned)),
        };
        let ports = "ports and ranges of ports like `22,9000-9010`";
        let quantity = "a quantity like `50m`, `0.5` or `64Mi`";
        let cpu = checked("cpu", is_quantity, quantity)?.unwrap_or_else(|| or("cpu", "20m"));
        let cpu_limit = checked("cpu-limit", is_quantity, quantity)?;
        if let Some(limit) = cpu_limit.as_deref().filter(|limit| amount(limit) < amount(&cpu)) {
            let reason = format!("`{limit}` is below the request, outrigger.dev/cpu: {cpu}");
            return Err(InjectError::Annotation { key: "cpu-limit".to_owned(), reason });
        }
        Ok(Settings {
            mode,
            identity,
            native_sidecar,
            config: checked("config", is_name, "the name of a ConfigMap")?,
            app_port: checked("app-port", |text| port(text).is_some(), "a port, 1 to 65535")?
                .as_deref()
                .and_then(port),
            skip_inbound_ports: checked("skip-inbound-ports", are_ports, ports)?.unwrap_or_default(),
            skip_outbound_ports: checked("skip-outbound-ports", are_ports, ports)?.unwrap_or_default(),
            image: checked("image", is_image, "the name of an image")?
                .unwrap_or_else(|| concat!("outrigger:", env!("CARGO_PKG_VERSION")).to_owned()),
            cpu,
            cpu_limit,
            memory: checked("memory", is_quantity, quantity)?.unwrap_or_else(|| or("memory", "32Mi")),
            log: checked(
                "log",
                |text| text.parse::<LogFilter>().is_ok(),
                "a level, or a filter like `info,outrigger::proxy=debug`",
            )?,
            drain_delay: match get("drain-delay") {
                None => 5,
                Some(text) => seconds(text).ok_or_else(|| {
                    invalid_value("drain-delay", text, "whole seconds up to 5m, like `5s`; `0s` for none")
                })?,
            },
            has_own_drain_delay: annotations.get(format!("{PREFIX}drain-delay")).is_some(),
            proxy: self.proxy.clone(),
        })
    }
}

fn invalid_value(key: &str, text: &str, wanted: &str) -> InjectError {
    InjectError::Annotation { key: key.to_owned(), reason: format!("`{text}` is not {wanted}") }
}

fn unknown(key: &str) -> String {
    let near = |name: &&&str| strsim::normalized_damerau_levenshtein(key, name);
    let nearest = KEYS.iter().max_by(|a, b| near(a).total_cmp(&near(b))).filter(|name| near(name) > 0.6);
    match nearest {
        Some(name) => format!("unknown key `{key}`; did you mean `{name}`?"),
        None => format!("unknown key `{key}`; valid: {}", KEYS.join(", ")),
    }
}

fn seconds(text: &str) -> Option<u64> {
    let duration = text.parse::<HumanDuration>().ok()?.0;
    (duration.subsec_nanos() == 0 && duration.as_secs() <= MAX_DRAIN_DELAY).then_some(duration.as_secs())
}

fn port(text: &str) -> Option<u16> {
    text.parse().ok().filter(|port| *port != 0)
}

fn are_ports(text: &str) -> bool {
    ranges(text).is_some_and(|ranges| ranges.len() <= MAX_RANGES)
}

/// Parses `22,9000-9010`; an empty string is an empty list.
pub fn ranges(text: &str) -> Option<Vec<std::ops::RangeInclusive<u16>>> {
    let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
    let range = |part: &str| match part.split_once('-') {
        None => port(part).map(|port| port..=port),
        Some((from, to)) => {
            let (from, to) = (port(from.trim())?, port(to.trim())?);
            (from <= to).then_some(from..=to)
        }
    };
    parts.map(range).collect()
}

/// Whether `text` is a valid Kubernetes name (RFC 1123).
fn is_name(text: &str) -> bool {
    let alphanumeric = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let is_boundary = |byte: Option<&u8>| byte.is_some_and(|byte| alphanumeric(*byte));
    text.len() <= 253
        && is_boundary(text.as_bytes().first())
        && is_boundary(text.as_bytes().last())
        && text.bytes().all(|byte| alphanumeric(byte) || b"-.".contains(&byte))
}

fn is_image(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 512
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"./:@_-".contains(&byte))
}

/// A quantity as a number; 0 if it is invalid.
pub fn amount(text: &str) -> f64 {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "m" => 1e-3,
        "k" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "Ki" => 1024.0,
        "Mi" => 1_048_576.0,
        "Gi" => 1_073_741_824.0,
        _ => 1.0,
    };
    digits.parse::<f64>().unwrap_or(0.0) * unit
}

fn is_quantity(text: &str) -> bool {
    let digits = text.trim_start_matches(|letter: char| letter.is_ascii_digit() || letter == '.');
    digits.len() < text.len()
        && text.starts_with(|first: char| first.is_ascii_digit())
        && ["", "m", "k", "M", "G", "Ki", "Mi", "Gi"].contains(&digits)
        && text[..text.len() - digits.len()].parse::<f64>().is_ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(key: &str, value: &str) -> Result<Settings, String> {
        let annotations = json!({ (format!("{PREFIX}{key}")): value, "other.dev/x": "1" });
        Defaults::default().read(&annotations).map_err(|error| error.to_string())
    }

    #[test]
    fn every_annotation_is_parsed() {
        assert_eq!(read("mode", "env").unwrap().mode, Mode::Env);
        assert_eq!(read("identity", "secret/a.b").unwrap().identity, Identity::Secret("a.b".to_owned()));
        assert_eq!(read("app-port", " 3000 ").unwrap().app_port, Some(3000));
        assert_eq!(read("drain-delay", "1m30s").unwrap().drain_delay, 90);
        assert_eq!(read("cpu-limit", "0.5").unwrap().cpu_limit.as_deref(), Some("0.5"));
        assert_eq!(read("cpu", "30m").unwrap().cpu_limit, None);
        assert_eq!(read("skip-inbound-ports", "").unwrap().skip_inbound_ports, "");
        assert!(!read("native-sidecar", "false").unwrap().native_sidecar);
        assert!(read("inject", "enabled").is_ok());
        for key in KEYS {
            assert!(read(key, "\u{1}!").is_err(), "{key} accepts anything");
        }
    }

    #[test]
    fn errors_name_the_valid_values() {
        for (key, value, expected) in [
            ("mode", "sidecar", "outrigger.dev/mode: `sidecar` is not `redirect` or `env`"),
            ("drain-dely", "1s", "unknown key `drain-dely`; did you mean `drain-delay`?"),
            ("app-port", "0", "`0` is not a port, 1 to 65535"),
            ("skip-inbound-ports", "9-1", "`9-1` is not ports"),
            ("memory", "64MB", "`64MB` is not a quantity"),
            ("cpu-limit", "10m", "`10m` is below the request, outrigger.dev/cpu: 20m"),
            ("drain-delay", "500ms", "`500ms` is not whole seconds"),
            ("identity", "secret/", "`secret/` is not `csi-spiffe`"),
            ("config", "../x", "`../x` is not the name of a ConfigMap"),
            ("image", "a b", "`a b` is not the name of an image"),
        ] {
            let error = read(key, value).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn defaults_apply_to_pods_without_annotations() {
        let text = "image = \"r.example/o:1\"\nmemory = \"48Mi\"\napp-port = 9000\n[proxy.inbound]\nmtls = \"off\"\n[proxy-defaults.telemetry]\nsample = 0.5\n";
        let defaults = Defaults::parse(text).unwrap();
        let settings = defaults.read(&json!({"outrigger.dev/memory": "64Mi"})).unwrap();
        assert_eq!((&*settings.image, &*settings.memory), ("r.example/o:1", "64Mi"));
        assert_eq!(settings.app_port, Some(9000));
        assert_eq!(settings.proxy.overrides.as_deref(), Some("[inbound]\nmtls = \"off\"\n"));
        assert_eq!(settings.proxy.defaults.as_deref(), Some("[telemetry]\nsample = 0.5\n"));
        for (text, expected) in [
            ("imaeg = \"x\"", "did you mean `image`?"),
            ("mode = \"x\"", "`x` is not `redirect` or `env`"),
            ("[proxy.inbuond]", "inbound"),
            ("[proxy-defaults.inbuond]", "inbound"),
            ("proxy = 1", "[proxy]"),
            ("proxy-defaults = 1", "[proxy-defaults]"),
            ("= 1", "line 1"),
        ] {
            let error = Defaults::parse(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
