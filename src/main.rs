//! The `outrigger` binary; everything is in the library.

fn main() -> std::process::ExitCode {
    outrigger::cli::main()
}
