//! Lints of `[telemetry]`: settings without effect, or with another effect than it seems.

use http::Uri;

use super::Lints;
use crate::config::{AccessLog, Config, Origin, OtlpProtocol};

/// The default OTLP ports of collectors, by protocol.
const GRPC_PORT: u16 = 4317;
const HTTP_PORT: u16 = 4318;

impl Lints<'_> {
    pub(super) fn telemetry(&mut self, config: &Config) {
        let (root, telemetry) = (self.root, &config.telemetry);
        let node = |key| root.get("telemetry").and_then(|node| node.get(key));
        let place = |key| node(key).and_then(|node| node.origin);
        if telemetry.access_log == AccessLog::Off && telemetry.access_log_file.is_some() {
            let help = "write access_log = \"errors\" or \"all\", or leave the file out";
            self.warn(place("access_log_file"), "this file is never written: access_log is \"off\"", help);
        }
        // Checked in the files: the environment may have disabled traces only temporarily.
        if node("otlp").is_none() {
            let help = "name the collector by `otlp`, or leave this out";
            self.warn(place("protocol"), "nothing is exported: there is no `otlp`", help);
        } else if let Some(uri) = telemetry.otlp.as_ref().and_then(|url| url.expose().parse::<Uri>().ok()) {
            self.protocol(&uri, telemetry.protocol, place("otlp").or(place("protocol")));
        }
    }

    fn protocol(&mut self, uri: &Uri, protocol: Option<OtlpProtocol>, place: Option<Origin>) {
        let port = uri.port_u16();
        match protocol {
            Some(OtlpProtocol::Grpc) if port == Some(HTTP_PORT) => {
                let help = "collectors take gRPC on 4317; or leave `protocol` out";
                self.warn(place, "protocol is \"grpc\", and 4318 is the port for HTTP", help);
            }
            Some(OtlpProtocol::Http) if port == Some(GRPC_PORT) => {
                let help = "collectors take HTTP on 4318; or leave `protocol` out";
                self.warn(place, "protocol is \"http\", and 4317 is the port for gRPC", help);
            }
            Some(OtlpProtocol::Http) => {}
            // The port makes HTTP the default.
            None if port == Some(HTTP_PORT) => {}
            Some(OtlpProtocol::Grpc) | None if !matches!(uri.path(), "" | "/") => {
                let help = "leave the path out, or write protocol = \"http\"";
                self.warn(place, "gRPC ignores the path of this URL", help);
            }
            Some(OtlpProtocol::Grpc) | None => {}
        }
    }
}
