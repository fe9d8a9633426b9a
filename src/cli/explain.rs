//! `outrigger explain METHOD URL`

mod cache;
mod explanation;
mod inbound;
mod request;

use std::{io::Write, process::ExitCode};

use clap::Args;

use super::files::{ConfigFiles, colour};
use request::ExplainedRequest;

/// Explain which upstream, route and policy a request would get, and which line of which file sets each value.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger explain GET http://payments/v1/charges/7
  outrigger explain -c outrigger.toml POST http://payments/v1/charge -H 'x-tenant: gold'
  outrigger explain --inbound GET /healthz
  outrigger explain --inbound GET /v1/orders --peer spiffe://shop.example/ns/shop/sa/cart
  outrigger explain CONNECT api.example:443")]
pub struct ExplainArgs {
    #[command(flatten)]
    files: ConfigFiles,
    /// An inbound request, instead of an outbound one.
    #[arg(long)]
    inbound: bool,
    /// With --inbound: the client's SPIFFE ID (or dns:NAME), to show which allow entry matches it.
    #[arg(long, value_name = "ID", requires = "inbound")]
    peer: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// A header of the request; may be given several times.
    #[arg(short = 'H', long = "header", value_name = "NAME: VALUE")]
    headers: Vec<String>,
    /// The method, e.g. GET.
    method: String,
    /// The URL, e.g. http://payments/v1/charge, or HOST:PORT with CONNECT.
    url: String,
}

pub fn run(args: &ExplainArgs) -> ExitCode {
    let parsed = ExplainedRequest::parse(&args.method, &args.url, &args.headers, args.inbound);
    let target = match parsed.and_then(|target| target.with_peer(args.peer.as_deref())) {
        Ok(target) => target,
        Err(wrong) => {
            eprintln!("error: {wrong}");
            return ExitCode::from(2);
        }
    };
    let loaded = match args.files.load() {
        Ok(loaded) => loaded,
        Err(problems) => {
            eprint!("{}", problems.render(colour(&std::io::stderr())));
            return ExitCode::FAILURE;
        }
    };
    let verdict = explanation::explain(&loaded, &target);
    let text = if args.json { format!("{:#}\n", verdict.to_json()) } else { verdict.to_string() };
    // A closed pipe is ignored.
    let _ = std::io::stdout().write_all(text.as_bytes());
    ExitCode::SUCCESS
}
