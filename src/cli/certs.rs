//! `outrigger certs --out DIR --trust-domain TD NAME…`

use std::{fs, io, path::PathBuf, process::ExitCode};

use clap::Args;

use crate::identity::{
    TrustDomain,
    issue::{Ca, IssueError, write_key},
};

/// Create a throw-away CA and certificates, for development.
///
/// Writes to DIR `ca.crt`, and for each NAME `NAME.crt` and `NAME.key`, valid for a year for
/// spiffe://TD/ns/default/sa/NAME and the DNS names NAME and localhost. The CA's key is not kept, so certificates
/// cannot be added later: create all of them again. Existing files are replaced only with --replace.
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
    /// Directory of the files; created if it does not exist
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// The trust domain, e.g. shop.example
    #[arg(long, value_name = "TD")]
    trust_domain: TrustDomain,
    /// Replace an existing CA and certificates: peers that trust the old CA reject the new certificates
    #[arg(long)]
    replace: bool,
    /// Names of the workloads
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
    ReservedName,
    #[error("{} already exists, and a new CA would replace it; use another --out, or --replace all files", .0.display())]
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
        return Err(CertsError::ReservedName);
    }
    let names = args.names.iter().flat_map(|name| [format!("{name}.crt"), format!("{name}.key")]);
    let mut files = ["ca.crt".to_owned()].into_iter().chain(names).map(|name| args.out.join(name));
    if let Some(existing) = files.find(|path| !args.replace && path.exists()) {
        return Err(CertsError::Exists(existing));
    }
    let ca = Ca::new(args.trust_domain.clone())?;
    // Issue all certificates before the first file is written.
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
    println!("{}: the CA that issued them; for development only", args.out.join("ca.crt").display());
    Ok(())
}
