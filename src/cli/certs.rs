//! `outrigger certs --out DIR --trust-domain TD NAME…`

use std::{fs, io, path::PathBuf, process::ExitCode};

use clap::Args;

use crate::identity::{
    TrustDomain,
    issue::{Ca, IssueError, write_key},
};

/// Make a throw-away CA and certificates, for development.
///
/// DIR gets `ca.crt`, and for each NAME `NAME.crt` and `NAME.key`, which prove
/// spiffe://TD/ns/default/sa/NAME and, in DNS, NAME and localhost for a year. The CA's key is not kept: what is needed
/// later is made anew, all of it. What is there already is replaced only with --replace.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger certs --out certs --trust-domain shop.example checkout payments

  then in the configuration of checkout's sidecar:
  [identity]
  cert = \"certs/checkout.crt\"
  key = \"certs/checkout.key\"
  ca = \"certs/ca.crt\"")]
pub struct CertsArgs {
    /// Where the files are written; made if it is not there
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// The trust domain, e.g. shop.example
    #[arg(long, value_name = "TD")]
    trust_domain: TrustDomain,
    /// Replace a CA and certificates that are there already: whoever trusts the old CA refuses the new certificates
    #[arg(long)]
    replace: bool,
    /// The workloads
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
enum CertsError {
    #[error(transparent)]
    Issue(#[from] IssueError),
    #[error("cannot write {}: {source}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("`ca` is the CA's own file; give the workload another name")]
    Taken,
    #[error("{} is there already: certificates of a new CA would not be trusted beside it; give another --out, or --replace all of it", .0.display())]
    Exists(PathBuf),
}

pub fn run(args: &CertsArgs) -> ExitCode {
    match write(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("outrigger: {error}");
            ExitCode::FAILURE
        }
    }
}

fn write(args: &CertsArgs) -> Result<(), CertsError> {
    if args.names.iter().any(|name| name == "ca") {
        return Err(CertsError::Taken);
    }
    let names = args.names.iter().flat_map(|name| [format!("{name}.crt"), format!("{name}.key")]);
    let mut files = ["ca.crt".to_owned()].into_iter().chain(names).map(|name| args.out.join(name));
    if let Some(there) = files.find(|path| !args.replace && path.exists()) {
        return Err(CertsError::Exists(there));
    }
    let ca = Ca::new(args.trust_domain.clone())?;
    // All are made before any is written.
    let issued =
        args.names.iter().map(|name| Ok((name, ca.issue(name)?))).collect::<Result<Vec<_>, IssueError>>()?;
    let failed = |path: &PathBuf| {
        let path = path.clone();
        move |source| CertsError::Write { path, source }
    };
    fs::create_dir_all(&args.out).map_err(failed(&args.out))?;
    let path = args.out.join("ca.crt");
    fs::write(&path, ca.certificate()).map_err(failed(&path))?;
    for (name, issued) in issued {
        let (certificate, key) = (args.out.join(format!("{name}.crt")), args.out.join(format!("{name}.key")));
        fs::write(&certificate, issued.certificate).map_err(failed(&certificate))?;
        write_key(&key, &issued.key).map_err(failed(&key))?;
        println!(
            "{}, {}: spiffe://{}/ns/default/sa/{name}",
            certificate.display(),
            key.display(),
            args.trust_domain
        );
    }
    println!("{}: who issued them; for development only", args.out.join("ca.crt").display());
    Ok(())
}
