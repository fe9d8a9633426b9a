//! Arguments to action; everything else is in the library.

fn main() -> std::process::ExitCode {
    outrigger::cli::main()
}
